"""The state that a model continues from: its size, its precision, and whether it lasts."""

import copy
import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from .checks import Violation, check
from .subject import Subject

LENGTHS = (1, 5, 64, 130)
CHUNKS, CHUNK, SINGLE_STEPS = 100, 1000, 2000  # a long life: 100,000 tokens in chunks, then 2,000 one by one
LAST = 64  # outputs that are compared at the end of every chunk
LASTING = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # relative error against float64 that is mere rounding
GROWTH = 2.0  # of the state, from the first half of that life to the second


# ---------------------------------------------------------------------------------------------- size
@check("state", "text", "cache", "constant_state")
def size_of_the_state(subject: Subject) -> str:
    """The cache holds the declared states and nothing else, and no more of them after a longer text."""
    rows = 3
    before: dict[str, torch.Size] = {}
    for length in LENGTHS:
        found = cache_tensors(subject.feed([subject.ids(rows, length)])[1])
        for name, tensor in found.items():
            if before and tensor.shape != before.get(name):
                was = "absent" if name not in before else tuple(before[name])
                raise Violation(f"the state grows: {name} is {tuple(tensor.shape)} after {length} tokens, before {was}")
        if hasattr(subject.model_class, "state_spec"):
            _compare_with_declared(subject, found, rows)
        before = {name: tensor.shape for name, tensor in found.items()}
    numbers = sum(tensor.numel() for tensor in found.values()) // rows
    return f"{numbers} values per sequence in {len(found)} tensors"


def _compare_with_declared(subject: Subject, found: Mapping[str, torch.Tensor], rows: int) -> None:
    undeclared = dict(found)
    for path, shape in _declared(subject).items():
        if path not in found:
            raise Violation(f"the state {path} is declared, but the cache does not hold it")
        if tuple(undeclared.pop(path).shape) != (rows, *shape):
            raise Violation(f"{path} is {tuple(found[path].shape)}, but {(rows, *shape)} is declared")
    for path, tensor in undeclared.items():
        if tensor.is_floating_point() or tensor.numel() > rows:  # a count per sequence is not a state
            raise Violation(f"the cache holds {path} {tuple(tensor.shape)}, which is not declared")


def _declared(subject: Subject) -> dict[str, tuple[int, ...]]:
    """Shapes without the batch of all states that `state_spec` declares, by their path in the cache."""
    model_class: Any = subject.model_class
    layers = model_class.state_spec(subject.config)
    return {f"layers.{i}.states.{name}": tuple(shape) for i, spec in enumerate(layers) for name, shape in spec.items()}


def cache_tensors(cache: Any) -> dict[str, torch.Tensor]:
    """All tensors in a cache of any kind, by the path to them, as in "layers.0.states.memory"."""
    found, seen = {}, set()

    def walk(value: Any, path: tuple[str, ...]) -> None:
        if id(value) in seen or isinstance(value, (nn.Module, PretrainedConfig, type)):
            return
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            found[".".join(path)] = value
        elif isinstance(value, (list, tuple)):
            for index, entry in enumerate(value):
                walk(entry, (*path, str(index)))
        else:
            for name, entry in (value if isinstance(value, Mapping) else getattr(value, "__dict__", {})).items():
                walk(entry, (*path, str(name)))

    walk(cache, ())
    return found


# ---------------------------------------------------------------------------------------------- precision
@check("state", "text", "cache")
def precision_of_the_state(subject: Subject) -> str:
    """States are float64 in a float64 model, at least float32 in a bfloat16 model, and do not hold rounded values."""
    for dtype, needed in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        model = subject.copy(dtype)
        _, cache = subject.feed([subject.ids(2, 20)], model=model)
        before = copy.deepcopy(cache)
        after = cache_tensors(_one_more(subject, model, cache))
        names = _states(subject, cache_tensors(before), after)
        for name in names:
            kept, rounded = after[name].dtype, _rounded_to(after[name])
            coarse = torch.promote_types(kept, needed) != kept
            if not (coarse or rounded) or (dtype == torch.bfloat16 and _holds_inputs(subject, model, before, name)):
                continue  # a window of inputs is as coarse as the model, and loses nothing
            if coarse or rounded is None:
                raise Violation(f"in a {_name(dtype)} model {name} is kept in {_name(kept)}, not in {_name(needed)}")
            raise Violation(f"in a {_name(dtype)} model {name} holds values that were rounded to {_name(rounded)}")
    return f"{len(names)} states" if names else "no state: everything in the cache grows"


def _states(subject: Subject, before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> list[str]:
    """Paths of the declared states, or of all floating tensors that do not grow by one more token."""
    if hasattr(subject.model_class, "state_spec"):
        return list(_declared(subject))
    return [n for n, x in after.items() if x.is_floating_point() and n in before and x.shape == before[n].shape]


def _one_more(subject: Subject, model: PreTrainedModel, cache: Any) -> Any:
    """The cache after one more token."""
    return subject.feed([subject.ids(2, 1, 1)], cache, model)[1]


def _rounded_to(state: torch.Tensor) -> torch.dtype | None:
    """The half precision that all values of a state fit into, if there is one; whole numbers are counts or marks."""
    if torch.equal(state, state.round()):
        return None
    fitting = (
        dtype for dtype in (torch.bfloat16, torch.float16) if torch.equal(state.to(dtype).to(state.dtype), state)
    )
    return next(fitting, None)


def _holds_inputs(subject: Subject, model: PreTrainedModel, cache: Any, name: str) -> bool:
    """Whether a state is a window of the last inputs, which are as coarse as the model: it moves on or forgets."""
    before = cache_tensors(cache)[name]
    after = cache_tensors(_one_more(subject, model, copy.deepcopy(cache)))[name]
    for dim, size in enumerate(after.shape):
        if dim and size > 1 and torch.equal(after.narrow(dim, 0, size - 1), before.narrow(dim, 1, size - 1)):
            return True
    changed = copy.deepcopy(cache)
    cache_tensors(changed)[name].mul_(2)
    return torch.equal(cache_tensors(_one_more(subject, model, changed))[name], after)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---------------------------------------------------------------------------------------------- endurance
@check("state", "generation", "cache", "constant_state", slow=True)
def endurance(subject: Subject) -> str:
    """After 100,000 tokens in chunks and 2,000 one by one, float32 and bfloat16 models still agree with float64."""
    coarse = subject.copy(torch.bfloat16)  # weights that every precision holds exactly
    exact, _ = _live(subject, copy.deepcopy(coarse).double(), [SINGLE_STEPS])
    remarks = []
    for dtype, allowed in LASTING.items():
        again = copy.deepcopy(coarse).to(dtype)  # type: ignore[arg-type]  # transformers wraps it without types
        outputs, sizes = _live(subject, again, [1] * SINGLE_STEPS)
        errors = [((y - z).norm() / z.norm()).item() for y, z in zip(outputs, exact, strict=True)]
        for number, error in enumerate(errors):
            if not error <= allowed:
                tokens = min((number + 1) * CHUNK, CHUNKS * CHUNK + SINGLE_STEPS)
                raise Violation(
                    f"a {_name(dtype)} model drifts: after {tokens} tokens its output is off by {error:.1e} relative, "
                    f"allowed {allowed:.0e}"
                )
        first, second = max(sizes[: CHUNKS // 2]), max(sizes[CHUNKS // 2 :])
        if second > GROWTH * first:
            raise Violation(f"the state of a {_name(dtype)} model grows {second / first:.1f}-fold in its second half")
        remarks.append(f"{_name(dtype)} off by {errors[-1]:.0e}")
    return ", ".join(remarks)


def _live(subject: Subject, model: PreTrainedModel, ending: list[int]) -> tuple[list[torch.Tensor], list[float]]:
    """Feed a long text in chunks and then as `ending` says.

    Returns:
        The last outputs `[LAST, D]` of every chunk and of the ending in float64, and the size of the state after each.
    """
    ids = subject.ids(1, CHUNKS * CHUNK + SINGLE_STEPS)
    outputs: list[torch.Tensor] = []
    sizes: list[float] = []
    cache = None
    pieces = [[chunk] for chunk in ids[:, : CHUNKS * CHUNK].split(CHUNK, 1)]
    for piece in [*pieces, ids[:, CHUNKS * CHUNK :].split(ending, 1)]:
        output, cache = subject.feed(piece, cache, model)
        states = [x for x in cache_tensors(cache).values() if x.is_floating_point()]
        size = functools.reduce(torch.add, (x.double().square().sum() for x in states)).sqrt().item()
        seen = len(sizes) * CHUNK + sum(part.shape[1] for part in piece)
        if not torch.isfinite(output).all() or not math.isfinite(size):
            raise Violation(f"a {_name(model.dtype)} model is no longer finite after {seen} tokens")
        outputs.append(output[0, -LAST:].double())
        sizes.append(size)
    return outputs, sizes
