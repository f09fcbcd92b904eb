"""Kernels of fla-core (Triton) in place of the scans, where they fit: on a GPU, for more than one token at a time.

fla-core is optional (`pip install 'hf-holo[gpu]'`) and looked for when a scan first meets a GPU. Its `simple_gla` is
the interference scan, its `gated_delta_rule` the cancelling scan; what is done here is the layout: heads after tokens,
keys repeated for the queries of a group, and documents as sequences of their own. Sizes in the shape tags as in
scans.py, N sequences.

Its products of float32 are rounded to TF32. So they are taken where torch's own may be rounded so, too
(`torch.set_float32_matmul_precision("high")`, or `--tf32` of transformers' Trainer), and never for float64.
"""

import functools
import importlib
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers.utils import logging

from .recording import exporting

SWITCH = "HF_HOLO_KERNELS"  # "torch" switches the kernels off
WIDEST = 256  # features that a kernel takes

logger = logging.get_logger(__name__)


class Kernels(NamedTuple):
    """The functions of fla-core that are called."""

    simple_gla: Callable
    gated_delta_rule: Callable


@functools.cache
def load_kernels() -> Kernels | str:
    """The kernels, or why there are none."""
    try:
        return Kernels(
            importlib.import_module("fla.ops.simple_gla").chunk_simple_gla,
            importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule,
        )
    except Exception as error:  # whatever Triton or its driver finds missing
        return f"fla-core cannot be imported: {type(error).__name__}: {error}"


def obstacle(device: torch.device, dtype: torch.dtype, features: int) -> str | None:
    """Why the kernels do not scan tensors on this device, of this dtype and with so many features; None if they do."""
    if device.type != "cuda":
        return "no GPU"
    if os.environ.get(SWITCH) == "torch":
        return f"{SWITCH}=torch"
    if dtype == torch.float64:
        return "float64"
    if features > WIDEST:
        return f"{features} features, and the kernels take {WIDEST}"
    if dtype == torch.float32 and not may_round_to_tf32():
        return "float32 products are exact; torch.set_float32_matmul_precision('high') allows the kernels"
    kernels = load_kernels()
    return kernels if isinstance(kernels, str) else None


def may_round_to_tf32() -> bool:
    """Whether torch may round the products of float32 on a GPU."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def backend(device: torch.device, dtype: torch.dtype, features: int) -> str:
    """What scans such tensors, in words: "fla-core triton", or "torch" with the reason."""
    reason = obstacle(device, dtype, features)
    return "fla-core triton" if reason is None else f"torch ({reason})"


def fits(q: torch.Tensor) -> bool:
    """Whether the kernels scan these queries `[B, H·G, T, F]`; says what is chosen once, in the log."""
    if exporting() or q.shape[2] == 1:
        return False
    _say(backend(q.device, q.dtype, q.shape[-1]))
    return obstacle(q.device, q.dtype, q.shape[-1]) is None


@functools.cache
def _say(chosen: str) -> None:
    logger.info(f"scan: {chosen}")


def _kernels() -> Kernels:
    """The kernels, where [`fits`] has said that there are some."""
    kernels = load_kernels()
    assert isinstance(kernels, Kernels)
    return kernels


def interference_by_kernel(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    log_write: torch.Tensor,
    state: torch.Tensor | None,
    document: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`interference_scan` by fla-core: the weight of a write goes into its value."""
    return _scan(_kernels().simple_gla, q, k, v * log_write.exp()[..., None].to(v.dtype), log_decay, state, document)


def cancelling_by_kernel(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    strength: torch.Tensor,
    state: torch.Tensor | None,
    document: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`cancelling_scan` by fla-core."""
    return _scan(_kernels().gated_delta_rule, q, k, v, log_decay, state, document, strength)


def _scan(
    kernel: Callable,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    state: torch.Tensor | None,
    document: torch.Tensor | None,
    strength: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q `[B, H·G, T, F]`, k `[B, H, T, F]`, v `[B, H, T, V]` and the others `[B, H, T]` to y `[B, H·G, T, V]` and the
    last state `[B, H, F, V]`."""
    rows, length, groups = len(q), q.shape[2], q.shape[1] // k.shape[1]
    if state is None:
        state = k.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1])
    # 1. heads after tokens, and for every query head a key head: [B, T, H·G, ...]
    inputs = {"q": q, "k": k, "v": v, "g": log_decay} | ({} if strength is None else {"beta": strength})
    if groups > 1:
        inputs = {name: x if name == "q" else x.repeat_interleave(groups, 1) for name, x in inputs.items()}
        state = state.repeat_interleave(groups, 1)
    inputs = {name: x.transpose(1, 2).contiguous() for name, x in inputs.items()}
    # 2. documents: all rows end to end, a sequence for each document, which begins with the state only if it is its own
    initial, last, borders = state.float(), None, {}
    if document is not None:
        inputs = {name: x.flatten(0, 1)[None] for name, x in inputs.items()}  # [1, B·T, H·G, ...]
        starts = F.pad(document.diff(dim=1) != 0, (1, 0), value=True).flatten().nonzero()[:, 0]  # [N]
        borders["cu_seqlens"] = F.pad(starts, (0, 1), value=rows * length)
        first = (starts % length == 0).nonzero()[:, 0]  # the first sequence of every row, [B]
        last = F.pad(first[1:], (0, 1), value=len(starts)) - 1
        carried = initial * (document[:, 0] == 0)[:, None, None, None].to(initial.dtype)
        initial = initial.new_zeros(len(starts), *initial.shape[1:]).index_copy(0, first, carried)
    # 3. the kernel
    y, final = kernel(**inputs, scale=1.0, initial_state=initial, output_final_state=True, **borders)
    # 4. and back: one state for all queries of a group, that after the last document of every row
    if last is not None:
        y, final = y[0].unflatten(0, (rows, length)), final[last]
    return y.transpose(1, 2), final[:, ::groups].to(state.dtype)
