"""Bases from data: the directions that the inputs of a layer take most often, for models that train from scratch."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ...errors import HoloError
from ...modeling.harmonics import HarmonicBasis, HoloLinear
from .calibration import removed_after


@torch.no_grad()
def fit_bases(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Any]], source: PreTrainedModel | None = None
) -> dict[str, float]:
    """Fix every "data" basis of a model to the directions in which the inputs of its layer have the most energy.

    These are the first R eigenvectors of E[x xᵀ], taken in float64. Amplitudes and phases stay as they are, so this
    belongs before training. It changes nothing in `source`, and nothing in `model` if it fails.

    Args:
        model: with [`HoloLinear`] layers of basis "data", such as a `HoloForCausalLM`.
        batches: what `source` takes, each a dict such as `{"input_ids": [B, T]}`; labels are ignored, and so are tokens
            that `attention_mask` hides. A few thousand tokens are plenty.
        source: a trained model with layers of the same names and inputs, such as its dense counterpart: it shows
            what trained layers read. Default: `model` as it is.

    Returns:
        For each of these layers the share of its inputs' energy that the basis keeps, in [0, 1].

    Raises:
        HoloError: `model` has no such layer, or a layer that surgery has fitted already; `source` has no layer of that
            name and input; the inputs of a layer are not finite or all zero, or fewer than its harmonics.
    """
    source = model if source is None else source
    layers = {name: module for name, module in model.named_modules() if _takes_a_basis(module)}
    if not layers:
        raise HoloError("model: it has no HoloLinear with a basis of its own to fit: build it with basis='data'")
    training = source.training
    try:
        moments = _input_moments(source.eval(), layers, batches)
        return {name: _store(layers[name].own_basis, moment) for name, moment in moments.items()}
    finally:
        source.train(training)


def _store(basis: HarmonicBasis, moment: torch.Tensor) -> float:
    """Make the strongest directions the basis; returns their share of the energy."""
    values, vectors = torch.linalg.eigh(moment)  # rising
    basis.store(vectors.flip(1).T[: basis.harmonics])
    return float(values.flip(0)[: basis.harmonics].sum() / values.sum())


def _takes_a_basis(module: nn.Module) -> bool:
    return isinstance(module, HoloLinear) and "own_basis" in module._modules and module.own_basis.kind == "data"


def _input_moments(
    source: PreTrainedModel, layers: Mapping[str, HoloLinear], batches: Iterable[Mapping[str, Any]]
) -> dict[str, torch.Tensor]:
    """Σ x xᵀ `[I, I]` over the tokens, for the layers of these names in `source`."""
    heard = {name: module for name, module in source.named_modules() if name in layers}
    moments = {}
    for name, layer in layers.items():
        if layer.folded or layer.own_basis.pivoted:
            raise HoloError(f"model: {name!r} is folded or pivoted, so surgery has fitted it already")
        if getattr(heard.get(name), "in_features", None) != layer.in_features:
            raise HoloError(
                f"source: it has no linear layer {name!r} with {layer.in_features} inputs, as the model has"
            )
        moments[name] = torch.zeros(layer.in_features, layer.in_features, dtype=torch.float64, device=source.device)
    tokens = 0
    for batch in batches:
        mask = batch.get("attention_mask")
        shown = torch.ones_like(batch["input_ids"]).bool() if mask is None else mask.bool()  # [B, T]
        handles = [heard[name].register_forward_pre_hook(partial(_add, m, shown)) for name, m in moments.items()]
        with removed_after(handles):
            source(**{key: value for key, value in batch.items() if key != "labels"})
        tokens += int(shown.sum())
    _check(layers, moments, tokens)
    return moments


def _add(moment: torch.Tensor, shown: torch.Tensor, layer: nn.Module, args: tuple[torch.Tensor]) -> None:
    x = args[0][shown].to(moment)  # [tokens, I]
    moment.addmm_(x.T, x)


def _check(layers: Mapping[str, HoloLinear], moments: Mapping[str, torch.Tensor], tokens: int) -> None:
    for name, moment in moments.items():
        if tokens < layers[name].harmonics:
            raise HoloError(f"batches: {tokens} tokens cannot show the {layers[name].harmonics} directions of {name!r}")
        if not moment.isfinite().all() or not moment.any():
            raise HoloError(f"source: the inputs of {name!r} are all zero or not finite on these batches")
