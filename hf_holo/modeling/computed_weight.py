"""The `weight` of a layer that has none of its own: computed from other tensors; it can be read and not written to."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

FREEZING = (torch.Tensor.requires_grad.__set__, torch.Tensor.requires_grad_)  # type: ignore[attr-defined]
WRITING = r"__set__|__setitem__|[a-z]\w*[^_]_"  # x.data = ..., x[i] = ..., x.add_(...), init.zeros_(x)


class ComputedWeight(torch.Tensor):
    """A weight that is the product of other parameters. It can be read; a change would be lost, so it is refused.

    Attributes:
        factors: the parameters, of the weight itself; none of its views.
    """

    _is_hf_initialized = True  # the functions of transformers 5 that initialise a model then pass it by
    factors: Sequence[nn.Parameter] = ()
    layer = "HoloLinear"

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if func in FREEZING and isinstance(args[0], cls):
            for factor in args[0].factors:
                factor.requires_grad_(*args[1:], **kwargs)
            return args[0]
        first = next(iter([*args, *kwargs.values()]), None)
        if isinstance(first if re.fullmatch(WRITING, name) else kwargs.get("out"), cls):
            raise TypeError(
                f"the weight of a {cls.layer} is computed from its factors and cannot be changed in place: "
                "keep the adapter separate, or convert the layer to nn.Linear before merging into it"
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*_plain(args), **_plain(kwargs))
        view = name == "__get__" and isinstance(result, torch.Tensor)  # .data, .T: a change would be lost there as well
        return result.as_subclass(cls) if view else result


def _plain(values: Any) -> Any:
    """The same with plain tensors."""
    if isinstance(values, ComputedWeight):
        return values.as_subclass(torch.Tensor)
    if isinstance(values, dict):
        return {key: _plain(value) for key, value in values.items()}
    return type(values)(map(_plain, values)) if isinstance(values, (tuple, list)) else values
