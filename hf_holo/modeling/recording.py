"""Graphs that are being recorded (torch.compile, torch.export, ONNX, a trace): what holds while they are."""

import functools
from collections.abc import Callable

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
    return functools.lru_cache(torch.compiler.assume_constant_result(function))


def single_token(length: int) -> bool:
    """Whether a call holds one token and may be told so: a compiler knows, a trace would take it for all lengths."""
    return not (torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()) and length == 1
