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

# How transformers marks a model that a quantizer has made, and its config.
QUANTIZED = ("is_quantized", "hf_quantizer", "quantization_method", "quantization_config", "_pre_quantization_dtype")

ENTRY = {"harmonics", "basis", "folded", "pivoted", "lender"}  # what a plan says of a layer


class SurgeryPlan(QuantizationConfigMixin):
    """Which layers are holographic, as a checkpoint says it.

    Args:
        layers: by module name: `harmonics`, `basis`, `folded`, `pivoted` and `lender`, see `apply_surgery`.
        seed: of random bases.
        checksum: of the bases that are made anew, or None.
        kwargs: kept as they are.
    """

    def __init__(
        self,
        layers: dict[str, dict[str, Any]] | None = None,
        seed: int = 0,
        checksum: int | None = None,
        **kwargs,
    ):
        vars(self).update(kwargs, quant_method="holo", layers=layers, seed=seed, checksum=checksum)


class PlanQuantizer(HfQuantizer):
    """Swaps layers while `from_pretrained` builds a model, and makes the bases when the weights are there."""

    requires_parameters_quantization = False

    def resolve(self, model: PreTrainedModel) -> QuantizationConfigMixin:
        """The config with the plan for this model.

        Raises:
            ValueError: it holds none.
        """
        if self.quantization_config.layers is None:
            raise ValueError("layers=None: a surgery is planned by hf_holo, which is not imported")
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
        swap(model, config)
        for basis in _bases(model).values():
            basis.regenerate(torch.device("cpu"))  # a device_map cannot place what has no data

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for basis in _bases(model).values():
            basis.regenerate()  # transformers 5 leaves it empty
        if not self.pre_quantized:
            for layer in model.modules():
                if isinstance(layer, HoloLinear):
                    layer.reset_parameters()
        config, checksum = self.quantization_config, checksum_of_bases(model)
        if config.checksum not in (None, checksum):
            raise ValueError(
                f"checksum={config.checksum} of the bases that the model was made with is not that of those made here "
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
        return True  # without it Trainer refuses the model


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
            raise OSError(f"{file}: the weights of a converted model lie in safetensors files, and this is none")
    check_files(files)


def swap(model: nn.Module, config: QuantizationConfigMixin) -> dict[str, HoloLinear]:
    """Put new layers in the places that the plan names, and return them by name.

    Raises:
        ValueError: the plan is none, or the model has no layer of a name in it; no layer has been replaced then.
    """
    check_plan(config.layers)
    modules, new = dict(model.named_modules()), {}
    lenders_first = sorted(config.layers.items(), key=lambda item: item[1]["lender"] is not None)  # JSON sorts by name
    for name, entry in lenders_first:
        old = modules.get(name)
        if old is None or not is_linear(old):
            raise ValueError(
                f"layers: {type(model).__name__} has no linear layer {name!r}; was it converted with another release "
                "of transformers?"
            )
        outputs, inputs = dense_shape(old)
        basis: str | HarmonicBasis = new[entry["lender"]].basis if entry["lender"] else entry["basis"]
        new[name] = HoloLinear(
            inputs,
            outputs,
            entry["harmonics"],
            basis,
            bias=old.bias is not None,
            seed=named_seed(config.seed, name),
            folded=entry["folded"],
            pivoted=entry["pivoted"] and not entry["lender"],
            device=old.weight.device,
            dtype=old.weight.dtype,
        )
    for name, layer in new.items():  # only now, when none was refused
        for module in layer.modules():
            module._is_hf_initialized = True  # the model's own initialisation must not take it for its nn.Linear
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.train(model.training))
    return new


def check_plan(layers: dict[str, dict[str, Any]]) -> None:
    """Raise ValueError unless a plan, as a checkpoint brings it, says what it must of every layer."""
    if not isinstance(layers, dict) or not all(isinstance(e, dict) and e.keys() >= ENTRY for e in layers.values()):
        raise ValueError(f"layers: a plan gives {', '.join(sorted(ENTRY))} for the name of every layer")
    for name, entry in layers.items():
        lender = entry["lender"]
        if lender is not None and (lender not in layers or layers[lender]["lender"] is not None):
            raise ValueError(f"layers: {name!r} borrows from {lender!r}, which is no layer of the plan that lends")


def is_linear(module: nn.Module) -> bool:
    """Whether it is a dense linear layer that can be converted."""
    return isinstance(module, (nn.Linear, Conv1D)) and not isinstance(module, HoloLinear)


def dense_shape(layer: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a linear layer."""
    return tuple(layer.weight.shape[::-1] if isinstance(layer, Conv1D) else layer.weight.shape)


def checksum_of_bases(model: nn.Module) -> int | None:
    """Of all bases that are made and not stored, in the order of their names; None if there is none, or on meta."""
    bases = _bases(model)
    sums = [bases[name].checksum for name in sorted(bases) if bases[name].checksum is not None]
    return zlib.crc32(repr(sums).encode()) if sums else None


def _bases(model: nn.Module) -> dict[str, HarmonicBasis]:
    """All bases by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, HarmonicBasis)}
