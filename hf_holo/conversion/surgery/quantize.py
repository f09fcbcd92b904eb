"""After the surgery: the thin matrices, and the layers that stayed dense, in 8 or 4 bits a value."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PretrainedConfig, PreTrainedModel

from ...errors import HoloError
from ...modeling.harmonics import HoloLinear
from ...modeling.integers import KINDS, IntegerLinear
from ...modeling.quantizer import SurgeryPlan, holo_layers, is_linear, replace
from .apply import HoloQuantizer, mark
from .calibration import removed_after
from .plan import HoloSurgeryConfig, is_its_product, is_router
from .proof import Proof, all_or_nothing
from .rounding import round_thin

MEMORY = 2 * 2**30  # bytes of statistics at a time
Site = list[HoloLinear]  # layers with one basis


def quantize_linears(
    model: PreTrainedModel, kind: str = "int8", windows: torch.Tensor | None = None
) -> PreTrainedModel:
    """Store the linear layers of a model in small integers, in place, for inference.

    Those are the folded coefficients of holographic layers with their stored bases, and the dense linear layers; not
    embeddings, nor a head that is tied to them, nor what chooses among experts, nor experts that are fused in one
    tensor. The model is then tried as after a surgery: it runs, and what would be saved loads.

    Args:
        model: converted by surgery, trained afterwards or not; a dense one is stored in the same way.
        kind: "int8", one scale for each row, or "int4", one for 32 values of a row.
        windows: `[N, T]`, tokens of a text, to whose inputs the rounding of holographic layers is fitted. Without them
            every value is rounded to the nearest, which fitted layers do not bear in int4: large contributions cancel
            in them. Dense layers are always rounded to the nearest.

    Returns:
        The model.

    Raises:
        HoloError: an unknown kind, the model is in small integers already or quantized by something else, a weight is
            not finite, or the model does not run or load with them. It is then as it was.
    """
    if kind not in KINDS:
        raise HoloError(f"quantize: {kind!r} is unknown; choose one of {', '.join(KINDS)}")
    config = _plan_of(model)
    proof = Proof.of(model)
    with all_or_nothing(model):
        dense = dense_linears(model)
        try:
            for layers, gram in _with_inputs(model, _sites(model), windows):
                if gram is not None:
                    round_thin(layers, gram, kind)
                for layer in layers if gram is None else []:
                    layer.to_integers(kind)
            replace(model, {layer: IntegerLinear.like(layer, kind) for layer in map(model.get_submodule, dense)})
        except ValueError as error:
            raise HoloError(f"model: {error}") from None
        _note(model, config, kind, dense)
        proof.check(model)
    return model


def _plan_of(model: PreTrainedModel) -> HoloSurgeryConfig:
    if not isinstance(model, PreTrainedModel):
        raise HoloError(f"model: {type(model).__name__} is not a model of transformers")
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return HoloSurgeryConfig(layers={})
    if not isinstance(config, SurgeryPlan):
        raise HoloError("model: it is quantized already, by another package; start from what it was before")
    if config.quantize is not None:
        raise HoloError(f"model: it is in {config.quantize} already")
    known = vars(HoloSurgeryConfig())
    return HoloSurgeryConfig(**{n: value for n, value in copy.deepcopy(vars(config)).items() if n in known})


@torch.no_grad()
def dense_linears(model: nn.Module) -> list[str]:
    """Names of the dense linear layers that can be stored in integers: they compute their product alone, share their
    weight with nothing, and do not choose among experts."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return [
        name
        for name, module in model.named_modules()
        if is_linear(module)
        and is_its_product(module)
        and owners[id(module.weight)] == 1
        and not is_router(model, name)
    ]


def _sites(model: nn.Module) -> list[Site]:
    shared: dict[int, Site] = {}
    for layer in holo_layers(model):
        shared.setdefault(id(layer.basis), []).append(layer)
    return list(shared.values())


def _with_inputs(
    model: PreTrainedModel, sites: Sequence[Site], windows: torch.Tensor | None
) -> Iterator[tuple[Site, torch.Tensor | None]]:
    """Each site with E[x xᵀ] of its inputs, None where there are none; the text is read as often as memory asks for."""
    if windows is None:
        yield from ((site, None) for site in sites)
        return
    for batch in _portions(sites):
        yield from zip(batch, _grams(model, batch, windows), strict=True)


def _portions(sites: Sequence[Site]) -> Iterator[list[Site]]:
    batch: list[Site] = []
    taken = 0
    for site in sites:
        size = 4 * site[0].in_features ** 2
        if batch and taken + size > MEMORY:
            yield batch
            batch, taken = [], 0
        batch.append(site)
        taken += size
    if batch:
        yield batch


@torch.no_grad()
def _grams(model: PreTrainedModel, sites: Sequence[Site], windows: torch.Tensor) -> list[torch.Tensor | None]:
    sums: list[torch.Tensor | None] = [None] * len(sites)

    def listen(number: int) -> Any:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].detach().float().flatten(0, -2)
            known, product = sums[number], x.T @ x
            sums[number] = product if known is None else known + product

        return hook

    training = model.training
    with removed_after([site[0].register_forward_pre_hook(listen(n)) for n, site in enumerate(sites)]):
        for window in tqdm(windows, desc="inputs of the layers", unit="window"):
            model.eval()(input_ids=window[None].to(model.device))
    model.train(training)
    return sums


def _note(model: PreTrainedModel, config: HoloSurgeryConfig, kind: str, dense: list[str]) -> None:
    """The configs of the model and its parts say what is in integers; to transformers it is a quantized model, of which
    only adapters can be trained."""
    for entry in (config.layers or {}).values():
        entry["folded"] = True
    config.quantize, config.dense = kind, dense
    for part in vars(model.config).values():
        if isinstance(part, PretrainedConfig):
            vars(part).pop("quantization_config", None)
    mark(model, config)
    known: dict[str, Any] = {"is_quantized": True, "quantization_method": config.quant_method}
    vars(model).update(known, hf_quantizer=HoloQuantizer(config, pre_quantized=True))
