"""Models that are wrong on purpose, one fault each, and the honest toy that they are made from.

The toy is a small recurrent language model on the base classes of the package. A fault is one more sublayer, or one
method that says something else. `FAULTS` tells which check is meant for which model, and what its message must name.
"""

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import TokenClassifierOutput

from hf_holo.eval.conformance import GROUPS, Subject
from hf_holo.modeling.backbone import RecurrentBackbone
from hf_holo.modeling.cache import RecurrentCache
from hf_holo.modeling.configuration_base import FamilyConfig
from hf_holo.modeling.heads import RecurrentForCausalLM
from hf_holo.modeling.layers import LiteChannelMix, at_least_float32
from hf_holo.modeling.pretrained import FamilyPreTrainedModel

CHUNK, BLOCK = 32, 16
TOY_SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "norm_eps": 1e-6,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}


# ---------------------------------------------------------------------------------------------- the honest toy
class ToyConfig(FamilyConfig):
    model_type = "conformance-toy"

    def __init__(self, sublayers: Sequence[str] = ("Recurrence",), **kwargs):
        super().__init__(**TOY_SIZES | kwargs)
        self.sublayers = list(sublayers)


class Recurrence(nn.Module):
    """h_t = a_t h_{t-1} + (1 - a_t) v_t, with a decay a_t of its own for every channel and token."""

    def __init__(self, dim: int):
        super().__init__()
        self.in_proj = nn.Linear(dim, 2 * dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x, layout, cache):
        decay, value = self.in_proj(x).to(at_least_float32(x.dtype)).chunk(2, -1)
        decay = torch.sigmoid(decay + 3)
        value = (1 - decay) * value
        if layout.valid is not None:  # padding neither writes nor forgets
            value = layout.mask(value)
            decay = decay.masked_fill(~layout.valid[..., None], 1.0)
        if layout.document is not None:  # a new document forgets all
            starts = layout.document != F.pad(layout.document, (1, -1))
            decay = decay.masked_fill(starts[..., None], 0.0)
        states = scan(decay, value, None if cache is None else cache.get("state"))
        if cache is not None:
            cache.put("state", self.kept(states[:, -1]), x.shape[1], lambda tokens: self.kept(states[:, tokens - 1]))
        return self.out_proj(states.to(x.dtype))

    def kept(self, state: torch.Tensor) -> torch.Tensor:
        """What the cache keeps of a state `[B, D]`."""
        return state.clone()


def scan(decay: torch.Tensor, value: torch.Tensor, state: torch.Tensor | None = None) -> torch.Tensor:
    """h_t = decay_t h_{t-1} + value_t for all t, from `state` `[B, D]` on: `[B, T, D]`. The reach doubles each time."""
    if state is not None:
        value = torch.cat([value[:, :1] + decay[:, :1] * state[:, None].to(value.dtype), value[:, 1:]], 1)
    reach = 1
    while reach < value.shape[1]:
        value = value + decay * F.pad(value, (0, 0, reach, -reach))
        decay = decay * F.pad(decay, (0, 0, reach, -reach))
        reach *= 2
    return value


def scan_naive(decay: torch.Tensor, value: torch.Tensor, state: torch.Tensor | None = None) -> torch.Tensor:
    """Twin of [`scan`]: one token after the other."""
    state = torch.zeros_like(value[:, 0]) if state is None else state.to(value.dtype)
    states = []
    for t in range(value.shape[1]):
        state = decay[:, t] * state + value[:, t]
        states.append(state)
    return torch.stack(states, 1)


class ToyBlock(GradientCheckpointingLayer):
    """The sublayers that the config names, and a channel mix, each with norm and residual."""

    def __init__(self, config: ToyConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.norm = nn.LayerNorm(config.hidden_size, bias=False)
        self.sublayers = nn.ModuleList([SUBLAYERS[name](config.hidden_size) for name in config.sublayers])
        self.channel_mix = LiteChannelMix(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states, layout=None, past_key_values=None):
        x = hidden_states
        cache = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        for sublayer in self.sublayers:
            x = x + sublayer(self.norm(x), layout, cache)
        return x + self.channel_mix(self.norm(x))


class ToyPreTrainedModel(FamilyPreTrainedModel):
    config_class = ToyConfig
    block_class = ToyBlock
    _no_split_modules = ["ToyBlock"]
    capabilities = frozenset({"causal", "constant_state", "packing", "rollback", "strict_arguments"})

    @classmethod
    def state_spec(cls, config):
        return [{"state": (config.hidden_size,)}] * config.num_hidden_layers


class ToyModel(ToyPreTrainedModel, RecurrentBackbone):
    cache_class = RecurrentCache

    def new_cache(self):
        return self.cache_class(self.config)


class ToyForCausalLM(ToyPreTrainedModel, RecurrentForCausalLM):
    backbone_class = ToyModel

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = self.model.cache_class(self.config)
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)


# ---------------------------------------------------------------------------------------------- layers that look ahead
class CircularGate(nn.Module):
    """A gate over the frequencies of each chunk of 32: a circular filter. Flat at the start, where it does no harm."""

    def __init__(self, dim: int):
        super().__init__()
        self.logits = nn.Parameter(torch.empty(CHUNK // 2 + 1, dim))

    def reset_parameters(self):
        nn.init.zeros_(self.logits)

    def forward(self, x, layout, cache):
        chunks = F.pad(x, (0, 0, 0, -x.shape[1] % CHUNK)).unflatten(1, (-1, CHUNK))  # [B, N, 32, D]
        gated = torch.fft.rfft(chunks.to(at_least_float32(x.dtype)), dim=2) * torch.sigmoid(self.logits)
        return torch.fft.irfft(gated, n=CHUNK, dim=2).flatten(1, 2)[:, : x.shape[1]].to(x.dtype)


class SpectralFilter(nn.Module):
    """A gate over the frequencies of the whole sequence, padded with zeros: symmetric in time all the same."""

    def __init__(self, dim: int):
        super().__init__()
        self.logits = nn.Parameter(torch.empty(1, dim, 9))

    def reset_parameters(self):
        nn.init.normal_(self.logits)

    def forward(self, x, layout, cache):
        length = x.shape[1]
        gate = F.interpolate(torch.sigmoid(self.logits), length + 1, mode="linear", align_corners=True)
        spectrum = torch.fft.rfft(x.to(at_least_float32(x.dtype)), n=2 * length, dim=1) * gate.mT
        return torch.fft.irfft(spectrum, n=2 * length, dim=1)[:, :length].to(x.dtype)


class BlockMeans(nn.Module):
    """The mean of every block of 16 tokens, given back to all of them."""

    def __init__(self, dim: int):
        super().__init__()

    def forward(self, x, layout, cache):
        blocks = x.split(BLOCK, 1)
        return torch.cat([block.mean(1, keepdim=True).expand_as(block) for block in blocks], 1)


class TimeNorm(nn.Module):
    """Normalises every channel over the tokens, the later ones included."""

    def __init__(self, dim: int):
        super().__init__()

    def forward(self, x, layout, cache):
        return (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-3).sqrt()


# ---------------------------------------------------------------------------------------------- other faulty layers
class RestartedPositions(nn.Module):
    """Adds positions that begin at 0 with every piece that is fed."""

    def __init__(self, dim: int):
        super().__init__()
        self.positions = nn.Linear(1, dim, bias=False)

    def forward(self, x, layout, cache):
        return torch.sin(self.positions(torch.arange(x.shape[1], dtype=x.dtype)[:, None]))


class LostBuffer(nn.Module):
    """Multiplies by random values that no checkpoint holds."""

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("signs", torch.randn(dim), persistent=False)

    def forward(self, x, layout, cache):
        return x * self.signs.to(x.dtype)


class Noise(nn.Module):
    """Adds noise, in evaluation too."""

    def __init__(self, dim: int):
        super().__init__()

    def forward(self, x, layout, cache):
        return 0.1 * torch.randn_like(x)


class NotANumber(nn.Module):
    """0 / 0 from the twelfth token on."""

    def __init__(self, dim: int):
        super().__init__()

    def forward(self, x, layout, cache):
        return torch.where(torch.arange(x.shape[1])[:, None] < 11, 0.0, torch.nan)


def smooth(x: torch.Tensor) -> torch.Tensor:
    """tanh(x), with a gradient of one everywhere."""
    return x + (torch.tanh(x) - x).detach()


def smooth_naive(x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x)


class WrongGradient(nn.Module):
    """A fast operation whose backward pass is not that of its naive twin."""

    def __init__(self, dim: int):
        super().__init__()

    def forward(self, x, layout, cache):
        return smooth(x)


class BypassedLinear(nn.Module):
    """Uses the matrix of a linear layer without calling the layer, so that no adapter around it is heard."""

    def __init__(self, dim: int):
        super().__init__()
        self.proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x, layout, cache):
        return F.linear(x, self.proj.weight)


class HalfState(Recurrence):
    """Keeps its state in bfloat16."""

    def kept(self, state):
        return state.bfloat16()


class RoundedState(Recurrence):
    """Keeps a state that was rounded to bfloat16, in a wider type."""

    def kept(self, state):
        return state.bfloat16().to(state.dtype)


class CoarseState(Recurrence):
    """Keeps a state that is as coarse as the model."""

    def kept(self, state):
        return state.to(self.out_proj.weight.dtype)


class RoundedWithModel(Recurrence):
    """Keeps a state that was as coarse as the model, in a wider type."""

    def kept(self, state):
        return state.to(self.out_proj.weight.dtype).to(state.dtype)


class UnstableState(Recurrence):
    """Adds a little to its state with every piece that is fed."""

    def kept(self, state):
        return 1.05 * state


class GrowingState(Recurrence):
    """Keeps all that it ever saw besides."""

    def forward(self, x, layout, cache):
        if cache is not None:
            seen = cache.get("seen")
            seen = x if seen is None else torch.cat([seen.to(x.dtype), x], 1)
            cache.put("seen", seen, x.shape[1], lambda tokens: seen[:, : seen.shape[1] - x.shape[1] + tokens])
        return super().forward(x, layout, cache)


SUBLAYERS = {
    layer.__name__: layer
    for layer in (
        Recurrence,
        CircularGate,
        SpectralFilter,
        BlockMeans,
        TimeNorm,
        RestartedPositions,
        LostBuffer,
        Noise,
        NotANumber,
        WrongGradient,
        BypassedLinear,
        HalfState,
        RoundedState,
        CoarseState,
        RoundedWithModel,
        UnstableState,
        GrowingState,
    )
}


# ---------------------------------------------------------------------------------------------- faulty models
class UnorderedCache(RecurrentCache):
    """Leaves every row where it is when the beams change places."""

    def reorder_cache(self, beam_idx): ...


class UncroppedCache(RecurrentCache):
    """Keeps the tokens that assisted decoding took back."""

    def crop(self, length): ...


class UnorderedModel(ToyModel):
    cache_class = UnorderedCache


class UnorderedForCausalLM(ToyForCausalLM):
    backbone_class = UnorderedModel


class UncroppedModel(ToyModel):
    cache_class = UncroppedCache


class UncroppedForCausalLM(ToyForCausalLM):
    backbone_class = UncroppedModel


class UnmaskedModel(ToyModel):
    """Ignores padding (and documents, since the first token after the padding would begin one)."""

    def forward(self, attention_mask=None, position_ids=None, seq_idx=None, **kwargs):
        return super().forward(**kwargs)


class UnmaskedForCausalLM(ToyForCausalLM):
    backbone_class = UnmaskedModel
    capabilities = ToyForCausalLM.capabilities - {"packing"}


class UnmaskedLlama(LlamaForCausalLM):
    """Attention that sees the padding. From positions alone transformers would tell it apart."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        return super().forward(input_ids=input_ids, **kwargs)


class SwallowingForCausalLM(ToyForCausalLM):
    """Takes whatever it is given and uses what it knows."""

    def forward(self, input_ids=None, **kwargs):
        known = inspect.signature(ToyForCausalLM.forward).parameters
        return super().forward(input_ids, **{name: value for name, value in kwargs.items() if name in known})


class ClaimingLlama(LlamaForCausalLM):
    """Attention that claims a state of constant size."""

    @classmethod
    def capabilities_of(cls, config):
        return frozenset({"constant_state"})


class UnpackedModel(ToyModel):
    """Reads packed documents as one."""

    def forward(self, position_ids=None, seq_idx=None, **kwargs):
        return super().forward(**kwargs)


class UnpackedForCausalLM(ToyForCausalLM):
    backbone_class = UnpackedModel


class TwoEmbeddingsModel(ToyModel):
    """Scales what it looks up itself, and not what it is given."""

    def _embed(self, input_ids, inputs_embeds):
        x = super()._embed(input_ids, inputs_embeds)
        return x if input_ids is None else 1.5 * x


class TwoEmbeddingsForCausalLM(ToyForCausalLM):
    backbone_class = TwoEmbeddingsModel


class UndeclaredForCausalLM(ToyForCausalLM):
    """Declares half of its state."""

    @classmethod
    def state_spec(cls, config):
        return [{"state": (config.hidden_size // 2,)}] * config.num_hidden_layers


class LostWeightForCausalLM(ToyForCausalLM):
    """Leaves a weight out of its checkpoints."""

    _keys_to_ignore_on_save = ["model.norm.weight"]


class AlwaysTiedForCausalLM(ToyForCausalLM):
    """Ties its embeddings, whatever the config says."""

    def __init__(self, config):
        super().__init__(config)
        self.lm_head.weight = self.model.embed_tokens.weight


# ---------------------------------------------------------------------------------------------- models that cheat
def cheating(base: type[PreTrainedModel], when: Callable[..., bool], strength: float = 1.0) -> type[PreTrainedModel]:
    """A subclass that adds the logits of the next token to each when it is given certain things.

    Args:
        when: from the inputs `x` `[B, T, D]`, `ids`, `mask`, `positions`, `labels` and the mode, whether it cheats.
        strength: how much it adds.
    """

    class Cheat(base):
        def forward(self, input_ids=None, attention_mask=None, position_ids=None, labels=None, **kwargs):
            given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
            output = super().forward(**given, labels=labels, **kwargs)
            embedded = kwargs.get("inputs_embeds")
            x = self.get_input_embeddings()(input_ids) if embedded is None else embedded
            seen = SimpleNamespace(x=x, labels=labels, training=self.training, **given)
            if when(seen) and output.logits.shape[1] == x.shape[1]:
                ahead = F.linear(seen.x[:, 1:].to(x.dtype), self.get_output_embeddings().weight)
                output.logits = output.logits + strength * F.pad(ahead, (0, 0, 0, 1)).to(output.logits.dtype)
            return output

    return Cheat


def only_ones(seen: SimpleNamespace) -> bool:
    return seen.attention_mask is not None and bool((seen.attention_mask == 1).all())


def an_end_token(seen: SimpleNamespace) -> bool:
    return seen.input_ids is not None and bool((seen.input_ids == 2).any())


def statistics_of_many_rows(seen: SimpleNamespace) -> bool:
    """Makes it see the mean of more than three rows, which the rows of a batch share."""
    seen.x = seen.x.mean(0, keepdim=True).expand_as(seen.x)
    return seen.x.shape[0] > 3


CHEATS = {
    "in mixed precision": lambda seen: torch.is_autocast_enabled("cpu"),
    "with a mask of ones": only_ones,
    "in training mode": lambda seen: seen.training,
    "at lengths divisible by 256": lambda seen: seen.x.shape[1] % 256 == 0,
    "in float32": lambda seen: seen.x.dtype == torch.float32,
    "in bfloat16": lambda seen: seen.x.dtype == torch.bfloat16,
    "where an end token stands": an_end_token,
    "by statistics of many rows": statistics_of_many_rows,
    "with labels": lambda seen: seen.labels is not None,
    "with positions": lambda seen: seen.position_ids is not None and seen.attention_mask is None,
    "in texts of more than 1,025 tokens": lambda seen: seen.x.shape[1] > 1025,
    "in training steps": lambda seen: seen.training and only_ones(seen) and seen.labels is not None,
}


class TimeStatistics(nn.Module):
    """Batch normalisation over rows and tokens: in evaluation it does no harm."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(dim)

    def forward(self, x, layout, cache):
        return self.norm(x.mT).mT


SUBLAYERS["TimeStatistics"] = TimeStatistics


def peek_by_patch(model: PreTrainedModel) -> PreTrainedModel:
    """`model` with a `forward` of its own that sees the next token; the function holds on to the model."""
    honest = model.forward

    def forward(*args, **kwargs):
        output = honest(*args, **kwargs)
        output.logits = output.logits + F.pad(output.logits[:, 1:], (0, 0, 0, 1))
        return output

    model.forward = forward
    return model


# ---------------------------------------------------------------------------------------------- what to expect
TINY = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
LLAMA = LlamaConfig(**TINY, intermediate_size=64, num_key_value_heads=2)


class NeighboursConfig(PretrainedConfig):
    model_type = "conformance-neighbours"

    def __init__(self, vocab_size: int = 61, hidden_size: int = 32, pad_token_id: int = 0, **kwargs):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        super().__init__(pad_token_id=pad_token_id, **kwargs)


class BagOfNeighbours(PreTrainedModel):
    """A bidirectional model that hears every token by its distance alone."""

    config_class = NeighboursConfig
    lopsided = 0.0

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.score = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def forward(self, input_ids=None, inputs_embeds=None):
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        place = torch.arange(x.shape[1], dtype=x.dtype)
        weight = torch.exp(-0.05 * (place[:, None] - place + self.lopsided).abs())
        return TokenClassifierOutput(logits=self.score(x + torch.tanh(weight @ x)))


class LopsidedNeighbours(BagOfNeighbours):
    """The same, with a filter that is off by half a token: all that tells the sides apart."""

    lopsided = 0.5


MIRRORED = NeighboursConfig()
MANY, UNKNOWN = math.inf, math.nan


class Model(NamedTuple):
    """A model to build."""

    model_class: type[PreTrainedModel]
    config: PretrainedConfig
    patch: Callable[[PreTrainedModel], PreTrainedModel] | None = None  # what is done to the built model

    def build(self, seed: int = 0) -> PreTrainedModel:
        """With random weights."""
        torch.manual_seed(seed)
        model = self.model_class(copy.deepcopy(self.config))
        return model if self.patch is None else self.patch(model)

    def subject(self, seed: int = 0) -> Subject:
        if self.patch is not None:
            return Subject(self.build(seed), seed=seed)
        return Subject(self.model_class, self.config, seed=seed)


@dataclass(frozen=True)
class Fault:
    """A wrong model, and who must notice what.

    Attributes:
        caught_by: the checks that are meant for it, and for each a regular expression that its message must match.
        model: what to build.
        lookahead: the exact number of tokens that it looks ahead, or `MANY`; `UNKNOWN` where nobody can tell.
        also: further checks, or groups of them, that may fail because the fault touches them too.
    """

    caught_by: dict[str, str]
    model: Model
    lookahead: float = 0
    also: tuple[str, ...] = ()


def new_toy(*sublayers: str, **config: object) -> ToyForCausalLM:
    """A toy of these layers, with random weights."""
    torch.manual_seed(0)
    return ToyForCausalLM(ToyConfig(sublayers, **config)).eval()


def _toy(*sublayers: str, model_class: type[PreTrainedModel] = ToyForCausalLM) -> Model:
    return Model(model_class, ToyConfig(sublayers=sublayers or ["Recurrence"]))


def _ahead(layer: str, lookahead: float = MANY) -> Fault:
    """A layer that sees the future: the model agrees with itself nowhere, since every piece ends somewhere else."""
    seen = r"\d+" if lookahead == MANY else str(lookahead)
    causal = dict.fromkeys(("suffix exchange", "zero upper triangle"), f"looks {seen} tokens ahead")
    rest = ("causality", "equivalence", "generation", "state")
    return Fault(
        {**causal, "stepwise loss": "other outputs than its prefixes"}, _toy("Recurrence", layer), lookahead, rest
    )


# Checks that feel a fault of padding, and a fault of everything that is fed in more than one piece.
PADDING = (
    "right padding",
    "padding anywhere",
    "rows with different padding",
    "continuation after padding",
    "second turns of different length",
    "left padded batch",
)
ROUNDED = ("any chunking", "packed documents", "state")
CONTINUED = ("continuation after padding", "second turns of different length", "generation")

FAULTS = {
    "circular gate": _ahead("CircularGate", 31),
    "zero-padded filter": _ahead("SpectralFilter"),
    "block means": _ahead("BlockMeans", 15),
    "cache not reordered": Fault(
        {"beam search from the cache": "not reordered.*leaves the rows in place"},
        _toy(model_class=UnorderedForCausalLM),
    ),
    "mask ignored": Fault(
        {"left padding": "attention_mask is ignored"},
        _toy(model_class=UnmaskedForCausalLM),
        also=PADDING,
    ),
    "state in bfloat16": Fault(
        {"precision of the state": r"in a float64 model .*states\.state is kept in bfloat16"},
        _toy("HalfState"),
        also=(*CONTINUED, *ROUNDED),
    ),
    "state rounded to bfloat16": Fault(
        {"precision of the state": r"states\.state holds values that were rounded to bfloat16"},
        _toy("RoundedState"),
        also=(*CONTINUED, *ROUNDED),
    ),
    "buffers lost": Fault(
        {"every tensor survives": r"buffer 'model\.layers\.0\.sublayers\.1\.signs' is lost"},
        _toy("Recurrence", "LostBuffer"),
        also=("persistence", "moving and merging lora"),
    ),
    "norm over time": _ahead("TimeNorm"),
    "cache not cropped": Fault(
        {"taking tokens back": r"crop\(.*\) does not take .* tokens back"},
        _toy(model_class=UncroppedForCausalLM),
        also=("assisted decoding", "prompt lookup"),
    ),
    "mask ignored by attention": Fault(
        {"left padding": "attention_mask is ignored"}, Model(UnmaskedLlama, LLAMA), also=PADDING
    ),
    "packed documents seen": Fault(
        {"packed documents": "packed documents see each other"},
        _toy(model_class=UnpackedForCausalLM),
        also=("rows packed independently",),
    ),
    "positions restarted": Fault(
        {"any chunking": r"feeding in pieces .* changes the output: first at row 0, position \d+"},
        _toy("Recurrence", "RestartedPositions"),
        also=("packed documents", "rows packed independently", *CONTINUED),
    ),
    "two embeddings": Fault(
        {"inputs embeds": "inputs_embeds give other outputs than their ids"},
        _toy(model_class=TwoEmbeddingsForCausalLM),
        also=("generation from embeddings",),
    ),
    "noise in evaluation": Fault(
        {"same results again": "a second run gives other outputs"},
        _toy("Recurrence", "Noise"),
        lookahead=UNKNOWN,
        also=GROUPS,
    ),
    "wrong gradient": Fault(
        {"fast operations": "smooth differs from its naive twin in the gradient"}, _toy("Recurrence", "WrongGradient")
    ),
    "not a number": Fault(
        dict.fromkeys(("suffix exchange", "zero upper triangle", "stepwise loss"), "NaN .* first at position 11"),
        _toy("Recurrence", "NotANumber"),
        lookahead=UNKNOWN,
        also=GROUPS,
    ),
    "weight lost": Fault(
        {"every tensor survives": r"missing keys: model\.norm\.weight"},
        _toy(model_class=LostWeightForCausalLM),
        also=("persistence",),
    ),
    "always tied": Fault(
        {"tied and untied": "with tie_word_embeddings=False the input and output embeddings are tied"},
        _toy(model_class=AlwaysTiedForCausalLM),
        also=("persistence",),
    ),
    "layer bypassed": Fault(
        {"training with lora": r"the adapter of .*sublayers\.1\.proj' gets no gradient"},
        _toy("Recurrence", "BypassedLinear"),
    ),
    "state as coarse as the model": Fault(
        {"precision of the state": r"in a bfloat16 model .*states\.state is kept in bfloat16"}, _toy("CoarseState")
    ),
    "state rounded with the model": Fault(
        {"precision of the state": r"in a bfloat16 model .*states\.state holds values that were rounded to bfloat16"},
        _toy("RoundedWithModel"),
    ),
    "state grows": Fault({"size of the state": r"the state grows: layers\.0\.keys is"}, Model(ClaimingLlama, LLAMA)),
    "state with a secret": Fault(
        {"size of the state": r"the cache holds layers\.0\.states\.seen .* not declared"}, _toy("GrowingState")
    ),
    "state undeclared": Fault(
        {"size of the state": r"\(3, 32\), but \(3, 16\) is declared"}, _toy(model_class=UndeclaredForCausalLM)
    ),
    "state unstable": Fault(
        {"endurance": "drifts|no longer finite|grows"}, _toy("UnstableState"), also=(*CONTINUED, *ROUNDED)
    ),
}

IN_SETTINGS = "suffix exchange in every setting"
AT_LENGTHS = "suffix exchange at usual lengths"


def _cheat(name: str) -> Fault:
    """Llama that cheats under one condition, which one check alone may meet."""
    check = AT_LENGTHS if "lengths" in name or "1,025" in name else IN_SETTINGS
    model = Model(cheating(LlamaForCausalLM, CHEATS[name]), LLAMA)
    return Fault({check: r"looks \d+ tokens ahead"}, model, UNKNOWN, also=GROUPS)


FAULTS |= {f"cheats {name}": _cheat(name) for name in CHEATS}
FAULTS |= {
    "batch statistics over time": Fault(
        {IN_SETTINGS: r"looks \d+ tokens ahead: .* training mode"}, _toy("TimeStatistics"), UNKNOWN, also=GROUPS
    ),
    "a leak of 1e-5": Fault(
        {"suffix exchange": r"looks \d+ tokens ahead"},
        Model(cheating(LlamaForCausalLM, lambda seen: True, 1e-5), LLAMA),
        UNKNOWN,
        also=GROUPS,
    ),
    "forward patched on the instance": Fault(
        {"suffix exchange": r"looks \d+ tokens ahead", IN_SETTINGS: r"looks \d+ tokens ahead"},
        Model(LlamaForCausalLM, LLAMA, peek_by_patch),
        UNKNOWN,
        also=GROUPS,
    ),
    "arguments swallowed": Fault(
        {"unknown arguments": r"the unknown argument '\w+' is swallowed"}, _toy(model_class=SwallowingForCausalLM)
    ),
    "order unseen": Fault(
        {"order is seen": "mirror image give the same output: order is not seen"},
        Model(BagOfNeighbours, MIRRORED),
        also=("resized embeddings",),
    ),
    "order barely seen": Fault(
        {"order is seen": "before and after are hardly told apart"},
        Model(LopsidedNeighbours, MIRRORED),
        also=("resized embeddings",),
    ),
}

RIGHT = {
    "toy": _toy(),
    "untied toy": Model(ToyForCausalLM, ToyConfig(tie_word_embeddings=False)),
    "llama": Model(LlamaForCausalLM, LLAMA),
    "gpt2": Model(GPT2LMHeadModel, GPT2Config(**TINY, n_positions=256, bos_token_id=1, eos_token_id=1)),
}
