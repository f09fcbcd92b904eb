"""What all exported formats have in common: a model as a function of tensors, its state among them.

A graph takes the inputs of the model (`input_ids` and `attention_mask` for text) and then every tensor that the model
continues from; it gives the output of the head and the tensors to continue from next. Names, shapes and order follow
from facts that an architecture states anyway, so that no family has export code of its own: `forward` names the inputs,
`state_spec` the states of constant size, and what else a cache holds is read off one.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import transformers
from torch import nn
from torch._subclasses import FakeTensorMode
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from ..data.processors import input_sizes
from ..errors import HoloError, unknown
from ..modeling.cache import CACHE_NAME, PADDING, RecurrentCache, RecurrentLayer
from ..modeling.harmonics import HoloLinear
from ..modeling.layers import at_least_float32
from ..modeling.recording import exporting
from ..registry import architectures, capabilities_of

# Optimum's names of the tasks that can be exported, and the Auto class that has the head for each.
TASKS = {
    "text-generation": "AutoModelForCausalLM",
    "feature-extraction": "AutoModel",
    "fill-mask": "AutoModelForMaskedLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "image-classification": "AutoModelForImageClassification",
    "audio-classification": "AutoModelForAudioClassification",
    "audio-frame-classification": "AutoModelForAudioFrameClassification",
}
POOLED = ("text-classification", "image-classification", "audio-classification")  # one output for a whole input
WITH_PAST = "-with-past"  # Optimum's suffix of a task whose graph continues from a state
GENERATION = f"text-generation{WITH_PAST}"

BATCH, TOKENS, PAST = "batch_size", "sequence_length", "past_sequence_length"
TOTAL = f"{PAST} + {TOKENS}"
# The inputs that a graph may have, with their axes of variable size; a model has those that its `forward` names.
MEDIA = {
    "pixel_values": {0: BATCH},
    "input_values": {0: BATCH, 1: "audio_length"},
    "input_features": {0: BATCH, 1: "audio_frames"},
}
OF_ANY_SIZE = {2: "height", 3: "width"}  # further axes of pictures, for models that take a mask of them
TEXT = {"input_ids": {0: BATCH, 1: TOKENS}, "attention_mask": {0: BATCH, 1: TOKENS}}
INPUTS = TEXT | MEDIA | {"audio_attention_mask": {0: BATCH, 1: "audio_length"}}
SENSES = {  # inputs of models with several senses, whose configs say which of them they have
    "text": ("input_ids", "attention_mask"),
    "vision": ("pixel_values",),
    "audio": ("input_values", "audio_attention_mask"),
}


@dataclass(frozen=True)
class State:
    """One tensor that a model continues from.

    Attributes:
        layer: index of the layer that it belongs to.
        name: what the layer calls it; "key" and "value" in a cache of transformers.
        shape: without the batch; None for an axis that grows with the text.
        dtype: of its values.
    """

    layer: int
    name: str
    shape: tuple[int | None, ...]
    dtype: torch.dtype

    @property
    def input_name(self) -> str:
        """Its name among the inputs of a graph."""
        return f"past_key_values.{self.layer}.{self.name}"

    @property
    def output_name(self) -> str:
        """Its name among the outputs of a graph."""
        return f"present.{self.layer}.{self.name}"

    def sizes(self, tokens: str) -> list[int | str]:
        """Its sizes, those that vary by name; `tokens` names the one that grows."""
        return [BATCH, *(tokens if size is None else size for size in self.shape)]

    def axes(self, tokens: str) -> dict[int, str]:
        """Its axes of variable size, named as in [`State.sizes`]."""
        return {axis: size for axis, size in enumerate(self.sizes(tokens)) if isinstance(size, str)}

    def zeros(self, batch: int, tokens: int = 0) -> torch.Tensor:
        """The state `[B, ...]` of a text that begins (or, of one that grows, zeros for `tokens` tokens)."""
        sizes = (tokens if size is None else size for size in self.shape)
        return torch.zeros(batch, *sizes, dtype=self.dtype)


class Graph:
    """The facts of an exported graph: what goes in, what comes out, and how a model is called with it.

    Args:
        task: a key of `TASKS`, or `GENERATION` if the state is to be input and output.
        config: the config of the model.
        dtype: of its weights.

    Raises:
        HoloError: the task is unknown, or the family has no head for it.
    """

    def __init__(self, task: str, config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> None:
        self.task, self.config, self.dtype = task.removesuffix(WITH_PAST), config, dtype
        self.with_past = task.endswith(WITH_PAST)
        self.model_class = head_for(task, config)
        self.modalities: list[str] | None = getattr(config, "modalities", None)  # of a model with several senses
        hidden = "last_hidden_state" if self.modalities is None else "pooler_output"
        self.output = hidden if self.task == "feature-extraction" else "logits"
        # Transformers' own decoders have to be told the positions, for they would count padding; these families don't.
        self.counts_positions = self.task == "text-generation" and config.model_type not in architectures()

    def counting_padding(self) -> "Graph":
        """The same for programs that take no positions, and so count padding: right where only distances matter."""
        graph = copy.copy(self)
        graph.counts_positions = False
        return graph

    @cached_property
    def inputs(self) -> dict[str, dict[int, str]]:
        """The inputs but for the state, with their axes of variable size.

        Raises:
            HoloError: `forward` does not name what the graph needs.
        """
        known = INPUTS if self.modalities is None else [name for sense in self.modalities for name in SENSES[sense]]
        axes = {name: dict(INPUTS[name]) for name in known if name in self.arguments}
        if "pixel_values" in axes and "pixel_mask" in self.arguments:
            axes["pixel_values"] |= OF_ANY_SIZE
        needed = [{self.main_input}]
        if self.with_past:
            needed += [{"attention_mask"}, {"past_key_values", "cache"}]  # the latter is its name since 5.24
        if missing := [" or ".join(sorted(names)) for names in needed if not names & self.arguments.keys()]:
            raise HoloError(
                f"{self.model_class.__name__}.forward does not name {', '.join(missing)} among its arguments; an "
                "export finds its inputs by their names there, so write them out"
            )
        if self.with_past:
            axes["attention_mask"][1] = TOTAL
        return axes

    @property
    def main_input(self) -> str:
        """The input that tells how many examples there are."""
        return self.model_class.main_input_name if self.modalities is None else SENSES[self.modalities[0]][0]

    @cached_property
    def arguments(self) -> Mapping[str, inspect.Parameter]:
        """What `forward` takes, by name."""
        return inspect.signature(self.model_class.forward).parameters

    @cached_property
    def states(self) -> list[State]:
        """What the model continues from; nothing in a graph without state."""
        return states_of(self.model_class, self.config, self.dtype) if self.with_past else []

    @property
    def input_axes(self) -> dict[str, dict[int, str]]:
        """All inputs in order, with their axes of variable size."""
        return self.inputs | {state.input_name: state.axes(PAST) for state in self.states}

    @property
    def output_axes(self) -> dict[str, dict[int, str]]:
        """All outputs in order, with their axes of variable size."""
        first = {0: BATCH} if self.task in POOLED or self.output == "pooler_output" else {0: BATCH, 1: TOKENS}
        return {self.output: first} | {state.output_name: state.axes(TOTAL) for state in self.states}

    @cached_property
    def reads_text(self) -> bool:
        """Whether a text is among the inputs."""
        return "input_ids" in self.inputs

    @cached_property
    def media(self) -> dict[str, tuple[int, ...]]:
        """Sizes of one image or sound, from the `dummy_inputs` of the model or, where it has none, from its config.

        Raises:
            HoloError: they lack one that `forward` takes.
        """
        names = [name for name in self.inputs if name in MEDIA]
        if not names:
            return {}
        told = input_sizes(self.config)
        if self.model_class.dummy_inputs is PreTrainedModel.dummy_inputs and told.keys() >= set(names):
            return {name: told[name] for name in names}
        with FakeTensorMode():  # tensors without data
            dummies = self.model_class._from_config(self.config).dummy_inputs
        if missing := [name for name in names if name not in dummies]:
            raise HoloError(f"{self.model_class.__name__}.dummy_inputs must hold {', '.join(missing)}")
        return {name: tuple(dummies[name].shape[1:]) for name in names}

    def example(self, batch: int = 2, tokens: int = 16, past: int = 8, seed: int = 0) -> dict[str, torch.Tensor]:
        """Inputs of a text of `tokens` tokens whose first row has padding in front; after a state, `past` tokens long
        where that grows, in a graph that has one. Images and sounds are noise, larger by `tokens` than those of
        [`media`] where their size may vary; the first sound has padding at its end."""
        generator = torch.Generator().manual_seed(seed)
        past = past if any(None in state.shape for state in self.states) else 0
        made = {}
        for name, sizes in self.media.items():
            larger = (
                size + self._more(axis, tokens) * (axis in self.inputs[name]) for axis, size in enumerate(sizes, 1)
            )
            made[name] = torch.randn(batch, *larger, generator=generator)
        if self.reads_text:
            vocabulary = self.config.get_text_config().vocab_size
            made["input_ids"] = torch.randint(vocabulary, (batch, tokens), generator=generator)
            made["attention_mask"] = torch.ones(batch, past + tokens, dtype=torch.long)
            made["attention_mask"][0, : past + tokens // 4] = 0
        heard = "audio_attention_mask" if self.reads_text or self.modalities else "attention_mask"
        sound = next((made[name] for name in ("input_values", "input_features") if name in made), None)
        if heard in self.inputs and sound is not None:
            made[heard] = torch.ones(sound.shape[:2], dtype=torch.long)
            made[heard][0, sound.shape[1] - sound.shape[1] // 4 :] = 0
        return {name: made[name] for name in self.inputs} | {s.input_name: s.zeros(batch, past) for s in self.states}

    def _more(self, axis: int, tokens: int) -> int:
        """By how much an axis of an image or sound is larger: height and width by pixels, not by as many, and a sound
        by steps of the model, where it has such."""
        if axis > 1:
            return tokens // (axis - 1)
        heard = getattr(self.config, "audio_config", None) or self.config
        return tokens * getattr(heard, "samples_per_step", 1)

    def again(self, tensors: Sequence[torch.Tensor], states: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Inputs that read the text of `tensors` once more, after itself: from the states that it has led to."""
        inputs = dict(zip(self.inputs, tensors, strict=False))
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(inputs["input_ids"])], 1)
        return [*inputs.values(), *states]

    def call(self, forward: Callable[..., Any], tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Call a model's `forward` with inputs and states in their order; gives the output and the new states."""
        inputs: dict[str, Any] = dict(zip(self.inputs, tensors, strict=False))
        if "use_cache" in self.arguments:
            inputs["use_cache"] = self.with_past
        if self.counts_positions and "position_ids" in self.arguments:
            inputs["position_ids"] = positions(inputs["attention_mask"], inputs["input_ids"].shape[1])
        if "return_dict" in self.arguments or _takes_any(self.arguments):
            inputs["return_dict"] = True
        if not self.with_past:
            return (forward(**inputs)[self.output],)
        cache = make_cache(self.config, self.states, tensors[len(self.inputs) :])
        if isinstance(cache, RecurrentCache):
            past = inputs["attention_mask"].shape[1] - inputs["input_ids"].shape[1]
            learned = getattr(self.config, "learned_state", False)
            if learned and not past and not exporting():  # zeros stand for a text that begins, in whatever state
                cache = RecurrentCache(self.config)
            cache.advance(past)
        name = CACHE_NAME if CACHE_NAME in self.arguments else "past_key_values"  # of code older than transformers 5.24
        result = forward(**inputs, **{name: cache})
        return (result[self.output], *take_states(self.states, result[CACHE_NAME]))


def _takes_any(arguments: Mapping[str, inspect.Parameter]) -> bool:
    """Whether a function has a `**kwargs`."""
    return any(argument.kind is inspect.Parameter.VAR_KEYWORD for argument in arguments.values())


class GraphModule(nn.Module):
    """A graph as a module that is called with its tensors in order, for exporters that know nothing of caches.

    Args:
        graph: the graph.
        model: the model that computes it.
    """

    def __init__(self, graph: Graph, model: nn.Module) -> None:
        super().__init__()
        self.graph, self.model = graph, model

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.graph.call(self.model, tensors)


# ---------------------------------------------------------------------------------------------- states
def states_of(
    model_class: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype = torch.float32
) -> list[State]:
    """Everything that a causal model continues from, in order.

    Args:
        model_class: its class.
        config: its config.
        dtype: of its weights.
    """
    if hasattr(model_class, "state_spec") and "constant_state" in (capabilities_of(model_class, config) or ()):
        layers, kept = model_class.state_spec(config), at_least_float32(dtype)
        return [State(i, name, tuple(shape), kept) for i, spec in enumerate(layers) for name, shape in spec.items()]
    return _read_off(model_class, config, dtype)


@torch.no_grad()
def _read_off(model_class: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype) -> list[State]:
    """The states of a model whose cache grows: the sizes that differ after two and after three tokens."""
    config = copy.deepcopy(config)
    config.pad_token_id = None  # some models would look for it in the texts
    with FakeTensorMode():  # tensors without data
        model = model_class._from_config(config, dtype=dtype, attn_implementation="eager").eval()  # others read masks
        texts = (torch.ones(1, tokens, dtype=torch.long) for tokens in (2, 3))
        shorter, longer = (dict(held_by(model(input_ids=text, use_cache=True)[CACHE_NAME])) for text in texts)
    states = []
    for (layer, name), tensor in shorter.items():
        sizes = zip(tensor.shape[1:], longer[layer, name].shape[1:], strict=True)
        states.append(State(layer, name, tuple(a if a == b else None for a, b in sizes), tensor.dtype))
    return states


def held_by(cache: Cache) -> Iterator[tuple[tuple[int, str], torch.Tensor]]:
    """The tensors in a cache, each with its layer and name."""
    for index, layer in enumerate(cache.layers):
        held: Mapping[str, Any] = (
            layer.states if isinstance(layer, RecurrentLayer) else {"key": layer.keys, "value": layer.values}
        )
        for name, tensor in held.items():
            if name != PADDING:  # a graph reads it off the mask
                yield (index, name), tensor


def positions(attention_mask: torch.Tensor, tokens: int) -> torch.Tensor:
    """Positions `[B, T]` of the last tokens under a mask `[B, S]`: padding is not counted, as in `generate`."""
    return (attention_mask.cumsum(1) - 1).clamp_min(0)[:, -tokens:]


def take_states(states: Sequence[State], cache: Cache) -> tuple[torch.Tensor, ...]:
    """The states in their order, from a cache."""
    held = dict(held_by(cache))
    return tuple(held[state.layer, state.name] for state in states)


def make_cache(config: PretrainedConfig, states: Sequence[State], tensors: Sequence[torch.Tensor]) -> Cache:
    """The cache that a model with `config` continues from: the inverse of [`take_states`]."""
    held: dict[int, dict[str, torch.Tensor]] = {}
    for state, tensor in zip(states, tensors, strict=True):
        held.setdefault(state.layer, {})[state.name] = tensor
    if all(layer.keys() == {"key", "value"} for layer in held.values()):
        return _keys_and_values(held)
    cache = RecurrentCache(config)
    for index, named in held.items():
        cache.layers[index].states = named
        cache.layers[index].is_initialized = True
    return cache


def _keys_and_values(held: Mapping[int, Mapping[str, torch.Tensor]]) -> DynamicCache:
    """transformers' own cache. Not through its `update`, which joins an empty tensor that no graph needs."""
    cache = DynamicCache()
    layers = [DynamicLayer() for _ in held]
    cache.layers = list(layers)
    for layer, named in zip(layers, held.values(), strict=True):
        layer.keys, layer.values = named["key"], named["value"]
        layer.dtype, layer.device, layer.is_initialized = layer.keys.dtype, layer.keys.device, True
    return cache


# ---------------------------------------------------------------------------------------------- weights
@contextmanager
def folded(model: nn.Module) -> Iterator[None]:
    """In this block the holographic layers of a model hold A · cos Φ in place of A and Φ: half the values to write."""
    layers = [layer for layer in model.modules() if isinstance(layer, HoloLinear) and not layer.folded]
    factors = [(layer.amplitude, layer.phase) for layer in layers]
    for layer in layers:
        layer.fold()
    try:
        yield
    finally:
        for layer, (amplitude, phase) in zip(layers, factors, strict=True):
            del layer.coefficients
            layer.amplitude, layer.phase = amplitude, phase


# ---------------------------------------------------------------------------------------------- tasks
def head_for(task: str, config: PretrainedConfig) -> type[PreTrainedModel]:
    """The model class for a task in the family of a config.

    Raises:
        HoloError: the task is unknown, or the family has no head for it.
    """
    if task not in (*TASKS, GENERATION):
        raise unknown("task", task, [*TASKS, GENERATION])
    model_class = getattr(transformers, TASKS[task.removesuffix(WITH_PAST)])._model_mapping.get(type(config), None)
    if model_class is None:
        raise HoloError(f"task: {task!r}: the family {config.model_type!r} has no head for it")
    return model_class


def task_of(config: PretrainedConfig) -> str:
    """The task of a saved model: that of the head in its config, with the state if it generates.

    Raises:
        HoloError: the config names no head, or one that cannot be exported.
    """
    saved = (config.architectures or [""])[0]
    for task, auto in TASKS.items():
        model_class = getattr(transformers, auto)._model_mapping.get(type(config), None)
        if model_class is not None and model_class.__name__ == saved:
            return GENERATION if task == "text-generation" else task
    known = ", ".join([*TASKS, GENERATION])
    raise HoloError(f"architectures: {saved!r} in config.json is not a head of a known task; give one of {known}")
