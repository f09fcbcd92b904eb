"""Proof that a model still works after surgery, and the way back to what it was.

A layer may look like a linear one and be used as something else: the model writes to its weight, ties it to another, or
reads more from it than its product. No list of architectures can be complete, so every surgery is followed by a forward
pass over two tokens and by loading what would be saved, without memory, on the meta device.
"""

import copy
import inspect
import json
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from ...errors import HoloError, first_line
from ...modeling.quantizer import QUANTIZED

Inputs = dict[str, torch.Tensor]

REMEDY = "leave out with exclude= what it uses in another way than as a linear layer"


@dataclass(frozen=True)
class Proof:
    """What a dense model can do, and the model must be able to do after the surgery too.

    Attributes:
        inputs: that it runs on; None if no guess fits it.
        loads: its state loads into a model made from its config.
        runs_loaded: that model runs, on the meta device: some change their weights in their first forward pass alone.
    """

    inputs: Inputs | None
    loads: bool
    runs_loaded: bool

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Proof":
        """Try the dense model, which stays as it is; a warning says so if nothing can be tried."""
        inputs = next((guess for guess in guesses(model) if _running_fails(model, guess) is None), None)
        if inputs is None and model.device.type != "meta":
            warnings.warn(
                f"{type(model).__name__} was not run after the surgery: it takes no input that hf_holo knows; try it",
                stacklevel=3,
            )
        twin, failure = _loaded(model)
        return cls(inputs, failure is None, twin is not None and _running_fails(twin, inputs) is None)

    @classmethod
    def of_dense(cls, converted: PreTrainedModel) -> "Proof":
        """Try what a model that was converted while it was loaded would be without: dense, without memory."""
        config = copy.deepcopy(converted.config)
        for part in _configs(config):
            for name in QUANTIZED:
                vars(part).pop(name, None)
        with torch.device("meta"):
            proof = cls.of(type(converted)(config))
        if proof.inputs is None:
            return proof
        return replace(proof, inputs=next(g for g in guesses(converted) if g.keys() == proof.inputs.keys()))

    def check(self, model: PreTrainedModel) -> None:
        """Raises HoloError if the converted model does not do what the dense one did."""
        failure = _running_fails(model, self.inputs)
        if self.loads and failure is None:
            twin, failure = _loaded(model)
            if failure is not None:
                raise HoloError(f"model: converted and saved, this {type(model).__name__} would not load ({failure})")
            failure = _running_fails(twin, self.inputs) if twin is not None and self.runs_loaded else None
        if failure is not None:
            raise HoloError(f"model: converted, this {type(model).__name__} does not run ({failure}); {REMEDY}")


# Trials -------------------------------------------------------------------------------------------------------------


def guesses(model: PreTrainedModel) -> Iterator[Inputs]:
    """Inputs that models of transformers take: two tokens, an image, a tenth of a second of sound."""
    made = _inputs(model)
    taken = inspect.signature(model.forward).parameters
    first = [model.main_input_name] if model.main_input_name in made else []
    for names in (first, ["input_ids"], ["pixel_values"], ["input_ids", "pixel_values"], ["input_features"]):
        for decoder in ([], ["decoder_input_ids"]):
            if names and taken.keys() >= {*names, *decoder}:
                yield {name: made[name] for name in names + decoder}


def _inputs(model: PreTrainedModel) -> Inputs:
    config, device = model.config, torch.device("cpu") if hasattr(model, "hf_device_map") else model.device
    text = config.get_text_config()
    vocabulary, end = getattr(text, "vocab_size", None) or 2, getattr(text, "eos_token_id", None)
    ids = torch.tensor([[vocabulary // 2, end if isinstance(end, int) else vocabulary // 3]], device=device)
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or 8
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    real: dict[str, Any] = {"dtype": model.dtype, "device": device}
    frames = 2 * (getattr(config, "max_source_positions", None) or 50)
    return {
        "input_ids": ids,
        "decoder_input_ids": ids,
        "pixel_values": torch.zeros(1, getattr(vision, "num_channels", None) or 3, height, width, **real),
        "input_values": torch.zeros(1, 1600, **real),
        "input_features": torch.zeros(1, getattr(config, "num_mel_bins", None) or 80, frames, **real),
    }


@torch.no_grad()
def _running_fails(model: PreTrainedModel, inputs: Inputs | None) -> str | None:
    """Why the model does not run on these inputs; None if it does, or there are none. The model stays as it is."""
    if inputs is None:
        return None
    inputs = {name: x.to(model.device) if model.device.type == "meta" else x for name, x in inputs.items()}
    with untouched(model):
        try:
            model.eval()(**inputs)
        except Exception as error:
            return f"{type(error).__name__}: {first_line(error)}"
    return None


def _loaded(model: PreTrainedModel) -> tuple[PreTrainedModel | None, str | None]:
    """The model as it would be loaded, on the meta device; or None, and the reason."""
    config = json.loads(model.config.to_json_string(use_diff=False))
    state = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    try:
        with _silence():
            twin, found = type(model).from_pretrained(
                None,
                config=type(model.config).from_dict(config),
                state_dict=state,
                device_map="meta",
                output_loading_info=True,
            )
    except Exception as error:
        return None, f"{type(error).__name__}: {first_line(error)}"
    troubles = (f"{key.replace('_', ' ')}: {sorted(map(str, found[key]))[0]}" for key in KEYS if found[key])
    failure = next(troubles, None)
    return (twin if failure is None else None), failure


KEYS = ("missing_keys", "unexpected_keys", "mismatched_keys")  # of transformers' account of loading


@contextmanager
def _silence() -> Iterator[None]:
    """transformers says nothing, and shows no bar."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


# The way back -------------------------------------------------------------------------------------------------------


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """If this block fails, the model is as it was before: its modules, attributes and configs.

    The block must not write to tensors that are there already; [`untouched`] is for what does.
    """
    before = _Structure(model)
    try:
        yield
    except BaseException:
        before.restore()
        raise


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """The model is as it was after this block, the values in it included."""
    before, numbers = _Structure(model), _Originals(model)
    try:
        with numbers:
            yield
    finally:
        before.restore()
        numbers.restore()


class _Structure:
    """The modules of a model, with all their attributes, and its configs."""

    TABLES = ("_parameters", "_buffers", "_modules")

    def __init__(self, model: nn.Module) -> None:
        configs = {id(part): part for module in model.modules() for part in _configs(getattr(module, "config", None))}
        self.attributes = [(owner, dict(vars(owner))) for owner in [*model.modules(), *configs.values()]]
        self.tables = [(table, dict(table)) for m in model.modules() for table in (vars(m)[n] for n in self.TABLES)]

    def restore(self) -> None:
        for owner, attributes in self.attributes:
            vars(owner).clear()
            vars(owner).update(attributes)
        for table, content in self.tables:
            table.clear()
            table.update(content)


def _configs(config: Any) -> list[PretrainedConfig]:
    """A config and those in it."""
    if not isinstance(config, PretrainedConfig):
        return []
    return [config, *(inner for value in vars(config).values() for inner in _configs(value))]


class _Originals(TorchDispatchMode):
    """Keeps a copy of each tensor of a model from before the first operation that writes to it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.owners = {_storage(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
        self.copies: dict[int, torch.Tensor] = {}

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        arguments = func._schema.arguments
        values = [*args, *(kwargs.get(argument.name) for argument in arguments[len(args) :])]
        for argument, value in zip(arguments, values, strict=True):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in value if isinstance(value, (list, tuple)) else [value]:
                    self._keep(tensor)
        return func(*args, **kwargs)

    def _keep(self, tensor: Any) -> None:
        key = _storage(tensor) if isinstance(tensor, torch.Tensor) else None
        if key in self.owners and key not in self.copies:
            self.copies[key] = self.owners[key].detach().clone()

    @torch.no_grad()
    def restore(self) -> None:
        for key, original in self.copies.items():
            self.owners[key].copy_(original)


def _storage(tensor: torch.Tensor) -> int:
    """The memory that a tensor and its views share."""
    return tensor.untyped_storage()._cdata
