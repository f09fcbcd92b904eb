"""Graphs that are being recorded (torch.compile, torch.export, ONNX, a trace): what holds while they are."""

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch


def exporting() -> bool:
    """True while a graph is recorded, where no branch or loop may depend on a shape."""
    return torch.jit.is_tracing() or torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export()


def has_values(x: torch.Tensor) -> bool:
    """Whether the values of a tensor can be read: not while a graph is recorded, nor in one without data."""
    return not exporting() and type(x) is torch.Tensor


def fixed_table(function: Callable) -> Callable:
    """Computes what depends on sizes alone once, also where a graph is recorded: torch.compile reads the values. It
    would turn NumPy's operations into its own, which fails under a default device."""
    known = functools.lru_cache(function)

    @torch.compiler.assume_constant_result
    def table(*sizes: int) -> Any:  # torch.compile warns of what lru_cache gives where it meets it
        return known(*sizes)

    return table


def single_token(length: int) -> bool:
    """Whether a call holds one token and may be told so: a compiler knows, a trace would take it for all lengths."""
    return not (torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()) and length == 1


def levels_to_reach(size: int, base: int, most: int) -> int:
    """How many levels, each of which reaches `base` times as far as the one before, it takes to reach `size`; `most` of
    them where a graph is to hold for all sizes. torch.compile records another graph for other sizes."""
    if torch.compiler.is_exporting() or not torch.compiler.is_compiling():
        return most
    levels = 0
    while levels < most and base**levels < size:
        levels += 1
    return levels


def full_precision(device: torch.device) -> AbstractContextManager:
    """No autocast within: states and phases keep their precision."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()  # which costs a step of decoding nothing
