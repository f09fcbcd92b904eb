"""Files that appear complete or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write to the path that this gives; it becomes `path` when the block ends, and vanishes if the block fails.

    Args:
        path: a file in an existing folder; it keeps its content until the new one is complete.
    """
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")  # two processes may write the same file
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, complete or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
