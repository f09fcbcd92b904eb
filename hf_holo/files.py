"""Files that appear complete or not at all."""

import csv
import glob
import os
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from .errors import HoloError


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


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Fill the folder that this gives; it becomes `folder` when the block ends, and vanishes if the block fails.

    Args:
        folder: its parents are made; an older folder of that name stays until the new one is complete.

    Raises:
        HoloError: there is a file of that name.
    """
    if folder.exists() and not folder.is_dir():
        raise HoloError(f"{str(folder)!r} is a file, where a folder is to be written")
    folder.parent.mkdir(parents=True, exist_ok=True)
    _clear_remains(folder)
    process = f"{platform.node()}-{os.getpid()}"  # machines may share a disk
    temporary, old = (folder.with_name(f"{folder.name}.{what}-{process}") for what in ("tmp", "old"))
    temporary.mkdir()
    try:
        yield temporary
        if folder.exists():  # a folder cannot take the place of one that holds files, so that one steps aside
            folder.rename(old)
        try:
            temporary.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _clear_remains(folder: Path) -> None:
    """Remove what processes that were killed have left next to `folder`; one that had stepped aside comes back."""
    for what in ("old", "tmp"):
        for remains in folder.parent.glob(f"{glob.escape(folder.name)}.{what}-{glob.escape(platform.node())}-*"):
            if _is_alive(remains.name.rpartition("-")[2]):
                continue
            if what == "old" and not folder.exists():
                remains.rename(folder)
            else:
                shutil.rmtree(remains, ignore_errors=True)


def _is_alive(process: str) -> bool:
    """Whether there is another process of that number; where that cannot be asked, and if it is not a number: yes."""
    if os.name == "nt" or not process.isdigit():
        return True
    if int(process) == os.getpid():  # one before this, which had the same number
        return False
    try:
        os.kill(int(process), 0)  # sends nothing
    except ProcessLookupError:
        return False
    except OSError:  # of somebody else
        return True
    return True


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, complete or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_csv(rows: Sequence[Mapping[str, object]], path: Path) -> None:
    """Write rows with the same keys as a table, complete or not at all."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def output_folder(name: str, argument: str = "output_dir") -> Path:
    """The folder that an argument names, made if it is not there.

    Args:
        name: its path.
        argument: how the error calls the argument.

    Raises:
        HoloError: it cannot be created.
    """
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HoloError(f"{argument}: {name!r} cannot be a folder: {error.strerror}") from error
    return folder
