"""The version of this package, and the versions of transformers that it was tested with.

It goes along with a checkpoint, so that a copy of the code, too, notices what it was not made for.
"""

import transformers

VERSION = "0.1.0"
TESTED = ("4.57.6", "5.23", "5.24")  # of transformers; the tests run with the first and the last of them
REMEDY = f"upgrade hf_holo, or install a release that was tested: pip install 'transformers~={TESTED[-1]}.0'"


def is_newer_than_tested() -> bool:
    """Whether this transformers is a later minor release than the last that was tested."""
    return _minor(transformers.__version__) > _minor(TESTED[-1])


def in_use() -> str:
    """Both versions, for messages."""
    tested = f"tested with transformers {', '.join(TESTED)}"
    return f"hf_holo {VERSION} ({tested}) and transformers {transformers.__version__}"


def _minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])
