"""Layer surgery: linear layers of any transformers model become HoloLinear, as a quantizer (`quant_method` "holo").

A converted model stays what it was (a `Phi3ForCausalLM`, say): its config carries the plan of the surgery, and plain
`from_pretrained` swaps the layers before it reads their weights. `import hf_holo` registers the quantizer.
"""

import copy
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...errors import HoloError
from ...hub.code import CONVERTED, add_code
from ...modeling.harmonics import HarmonicBasis, HoloLinear
from ...modeling.integers import IntegerLinear
from ...modeling.quantizer import (
    QUANTIZED,
    PlanQuantizer,
    checksum_of_bases,
    dense_weight,
    holo_layers,
    integer_linears,
    replace,
    swap,
)
from .plan import HoloSurgeryConfig, resolved
from .proof import Proof, all_or_nothing


@dataclass(frozen=True)
class SurgeryReport:
    """What the surgery did, module by module.

    Attributes:
        rows: for every module that has values of its own: `module`, its kind `before` and `after`, `numbers_before`,
            `stored` (values in a checkpoint) and `trained` (parameters); a tied matrix counts once. `error`: squared
            error of the weights, relative to their square; None where nothing was fitted.
    """

    rows: list[dict[str, Any]]

    @property
    def converted(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["before"] != row["after"]]

    def total(self, column: str) -> int:
        return sum(row[column] for row in self.rows)

    @property
    def kept(self) -> float:
        """Share of the values of the converted layers that a checkpoint still keeps."""
        return sum(row["stored"] for row in self.converted) / sum(row["numbers_before"] for row in self.converted)


def apply_surgery(model: PreTrainedModel, config: HoloSurgeryConfig | None = None) -> SurgeryReport:
    """Replace linear layers by [`HoloLinear`], in place; on the meta device too.

    The new layers start as the least-squares fit of the old weights in their basis. The converted model is then run on
    two tokens, and what would be saved is loaded on the meta device: both must work as they did before.

    Args:
        model: any model of transformers.
        config: default: that of the HOLO reference, see [`HoloSurgeryConfig`]. A copy with the plan is kept in
            `model.config`.

    Returns:
        A report with every module.

    Raises:
        HoloError: a pattern matches nothing, a ratio cannot be reached, there are more harmonics than inputs, an output
            layer is tied to the embeddings or to another, a weight is not finite, the model is not one of transformers,
            converted already or wrapped in adapters, a "data" basis is asked for (it needs `hf-holo convert`), or the
            model does not run or load with the new layers. The model is then as it was.
    """
    config = HoloSurgeryConfig() if config is None else config
    _check_arguments(model, config)
    config = resolved(model, config)
    before = _census(model)
    _check_weights(before, config.layers or {})
    proof, errors = Proof.of(model), {}
    with all_or_nothing(model):
        for name, new in swap(model, config).items():
            old = before.modules[name]
            if isinstance(new, HoloLinear) and not next(old.parameters()).is_meta:
                errors[name] = _fit(new, old)
        config.checksum = checksum_of_bases(model)
        mark(model, config)
        proof.check(model)
    return _compare(before, _census(model), errors)


def _check_arguments(model: PreTrainedModel, config: HoloSurgeryConfig) -> None:
    if not isinstance(config, HoloSurgeryConfig):
        raise HoloError(f"config: {config!r} is not a HoloSurgeryConfig")
    if config.quantize is not None:
        raise HoloError(f"quantize: {config.quantize!r} comes after the surgery; call quantize_linears then")
    if config.layers == {}:
        raise HoloError("layers: {} names no layer to convert; leave it out, and the surgery fills it in")
    if config.basis == "data" and config.layers is None:
        raise HoloError("basis: 'data' has to be fitted to activations: use `hf-holo convert --method calibrated`")
    adapted = [n for n, module in model.named_modules() if isinstance(getattr(module, "base_layer", None), nn.Module)]
    if adapted:
        raise HoloError(f"model: {adapted[0]!r} carries an adapter; merge the adapters into the model, or unload them")
    if not isinstance(model, PreTrainedModel):
        raise HoloError(f"model: {type(model).__name__} is not a model of transformers; in others, use HoloLinear")
    if getattr(model.config, "quantization_config", None) is not None:
        raise HoloError("model: it is converted or quantized already; start from a dense model, or `restore_linears`")


def _check_weights(census: "_Census", layers: dict[str, dict[str, Any]]) -> None:
    for name, module in census.modules.items():
        if name in layers and not all(p.is_meta or p.isfinite().all() for p in module.parameters()):
            raise HoloError(f"model: the weights of {name!r} are not finite; fix them, or leave it out with exclude=")


@torch.no_grad()
def _fit(new: HoloLinear, old: nn.Module) -> float:
    """Set the coefficients whose product with the basis is nearest to the old weight.

    Returns:
        The squared distance, relative to the square of the weight.
    """
    dense = dense_weight(old)
    weight = dense.double()  # [O, I]
    basis = new.basis.matrix().double()  # [R, I]
    gram, product = basis @ basis.T, weight @ basis.T  # [R, R], [O, R]
    coefficients = torch.linalg.solve(gram, product.T).T  # [O, R]
    new.load_factors(coefficients.to(dense.dtype))
    if new.bias is not None:
        new.bias.copy_(old.get_parameter("bias"))
    total = float(weight.square().sum())
    return max(1 - float((product * coefficients).sum()) / total, 0.0) if total else 0.0  # Pythagoras


def mark(model: PreTrainedModel, config: HoloSurgeryConfig) -> None:
    """Make a model with holographic layers known as such: its config holds the plan, and what it saves has its code.

    A part of the model that can be loaded by itself (the text model of a CLIP) finds its share of the plan in its own
    config.
    """
    model.config.quantization_config = config
    vars(model)["save_pretrained"] = MethodType(_save_with_code, model)
    vars(model)["_upload_modified_files"] = MethodType(_upload_with_code, model)
    for name, module in model.named_modules():
        own = getattr(module, "config", None)
        if isinstance(own, PretrainedConfig) and any(own is part for part in vars(model.config).values()):
            share = {n: dict(entry) for n, entry in (config.layers or {}).items() if n.startswith(f"{name}.")}
            if share and getattr(own, "quantization_config", None) is None:
                own.quantization_config = copy.copy(config)
                own.quantization_config.layers, own.quantization_config.checksum = share, None
                own.quantization_config.dense = [n for n in config.dense if n.startswith(f"{name}.")]


def _save_with_code(model: PreTrainedModel, folder: str | os.PathLike, is_main_process: bool = True, **options) -> None:
    """The class's own, and the code that the checkpoint needs where hf_holo is missing."""
    type(model).save_pretrained(model, folder, is_main_process=is_main_process, **options)
    if is_main_process:
        add_code(Path(folder))


def _upload_with_code(model: PreTrainedModel, working_dir: str | os.PathLike, *args: Any, **options: Any) -> Any:
    """Where `push_to_hub` and `save_pretrained(push_to_hub=True)` meet, with the code that the checkpoint needs."""
    add_code(Path(working_dir))
    return type(model)._upload_modified_files(model, working_dir, *args, **options)


def _unmark(model: PreTrainedModel) -> None:
    """Undo [`mark`] and what transformers and [`hf_holo.modeling.converted`] noted on loading."""
    for name in ("save_pretrained", "_upload_modified_files"):
        vars(model).pop(name, None)
    for name in QUANTIZED:
        vars(model).pop(name, None)
    for config in [model.config, *vars(model.config).values()]:
        if isinstance(config, PretrainedConfig):
            for name in QUANTIZED:
                vars(config).pop(name, None)
    forget_code(model)
    if hasattr(model.config, "make_dense"):
        model.config.make_dense()


def forget_code(model: PreTrainedModel) -> None:
    """The config no longer names the code in the folder that the model came from: the next one may have none."""
    own = {auto: name for auto, name in getattr(model.config, "auto_map", {}).items() if not _is_ours(name)}
    if own:
        model.config.auto_map = own
    else:
        vars(model.config).pop("auto_map", None)


def _is_ours(reference: str | Sequence[str | None]) -> bool:
    """Whether an entry of an `auto_map` names the code of a converted model."""
    return isinstance(reference, str) and reference.rpartition("--")[2].startswith(f"{CONVERTED.stem}.")


@torch.no_grad()
def restore_linears(model: nn.Module) -> nn.Module:
    """Replace every [`HoloLinear`], and every layer in small integers, by the dense layer that it stands for, of the
    class that it took the place of, in place: to merge adapters, or to export. What is saved then is a dense
    checkpoint, and so is its config. What rounding to integers took away does not come back."""
    for around in model.modules():
        inner = around._modules.get("base_layer")  # of an adapter
        if isinstance(inner, (HoloLinear, IntegerLinear)) and hasattr(around, "fan_in_fan_out"):
            vars(around)["fan_in_fan_out"] = inner.dense_class is Conv1D
    layers: list[HoloLinear | IntegerLinear] = [*holo_layers(model), *integer_linears(model)]
    replace(model, {layer: _dense(layer) for layer in layers})
    for module in model.modules():
        if isinstance(module, PreTrainedModel):  # adapters may be wrapped around it
            _unmark(module)
    return model


def _dense(layer: HoloLinear | IntegerLinear) -> nn.Module:
    """The layer as one matrix."""
    matrix = layer.dense_matrix()  # [O, I]
    made: dict[str, Any] = {"device": matrix.device, "dtype": matrix.dtype}
    dense: Any
    if layer.dense_class is Conv1D:
        dense = Conv1D(layer.out_features, layer.in_features).to(**made)
        dense.weight.copy_(matrix.T)
    else:
        dense = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, **made)
        dense.weight.copy_(matrix)
    if layer.bias is not None:
        dense.bias.copy_(layer.bias)
    return dense.train(layer.training)


# ---------------------------------------------------------------------------------------------- counting
@dataclass(frozen=True)
class _Census:
    modules: dict[str, nn.Module]
    kinds: dict[str, str]
    numbers: dict[str, tuple[int, int]]  # stored in a checkpoint, trained


def _census(model: nn.Module) -> _Census:
    """Every module with values of its own; a HoloLinear counts with its basis, a shared tensor once."""
    seen: set[int] = set()
    modules, kinds, numbers = {}, {}, {}
    for name, module in model.named_modules():
        if isinstance(module, HarmonicBasis):
            continue
        trained = sum(p.numel() for p in _new(module.parameters(isinstance(module, HoloLinear)), seen))
        stored = module.count_numbers()["stored"] if isinstance(module, HoloLinear) else trained
        if trained:
            modules[name], kinds[name], numbers[name] = module, type(module).__name__, (stored, trained)
    return _Census(modules, kinds, numbers)


def _new(parameters: Iterator[nn.Parameter], seen: set[int]) -> Iterator[nn.Parameter]:
    for parameter in parameters:
        if id(parameter) not in seen:
            seen.add(id(parameter))
            yield parameter


def _compare(before: _Census, after: _Census, errors: dict[str, float]) -> SurgeryReport:
    rows = []
    for name, (stored, trained) in after.numbers.items():
        rows.append(
            {
                "module": name,
                "before": before.kinds[name],
                "after": after.kinds[name],
                "numbers_before": before.numbers[name][0],
                "stored": stored,
                "trained": trained,
                "error": errors.get(name),
            }
        )
    return SurgeryReport(rows)


# ---------------------------------------------------------------------------------------------- in transformers
class HoloQuantizer(PlanQuantizer):
    """The quantizer where hf_holo is installed: it also plans the surgery of a dense checkpoint."""

    quantization_config: HoloSurgeryConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        if not self.pre_quantized and config.basis == "data" and config.layers is None:
            raise HoloError("basis: 'data' has to be fitted to activations: use `hf-holo convert --method calibrated`")

    def resolve(self, model: PreTrainedModel) -> HoloSurgeryConfig:
        return resolved(model, self.quantization_config)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        super()._process_model_after_weight_loading(model, **kwargs)
        forget_code(model)
        mark(model, self.quantization_config)
        if not self.pre_quantized:
            Proof.of_dense(model).check(model)
        return model
