"""HoloSpectralNet: language models that bind, bundle and unbind instead of attending."""

import functools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import AttentionMixer, WindowMixer
from .backbone import RecurrentBackbone
from .binding import bind, unbind
from .binding import bind as fft_circular_conv
from .binding import unbind as fft_circular_corr
from .cache import RecurrentCache, RecurrentLayer
from .configuration_hsn import HsnConfig, reference_config
from .filters import SpectralGate
from .heads import MaskedLMHead, RecurrentForCausalLM, SequenceClassificationHead, TokenClassificationHead
from .initial_state import InitialState
from .layers import (
    GatedChannelMix,
    LiteChannelMix,
    at_least_float32,
    init_copy_,
    init_normal_,
    init_residual_,
    make_channel_mix,
    make_norm,
)
from .layout import TokenLayout
from .phases import (
    PhaseDrift,
    RotaryEmbedding,
    home_of_float64,
    phase_features,
    rotate_state,
    summed_turns,
    turn_halves,
    whole_turns,
)
from .pretrained import FamilyPreTrainedModel
from .recording import full_precision, single_token
from .scans import cancelling_scan, cancelling_step, interference_scan, interference_step


def or_sizes(init: Callable) -> Callable:
    """A constructor that takes an [`HsnConfig`] or, as HoloSpectralNet's, the sizes of [`reference_config`]."""

    @functools.wraps(init)
    def with_config(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        given = args[0] if args else kwargs.get("config")
        if isinstance(given, PretrainedConfig):  # not HsnConfig: a checkpoint's own code may be there twice
            init(self, *args, **kwargs)
        else:
            init(self, reference_config(*args, **kwargs))

    return with_config


class Projected(NamedTuple):
    """What a mixer with dynamic binding computes from its tokens.

    Attributes:
        v: values `[B, T, H·V]`.
        theta_q, theta_k: phases of queries and keys `[B, T, H·P]`, with what the tokens have turned so far.
        decay: `[B, T, H]`, before the bias is added.
        strength: of the cancelling write `[B, T, H]`, None if it bundles.
        turned: how far the tokens up to each have turned the state, `[B, T, H]`; None if the drift is fixed.
    """

    v: torch.Tensor
    theta_q: torch.Tensor
    theta_k: torch.Tensor
    decay: torch.Tensor
    strength: torch.Tensor | None
    turned: torch.Tensor | None

    def reversed(self) -> "Projected":
        """Read from the end. What was turned stays with its token, so that it turns the other way."""
        v, theta_q, theta_k, decay = (x.flip(1) for x in self[:4])
        strength, turned = (None if x is None else x.flip(1) for x in self[4:])
        return Projected(v, theta_q, theta_k, decay, strength, turned)


class HolographicMixer(nn.Module):
    """Binds values to phases, bundles them in a decaying state, and unbinds what the present token asks for.

    `binding="dynamic"`: per head with P phases, M_t = λ_t e^{-iω} M_{t-1} + e^{iθk_t} ⊗ √(1 - λ_t) v_t and
    y_t = Re(e^{-iθq_t} · M_t) / √P: phases, values and the decay λ are computed from the input, and the drift ω
    is the position encoding. `write="cancel"` subtracts what the key recalls before it writes (the delta rule). The
    output is normalised per head and gated. A bidirectional mixer reads both directions, and its drift is turned round
    on the way back: a token before and one after are heard at ω(t - s), so their order is seen.

    `binding="static"`, the form of HoloSpectralNet: y = corr(EMA(x ⊛ k), u) with two learned keys k and u as wide as
    the model and no projections: 2 D parameters, and a decay per head. Its heads are neighbouring channels that
    remember equally long; the first key spreads every channel over all of them, the second gathers them again. As the
    memories differ, neither key can take the other's part. Tokens are mixed by their distance, whatever they say: it
    cannot select by content. A bidirectional mixer exchanges the keys on the way back, so that order is seen.

    Args:
        config: an [`HsnConfig`]; or the width D of a static one, with the spectral gate elsewhere.
    """

    @or_sizes
    def __init__(self, config: HsnConfig) -> None:
        super().__init__()
        dim, self.heads = config.hidden_size, config.num_heads
        self.key_heads = config.num_key_heads if config.binding == "dynamic" else self.heads
        self.phases, self.head_dim = config.num_phases, config.head_dim
        self.causal, self.dynamic = config.is_causal, config.binding == "dynamic"
        self.cancel = config.write == "cancel"
        self.write_range, self.write_start, self.spread = config.write_range, config.write_start, config.phase_spread
        self.turns, self.memory = config.drift == "data", config.memory
        self.fractions = [config.turn_fractions[head % len(config.turn_fractions)] for head in range(self.key_heads)]
        self.norm_eps = config.norm_eps
        filtered = config.gate_placement == "mixer"
        self.filter = SpectralGate(dim, config.gate_taps, self.causal, "filter", delayed=0.5) if filtered else None
        if self.dynamic:
            self.v_proj = nn.Linear(dim, self.key_heads * self.head_dim, bias=False)
            self.gate_proj = nn.Linear(dim, dim, bias=False)
            self.out_proj = nn.Linear(dim, dim, bias=False)
            self.norm_weight = nn.Parameter(torch.ones(dim))
            self.drift = PhaseDrift(self.key_heads, self.phases, config.drift_base, config.drifting_phases)
            self.q_proj = nn.Linear(dim, self.heads * self.phases, bias=False)
            self.k_proj = nn.Linear(dim, self.key_heads * self.phases, bias=False)
            self.decay_proj = nn.Linear(dim, self.key_heads, bias=False)
            if self.cancel:
                self.write_proj = nn.Linear(dim, self.key_heads)
            if self.turns:
                self.turn_proj = nn.Linear(dim, self.key_heads)
        else:
            self.bind_key = nn.Parameter(torch.empty(dim))
            self.unbind_key = nn.Parameter(torch.empty(dim))
        self.decay_bias = nn.Parameter(torch.empty(self.key_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init_copy_(self.decay_bias, self._first_decays())
        if self.dynamic and self.spread != 1:
            for projection in (self.q_proj, self.k_proj):
                init_normal_(projection.weight, std=0.7 * self.spread * projection.in_features**-0.5)
        if self.cancel:
            share = torch.tensor(self.write_start / self.write_range)
            init_copy_(self.write_proj.bias, share.logit().expand(self.key_heads))
        if self.dynamic:
            nn.init.ones_(self.norm_weight)
        else:
            for key in (self.bind_key, self.unbind_key):
                init_normal_(key, std=len(key) ** -0.5)

    def _first_decays(self) -> torch.Tensor:
        """Decays d `[H]` to start from, where λ = σ(-d) remembers 1/(1 - λ) tokens: longest in the first head."""
        if self.memory is None:  # about 55 tokens down to 2
            return torch.linspace(-4.0, -0.5, self.key_heads)
        shortest, longest = self.memory
        tokens = torch.logspace(math.log10(longest), math.log10(shortest), self.key_heads, dtype=torch.float64)
        return -(tokens - 1).log()

    def init_residual_(self, depth: int) -> None:
        """Start what writes to the residual stream for a model of `depth` blocks, see [`init_residual_`]."""
        if self.dynamic:
            init_residual_(depth, self.out_proj)
        else:
            init_normal_(self.unbind_key, std=0.7 * len(self.unbind_key) ** -0.5 / math.sqrt(2 * depth))

    def state_spec(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the states, without the batch."""
        features = 2 * self.phases if self.dynamic else 1
        spec = self.filter.state_spec() if self.filter is not None else {}
        return spec | {"memory": (self.key_heads, features, self.head_dim)}

    def forward(
        self, x: torch.Tensor, layout: TokenLayout | None = None, cache: RecurrentLayer | None = None
    ) -> torch.Tensor:
        """`[B, T, D]` to `[B, T, D]`; continues from `cache` and updates it, if given."""
        layout = TokenLayout(x.shape[1]) if layout is None else layout
        source = x if self.filter is None else F.silu(self.filter(x, layout, cache))
        single = self.causal and single_token(layout.length)
        before = cache.get("memory") if cache is not None and single else None
        if cache is not None and before is not None:
            return (self._dynamic_step if self.dynamic else self._static_step)(x, source, layout, cache, before)
        return (self._dynamic if self.dynamic else self._static)(x, source, layout, cache)

    def _dynamic(
        self, x: torch.Tensor, source: torch.Tensor, layout: TokenLayout, cache: RecurrentLayer | None
    ) -> torch.Tensor:
        bound = self._project(x, source, layout)
        with full_precision(x.device):
            if layout.drift is None:
                layout.drift = self.drift(layout.length, x.device).to(bound.v.dtype).to(x.device)
            y = self._recall(bound, layout, cache)
            if not self.causal:
                y = y + self._recall(bound.reversed(), layout.reversed(), None).flip(2)
            y = F.layer_norm(y, (self.head_dim,), eps=self.norm_eps)
        return self._gated(y.transpose(1, 2), x)

    def _gated(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """What is read `[B, T, H, V]`, through the output gate: `[B, T, D]`."""
        y = y.flatten(2).to(x.dtype) * self.norm_weight
        return self.out_proj(y * F.silu(self.gate_proj(x)))

    def _dynamic_step(
        self, x: torch.Tensor, source: torch.Tensor, layout: TokenLayout, cache: RecurrentLayer, before: torch.Tensor
    ) -> torch.Tensor:
        """[`_dynamic`] for a single token that continues from the state `before`: one step of the recurrence."""
        v, theta_q, theta_k, decay, strength, turned = self._project(x, source, layout)
        with full_precision(x.device):
            theta = torch.cat([theta_q, theta_k], -1).view(len(x), -1, self.phases)  # [B, H·G + H, P], not drifted yet
            q, k = torch.cat([theta.cos(), theta.sin()], -1).split([self.heads, self.key_heads], 1)
            v, decay = v.view(len(x), self.key_heads, -1), (decay + self.decay_bias.to(decay.dtype))[:, 0]  # [B, H]
            kept, state = decay.neg().sigmoid(), layout.before(before)
            if strength is None:
                write = (0.5 * (F.logsigmoid(decay) - math.log(self.phases))).exp()
                y, state = interference_step(q, k, v, kept, write, state)
            else:  # keys of unit norm
                q, k = q * self.phases**-0.5, k * self.phases**-0.5
                y, state = cancelling_step(q, k, v, kept, self._write(decay, strength)[:, :, 0], state)
            if turned is not None:
                state = self._turn(state, TokenLayout(1), turned)
            else:
                layout.turn = self.drift.turn(state) if layout.turn is None else layout.turn
                state = turn_halves(state, *layout.turn, -2)
            cache.put("memory", layout.after(state, before))
            y = F.layer_norm(y, (self.head_dim,), eps=self.norm_eps)
        return self._gated(y[:, None], x)

    def _static(
        self, x: torch.Tensor, source: torch.Tensor, layout: TokenLayout, cache: RecurrentLayer | None
    ) -> torch.Tensor:
        dtype = at_least_float32(x.dtype)
        k, u, source = (z.to(dtype) for z in (self.bind_key, self.unbind_key, source))
        with full_precision(x.device):
            y = self._spread(source, k, u, layout, cache)
            if not self.causal:
                y = y + self._spread(source.flip(1), u, k, layout.reversed(), None).flip(1)
        return y.to(x.dtype)

    def _static_step(
        self, x: torch.Tensor, source: torch.Tensor, layout: TokenLayout, cache: RecurrentLayer, before: torch.Tensor
    ) -> torch.Tensor:
        """[`_static`] for a single token that continues from the state `before`."""
        dtype = at_least_float32(x.dtype)
        k, u, source, bias = (z.to(dtype) for z in (self.bind_key, self.unbind_key, source, self.decay_bias))
        with full_precision(x.device):
            v = bind(source, k).view_as(before)  # [B, H, 1, V]
            state = layout.before(before).lerp(v, bias.sigmoid()[:, None, None])  # λ M + (1 - λ) v
            cache.put("memory", layout.after(state, before))
            return unbind(state.view_as(source), u).to(x.dtype)

    def _project(self, x: torch.Tensor, source: torch.Tensor, layout: TokenLayout) -> Projected:
        """What the tokens say: phases, values and strength from the filtered input, decay and turn from the input."""
        dtype = at_least_float32(x.dtype)
        strength = self.write_proj(source).to(dtype) if self.cancel else None
        v, theta_q, theta_k = (projection(source).to(dtype) for projection in (self.v_proj, self.q_proj, self.k_proj))
        turned = None
        if self.turns:
            turned = summed_turns(layout.mask(whole_turns(self.turn_proj(x).to(dtype), self.fractions)))
            theta_q, theta_k = (self._add(theta, turned) for theta in (theta_q, theta_k))
        return Projected(v, theta_q, theta_k, self.decay_proj(x).to(dtype), strength, turned)

    def _add(self, theta: torch.Tensor, turned: torch.Tensor) -> torch.Tensor:
        """Phases `[B, T, H·P]` of queries or keys with what the tokens up to theirs have turned, `[B, T, H]`."""
        heads = theta.shape[-1] // self.phases
        angle = turned if heads == self.key_heads else turned.repeat_interleave(heads // self.key_heads, 2)
        return (theta.unflatten(-1, (heads, self.phases)) + angle[..., None]).flatten(2)

    def _recall(self, bound: Projected, layout: TokenLayout, cache: RecurrentLayer | None) -> torch.Tensor:
        """Bind, bundle and unbind by phases in one direction: `[B, H, T, V]`."""
        v, theta_q, theta_k, decay, strength, turned = bound
        groups = self.heads // self.key_heads
        drift = cast(torch.Tensor, layout.drift)  # [T, H, P]; set by whoever calls this
        theta_q, theta_k = (theta.unflatten(-1, (-1, self.phases)) for theta in (theta_q, theta_k))  # [B, T, H, P]
        q = phase_features(theta_q, drift if groups == 1 else drift.repeat_interleave(groups, 1))
        k = phase_features(theta_k, drift)
        if self.cancel:  # keys of unit norm
            q, k = q * self.phases**-0.5, k * self.phases**-0.5
        decay = (decay + self.decay_bias.to(decay.dtype)).transpose(1, 2).contiguous()  # [B, H, T]
        v = v.unflatten(-1, (self.key_heads, -1)).transpose(1, 2)  # [B, H, T, V]
        return self._scan(q, k, v, decay, strength, layout, cache, turned)

    def _spread(
        self,
        x: torch.Tensor,
        first: torch.Tensor,
        second: torch.Tensor,
        layout: TokenLayout,
        cache: RecurrentLayer | None,
    ) -> torch.Tensor:
        """Bind `[B, T, D]` with one key, bundle, and unbind with the other in one direction: `[B, T, D]`."""
        v = bind(x, first).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, H, T, V]
        ones = torch.ones_like(v[..., :1])
        decay = self.decay_bias.to(v.dtype)[:, None].expand(v.shape[:-1])
        y = self._scan(ones, ones, v, decay, None, layout, cache)
        return unbind(y.transpose(1, 2).flatten(2), second)

    def _scan(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        decay: torch.Tensor,
        strength: torch.Tensor | None,
        layout: TokenLayout,
        cache: RecurrentLayer | None,
        turned: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Bundle what is bound and read it, with the decay λ = σ(-`decay`) `[B, H, T]`: `[B, H, T, V]`."""
        log_decay = -F.softplus(decay)  # of other strides, torch.compile takes the wrong ones for its gradient
        write = self._write(decay, strength)
        if layout.valid is not None:  # padding neither decays the state nor writes
            padding = ~layout.valid[:, None]
            log_decay = log_decay.masked_fill(padding, 0.0)
            write = write.masked_fill(padding, 0.0 if self.cancel else float("-inf"))
        scan = cancelling_scan if self.cancel else interference_scan
        before = cache.get("memory") if cache is not None else None
        y, state = scan(q, k, v, log_decay, write, before, layout.document)
        if cache is not None:

            def replay(tokens: int) -> torch.Tensor:
                part, some = layout.first(tokens), (slice(None), slice(None), slice(tokens))
                state = scan(q[some], k[some], v[some], log_decay[some], write[some], before, part.document)[1]
                return self._turn(state, part, turned)

            cache.put("memory", self._turn(state, layout, turned), layout.length, replay)
        return y

    def _write(self, decay: torch.Tensor, strength: torch.Tensor | None) -> torch.Tensor:
        """Strength of writing `[B, H, T]`: β for the cancelling write, else the logarithm of the weight."""
        if strength is not None:
            return (self.write_range * strength.sigmoid()).transpose(1, 2)
        released = -F.softplus(-decay)  # log(1 - λ), however near to 1 λ is
        return 0.5 * (released - math.log(self.phases)) if self.dynamic else released

    def _turn(self, state: torch.Tensor, layout: TokenLayout, turned: torch.Tensor | None) -> torch.Tensor:
        """The state with its phases relative to the token that comes next, which may turn it further."""
        if not self.dynamic:
            return state
        home = home_of_float64(state.device)
        tokens = torch.tensor(layout.length, device=home) if layout.lengths is None else layout.lengths
        angle = self.drift.angles(tokens)  # [H, P] or [B, H, P]
        if turned is not None:  # padding comes last and turns nothing
            angle = angle + turned[:, layout.length - 1, :, None].to(angle.device)
        return rotate_state(state, angle)


MIXERS = {"holographic": HolographicMixer, "attention": AttentionMixer, "window": WindowMixer}


class HoloSpectralBlock(GradientCheckpointingLayer):
    """Token mixer, spectral gate (if it is a sublayer of its own) and channel mix, each with norm and residual.

    Args:
        config: an [`HsnConfig`]; or, as HoloSpectralNet has it, `dim`, `max_seq_len` (512) and `rank` (32).
        layer_idx: index of the block, which picks its mixer and its states in the cache.
    """

    gate: SpectralGate | None

    @or_sizes
    def __init__(self, config: HsnConfig, layer_idx: int = 0) -> None:
        super().__init__()
        dim = config.hidden_size
        self.layer_idx = layer_idx
        self.mixer_norm = make_norm(config)
        self.mixer = MIXERS[config.mixer_types[layer_idx]](config)
        if config.gate_placement == "sublayer":
            self.gate_norm = make_norm(config)
            self.gate = SpectralGate(dim, config.gate_taps, config.is_causal)
        else:
            self.gate = None
        self.channel_norm = make_norm(config)
        self.channel_mix = make_channel_mix(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        remembers = config.learned_state and isinstance(self.mixer, HolographicMixer)
        self.initial_state = InitialState(self.mixer.state_spec(), config.state_start) if remembers else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        layout: TokenLayout | None = None,
        past_key_values: RecurrentCache | None = None,
    ) -> torch.Tensor:
        """`[B, T, D]` to `[B, T, D]`."""
        x = hidden_states
        cache = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        mixer = self.mixer if self.initial_state is None else partial(self.initial_state.run, self.mixer)
        x = x + self.dropout(mixer(self.mixer_norm(x), layout, cache))
        if self.gate is not None:
            x = x + self.dropout(self.gate(self.gate_norm(x), layout, cache))
        return x + self.dropout(self.channel_mix(self.channel_norm(x)))

    def state_spec(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the states, without the batch; the keys of attention grow and are not listed."""
        return self.mixer.state_spec() | (self.gate.state_spec() if self.gate is not None else {})


class HsnPreTrainedModel(FamilyPreTrainedModel):
    config_class = HsnConfig
    block_class = HoloSpectralBlock
    _no_split_modules = ["HoloSpectralBlock"]
    capabilities = frozenset({"causal", "bidirectional", "constant_state", "packing", "rollback", "strict_arguments"})

    @classmethod
    def state_spec(cls, config: HsnConfig) -> list[dict[str, tuple[int, ...]]]:
        with torch.device("meta"):
            return [HoloSpectralBlock(config, index).state_spec() for index in range(config.num_hidden_layers)]

    @classmethod
    def capabilities_of(cls, config: PretrainedConfig) -> frozenset[str]:
        attends = "attention" in config.mixer_types  # then keys and values grow with the text
        return cls.capabilities - {"constant_state"} if attends else cls.capabilities

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, HoloSpectralBlock):  # the residual stream keeps its size at any depth
            depth = self.config.num_hidden_layers
            module.mixer.init_residual_(depth)
            init_residual_(depth, module.channel_mix.out_proj)


class HsnModel(HsnPreTrainedModel, RecurrentBackbone):
    """HoloSpectralNet without a head: `[B, T]` token ids to hidden states `[B, T, hidden_size]`."""


class HsnForCausalLM(HsnPreTrainedModel, RecurrentForCausalLM):  # type: ignore[misc]  # as CausalLMHead
    """HoloSpectralNet that predicts the next token."""

    backbone_class = HsnModel


def HoloSpectralNet(
    vocab_size: int = 32000,
    dim: int = 256,
    depth: int = 6,
    max_seq_len: int = 512,
    rank: int = 32,
    tie_weights: bool = True,
) -> HsnForCausalLM:
    """The language model that HoloSpectralNet's README describes, made causal: an [`HsnForCausalLM`] of that form.

    It mixes tokens by their distance alone; the default of [`HsnConfig`] selects by content and learns far better.

    Args:
        vocab_size: number of tokens.
        dim: width D.
        depth: number of blocks.
        max_seq_len: length that it is meant for; information only, there is no limit.
        rank: inner width of the channel mix.
        tie_weights: whether the head shares the embedding matrix.

    Returns:
        A model of transformers: called with token ids `[B, T]` it gives an output whose `logits` are
        `[B, T, vocab_size]`.
    """
    sizes = {"vocab_size": vocab_size, "num_hidden_layers": depth, "tie_word_embeddings": tie_weights}
    return HsnForCausalLM(reference_config(dim, max_seq_len, rank, **sizes))


class HsnForMaskedLM(HsnPreTrainedModel, MaskedLMHead):
    """Bidirectional HoloSpectralNet that fills masked tokens."""

    backbone_class = HsnModel


class HsnForSequenceClassification(HsnPreTrainedModel, SequenceClassificationHead):
    """HoloSpectralNet that classifies whole texts."""

    backbone_class = HsnModel


class HsnForTokenClassification(HsnPreTrainedModel, TokenClassificationHead):
    """HoloSpectralNet that classifies every token."""

    backbone_class = HsnModel


__all__ = [
    "GatedChannelMix",
    "HoloSpectralBlock",
    "HoloSpectralNet",
    "HolographicMixer",
    "HsnConfig",
    "HsnForCausalLM",
    "HsnForMaskedLM",
    "HsnForSequenceClassification",
    "HsnForTokenClassification",
    "HsnModel",
    "LiteChannelMix",
    "RotaryEmbedding",
    "SpectralGate",
    "fft_circular_conv",
    "fft_circular_corr",
]
