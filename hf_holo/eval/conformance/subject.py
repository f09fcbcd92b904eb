"""The model under test: what it says of itself, its weights moved away from their start, and inputs that fit it."""

import copy
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.pytorch_utils import Conv1D

from ...data.processors import input_sizes
from ...errors import HoloError
from ...registry import capabilities_of

# What models continue from is called by one of these names; first comes that of the transformers in use.
CACHE_NAMES = ("cache", "past_key_values", "cache_params")
if "cache" not in BaseModelOutputWithPast.__dataclass_fields__:  # before 5.24
    CACHE_NAMES = ("past_key_values", "cache_params", "cache")
EXACT, ROUNDED = 1e-8, 1e-4  # relative tolerances of equivalences, see `Subject.tolerance`

# What a check may need, and why it does not apply to a model without it. The names of arguments of `forward` and the
# capabilities are features too.
FEATURES = {
    "text": "it does not take token ids alone",
    "several senses": "it has one sense",
    "frames": "it gives no output for every moment of a sound",
    "causal": "it is bidirectional",
    "bidirectional": "it is causal",
    "generation": "it does not generate",
    "generation from embeddings": "generate() takes no inputs_embeds for it",
    "cache": "it continues from no cache",
    "token outputs": "its output is not one vector per token",
    "pooled output": "its output is not one vector per text",
    "gradient checkpointing": "it does not support gradient checkpointing",
    "tying": "it has no output embeddings that could be tied",
    "linear layers": "it has no linear layer",
    "naive twins": "no operation that it uses has a naive twin",
}
INPUTS = {"text": "input_ids", "vision": "pixel_values", "audio": "input_values"}  # what each modality is called
DEFAULT_PICTURE, DEFAULT_SOUND = (3, 32, 32), (4000,)  # where the config says nothing
AnyModule = TypeVar("AnyModule", bound=nn.Module)
CAPABILITIES = ("constant_state", "packing", "rollback", "strict_arguments")


class Subject:
    """One model under test, on torch's default device: to test on a GPU, work under `with torch.device("cuda")`.

    Args:
        source: the model to test (it is copied and never changed), or its class.
        config: the config to build a model of that class with; only with a class.
        name: how reports call it; default: the name of the class.
        capabilities: flags that the model claims; default: what the model, its registration or its interface says.
        seed: seed of weights and inputs.
        move_weights: move the weights away from where they are, see [`perturb`].

    Raises:
        HoloError: the model is an encoder with a decoder or no `PreTrainedModel`, or a class comes without a config.
    """

    def __init__(
        self,
        source: PreTrainedModel | type[PreTrainedModel],
        config: PretrainedConfig | None = None,
        name: str | None = None,
        capabilities: Sequence[str] | None = None,
        seed: int = 0,
        move_weights: bool = True,
    ) -> None:
        self.model_class = source if isinstance(source, type) else type(source)
        if not issubclass(self.model_class, PreTrainedModel):
            raise HoloError(f"model: {self.model_class.__name__} is not a PreTrainedModel of transformers")
        self._source = source
        given = config if isinstance(source, type) else source.config
        if given is None:
            raise HoloError(f"config: None; {self.model_class.__name__} is a class, so the config of a model is needed")
        self._given_config = given
        if self._given_config.is_encoder_decoder:
            raise HoloError(f"model: {self.model_class.__name__} is an encoder with a decoder; give one of the two")
        self.name = name or self.model_class.__name__
        self.seed = seed
        self._capabilities = capabilities
        self._move_weights = move_weights

    def __repr__(self) -> str:
        return self.name

    # ------------------------------------------------------------------------------------------ what it is
    @property
    def config(self) -> PretrainedConfig:
        """The config of the built model, which may say more than the one that was given."""
        return self._weights.config

    @cached_property
    def arguments(self) -> frozenset[str]:
        """Names of the arguments of `forward`, and of those that it hands on as `*args` or `**kwargs`."""
        names: set[str] = set()
        for forward in (vars(cls)["forward"] for cls in self.model_class.__mro__ if "forward" in vars(cls)):
            parameters = inspect.signature(forward).parameters.values()
            rest = [p for p in parameters if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
            names.update(p.name for p in parameters if p not in rest)
            if not rest:
                break
        return frozenset(names - {"self"})

    @cached_property
    def capabilities(self) -> frozenset[str]:
        """What the model claims: its own flags, those of its registration, or what its interface implies."""
        if self._capabilities is not None:
            return frozenset(self._capabilities)
        claimed = capabilities_of(self.model_class, self.config)
        if claimed is not None:
            return claimed
        return frozenset({"rollback"} if self._generates and not self.model_class._is_stateful else ())

    @property
    def _generates(self) -> bool:
        return self.model_class.can_generate()

    @cached_property
    def causal(self) -> bool:
        """What the config says, else whether the class generates text."""
        declared = getattr(self.config, "is_causal", None)
        return self._generates if declared is None else bool(declared)

    @cached_property
    def cache_name(self) -> str | None:
        """The argument of `forward` (and field of its output) that a causal model continues from."""
        names = [name for name in CACHE_NAMES if name in self.arguments]
        return names[0] if names and self.causal else None

    @property
    def _can_tie(self) -> bool:
        declared = bool(self.model_class._tied_weights_keys) and hasattr(self.config, "tie_word_embeddings")
        return declared and self._weights.get_output_embeddings() is not None

    @cached_property
    def linear_layers(self) -> list[str]:
        """Names of the linear layers, but for the output embeddings: what an adapter could reach."""
        head = self._weights.get_output_embeddings()
        layers = ((n, m) for n, m in self._weights.named_modules() if isinstance(m, (nn.Linear, Conv1D)))
        return [name for name, layer in layers if layer is not head]

    @cached_property
    def features(self) -> frozenset[str]:
        """Everything that a check may ask for: see `FEATURES`."""
        text = self._takes_text
        features = set(self.arguments.difference(CACHE_NAMES) | (self.capabilities & set(CAPABILITIES)))
        features -= {argument for name, argument in INPUTS.items() if name not in self.modalities}
        features.add("causal" if self.causal else "bidirectional")
        if len(self.modalities) > 1:
            features.add("several senses")
        if self.modalities == ["audio"] and self.run(**self.inputs(1)).dim() == 3:
            features.add("frames")
        if text:
            features.add("text")
            per_token = self.run(self.ids(1, 3)).shape[:-1] == (1, 3)
            features.add("token outputs" if per_token else "pooled output")
        if self._generates and self.causal and text:
            features.add("generation")
            generating: Any = self.model_class
            if "inputs_embeds" in inspect.signature(generating.prepare_inputs_for_generation).parameters:
                features.add("generation from embeddings")
        if self.cache_name:
            features.add("cache")
        if self.model_class.supports_gradient_checkpointing:
            features.add("gradient checkpointing")
        if self._can_tie:
            features.add("tying")
        if self.linear_layers:
            features.add("linear layers")
        if self.naive_twins:
            features.add("naive twins")
        return frozenset(features)

    def require(self, *needs: str) -> None:
        """Raise HoloError if a feature is lacking."""
        reason = self.lacks(needs)
        if reason is not None:
            raise HoloError(f"model: {self.name} cannot be checked: {reason}")

    def lacks(self, needs: Sequence[str]) -> str | None:
        """Why a check with these needs does not apply, or None if it does."""
        for need in needs:
            if need not in self.features:
                claim = f"it does not claim {need!r}" if need in CAPABILITIES else f"forward takes no {need}"
                return FEATURES.get(need, claim)
        return None

    @cached_property
    def layer_modules(self) -> list[ModuleType]:
        """The Python modules in which the classes of its layers are defined."""
        names = {type(layer).__module__ for layer in self.model.modules()}
        return [sys.modules[name] for name in sorted(names) if name in sys.modules]

    @cached_property
    def naive_twins(self) -> dict[FunctionType, FunctionType]:
        """Fast operations that its layers may call to their twins: `f_naive` stands where `f` is defined."""
        operations = (f for module in self.layer_modules for f in vars(module).values() if isinstance(f, FunctionType))
        twins = {f: getattr(sys.modules.get(f.__module__), f"{f.__name__}_naive", None) for f in operations}
        return {f: twin for f, twin in twins.items() if twin is not None}

    @cached_property
    def max_length(self) -> int | None:
        """The longest sequence it takes; None for a model with a state of constant size."""
        if "constant_state" in self.capabilities:
            return None
        positions = getattr(self.config, "max_position_embeddings", None)
        return None if positions is None else positions - self.first_position

    @cached_property
    def first_position(self) -> int:
        """The position of the first token: 0, or what follows that of padding, as RoBERTa counts."""
        layers = (layer for name, layer in self.model.named_modules() if name.endswith("position_embeddings"))
        return 1 + max([-1, *(pad for layer in layers if (pad := getattr(layer, "padding_idx", None)) is not None)])

    def lengths(self, *wanted: int) -> list[int]:
        """Those of the wanted lengths that the model takes."""
        return [length for length in wanted if self.max_length is None or length <= self.max_length]

    # ------------------------------------------------------------------------------------------ the model
    @cached_property
    def _weights(self) -> PreTrainedModel:
        """In float32 and evaluation mode, every weight moved: a flat fresh gate would hide a leak."""
        if isinstance(self._source, type):
            with torch.random.fork_rng(devices=[]):  # a probe during training must not touch its random numbers
                torch.manual_seed(self.seed)
                model = self._source(copy.deepcopy(self._given_config))
        else:
            model = copied(self._source)
            _without_autocast(model)
        # .float() refuses a model that a quantizer has made; transformers wraps .to() without types
        model = model.to(torch.get_default_device(), torch.float32).eval()  # type: ignore[arg-type]
        text_config = model.config.get_text_config()
        if "text" in self.modalities and getattr(text_config, "pad_token_id", None) is None:
            text_config.pad_token_id = 0  # heads that pool find the end of a text by it
        return perturb(model, self.seed) if self._move_weights else model

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model in float64 and evaluation mode, to look at: who changes a model takes a [`copy`]."""
        return self.copy().requires_grad_(False)

    def copy(self, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
        """A model of one's own with the same weights, in evaluation mode."""
        model = copied(self._weights).to(dtype)  # type: ignore[arg-type]  # as above
        if dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")  # the grouped product of experts has no float64
        return model

    def drawn_again(self, seed: int) -> "Subject":
        """The same model with weights and inputs by another seed."""
        return Subject(self._source, self._given_config, self.name, self._capabilities, seed, self._move_weights)

    @cached_property
    def output_width(self) -> int:
        """Values per token in the output."""
        return self.run(self.ids(1, 2)).shape[-1]

    @cached_property
    def tolerance(self) -> float:
        """Relative tolerance of equivalences: 1e-8, or 1e-4 for a model that rounds to float32 inside.

        transformers' Llama, for one, normalises in float32 even in a float64 model. It shows in the second
        difference of the outputs for a tiny step of the embeddings, which is zero without rounding.
        """
        start = self._continuous_inputs()
        if start is None:
            return ROUNDED
        steps = {name: self._tiny_step(x) for name, x in start.items() if x.is_floating_point()}
        moved: list[dict[str, Any]] = [
            {name: x + n * steps[name] if name in steps else x for name, x in start.items()} for n in range(3)
        ]
        first, second, third = (self.run(**inputs) for inputs in moved)
        bend = (third - 2 * second + first).norm() / first.norm()
        return EXACT if bend < 1e-12 else ROUNDED

    def _continuous_inputs(self) -> dict[str, Any] | None:
        """Inputs some of which can be moved a little, None if there are none."""
        if not self._takes_text:
            inputs = self.inputs()
            return inputs if any(x.is_floating_point() for x in inputs.values()) else None
        return {"inputs_embeds": self.embed(self.ids(2, 16))} if "inputs_embeds" in self.arguments else None

    def _tiny_step(self, x: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(x.shape, generator=self.generator(1), dtype=x.dtype)
        return 1e-9 * noise * x.norm(dim=-1, keepdim=True)

    # ------------------------------------------------------------------------------------------ its inputs
    def generator(self, salt: int = 0) -> torch.Generator:
        """A random generator that depends on the seed and `salt` only."""
        return torch.Generator(torch.get_default_device()).manual_seed(1000 * self.seed + salt)

    @cached_property
    def special_ids(self) -> list[int]:
        """The ids that the config gives a meaning of their own, such as the end of a text."""
        config = self.config.get_text_config()
        named = (getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos", "sep", "cls", "mask"))
        listed = (i for entry in named for i in (entry if isinstance(entry, list) else [entry]))
        return sorted({i for i in listed if i is not None and 0 <= i < config.vocab_size})

    @cached_property
    def vocabulary(self) -> torch.Tensor:
        """The ids that mean nothing special to the model."""
        special = set(self.special_ids)
        size = self.config.get_text_config().vocab_size
        return torch.tensor([i for i in range(size) if i not in special])

    def ids(self, rows: int, length: int, salt: int = 0) -> torch.Tensor:
        """Random token ids `[rows, length]` without special ones; another `salt` gives others."""
        return self.vocabulary[torch.randint(len(self.vocabulary), (rows, length), generator=self.generator(salt))]

    def other_ids(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids that differ from `ids` everywhere."""
        return self.vocabulary[(torch.searchsorted(self.vocabulary, ids) + 1) % len(self.vocabulary)]

    @torch.no_grad()
    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """The input embeddings of `ids`, in float64: `[B, T, D]`."""
        return self.model.get_input_embeddings()(ids)

    def masked(self, mask: torch.Tensor) -> dict[str, Any]:
        """The arguments that go with an attention mask `[B, T]`, as generate() makes them if positions start at 0."""
        inputs = {"attention_mask": mask}
        if "position_ids" in self.arguments:
            inputs["position_ids"] = (mask.cumsum(1) - 1 + self.first_position).masked_fill(mask == 0, 1)
        return inputs

    @cached_property
    def modalities(self) -> list[str]:
        """What it takes, of `INPUTS`: what its config says, or the arguments of `forward`."""
        declared = getattr(self._given_config, "modalities", None)
        return declared or [name for name, argument in INPUTS.items() if argument in self.arguments]

    def inputs(self, rows: int = 2, length: int = 16, salt: int = 0) -> dict[str, Any]:
        """Inputs for one forward pass, with all modalities: token ids, pictures, sounds. For models that take other
        things or say it themselves, their own `dummy_inputs`.

        Args:
            rows: examples.
            length: of a text in tokens, of a sound in steps of the model, where it has such.
            salt: another gives others.
        """
        own = self.model_class.dummy_inputs is not PreTrainedModel.dummy_inputs
        if not self.modalities or (own and not self._takes_text):
            return self.model.dummy_inputs
        made: dict[str, Callable[[], torch.Tensor]] = {
            "text": lambda: self.ids(rows, length, salt),
            "vision": lambda: self.pixels(rows, salt=salt),
            "audio": lambda: self.waves(rows, length * self.samples_per_step, salt),
        }
        return {INPUTS[name]: made[name]() for name in self.modalities}

    @property
    def samples_per_step(self) -> int:
        """Samples of a step of the model; 0 if its config does not say it."""
        config = getattr(self._given_config, "audio_config", None) or self._given_config
        return getattr(config, "samples_per_step", 0)

    def pixels(self, rows: int, height: int | None = None, width: int | None = None, salt: int = 0) -> torch.Tensor:
        """Random pictures `[rows, C, height, width]` in float64, by default as large as the config says."""
        channels, *sides = input_sizes(self._given_config).get("pixel_values", DEFAULT_PICTURE)
        shape = rows, channels, height or sides[0], width or sides[1]
        return torch.randn(shape, generator=self.generator(20 + salt), dtype=torch.float64)

    def waves(self, rows: int, samples: int = 0, salt: int = 0) -> torch.Tensor:
        """Random sounds `[rows, samples]` in float64, a rising tone under noise; by default a quarter of a second."""
        config = getattr(self._given_config, "audio_config", None) or self._given_config
        rate = getattr(config, "sampling_rate", 16_000)
        samples = samples or input_sizes(self._given_config).get("input_values", DEFAULT_SOUND)[0]
        generator = self.generator(40 + salt)
        start = 200 + 300 * torch.rand(rows, 1, generator=generator, dtype=torch.float64)  # hertz
        time = torch.arange(samples, dtype=torch.float64) / rate
        noise = torch.randn(rows, samples, generator=generator, dtype=torch.float64)
        return 0.4 * torch.sin(2 * torch.pi * (start + 400 * time) * time) + 0.1 * noise

    @property
    def _takes_text(self) -> bool:
        return self.modalities == ["text"]

    # ------------------------------------------------------------------------------------------ running it
    def run(
        self, input_ids: torch.Tensor | None = None, model: PreTrainedModel | None = None, **inputs: Any
    ) -> torch.Tensor:
        """The output without a cache, `[B, T, ...]` where it has one vector per token; by default in float64."""
        if input_ids is not None:
            inputs["input_ids"] = input_ids
        if "use_cache" in self.arguments:
            inputs.setdefault("use_cache", False)
        return main_output((self.model if model is None else model)(**inputs))

    @torch.no_grad()
    def feed(
        self,
        pieces: Sequence[torch.Tensor],
        cache: Any = None,
        model: PreTrainedModel | None = None,
        **per_token: Any,
    ) -> tuple[torch.Tensor, Any]:
        """Feed pieces of a sequence `[B, T_i]` one after the other through the cache.

        Args:
            pieces: token ids.
            cache: what to continue from; default: nothing.
            model: default: the float64 model.
            per_token: further arguments `[B, sum of T_i]`, cut as the pieces are.

        Returns:
            The outputs of all pieces `[B, sum of T_i, ...]`, and the cache after the last.
        """
        outputs: list[torch.Tensor] = []
        for ids, extra in zip(pieces, self._cut(per_token, pieces), strict=True):
            seen = sum(output.shape[1] for output in outputs)
            output, cache = self.advance(ids, cache, seen, model, **extra)
            outputs.append(output)
        return torch.cat(outputs, 1), cache

    def advance(
        self, ids: torch.Tensor, cache: Any, seen: int, model: PreTrainedModel | None = None, **inputs: Any
    ) -> tuple[torch.Tensor, Any]:
        """The output for `ids` `[B, T]` that follow `seen` tokens in the cache, and the cache after them."""
        if "cache_position" in self.arguments and self.cache_name == "cache_params":
            # generate() starts to count after the window of the convolution
            start = max(seen, getattr(self.config, "conv_kernel", 0))
            inputs["cache_position"] = torch.arange(start, start + ids.shape[1])
        inputs |= {"input_ids": ids, "use_cache": True, cast(str, self.cache_name): cache}
        result = (self.model if model is None else model)(**inputs)
        return main_output(result), result[self.cache_name]

    def _cut(self, per_token: dict[str, torch.Tensor], pieces: Sequence[torch.Tensor]) -> Iterator[dict[str, Any]]:
        sizes = [piece.shape[1] for piece in pieces]
        columns = {name: x.split(sizes, 1) for name, x in per_token.items()}
        return ({name: parts[i] for name, parts in columns.items()} for i in range(len(pieces)))


def tokens_in(cache: Any) -> int | None:
    """How many tokens a cache says that it has seen; None for one that does not count them."""
    try:
        return cache.get_seq_length()
    except (AttributeError, ValueError):  # transformers 5 has caches of recurrent layers that refuse
        return None


def copied(model: PreTrainedModel) -> PreTrainedModel:
    """A deep copy, in which a `forward` that somebody has set on a module works on the copy too."""
    memo: dict[int, Any] = {}
    copy.deepcopy(model, memo)
    for module in list(model.modules()):
        patched = vars(module).get("forward")
        if isinstance(patched, (FunctionType, MethodType)):
            vars(memo[id(module)])["forward"] = _rebound(patched, memo)
    return memo[id(model)]


def _rebound(value: Any, memo: dict[int, Any]) -> Any:
    """A function or method that reaches into a copied model, as one that reaches into the copy.

    `copy.deepcopy` takes functions as they are; one that has the model or a method of it among its closed-over names,
    defaults or globals would run the original.

    Args:
        value: anything; what is neither a function, a method nor copied is returned as it is.
        memo: ids of what was copied to the copies.
    """
    if isinstance(value, nn.Module) and id(value) in memo:
        return memo[id(value)]
    if isinstance(value, MethodType):
        return MethodType(_rebound(value.__func__, memo), _rebound(value.__self__, memo))
    if not isinstance(value, FunctionType):
        return value
    if id(value) in memo:
        return memo[id(value)]
    memo[id(value)] = value  # a function that refers to itself
    closure = tuple(_rebound_cell(cell, memo) for cell in value.__closure__ or ())
    used = {name: value.__globals__[name] for name in value.__code__.co_names if name in value.__globals__}
    changed = {name: new for name, old in used.items() if (new := _rebound_name(old, memo)) is not old}
    scope = value.__globals__ | changed if changed else value.__globals__
    defaults = tuple(_rebound_name(x, memo) for x in value.__defaults__ or ()) or None
    function = FunctionType(value.__code__, scope, value.__name__, defaults, closure or None)
    function.__kwdefaults__ = {k: _rebound_name(x, memo) for k, x in (value.__kwdefaults__ or {}).items()} or None
    vars(function).update(vars(value))
    memo[id(value)] = function
    return function


def _rebound_name(value: Any, memo: dict[int, Any]) -> Any:
    """`value`, or its copy if it is a copied module or a method of one."""
    owner = getattr(value, "__self__", value)
    return _rebound(value, memo) if isinstance(owner, nn.Module) and id(owner) in memo else value


def _rebound_cell(cell: CellType, memo: dict[int, Any]) -> CellType:
    try:
        return CellType(_rebound(cell.cell_contents, memo))
    except ValueError:  # empty: the name is not bound yet
        return cell


def _without_autocast(model: PreTrainedModel) -> None:
    """Take off what accelerate wraps around `forward` in mixed precision; a copy has a precision of its own."""
    original = vars(model).pop("_original_forward", None)
    if original is not None:
        vars(model).pop("forward", None)
        if getattr(original, "__func__", None) is not type(model).forward:
            model.forward = original


def main_output(output: Any) -> torch.Tensor:
    """The logits of a model's output, the embeddings side by side of one that compares them, or else its first tensor
    that is more than a number; the loss where nothing else is given, as by compressed vocabularies in training."""
    if "logits" in output:
        return output.logits
    embeddings = [x for name, x in output.items() if name.endswith("_embeds")] if isinstance(output, dict) else []
    if embeddings:
        return torch.cat(embeddings, -1)
    given = tuple(output[i] for i in range(len(output)))
    return next((x for x in tree_leaves(given) if is_output(x)), given[0])


def is_output(x: Any) -> bool:
    """Whether it is what a model computed of its inputs: a tensor of more than one number for all of them."""
    return isinstance(x, torch.Tensor) and x.is_floating_point() and x.dim() > 1


@torch.no_grad()
def perturb(model: AnyModule, seed: int = 0) -> AnyModule:
    """Move every weight of `model` away from its start, in place, by the kind of module that owns it.

    Matrices of linear and convolutional layers get noise that keeps the scale of what flows through them, embeddings
    noise of half their own size; all other parameters (norms, biases, gates, decays) noise of 0.15.
    """
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    seen = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter.add_((_noise_scale(module, parameter) * noise).to(parameter))
    return model


def _noise_scale(module: nn.Module, parameter: nn.Parameter) -> float:
    if isinstance(module, nn.Embedding):
        return 0.5 * parameter.float().std().item()
    if isinstance(module, (nn.Linear, Conv1D, nn.modules.conv._ConvNd)) and parameter.dim() > 1:
        outputs = parameter.shape[1] if isinstance(module, Conv1D) else parameter.shape[0]
        return (outputs / parameter.numel()) ** 0.5
    return 0.15
