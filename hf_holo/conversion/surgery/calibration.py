"""Calibrated surgery: which harmonics of a trained layer matter, by its activations and by the loss.

Layers that read the same input form a site; their weights are stacked to one matrix W [m, n] and share one basis. With
Σ = E[x xᵀ] of the inputs and the Fisher matrix G = E[g gᵀ] of the gradients at the outputs, a change of W to W′ costs
about ½ tr(G (W − W′) Σ (W − W′)ᵀ) in loss. The best W′ of rank r is W times a projection, or a projection times W, and
the projections of all ranks are nested: one eigendecomposition gives them and what each rank loses. The ranks of all
sites are then chosen together, so that the loss is least for the number of values that may be stored.

Sources: activation-aware low rank as in SVD-LLM (Wang et al., 2024); G as in K-FAC (Martens and Grosse, 2015), of
sampled labels.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ...distributed.processes import is_main, share_of, summed
from ...errors import HoloError
from ...modeling.quantizer import dense_shape, dense_weight, swap
from .plan import HoloSurgeryConfig, choose, same_input

FLOOR = 1e-6  # least eigenvalue of Σ, as a share of the mean one: what the text never excites must stay invertible
SHRINKAGE = 0.01  # of G towards its mean eigenvalue: it is estimated from fewer tokens than Σ


# Sites --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """Layers with the same input, whose weights are stacked to W [m, n].

    Attributes:
        layers: names; the first one will own the basis.
        widths: outputs of each layer; m is their sum.
        inputs: n.
    """

    layers: tuple[str, ...]
    widths: tuple[int, ...]
    inputs: int

    @property
    def outputs(self) -> int:
        return sum(self.widths)

    @property
    def numbers(self) -> int:
        """Values of the dense weights, without biases."""
        return self.outputs * self.inputs

    @property
    def size(self) -> int:
        """Width of the projection, and largest rank: min(m, n)."""
        return min(self.outputs, self.inputs)

    @property
    def projects_outputs(self) -> bool:
        """W′ = P W instead of W P. The smaller side is projected; G is kept as a full matrix only there."""
        return self.outputs <= self.inputs

    def stored(self, harmonics: int | None, pivoted: bool = True) -> int:
        """Values in a checkpoint at this rank, without biases; of the dense weights for None."""
        if harmonics is None:
            return self.numbers
        basis = harmonics * (self.inputs - harmonics) + self.inputs if pivoted else harmonics * self.inputs
        return harmonics * self.outputs + basis

    def largest_rank(self, ratio: float, pivoted: bool = True) -> int | None:
        """The largest rank that keeps at most `ratio` of the values; None if not even one harmonic does."""
        ranks = (rank for rank in range(self.size, 0, -1) if self.stored(rank, pivoted) <= ratio * self.numbers)
        return next(ranks, None)

    def plan(self, harmonics: int, pivoted: bool = True) -> dict[str, dict[str, Any]]:
        """Its entries in [`HoloSurgeryConfig.layers`]."""
        entry = {"harmonics": harmonics, "basis": "data", "folded": True, "pivoted": pivoted}
        return {
            name: {**entry, "lender": self.layers[0] if number else None} for number, name in enumerate(self.layers)
        }


def find_sites(model: nn.Module, config: HoloSurgeryConfig) -> list[Site]:
    """The sites of the layers that `config` chooses; one for each layer unless `config.shared`.

    Raises:
        HoloError: as [`choose`].
    """
    groups: list[list[str]] = []
    for name in choose(model, config):
        group = next((g for g in groups if config.shared and same_input(model, name, g[0])), None)
        if group is None:
            groups.append([name])
        else:
            group.append(name)
    shapes = {name: dense_shape(model.get_submodule(name)) for group in groups for name in group}
    return [Site(tuple(g), tuple(shapes[name][0] for name in g), shapes[g[0]][1]) for g in groups]


def stacked_weight(model: nn.Module, site: Site) -> torch.Tensor:
    """W `[m, n]`."""
    return torch.cat([dense_weight(model.get_submodule(name)) for name in site.layers]).detach()


# Statistics ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Statistics:
    """What calibration measures at a site, as means over tokens.

    Attributes:
        gram: Σ `[n, n]`, or W Σ Wᵀ `[m, m]` where the outputs are projected. All zero for an expert that no token came
            to; see [`without_gradients`].
        fisher: G `[m, m]` where the outputs are projected, else its diagonal `[m]`; None counts all outputs alike.
    """

    gram: torch.Tensor
    fisher: torch.Tensor | None = None


def is_expert(name: str) -> bool:
    """Whether a layer gets only the tokens that a router sends it, by its name."""
    return re.search(r"(^|\.)experts?[._]", name) is not None


def without_gradients(model: nn.Module, site: Site, gram: torch.Tensor) -> Statistics:
    """Statistics of an expert whose gradients are not known: all outputs count alike. If no token came to it at all,
    its gram being zero, all inputs do too: it is fitted to its weights."""
    if not gram.any():
        weight = stacked_weight(model, site).to(gram)
        gram = weight @ weight.T if site.projects_outputs else torch.eye(site.inputs).to(gram)
    return Statistics(gram)


def statistics_bytes(site: Site, itemsize: int = 4) -> int:
    """Memory that the statistics of one site take while they are collected."""
    fisher = site.size**2 if site.projects_outputs else site.outputs
    return (site.size**2 + fisher) * itemsize


def collect(
    model: PreTrainedModel,
    sites: Sequence[Site],
    windows: torch.Tensor,
    fisher_windows: torch.Tensor | None = None,
    seed: int = 0,
    shared: bool = False,
) -> list[Statistics]:
    """Run the calibration text through the model and measure.

    Args:
        model: with all its dense layers.
        sites: memory grows with their number, see [`statistics_bytes`].
        windows: token ids `[N, T]` for Σ.
        fisher_windows: token ids `[N, T]` for G, with labels drawn from the model's own predictions; without them G is
            left out.
        seed: of the labels.
        shared: all processes of the run are here with the same arguments; each reads a part of the windows, and all get
            the statistics of the whole.

    Returns:
        The statistics of each site.

    Raises:
        HoloError: an activation or a gradient is not finite, or a layer that is not an expert has no part in the
            output.
    """
    model.eval()
    grams = _collect_grams(model, sites, windows, shared)
    _check(sites, grams, "activations")
    if fisher_windows is None:
        return [Statistics(gram) for gram in grams]
    fishers = _collect_fishers(model, sites, fisher_windows, seed, shared)
    _check(sites, fishers, "gradients")
    return [Statistics(gram, fisher) for gram, fisher in zip(grams, fishers, strict=True)]


def _check(sites: Sequence[Site], measured: Sequence[torch.Tensor], what: str) -> None:
    for site, numbers in zip(sites, measured, strict=True):
        if not numbers.isfinite().all():
            raise HoloError(
                f"TEACHER: the {what} of {site.layers[0]!r} are not finite on the calibration text; "
                "fix the teacher, or leave the layer out with --exclude"
            )
        if not numbers.any() and not is_expert(site.layers[0]):
            raise HoloError(
                f"modules: {site.layers[0]!r} has no part in the output: its {what} are all zero; exclude it"
            )


@torch.no_grad()
def _collect_grams(
    model: PreTrainedModel, sites: Sequence[Site], windows: torch.Tensor, shared: bool
) -> list[torch.Tensor]:
    grams = [_zeros(model, site, site.size, site.size) for site in sites]

    def add(gram: torch.Tensor, weight: torch.Tensor | None, layer: nn.Module, args: tuple[torch.Tensor]) -> None:
        x = args[0].flatten(0, -2)  # [tokens, n]
        x = (x if weight is None else x @ weight.T).to(gram.dtype)
        gram.addmm_(x.T, x)

    handles = []
    for site, gram in zip(sites, grams, strict=True):
        weight = stacked_weight(model, site) if site.projects_outputs else None
        handles.append(model.get_submodule(site.layers[0]).register_forward_pre_hook(partial(add, gram, weight)))
    prefix = f"{model.base_model_prefix}."
    body = model.base_model if all(name.startswith(prefix) for site in sites for name in site.layers) else model
    with removed_after(handles):
        for number in _numbered(windows, shared, "activations"):
            body(input_ids=windows[number, None].to(model.device))  # without the output layer, which costs much
    return [_mean(gram, windows, shared) for gram in grams]


def _numbered(windows: torch.Tensor, shared: bool, description: str) -> Iterable[int]:
    """The numbers of the windows `[N, T]` that this process reads, with a bar in the main one."""
    numbers = share_of(len(windows)) if shared else range(len(windows))
    return tqdm(numbers, desc=description, unit="window", disable=shared and not is_main())


def _mean(sums: torch.Tensor, windows: torch.Tensor, shared: bool) -> torch.Tensor:
    """Over the tokens of all windows, from the sums of this process."""
    return (summed(sums.double()).to(sums.dtype) if shared else sums) / windows.numel()


def _collect_fishers(
    model: PreTrainedModel, sites: Sequence[Site], windows: torch.Tensor, seed: int, shared: bool
) -> list[torch.Tensor]:
    fishers = [_zeros(model, site, *((site.outputs,) * (2 if site.projects_outputs else 1))) for site in sites]
    pending: list[dict[str, torch.Tensor]] = [{} for _ in sites]

    def arrived(number: int, name: str, gradient: torch.Tensor) -> None:
        """Keep the gradient until those of all layers of the site are there."""
        site, parts, fisher = sites[number], pending[number], fishers[number]
        parts[name] = gradient.flatten(0, -2).to(fisher.dtype)  # [tokens, outputs of this layer]
        if len(parts) == len(site.layers):
            g = torch.cat([parts[layer] for layer in site.layers], dim=1)  # [tokens, m]
            fisher.add_(g.T @ g if fisher.dim() == 2 else g.square().sum(0))
            parts.clear()

    def watch(number: int, name: str, layer: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        if not output.requires_grad:  # it reads no token: relative positions, say
            output = output.detach().requires_grad_().clone()  # no leaf: some models write to it
        output.register_hook(partial(arrived, number, name))
        return output

    def start_graph(layer: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return output.detach().requires_grad_()

    handles = [
        model.get_submodule(name).register_forward_hook(partial(watch, number, name))
        for number, site in enumerate(sites)
        for name in site.layers
    ]
    handles.append(model.get_input_embeddings().register_forward_hook(start_graph))
    with removed_after(handles), _frozen(model), torch.enable_grad():
        for number in _numbered(windows, shared, "gradients"):
            generator = torch.Generator().manual_seed(seed + number)  # whatever process reads this window
            logits = model(input_ids=windows[number, None].to(model.device)).logits.float().flatten(0, -2)  # [T, V]
            drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
            F.cross_entropy(logits, drawn.to(logits.device), reduction="sum").backward()
    return [_mean(fisher, windows, shared) for fisher in fishers]


def _zeros(model: PreTrainedModel, site: Site, *shape: int) -> torch.Tensor:
    weight = dense_weight(model.get_submodule(site.layers[0]))
    return torch.zeros(shape, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)


@contextmanager
def removed_after(handles: Sequence[Any]) -> Iterator[None]:
    """Remove hooks at the end, however it comes."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter takes gradients: those of the weights would cost as much memory as the model."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


# Factors ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Factors:
    """The nested projections of a site: P_r = synthesis[:, :r] @ analysis[:r], the best of each rank r.

    Attributes:
        loss: `[k]`, falling: what leaving out each harmonic costs, Fisher-weighted.
        energy: `[k]`: what each contributes to the mean squared output.
        synthesis, analysis: `[k, k]`, inverse to each other.
    """

    loss: torch.Tensor
    energy: torch.Tensor
    synthesis: torch.Tensor
    analysis: torch.Tensor

    def error(self, harmonics: int | None) -> float:
        """Mean squared error of the outputs at this rank, relative to their mean square; 0 for a dense layer."""
        return 0.0 if harmonics is None else float(self.energy[harmonics:].sum() / self.energy.sum())


@torch.no_grad()
def factorise(site: Site, weight: torch.Tensor, statistics: Statistics) -> Factors:
    """The projections of a site, computed in float64.

    Args:
        site: the site.
        weight: W `[m, n]`.
        statistics: of the site.
    """
    weight, gram = weight.double(), statistics.gram.double()
    fisher = statistics.fisher
    if site.projects_outputs:
        fisher = torch.eye(site.outputs, dtype=gram.dtype, device=gram.device) if fisher is None else fisher.double()
        root, inverse = _roots(_shrunk(fisher))
        loss, vectors = _falling_eigh(root @ gram @ root)  # of G^½ W Σ Wᵀ G^½
        synthesis, analysis = inverse @ vectors, vectors.T @ root
        return Factors(loss, synthesis.square().sum(0) * loss, synthesis, analysis)
    root, inverse = _roots(gram)
    weighted = weight @ root if fisher is None else fisher.double().sqrt()[:, None] * (weight @ root)
    loss, vectors = _falling_eigh(weighted.T @ weighted)  # of Σ^½ Wᵀ G W Σ^½
    synthesis, analysis = root @ vectors, vectors.T @ inverse
    return Factors(loss, (weight @ synthesis).square().sum(0), synthesis, analysis)


def _shrunk(fisher: torch.Tensor) -> torch.Tensor:
    mean = fisher.trace() / len(fisher)
    return (1 - SHRINKAGE) * fisher + SHRINKAGE * mean * torch.eye(
        len(fisher), dtype=fisher.dtype, device=fisher.device
    )


def _roots(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Square root of a symmetric matrix, and its inverse."""
    values, vectors = torch.linalg.eigh(matrix)
    roots = values.clamp_min(FLOOR * values.mean()).sqrt()
    return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T


def _falling_eigh(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(0).clamp_min(0), vectors.flip(1)


# Ranks --------------------------------------------------------------------------------------------------------------


def allocate(sites: Sequence[Site], losses: Sequence[torch.Tensor], ratio: float) -> list[int | None]:
    """Ranks of all sites that lose least and store at most `ratio` of the values, pivoted bases included.

    Each site takes the rank of least loss + μ · stored values; μ is found by bisection. What the last step leaves of
    the budget is spent one harmonic after the other, where it gains most. A site without losses, an expert that no
    token came to, takes its even share.

    Args:
        sites: the sites.
        losses: of each, `[k]`, see [`Factors`]; all zero if they are not known.
        ratio: in (0, 1).

    Returns:
        Harmonics of each site, or None where it is best left dense.

    Raises:
        HoloError: one harmonic everywhere is already more than the budget.
    """
    check_ratio(sites, ratio)
    known = [number for number, loss in enumerate(losses) if loss.any()]
    if len(known) < len(sites):
        ranks = [site.largest_rank(ratio) for site in sites]
        chosen_ranks = allocate([sites[n] for n in known], [losses[n] for n in known], ratio) if known else []
        for number, rank in zip(known, chosen_ranks, strict=True):
            ranks[number] = rank
        return ranks
    budget = ratio * sum(site.numbers for site in sites)
    costs, tails = zip(*(_choices(site, loss) for site, loss in zip(sites, losses, strict=True)), strict=True)

    def chosen(price: float) -> list[int]:
        return [int((tail + price * cost).argmin()) for cost, tail in zip(costs, tails, strict=True)]

    low, high = 0.0, 1.0
    while _spent(costs, chosen(high)) > budget:
        low, high = high, 8 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _spent(costs, chosen(middle)) > budget else (low, middle)
    choices = _topped_up(chosen(high), costs, tails, budget)
    return [None if choice == site.size else choice + 1 for site, choice in zip(sites, choices, strict=True)]


def check_ratio(sites: Sequence[Site], ratio: float) -> None:
    """Raises HoloError if one harmonic everywhere is already more than `ratio` of the values."""
    least = sum(site.stored(1) for site in sites) / sum(site.numbers for site in sites)
    if least > ratio:
        raise HoloError(f"ratio: {ratio} cannot be reached: one harmonic in each layer already keeps {least:.3g}")


def _choices(site: Site, loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Stored values and loss of each choice `[k + 1]`: ranks 1 to k, and the dense weights at the end."""
    ranks = [*range(1, site.size + 1), None]
    cost = torch.tensor([site.stored(rank) for rank in ranks], dtype=torch.float64)
    tail = loss.double().cpu().flip(0).cumsum(0).flip(0)  # [k], with harmonic r itself: the loss of rank r - 1
    nothing = tail.new_zeros(1)
    return cost, torch.cat([tail[1:], nothing, nothing])


def _spent(costs: Sequence[torch.Tensor], choices: Sequence[int]) -> float:
    return sum(float(cost[choice]) for cost, choice in zip(costs, choices, strict=True))


def _topped_up(
    choices: list[int], costs: Sequence[torch.Tensor], tails: Sequence[torch.Tensor], budget: float
) -> list[int]:
    left = budget - _spent(costs, choices)
    while True:
        steps = []
        for number, choice in enumerate(choices):
            if choice + 2 < len(costs[number]):  # the dense weights are not one step further, but a choice of their own
                price = float(costs[number][choice + 1] - costs[number][choice])
                if price <= left:
                    steps.append((float(tails[number][choice] - tails[number][choice + 1]) / price, number, price))
        if not steps:
            return choices
        _, number, price = max(steps)
        choices[number] += 1
        left -= price


# Into the model -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def install(
    model: PreTrainedModel,
    site: Site,
    factors: Factors,
    harmonics: int,
    pivoted: bool = True,
    weight: torch.Tensor | None = None,
) -> None:
    """Put the projected weights of one site into the model as folded [`HoloLinear`] layers with a shared "data" basis.

    Args:
        model: with the dense layers of the site.
        site: the site.
        factors: of the site.
        harmonics: rank r.
        pivoted: store the basis pivoted. (The scale of its rows then drops out.)
        weight: what is projected, `[m, n]`; default: the weights of the site.
    """
    weight = stacked_weight(model, site).double() if weight is None else weight
    synthesis, analysis = factors.synthesis[:, :harmonics].double(), factors.analysis[:harmonics].double()
    if site.projects_outputs:
        coefficients, basis = synthesis, analysis @ weight
    else:
        coefficients, basis = weight @ synthesis, analysis
    biases: dict[str, Any] = {name: model.get_submodule(name).bias for name in site.layers}
    layers: dict[str, Any] = dict(swap(model, HoloSurgeryConfig(layers=site.plan(harmonics, pivoted))))
    change = layers[site.layers[0]].basis.store(basis)
    for name, part in zip(site.layers, (coefficients @ change).split(site.widths), strict=True):
        layers[name].load_factors(part)
        if (bias := layers[name].bias) is not None:
            bias.copy_(biases[name])


def install_all(
    model: PreTrainedModel,
    sites: Sequence[Site],
    ranks: Sequence[int | None],
    factors: Iterable[Factors],
    pivoted: bool = True,
) -> list[float]:
    """[`install`] every site at its rank (None stays dense); returns their errors, see [`Factors.error`]."""
    errors = []
    for site, rank, fitted in zip(sites, ranks, factors, strict=True):
        if rank is not None:
            install(model, site, fitted, rank, pivoted)
        errors.append(fitted.error(rank))
    return errors


def surgery_plan(sites: Sequence[Site], ranks: Sequence[int | None], pivoted: bool = True) -> dict[str, dict[str, Any]]:
    """The plan of all sites for [`HoloSurgeryConfig`]; those left dense are not in it."""
    plan: dict[str, dict[str, Any]] = {}
    for site, rank in zip(sites, ranks, strict=True):
        if rank is not None:
            plan |= site.plan(rank, pivoted)
    return plan
