"""The plan of a surgery: which layers become holographic, with how many harmonics."""

import copy
import functools
import json
import re
from importlib.resources import files
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils.quantization_config import QuantizationMethod

from ...errors import HoloError, unknown
from ...modeling.harmonics import BASES
from ...modeling.quantizer import SurgeryPlan, check_integers, check_plan, dense_shape, dense_weight, is_linear

LINEAR = (nn.Linear, Conv1D)

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

HARMONICS = 64  # of every layer, when neither harmonics nor a ratio is given, as in the HOLO reference


class HoloSurgeryConfig(SurgeryPlan):
    """Which layers become holographic, and how. The defaults are those of the HOLO reference
    (github.com/anttiluode/HOLO-pytorch): every linear layer in the blocks, a random basis that is recomputed on
    loading, amplitudes and phases as parameters.

    Args:
        modules: regular expressions; a layer is converted if one is found in its name. Default: every linear layer
            inside the blocks, but for those that choose among experts.
        exclude: regular expressions of layers that stay.
        keep_first, keep_last: number of blocks that stay at the start and at the end of every list of blocks (an
            encoder-decoder has two).
        harmonics: harmonics R of every layer; default 64, unless `ratio` is given.
        ratio: share of each layer's values that is kept, stored bases included; in (0, 1].
        basis: "random", "dct", "golden", or "data" (fitted to activations, by `hf-holo convert`).
        shared: layers that read the same input share one basis.
        folded: keep A · cos Φ as one parameter.
        pivoted: store a "data" basis pivoted.
        seed: of random bases.
        layers: the resolved plan, by module name; filled in by the surgery. Given, it replaces all of the above.
        checksum: of the bases that are recomputed on loading; filled in by the surgery, verified on loading.
        quantize, dense: "int8" or "int4", and the dense layers that are stored in it too; filled in by
            [`quantize_linears`].
        quant_method: "holo", by which transformers knows the config.

    Raises:
        HoloError: an argument is unknown, or a value of the wrong kind or out of range.
    """

    def __init__(
        self,
        modules: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        keep_first: int = 0,
        keep_last: int = 0,
        harmonics: int | None = None,
        ratio: float | None = None,
        basis: str = "random",
        shared: bool = False,
        folded: bool = False,
        pivoted: bool = False,
        seed: int = 0,
        layers: dict[str, dict[str, Any]] | None = None,
        checksum: int | None = None,
        quantize: str | None = None,
        dense: list[str] | None = None,
        quant_method: str = "holo",
        **others,
    ) -> None:
        self.quant_method = cast(QuantizationMethod, quant_method)  # an enumeration of its own methods
        self.modules, self.exclude = _patterns("modules", modules), _patterns("exclude", exclude)
        self.keep_first, self.keep_last = keep_first, keep_last
        self.harmonics, self.ratio = harmonics, ratio
        self.basis, self.shared, self.folded, self.pivoted, self.seed = basis, shared, folded, pivoted, seed
        self.layers = layers
        self.checksum = checksum
        self.quantize, self.dense = quantize, list(dense or [])
        if others:
            raise unknown("argument", next(iter(others)), vars(self))
        self._check()

    def _check(self) -> None:
        if self.harmonics is not None and self.ratio is not None:
            raise HoloError(f"harmonics: {self.harmonics} and ratio={self.ratio} exclude each other; give one of them")
        if self.harmonics is not None:
            _check_whole("harmonics", self.harmonics, least=1)
        for name in ("keep_first", "keep_last", "seed"):
            _check_whole(name, getattr(self, name), least=0)
        if self.ratio is not None and not (isinstance(self.ratio, (int, float)) and 0 < self.ratio <= 1):
            raise HoloError(f"ratio: {self.ratio!r} is not a number in (0, 1]")
        if self.quant_method != "holo":
            raise HoloError(f"quant_method: {self.quant_method!r} is not 'holo'")
        if self.basis not in BASES:
            raise HoloError(f"basis: {self.basis!r} is unknown; choose one of {', '.join(BASES)}")
        for name in ("shared", "folded", "pivoted"):
            if not isinstance(getattr(self, name), bool):
                raise HoloError(f"{name}: {getattr(self, name)!r} is neither True nor False")
        if self.quantize is not None and self.layers is None:
            raise HoloError(f"quantize: {self.quantize!r} comes after the surgery; call quantize_linears then")
        if self.layers is not None:
            try:
                check_plan(self.layers)
                check_integers(self)
            except ValueError as error:
                raise HoloError(str(error)) from None


def _check_whole(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise HoloError(f"{name}: {value!r} is not a whole number of at least {least}")


def _patterns(argument: str, given: str | list[str] | None) -> list[str] | None:
    patterns = [given] if isinstance(given, str) else given
    if patterns is None:
        return None
    if not isinstance(patterns, (list, tuple)) or not all(isinstance(pattern, str) for pattern in patterns):
        raise HoloError(f"{argument}: {given!r} is not a regular expression or a list of them")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise HoloError(f"{argument}: {pattern!r} is not a regular expression: {error}") from None
    return list(patterns)


def resolved(model: nn.Module, config: HoloSurgeryConfig) -> HoloSurgeryConfig:
    """A copy of the config that holds the plan for this model."""
    config = copy.deepcopy(config)
    if config.layers is None:
        config.layers = plan(model, config)
    return config


def plan(model: nn.Module, config: HoloSurgeryConfig) -> dict[str, dict[str, Any]]:
    """How each chosen layer is converted, by name: `harmonics`, `basis`, `folded`, `pivoted`, and `lender`, the layer
    whose basis it uses (or None)."""
    layers: dict[str, dict[str, Any]] = {}
    for name in choose(model, config):
        layer = model.get_submodule(name)
        lender = next((other for other in layers if config.shared and same_input(model, name, other)), None)
        rank = layers[lender]["harmonics"] if lender else _harmonics(name, layer, config)
        layers[name] = {
            "harmonics": rank,
            "basis": config.basis,
            "folded": config.folded,
            "pivoted": config.pivoted,
            "lender": lender,
        }
    return layers


def choose(model: nn.Module, config: HoloSurgeryConfig) -> list[str]:
    """Names of the layers to convert.

    Raises:
        HoloError: a pattern matches no linear layer, none is left, or one is tied to the embeddings.
    """
    linears = [name for name, module in model.named_modules() if is_linear(module) and is_its_product(module)]
    depths = {name: len(blocks) for name, blocks in block_lists(model).items()}
    if not linears or not (depths or config.modules):
        raise _no_blocks(model)
    for argument in ("modules", "exclude"):
        for pattern in getattr(config, argument) or ():
            if not any(re.search(pattern, name) for name in linears):
                raise HoloError(f"{argument}: {pattern!r} matches none of the linear layers, such as {linears[0]!r}")
    starts = tuple(f"{blocks}." for blocks in depths)
    inside = [n for n in linears if n.startswith(starts) and not is_router(model, n)]
    chosen = inside if config.modules is None else [n for n in linears if _matches(n, config.modules)]
    chosen = [n for n in chosen if not _matches(n, config.exclude or []) and not _stays(n, depths, config)]
    if not chosen:
        raise HoloError("modules, exclude, keep_first and keep_last leave no linear layer to convert")
    _check_ties(model, chosen)
    return chosen


@torch.no_grad()
def is_its_product(layer: nn.Module) -> bool:
    """Whether a layer computes its weight times the input, plus its bias. (A router may be a linear layer by class, and
    say which experts a token goes to.)"""
    if type(layer).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    weight, bias = dense_weight(layer), cast(torch.Tensor | None, layer.bias)
    x = torch.ones(1, 2, weight.shape[1], dtype=weight.dtype, device=weight.device)
    right = F.linear(x, weight, bias)
    try:
        y = layer(x)
    except Exception:
        return False
    return isinstance(y, torch.Tensor) and y.shape == right.shape and (y.is_meta or torch.allclose(y, right))


def is_router(model: nn.Module, name: str) -> bool:
    """Whether a layer chooses among experts: it has as many outputs as there are experts next to it, or next to the
    module that it is in. A small error there sends tokens to other experts, so it is converted only where it is named.
    """
    outputs, _ = dense_shape(model.get_submodule(name))
    around = name.rpartition(".")[0]
    for parent in (around, around.rpartition(".")[0]):
        for label, module in model.get_submodule(parent).named_children():
            if "expert" in label:
                counts = [len(module)] if isinstance(module, (nn.ModuleList, nn.ModuleDict)) else []
                counts += [len(p) for p in module.parameters() if p.dim() == 3]
                if outputs in counts:
                    return True
    return False


def _check_ties(model: nn.Module, chosen: list[str]) -> None:
    """Raises HoloError if a layer shares its weight with another: they would differ after the surgery."""
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        other = name if weight is None else owners.setdefault(id(weight), name)
        if other == name or not {name, other}.intersection(chosen):
            continue
        if isinstance(model.get_submodule(other), nn.Embedding):
            raise HoloError(f"modules: {name!r} is tied to the input embeddings and cannot be converted; leave it out")
        raise HoloError(f"modules: {other!r} and {name!r} are tied, and cannot be converted; exclude both")


def _matches(name: str, patterns: list[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _stays(name: str, depths: dict[str, int], config: HoloSurgeryConfig) -> bool:
    """Whether a layer is in the first or last blocks of its list, which stay."""
    for blocks, depth in depths.items():
        if name.startswith(f"{blocks}."):
            number = int(name.removeprefix(f"{blocks}.").partition(".")[0])
            return number < config.keep_first or number >= depth - config.keep_last
    return False


def block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The lists of blocks, by name: one in most models, two in an encoder-decoder or a model of text and images.

    They are the outermost lists in the body of the model that hold linear layers inside their members; a list of linear
    layers, or one outside the body, belongs to a head.
    """
    body = set((model.base_model if isinstance(model, PreTrainedModel) else model).modules())
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and module in body and not any(name.startswith(f"{n}.") for n in found):
            linears = {m for m in module.modules() if isinstance(m, (nn.Linear, Conv1D))}
            if linears.difference(module):
                found[name] = module
    return found


def block_list(model: nn.Module) -> str:
    """The one of [`block_lists`] with the most parameters.

    Raises:
        HoloError: there is none.
    """
    lists = block_lists(model)
    if not lists:
        raise _no_blocks(model)
    return max(lists, key=lambda name: sum(p.numel() for p in lists[name].parameters()))


def other_matrices(model: nn.Module) -> dict[str, int]:
    """What surgery cannot convert in the blocks: matrices and stacks of them outside linear layers, above all experts
    that are fused in one tensor.

    Returns:
        How many values they have, by name (without the index of the block) and class of the module; those of all
            blocks together.
    """
    found: dict[str, int] = {}
    starts = tuple(f"{blocks}." for blocks in block_lists(model))
    for name, module in model.named_modules():
        if not name.startswith(starts) or isinstance(module, (*LINEAR, nn.Embedding, *CONVOLUTIONS)):
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1:
                kind = f"{re.split(r'[.][0-9]+[.]', name, maxsplit=1)[-1]}.{leaf} ({type(module).__name__})"
                found[kind] = found.get(kind, 0) + parameter.numel()
    return found


def _no_blocks(model: nn.Module) -> HoloError:
    return HoloError(f"model: {type(model).__name__} has no list of blocks; name the layers with modules=")


def same_input(model: nn.Module, a: str, b: str) -> bool:
    """Whether two layers read the same input, by the table of the architectures (shared_inputs.json)."""
    config: Any = model.config
    for group in shared_inputs().get(config.model_type, ()):
        end_a, end_b = (next((end for end in group if name.endswith(f".{end}")), "") for name in (a, b))
        if end_a and end_b and a.removesuffix(end_a) == b.removesuffix(end_b):
            return True
    return False


@functools.cache
def shared_inputs() -> dict[str, list[list[str]]]:
    """For each family, by `model_type`: groups of layers of a block that read the same input."""
    entries = json.loads(files(__package__).joinpath("shared_inputs.json").read_text(encoding="utf-8"))
    return {family: entry["groups"] for entry in entries for family in entry["families"]}


def _harmonics(name: str, layer: nn.Module, config: HoloSurgeryConfig) -> int:
    outputs, inputs = dense_shape(layer)
    if config.ratio is None:
        harmonics = config.harmonics or HARMONICS
        if harmonics > inputs:
            raise HoloError(
                f"harmonics: {harmonics} is more than the {inputs} inputs of {name!r}; use at most {inputs}"
            )
        return harmonics
    per_harmonic = outputs * (1 if config.folded else 2)
    bias = 0 if layer.bias is None else outputs
    harmonics = min(int((config.ratio * (outputs * inputs + bias) - bias) / per_harmonic), inputs)
    if harmonics < 1:
        raise HoloError(
            f"ratio: {config.ratio} leaves {name!r} ({outputs}×{inputs}) not one harmonic; "
            f"give at least {(per_harmonic + bias) / (outputs * inputs + bias):.3g}"
        )
    return harmonics
