"""Checks on a checkpoint that is loaded: whether it fits, its files are complete and its weights are finite."""

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import SAFE_WEIGHTS_NAME

_limit: ContextVar[int | None] = ContextVar("bytes that the weights of a model may take", default=None)


@contextmanager
def within_memory(wanted: bool) -> Iterator[None]:
    """Where a model that is built in this block has more weights than this machine has memory, [`check_memory`] refuses
    it: a config that is damaged, or meant to do damage, costs nothing then.

    Args:
        wanted: whether to refuse any; there is no need where weights may go to other devices or to the disk.
    """
    token = _limit.set(physical_memory() if wanted else None)
    try:
        yield
    finally:
        _limit.reset(token)


def physical_memory() -> int | None:
    """Bytes of this machine's memory; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def check_memory(build: Callable[[], nn.Module]) -> None:
    """Raise ValueError if what `build` makes, without memory for now, goes beyond [`within_memory`]."""
    limit = _limit.get()
    if limit is None:
        return
    with torch.device("meta"):
        size = sum(p.nbytes for p in build().parameters())
    if size > limit:
        raise ValueError(
            f"the weights that its config describes take {size / 2**30:,.0f} GiB, and this machine has "
            f"{limit / 2**30:,.0f}; a device_map can leave some of them on the disk"
        )


@contextmanager
def naming_the_checkpoint(name: object) -> Iterator[None]:
    """Make the errors of reading weights say which checkpoint they are about, and what is wrong with it.

    Args:
        name: of the checkpoint.

    Raises:
        OSError: a file is cut off, or not in the format safetensors.
        RuntimeError: weights have other shapes than the config asks for.
    """
    try:
        yield
    except SafetensorError as error:
        reason = f"its weights are not a complete safetensors file ({error}); fetch or save it again"
        raise OSError(f"{name}: {reason}") from error
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        reason = " ".join(str(error).split())
        raise RuntimeError(f"{name}: its weights have other shapes than its config says: {reason}") from error


def check_files(files: Iterable[str | Path]) -> None:
    """Refuse safetensors files that are cut off or something else; it reads their headers, not their weights.

    Args:
        files: in other formats are passed over.

    Raises:
        OSError: the message names the file.
    """
    for file in files:
        if str(file).endswith(".safetensors"):
            with naming_the_checkpoint(file), safe_open(file, "pt"):
                pass


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files that `from_pretrained` reads from a local folder; none if it is not there."""
    whole = Path(folder, SAFE_WEIGHTS_NAME)
    return [whole] if whole.is_file() else sorted(Path(folder).glob(f"{whole.stem}-*-of-*{whole.suffix}"))


def values_on_disk(folder: str | Path, modules: Iterable[str] | None = None) -> int:
    """How many values the safetensors files of a checkpoint store, for these modules or in all.

    Args:
        folder: of the checkpoint; only the headers of its files are read.
        modules: names; default: all of them.
    """
    prefixes = None if modules is None else tuple(f"{name}." for name in modules)
    total = 0
    for path in sorted(Path(folder).glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        for key, entry in header.items():
            if key != "__metadata__" and (prefixes is None or key.startswith(prefixes)):
                total += math.prod(entry["shape"])
    return total


def is_finite(x: torch.Tensor) -> bool:
    """Whether none of these values, of which there must be one, is NaN or infinity; each is read once."""
    x = x if x.itemsize > 1 else x.float()  # the smallest types cannot be compared
    return bool(torch.stack(x.aminmax()).isfinite().all())


@torch.no_grad()
def check_finite(model: nn.Module, name: object) -> None:
    """Refuse weights with NaN or infinity: every output would be NaN, and nothing would say why.

    It reads each value once, as the first forward pass does anyway. What has been left on the disk or is quantised by
    another package is not checked.

    Args:
        model: with its weights.
        name: of the checkpoint.

    Raises:
        ValueError: the message names the weights.
    """
    weights = ((key, p) for key, p in model.named_parameters() if p.is_floating_point() and not p.is_meta)
    plain = {key: p for key, p in weights if type(p.data) is torch.Tensor and p.numel()}
    bad = [key for key, p in plain.items() if not is_finite(p)]
    if bad:
        others = f" and {len(bad) - 1} others" if len(bad) > 1 else ""
        raise ValueError(
            f"{name}: {bad[0]}{others} of {len(plain)} weights hold NaN or infinity; the run that wrote them had "
            "diverged, or a file is damaged"
        )


def check_offloaded(model: nn.Module, name: object) -> None:
    """Refuse stored buffers that were not read because their layer is on the disk, as transformers 4.57 does: the
    outputs would be wrong, and nothing would say so.

    Args:
        model: with its weights.
        name: of the checkpoint.

    Raises:
        ValueError: the message names the buffer.
    """
    places = getattr(model, "hf_device_map", {})
    on_disk = tuple(f"{part}." if part else "" for part, place in places.items() if place == "disk")
    if not on_disk:
        return
    stored = model.state_dict().keys()
    for key, buffer in model.named_buffers():
        if key in stored and key.startswith(on_disk) and not buffer.is_meta and not buffer.any():
            raise ValueError(
                f"{name}: device_map puts {key!r} on the disk, from where this version of transformers does not read "
                "it; give the model more memory, or use transformers 5"
            )
