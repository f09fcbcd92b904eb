"""What depends on weights alone, kept until the weights change: decoding asks for it again at every token."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from .layers import same_numbers
from .recording import exporting

T = TypeVar("T")


class Kept(Generic[T]):
    """A value that is computed from weights, for as long as they stay the same.

    On the CPU the values of the weights themselves are compared, so that nothing which changes them can be missed.
    On another device a look at them would stop it: there the tensors, their memory and the versions that torch counts
    are compared. What writes through `weight.data` escapes that, so it holds within one text only: what is asked for
    outside of a step of decoding is computed again.

    Nothing is kept while gradients or a graph are recorded, where the computation is part of it, nor for weights that
    are not plain parameters (sharded, replicated, adapted). Copies of a model and saved ones begin with nothing.
    Threads may share it: what is kept is replaced as a whole.
    """

    def __init__(self) -> None:
        self._held: tuple[Any, T] | None = None

    def get(self, compute: Callable[[], T], weights: Sequence[torch.Tensor], step: bool = True) -> T:
        """`compute()`, or what it gave before.

        Args:
            compute: what depends on the weights alone, with no other state.
            weights: all that it depends on.
            step: whether a token of a text is being decoded that has begun before.
        """
        if torch.is_grad_enabled() or exporting() or not all(type(x) is nn.Parameter for x in weights):
            return compute()
        held, on_cpu = self._held, all(x.is_cpu for x in weights)
        same = _same_values if on_cpu else _same_tensors
        if held is None or not (on_cpu or step) or not same(weights, held[0]):
            noted = [x.detach().clone() for x in weights] if on_cpu else [_identity(x) for x in weights]
            held = self._held = noted, compute()
        return held[1]

    def __deepcopy__(self, memo: dict) -> "Kept[T]":
        return Kept()

    def __reduce__(self) -> tuple[type, tuple]:
        return Kept, ()


def _same_values(weights: Sequence[torch.Tensor], noted: Sequence[Any]) -> bool:
    """Whether the weights have the values of the copies `noted`."""
    return all(type(y) is torch.Tensor and same_numbers(x, y) for x, y in zip(weights, noted, strict=True))


def _same_tensors(weights: Sequence[torch.Tensor], noted: Sequence[Any]) -> bool:
    """Whether the weights are the tensors that [`_identity`] has told of, unchanged as far as torch counts changes."""
    return all(
        type(known) is tuple and known[0]() is x and known[1:] == _identity(x)[1:]
        for x, known in zip(weights, noted, strict=True)
    )


def _identity(x: torch.Tensor) -> tuple[Any, ...]:
    version = None if x.is_inference() else x._version
    return weakref.ref(x), x.data_ptr(), x.device, x.dtype, version
