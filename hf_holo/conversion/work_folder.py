"""The folder next to a result in which it grows: what is finished survives a kill; the result appears all at once."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import HoloError
from ..files import replacing, write_text

MARK = "report.json"  # every finished conversion holds one; nothing else is ever replaced
MARKED_BY = {"recipe", "numbers"}  # what it says there, and the report of a distillation does not


class WorkFolder:
    """`OUT.work`, next to the folder OUT.

    Args:
        out: the folder of the result.
        identity: what the work depends on; work of another identity is not continued.
        overwrite: throw away work of another identity, and let the result replace an earlier one.

    Raises:
        HoloError: OUT exists, or there is unfinished work of another kind.
    """

    def __init__(self, out: Path, identity: dict[str, Any], overwrite: bool = False) -> None:
        self.out, self.path = out, work_path(out)
        check_out(out, overwrite)
        known = self.load_json("identity")
        if known not in (None, json.loads(json.dumps(identity))):
            if not overwrite:
                raise HoloError(
                    f"OUT: {str(self.path)!r} holds an unfinished run with other options, texts or weights; "
                    "finish it with its own command, delete it, or give --overwrite"
                )
            shutil.rmtree(self.path)
        elif known is not None:
            print(f"Resuming from the unfinished work in {self.path}.")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise HoloError(f"OUT: {str(self.path)!r} cannot be created: {error.strerror}") from None
        self.save_json("identity", identity)

    def save_json(self, name: str, values: Any) -> None:
        write_text(self.path / f"{name}.json", json.dumps(values, indent=2))

    def load_json(self, name: str) -> Any:
        """What was saved under this name, or None."""
        path = self.path / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def has_tensors(self, name: str) -> bool:
        return (self.path / f"{name}.safetensors").exists()

    def save_tensors(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        with replacing(self.path / f"{name}.safetensors") as temporary:
            save_file({key: tensor.contiguous().cpu() for key, tensor in tensors.items()}, temporary)

    def load_tensors(self, name: str, *keys: str) -> dict[str, torch.Tensor]:
        """These tensors, or all."""
        with safe_open(self.path / f"{name}.safetensors", "pt") as file:
            return {key: file.get_tensor(key) for key in keys or file.keys()}

    def drop_tensors(self, name: str) -> None:
        (self.path / f"{name}.safetensors").unlink(missing_ok=True)

    def new_result(self) -> Path:
        """An empty folder for the result."""
        path = self.path / "result"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        return path

    def publish(self) -> None:
        """Give the result its final name, and remove everything else."""
        if self.out.exists():
            os.replace(self.out, self.path / "replaced")
        os.replace(self.path / "result", self.out)
        shutil.rmtree(self.path)


def work_path(out: Path) -> Path:
    """The folder of the unfinished work for this result."""
    return out.with_name(f"{out.name}.work")


def check_out(out: Path, overwrite: bool) -> None:
    """Refuse a folder that must not be written to.

    Raises:
        HoloError: it exists and `overwrite` is False, or it is not an earlier conversion.
    """
    if out.is_file():
        raise HoloError(f"OUT: {str(out)!r} is a file; name a folder")
    if not out.exists() or not any(out.iterdir()):
        return
    if not overwrite:
        raise HoloError(f"OUT: {str(out)!r} exists; name another folder, or give --overwrite to replace it")
    if not _is_conversion(out / MARK):
        raise HoloError(f"OUT: {str(out)!r} is not an earlier conversion (no {MARK} of one); name another folder")


def _is_conversion(report: Path) -> bool:
    try:
        values = json.loads(report.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and values.keys() >= MARKED_BY


@contextmanager
def clear_disk_errors(argument: str, folder: Path) -> Iterator[None]:
    """Turn a full or read-only disk into one line.

    Args:
        argument: that named the place.
        folder: that is being written.

    Raises:
        HoloError: instead of the OSError, or of the SafetensorError that hides it.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reasons = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota of the disk is used up"}
        for number, reason in reasons.items():
            if getattr(error, "errno", None) == number or f"os error {number}" in str(error):
                raise HoloError(
                    f"{argument}: {reason} while writing {str(folder)!r}; free some space, then resume from there"
                ) from None
        if isinstance(error, PermissionError):
            raise HoloError(f"{argument}: {str(error.filename)!r} cannot be written: {error.strerror}") from None
        raise
