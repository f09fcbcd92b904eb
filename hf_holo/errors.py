"""The error that a user can cause and mend."""


class HoloError(ValueError):
    """Bad input. The message is one line: the argument, its value, and what would be accepted.

    The command `hf-holo` prints it without a traceback and exits with status 2.
    """
