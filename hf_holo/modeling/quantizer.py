"""What turns a converted checkpoint back into a model: `from_pretrained` swaps layers before it reads their weights.

It is a quantizer of transformers (`quant_method` "holo") that follows the plan in the config of the checkpoint.
"""

import copy
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .checkpoint import check_files, check_finite, check_offloaded, weight_files
from .harmonics import HarmonicBasis, HoloLinear, named_seed
from .integers import KINDS, IntegerLinear, IntegerMatrix
from .validation import check_choice

# How transformers marks a model that a quantizer has made, and its config.
QUANTIZED = ("is_quantized", "hf_quantizer", "quantization_method", "quantization_config", "_pre_quantization_dtype")

ENTRY = {"harmonics", "basis", "folded", "pivoted", "lender"}  # what a plan says of a layer


class SurgeryPlan(QuantizationConfigMixin):
    """Which layers are holographic, as a checkpoint says it.

    Args:
        layers: by module name: `harmonics`, `basis`, `folded`, `pivoted` and `lender`, see `apply_surgery`.
        seed: of random bases.
        checksum: of the bases that are recomputed, or None.
        quantize: "int8" or "int4": what the layers are stored in, see [`IntegerMatrix`]; None: as they are.
        dense: names of the dense layers that are stored in it too.
        kwargs: kept as they are.
    """

    layers: dict[str, dict[str, Any]] | None
    seed: int
    checksum: int | None
    quantize: str | None
    dense: list[str]

    def __init__(
        self,
        layers: dict[str, dict[str, Any]] | None = None,
        seed: int = 0,
        checksum: int | None = None,
        quantize: str | None = None,
        dense: Iterable[str] = (),
        **kwargs,
    ) -> None:
        vars(self).update(kwargs, quant_method="holo", layers=layers, seed=seed, checksum=checksum)
        self.quantize, self.dense = quantize, list(dense)


class PlanQuantizer(HfQuantizer):
    """Swaps layers while `from_pretrained` builds a model, and makes the bases when the weights are there."""

    requires_parameters_quantization = False
    quantization_config: SurgeryPlan

    def resolve(self, model: PreTrainedModel) -> SurgeryPlan:
        """The config with the plan for this model.

        Raises:
            ValueError: it has none.
        """
        if self.quantization_config.layers is None:
            raise ValueError("layers: None; a surgery is planned by hf_holo, which is not imported")
        return copy.deepcopy(self.quantization_config)

    def update_tp_plan(self, config: PretrainedConfig) -> PretrainedConfig:
        """Not about plans: nothing else is called before transformers 4.57 opens a file. It does not say which one, so
        this looks into the folder that `AutoModel...from_pretrained` was given."""
        check_safe(local_files(config))
        return config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        check_safe(checkpoint_files or local_files(model.config))  # transformers 5 opens them later
        config = self.quantization_config = model.config.quantization_config = self.resolve(model)
        partial = type(model).__name__ not in (model.config.architectures or ())  # another than the one converted
        for layer in swap(model, config, partial=self.pre_quantized and partial).values():
            layer.loading = True
        for basis in _bases(model).values():
            basis.regenerate(torch.device("cpu"))  # a device_map cannot place what has no data

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for basis in _bases(model).values():
            basis.regenerate()  # transformers 5 leaves it empty
        for matrix in integer_matrices(model):
            matrix.settle()
        for linear in integer_linears(model):
            linear.loading = False
        for layer in holo_layers(model):
            layer.loading = False
            if not self.pre_quantized:
                layer.reset_parameters()
            _agree_on_dtype(layer)
        config, checksum = self.quantization_config, checksum_of_bases(model)
        if config.checksum not in (None, checksum):
            raise ValueError(
                f"checksum: {config.checksum} of the bases that the model was made with is not that of those made here "
                f"({checksum}): its weights would mean something else"
            )
        config.checksum = checksum
        check_finite(model, "the converted model")
        check_offloaded(model, "the converted model")
        return model

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        return safe_serialization is not False  # a pickle would not be loaded again

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Without it Trainer trains nothing but adapters, and says so."""
        return self.quantization_config.quantize is None


def local_files(config: PretrainedConfig) -> list[Path]:
    """The files with the weights in the folder that a config is from, if it is from one: safetensors, else pickles."""
    if not config.name_or_path:
        return []
    folder = Path(config.name_or_path)
    return weight_files(folder) if any(folder.glob("*.safetensors")) else list(folder.glob("pytorch_model*.bin"))


def check_safe(files: Iterable[str | Path]) -> None:
    """Refuse weights that are pickled, cut off or something else.

    Raises:
        OSError: the message names the file.
    """
    files = list(files)
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise OSError(f"{file}: the weights of a converted model must be in safetensors files, and this is not one")
    check_files(files)


def swap(model: nn.Module, config: SurgeryPlan, partial: bool = False) -> dict[str, HoloLinear | IntegerLinear]:
    """Put new layers in the places that the plan names.

    Args:
        model: with dense layers there.
        config: with the plan; entries that the model has no layer for are taken out.
        partial: the plan may be another model's, of which this one is a part: see [`places`].

    Returns:
        The new layers, by their names in this model.

    Raises:
        ValueError: the plan is not valid, or the model has no layer of a name in it; no layer has been replaced then.
    """
    layers, dense = check_plan(config.layers), check_integers(config)
    modules: dict[str, Any] = dict(model.named_modules())
    new: dict[str, HoloLinear] = {}
    found = places(model, [*layers, *dense], partial)
    if len(found) < len(layers) + len(dense):
        config.layers = layers = {name: entry for name, entry in layers.items() if name in found}
        config.dense = dense = [name for name in dense if name in found]
        config.checksum = None  # it was of all bases
    lenders_first = sorted(layers.items(), key=lambda item: item[1]["lender"] is not None)  # JSON sorts by name
    for name, entry in lenders_first:
        old = modules[found[name]]
        outputs, inputs = dense_shape(old)
        basis: str | HarmonicBasis = new[entry["lender"]].basis if entry["lender"] else entry["basis"]
        new[name] = HoloLinear(
            inputs,
            outputs,
            entry["harmonics"],
            basis,
            bias=old.bias is not None,
            seed=named_seed(config.seed, name),  # the name in the plan: in another head's model the layer has another
            folded=entry["folded"],
            pivoted=entry["pivoted"] and not entry["lender"],
            device=old.weight.device,
            dtype=old.weight.dtype,
        )
        new[name].dense_class = Conv1D if isinstance(old, Conv1D) else nn.Linear
    if config.quantize is not None:
        for layer in new.values():
            layer.to_integers(config.quantize)
    plain = {name: IntegerLinear.like(modules[found[name]], config.quantize or "") for name in dense}
    everything: dict[str, HoloLinear | IntegerLinear] = {**new, **plain}
    for module in (part for layer in everything.values() for part in layer.modules()):
        vars(module)["_is_hf_initialized"] = True  # else the model would initialise it as its nn.Linear
    replace(model, {modules[found[name]]: layer.train(model.training) for name, layer in everything.items()})
    return {found[name]: layer for name, layer in everything.items()}


def places(model: nn.Module, layers: Iterable[str], partial: bool) -> dict[str, str]:
    """Where the layers of a plan are in this model: names in the plan to names of modules.

    As with dense weights, a plan of a model with a head fits its base model and other heads on it, and the other way
    round: the name of the base model within the others is put before the names, or taken away; so is that of a part of
    a composite model from the names of this part.

    Args:
        model: with dense layers.
        layers: their names in the plan.
        partial: leave out those for which the model has no part: a base model has no head, an encoder no decoder, and
            one with fewer blocks not the last ones.

    Raises:
        ValueError: a layer is missing.
    """
    modules = dict(model.named_modules())
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    first = {name.partition(".")[0] for name in layers}
    part = f"{first.pop()}." if len(first) == 1 else prefix
    found, missing = {}, []
    for name in layers:
        names = [name, prefix + name, name.removeprefix(prefix), name.removeprefix(part)]
        place = next((n for n in names if is_linear(modules.get(n))), None)
        if place is not None:
            found[name] = place
        elif not partial or any(_block(modules, n) is not None for n in names):
            missing.append(name)
    if missing or not found:
        raise ValueError(_why_missing(model, [*missing, *layers]))
    return found


def _block(modules: dict[str, nn.Module], name: str) -> nn.Module | None:
    """The block that the layer of this name would be in, if there is one: a member of a list of blocks."""
    parts = name.split(".")
    number = next((n for n, part in enumerate(parts) if part.isdigit()), len(parts))
    return modules.get(".".join(parts[: number + 1])) if number < len(parts) else None


def _why_missing(model: nn.Module, missing: list[str]) -> str:
    name = next((name for name in missing if "expert" in name), missing[0])
    stacked = next((n for n, p in model.named_parameters() if p.dim() == 3 and "expert" in n), None)
    if "expert" in name and stacked is not None:
        return (
            f"layers: {name!r} was converted where each expert has layers of its own, as in transformers 4; in this "
            f"release the experts of {type(model).__name__} are fused, in one tensor {stacked!r}. Load it with the "
            "release that it was converted with"
        )
    return (
        f"layers: {type(model).__name__} has no linear layer {name!r}; was it converted with another release of "
        "transformers?"
    )


def replace(model: nn.Module, new: dict[nn.Module, nn.Module]) -> None:
    """Put modules in the places of others, everywhere in the model."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in new:
                setattr(parent, name, new[child])


def check_plan(layers: Any) -> dict[str, dict[str, Any]]:
    """A plan as a checkpoint brings it; raises ValueError unless it says what it must of every layer."""
    if not isinstance(layers, dict) or not all(isinstance(e, dict) and e.keys() >= ENTRY for e in layers.values()):
        raise ValueError(f"layers: a plan gives {', '.join(sorted(ENTRY))} for the name of every layer")
    for name, entry in layers.items():
        lender = entry["lender"]
        if lender is not None and (lender not in layers or layers[lender]["lender"] is not None):
            raise ValueError(f"layers: {name!r} borrows from {lender!r}, which is not a layer of the plan that lends")
    return layers


def check_integers(config: SurgeryPlan) -> list[str]:
    """The names of dense layers that a plan stores in small integers; raises ValueError unless they fit the plan."""
    check_choice("quantize", config.quantize, (None, *KINDS))
    dense = config.dense
    if not isinstance(dense, list) or not all(isinstance(n, str) and n not in (config.layers or {}) for n in dense):
        raise ValueError("dense: not a list of the names of layers that are not holographic")
    if dense and config.quantize is None:
        raise ValueError(f"dense: {dense[0]!r} is to be stored in integers, but quantize does not say in which")
    return dense


def is_linear(module: nn.Module | None) -> bool:
    """Whether it is a dense linear layer that can be converted."""
    return isinstance(module, (nn.Linear, Conv1D)) and not isinstance(module, (HoloLinear, IntegerLinear))


def dense_shape(layer: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a linear layer."""
    outputs, inputs = dense_weight(layer).shape
    return outputs, inputs


def dense_weight(layer: nn.Module) -> torch.Tensor:
    """The weight of a linear layer, `[outputs, inputs]`; Conv1D keeps it the other way round."""
    weight: Any = layer.weight
    return weight.T if isinstance(layer, Conv1D) else weight


def checksum_of_bases(model: nn.Module) -> int | None:
    """Of all bases that are computed and not stored, in the order of their names; None if there is none, or on meta."""
    bases = _bases(model)
    sums = [bases[name].checksum for name in sorted(bases) if bases[name].checksum is not None]
    return zlib.crc32(repr(sums).encode()) if sums else None


def holo_layers(model: nn.Module) -> list[HoloLinear]:
    """All of them, each once."""
    return [module for module in model.modules() if isinstance(module, HoloLinear)]


def integer_linears(model: nn.Module) -> list[IntegerLinear]:
    """Dense layers that are stored in small integers, each once."""
    return [module for module in model.modules() if isinstance(module, IntegerLinear)]


def integer_matrices(model: nn.Module) -> list[IntegerMatrix]:
    """All matrices in small integers, each once."""
    return [module for module in model.modules() if isinstance(module, IntegerMatrix)]


def _agree_on_dtype(layer: HoloLinear) -> None:
    """A layer that transformers keeps in float32 has its own basis in float32, too."""
    if "own_basis" in layer._modules and layer.own_basis.dtype != layer.dtype:
        layer.own_basis.to(layer.dtype)


def _bases(model: nn.Module) -> dict[str, HarmonicBasis]:
    """All bases by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, HarmonicBasis)}
