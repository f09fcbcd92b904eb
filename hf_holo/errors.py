"""The error that a user can cause and fix."""

import difflib
from argparse import ArgumentParser
from collections.abc import Iterable
from typing import NoReturn

from safetensors import SafetensorError


class HoloError(ValueError):
    """Bad input. The message is one line: the argument, its value, and what would be accepted.

    The command `hf-holo` prints it without a traceback and exits with status 2.
    """


# What `from_pretrained` raises for a checkpoint that is not there, damaged, or of other sizes than its config says.
UNREADABLE = (OSError, ValueError, RuntimeError, SafetensorError)


def unknown(kind: str, name: str, known: Iterable[str]) -> HoloError:
    """The error for a `name` that is not among the `known` ones; suggests the nearest and lists them all."""
    known = sorted(known)
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    return HoloError(f"unknown {kind} {name!r}: {hint}known are {', '.join(known) or 'none'}")


def first_line(error: BaseException) -> str:
    """What fits into a one-line message of the error of a library."""
    return str(error).strip().partition("\n")[0]


class Parser(ArgumentParser):
    """An ArgumentParser whose errors are a [`HoloError`] instead of the usage and an exit."""

    def error(self, message: str) -> NoReturn:
        raise HoloError(message)
