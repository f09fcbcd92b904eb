"""Refitting: each layer learns to give the teacher's outputs from the inputs that the student itself produces.

Calibration fits every layer to what the teacher feeds it. In the student the layers ahead have changed those inputs,
and where much is removed the errors add up. So the blocks are converted from first to last, and before a site is
projected, its weights W are replaced by those that make up best for what was lost so far: with the teacher's inputs x
and the student's x̃ at the same tokens,

    W̃ = argmin E‖W x + e - W̃ x̃‖² + λ‖W̃ - W‖².

e is zero but for a layer that writes into the residual stream: there it is what the student's stream lacks. Ranks and
Fisher weights stay as calibration found them.

The router of a mixture of experts sends the student's tokens to other experts than the teacher's, so that for an expert
there are no pairs of x and x̃. It keeps its weights, and is projected for the inputs that it gets in the student; so are
the layers of blocks that the model calls more than once.

Source: layer-wise least squares on the student's own inputs, as in GPTQ (Frantar et al., 2023), for low rank in SVD-LLM
(Wang et al., 2024).
"""

import copy
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any, cast

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ...distributed.processes import count, gathered, is_main, share_of, summed
from ...errors import HoloError
from ...modeling.quantizer import dense_shape, is_linear, swap
from ..work_folder import WorkFolder
from .calibration import (
    Site,
    Statistics,
    collect,
    factorise,
    install,
    is_expert,
    removed_after,
    stacked_weight,
    surgery_plan,
    without_gradients,
)
from .plan import HoloSurgeryConfig, block_list, block_lists

DAMPING = 0.03  # λ, as a share of the mean eigenvalue of E[x̃ x̃ᵀ]
TOKENS_PER_INPUT = 10  # of the widest layer: with fewer, refitting fits noise
MOST_WRITERS = 3  # linear layers of one block that write into the residual stream
SAME = 1e-2  # relative difference up to which two sums of activations are taken for the same, in half precision too


@torch.no_grad()
def refit(
    model: PreTrainedModel,
    sites: Sequence[Site],
    ranks: Sequence[int | None],
    fishers: Sequence[torch.Tensor | None],
    windows: torch.Tensor,
    work: WorkFolder | None = None,
    shared: bool = False,
) -> list[float]:
    """Convert in place, block after block, with weights fitted again, to the student's own inputs.

    Memory: in addition to the model, a copy of one block, the hidden states of all windows twice, and what the layers
    of one block read in the teacher.

    Args:
        model: with all its dense layers, in eval mode.
        sites: inside the blocks, see [`check_refit`].
        ranks: harmonics of each site; None stays dense.
        fishers: G of each site, see [`Statistics`].
        windows: token ids `[N, T]`; the more, the better: see [`worth_refitting`].
        work: keeps each block that is finished; those that are there already are taken from it. Default: nothing is
            kept.
        shared: all processes of the run are here with the same arguments; each reads a part of the windows, all fit the
            same weights to the sums of their products, and the main one keeps the blocks.

    Returns:
        The error of each site, see [`Factors.error`].

    Raises:
        HoloError: a site is outside the blocks.
    """
    check_refit(model, sites)
    name = block_list(model)
    blocks = block_lists(model)[name]
    if _repeats(model, blocks, windows[0]):
        return [_project(model, *each, windows, shared) for each in zip(sites, ranks, fishers, strict=True)]
    calls = _record_calls(model, blocks, windows[0])
    kept = [_is_kept(work, index) for index in range(len(blocks))]
    if shared := shared and len(windows) >= count():  # else each process fits all by itself
        windows, kept = windows[list(share_of(len(windows)))], gathered(kept)[0]
    if all(kept):
        windows = windows[:0]  # nothing is left to fit
    theirs = [call.hidden for call in (_record_calls(model, blocks[:1], window)[0] for window in windows)]
    ours = theirs
    errors = [0.0] * len(sites)
    for index, (block, call) in enumerate(zip(tqdm(blocks, desc="refit", unit="block"), calls, strict=True)):
        teacher, prefix = copy.deepcopy(block), f"{name}.{index}."
        numbers = {
            site.layers[0].removeprefix(prefix): number
            for number, site in enumerate(sites)
            if site.layers[0].startswith(prefix) and ranks[number] is not None
        }
        if work is not None and kept[index]:
            _restore(work, index, model, sites, ranks, errors, numbers.values())
            theirs, ours = [call(teacher, hidden) for hidden in theirs], [call(block, hidden) for hidden in ours]
            continue
        writers = residual_writers(teacher, call, theirs[0])
        writers = gathered(writers)[0] if shared else writers
        wanted, left = zip(*(_pass(teacher, call, hidden, list(numbers), writers) for hidden in theirs), strict=True)
        theirs = list(left)
        called = dict.fromkeys(layer for arrivals in wanted for layer in arrivals)  # in this order
        if shared:  # an expert may have been called in one of the processes only
            called = dict.fromkeys(layer for layers in gathered(list(called)) for layer in layers)
        for layer in [*called, *(layer for layer in numbers if layer not in called)]:
            number = numbers[layer]
            site, weight = sites[number], stacked_weight(model, sites[number])
            weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
            found = (_pass(block, call, hidden, [layer], writers, stop=True)[0] for hidden in ours)
            if is_expert(layer):
                fitted, gram = weight, _gram(weight, layer, found, wanted, shared)
            else:
                passages = ((w[layer], f[layer]) for w, f in zip(wanted, found, strict=True))
                fitted, gram = fit(weight, passages, layer in writers, shared)  # [m, n] and [n, n]
            errors[number] = _install(model, site, cast(int, ranks[number]), fishers[number], fitted, gram)
        if work is not None and (not shared or is_main()):
            _keep(work, index, model, sites, errors, numbers.values())
        ours = [call(block, hidden) for hidden in ours]
        del wanted, left  # before those of the next block are there
    return errors


def _install(
    model: PreTrainedModel,
    site: Site,
    rank: int,
    fisher: torch.Tensor | None,
    weight: torch.Tensor,
    gram: torch.Tensor,
) -> float:
    """Convert one site with this weight, for inputs of this E[x̃ x̃ᵀ] `[n, n]`; returns its error."""
    weight = weight.to(gram)
    moments = weight @ gram @ weight.T if site.projects_outputs else gram
    known = gram.any() and (fisher is None or fisher.any())
    factors = factorise(site, weight, Statistics(moments, fisher) if known else without_gradients(model, site, moments))
    install(model, site, factors, rank, weight=weight)
    return factors.error(rank)


def _project(
    model: PreTrainedModel,
    site: Site,
    rank: int | None,
    fisher: torch.Tensor | None,
    windows: torch.Tensor,
    shared: bool,
) -> float:
    """Convert one site, for the inputs that it has in the whole model as it is now; returns its error."""
    if rank is None:
        return 0.0
    gram = collect(model, [site], windows, shared=shared)[0].gram
    statistics = Statistics(gram, fisher) if gram.any() else without_gradients(model, site, gram)
    factors = factorise(site, stacked_weight(model, site), statistics)
    install(model, site, factors, rank)
    return factors.error(rank)


def worth_refitting(model: PreTrainedModel, sites: Sequence[Site], tokens: int) -> bool:
    """Whether all sites are inside the blocks, and a text of this many tokens suffices for the widest."""
    return not _outside(model, sites) and tokens >= TOKENS_PER_INPUT * max(site.inputs for site in sites)


def check_refit(model: PreTrainedModel, sites: Sequence[Site]) -> None:
    """Raises HoloError if a site is outside the blocks, where no order of layers is known."""
    outside = _outside(model, sites)
    if outside:
        raise HoloError(
            f"refit: True fits layers inside the blocks {block_list(model)!r}, not {outside[0]!r}; exclude it, or "
            "refit nothing"
        )


def _outside(model: PreTrainedModel, sites: Sequence[Site]) -> list[str]:
    prefix = f"{block_list(model)}."
    return [layer for site in sites for layer in site.layers if not layer.startswith(prefix)]


# Finished blocks ----------------------------------------------------------------------------------------------------


def _is_kept(work: WorkFolder | None, index: int) -> bool:
    return work is not None and work.has_tensors(_block(index))


def _keep(
    work: WorkFolder,
    index: int,
    model: PreTrainedModel,
    sites: Sequence[Site],
    errors: Sequence[float],
    numbers: Collection[int],
) -> None:
    """Put the converted layers of a block, and the errors of its sites, into the work folder."""
    layers = {name: model.get_submodule(name) for number in numbers for name in sites[number].layers}
    tensors = {f"{name}.{key}": x for name, layer in layers.items() for key, x in layer.state_dict().items()}
    tensors["errors"] = torch.tensor([errors[number] for number in numbers], dtype=torch.float64)
    work.save_tensors(_block(index), tensors)


def _restore(
    work: WorkFolder,
    index: int,
    model: PreTrainedModel,
    sites: Sequence[Site],
    ranks: Sequence[int | None],
    errors: list[float],
    numbers: Collection[int],
) -> None:
    """Convert a block as it was kept, and enter the errors of its sites."""
    tensors = work.load_tensors(_block(index))
    plan = surgery_plan([sites[number] for number in numbers], [ranks[number] for number in numbers])
    for name, layer in swap(model, HoloSurgeryConfig(layers=plan)).items():
        start = f"{name}."
        layer.load_state_dict({key.removeprefix(start): x for key, x in tensors.items() if key.startswith(start)})
    for number, error in zip(numbers, tensors["errors"].tolist(), strict=True):
        errors[number] = error


def _block(index: int) -> str:
    return f"block-{index:04d}"


# Weights ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arrival:
    """What comes to a layer.

    Attributes:
        x: its input `[tokens, n]`.
        stream: the residual stream so far `[tokens, D]`.
    """

    x: torch.Tensor
    stream: torch.Tensor


def fit(
    weight: torch.Tensor, passages: Iterator[tuple[Arrival, Arrival]], writes: bool, shared: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """W̃ of the module's formula.

    Args:
        weight: W `[m, n]`, in at least float32.
        passages: what came to the layer in the teacher and in the student, window by window.
        writes: whether its output is added to the residual stream, so that it can make up for what that lacks.
        shared: the passages are a part of all, as in [`refit`].

    Returns:
        W̃ `[m, n]` and E[x̃ x̃ᵀ] `[n, n]`, both in float64.
    """
    gram, cross, tokens = weight.new_zeros(()), weight.new_zeros(()), 0
    by_inputs = weight.shape[0] > weight.shape[1] and not writes  # W is taken out of the sum where that is less work
    for theirs, ours in passages:
        x, target = ours.x.to(weight.dtype), theirs.x.to(weight.dtype)  # [tokens, n]
        if not by_inputs:
            target = target @ weight.T  # [tokens, m]
        if writes:
            target = target + theirs.stream - ours.stream
        gram, cross, tokens = gram + x.T @ x, cross + target.T @ x, tokens + len(x)
    gram, cross, weight = gram.double(), cross.double(), weight.double()
    if shared:
        gram, cross, tokens = summed(gram), summed(cross), int(summed(torch.tensor(tokens)))
    gram, cross = gram / tokens, cross / tokens
    cross = weight @ cross if by_inputs else cross
    damping = DAMPING * gram.trace() / len(gram)
    damped = gram + damping * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(damped, (cross + damping * weight).T).T, gram


def _gram(
    weight: torch.Tensor,
    layer: str,
    found: Iterator[dict[str, Arrival]],
    wanted: Sequence[dict[str, Arrival]],
    shared: bool,
) -> torch.Tensor:
    """E[x̃ x̃ᵀ] `[n, n]` of what came to an expert in the student, else in the teacher; zero if nothing came in both."""
    zero = weight.new_zeros(weight.shape[1], weight.shape[1], dtype=torch.float64)
    for windows in (found, wanted):
        gram, tokens = zero, 0
        for arrivals in windows:
            if layer in arrivals:
                x = arrivals[layer].x.to(weight.dtype)  # [tokens, n]
                gram, tokens = gram + (x.T @ x).double(), tokens + len(x)
        if shared:
            gram, tokens = summed(gram), int(summed(torch.tensor(tokens)))
        if tokens:
            return gram / tokens
    return zero


# Blocks -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """How the model calls a block: the hidden states `[1, T, D]`, and what else it gives."""

    hidden: torch.Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The block's output for other hidden states of the same length."""
        output = block(hidden, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output


class _Reached(Exception):
    """All has been seen that was looked for; the rest of the forward pass is not needed."""


def _record_calls(model: PreTrainedModel, blocks: nn.ModuleList, window: torch.Tensor) -> list[Call]:
    """How the model calls these blocks when it reads a window."""
    calls: list[Call] = []

    def record(block: nn.Module, args: tuple, kwargs: dict) -> None:
        kwargs = dict(kwargs)
        hidden, *rest = args if args else (kwargs.pop("hidden_states"),)
        calls.append(Call(hidden, tuple(rest), kwargs))
        if len(calls) == len(blocks):
            raise _Reached

    hooks = [block.register_forward_pre_hook(record, with_kwargs=True) for block in blocks]
    with suppress(_Reached), removed_after(hooks):
        _read(model, window)
    return calls


def _repeats(model: PreTrainedModel, blocks: nn.ModuleList, window: torch.Tensor) -> bool:
    """Whether the model calls a block more than once, as ALBERT does, or not at all."""
    calls: list[nn.Module] = []
    hooks = [block.register_forward_pre_hook(lambda block, args: calls.append(block)) for block in blocks]
    with removed_after(hooks):
        _read(model, window)
    return len(calls) != len(blocks)


def _read(model: PreTrainedModel, window: torch.Tensor) -> None:
    """Run the model on one window, without a cache: a block is called many times over. Not every config has the
    switch."""
    configs = [c for c in [model.config, model.config.get_text_config()] if getattr(c, "use_cache", None)]
    for config in configs:
        config.use_cache = False
    try:
        model(input_ids=window[None].to(model.device))
    finally:
        for config in configs:
            config.use_cache = True


def _pass(
    block: nn.Module,
    call: Call,
    hidden: torch.Tensor,
    layers: Sequence[str],
    writers: Sequence[str],
    stop: bool = False,
) -> tuple[dict[str, Arrival], torch.Tensor | None]:
    """Run the block, up to the last of these layers if told to `stop` there: what came to each, in the order of
    the calls, and what left the block."""
    arrivals: dict[str, Arrival] = {}
    stream = hidden

    def add(writer: nn.Module, args: tuple, output: torch.Tensor) -> None:
        nonlocal stream
        stream = stream + output.view_as(stream)

    def arrive(name: str, layer: nn.Module, args: tuple[torch.Tensor]) -> None:
        arrivals[name] = Arrival(args[0].flatten(0, -2), stream.flatten(0, -2))
        if stop and len(arrivals) == len(layers):
            raise _Reached

    hooks = [block.get_submodule(name).register_forward_hook(add) for name in writers]
    hooks += [block.get_submodule(name).register_forward_pre_hook(partial(arrive, name)) for name in layers]
    output = None
    with suppress(_Reached), removed_after(hooks):
        output = call(block, hidden)
    return arrivals, output


def residual_writers(block: nn.Module, call: Call, hidden: torch.Tensor) -> tuple[str, ...]:
    """The linear layers whose outputs a block adds to what it reads; none if it does more than add them.

    They are found by their outputs: those of the layers of the stream's width that sum up to what the block adds. (A
    block that normalises its sum, as BERT's does, has none.)

    Args:
        block: a block of the model.
        call: how it is called.
        hidden: what it reads `[1, T, D]`.
    """
    width = hidden.shape[-1]
    linears = {name: m for name, m in block.named_modules() if is_linear(m) and dense_shape(m)[0] == width}
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str, output: torch.Tensor) -> None:
        outputs[name] = output.double()

    hooks = [m.register_forward_hook(lambda m, args, out, name=name: keep(name, out)) for name, m in linears.items()]
    with removed_after(hooks):
        added = call(block, hidden).double() - hidden.double()
    outputs = {name: y.view_as(added) for name, y in outputs.items() if y.numel() == added.numel()}  # no expert's
    for most in range(1, MOST_WRITERS + 1):
        for names in combinations(outputs, most):
            if (sum(outputs[name] for name in names) - added).norm() <= SAME * added.norm():
                return names
    return ()
