"""Resonance: language models that listen to their past through banks of damped resonators instead of attending."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .backbone import RecurrentBackbone
from .cache import RecurrentCache, RecurrentLayer
from .chunks import ChunkContext
from .configuration_resonance import ResonanceConfig
from .configuration_resonators import ResonatorConfig
from .filters import SpectralGate
from .heads import MaskedLMHead, RecurrentForCausalLM, SequenceClassificationHead, TokenClassificationHead
from .initial_state import InitialState
from .layers import at_least_float32, init_residual_, make_channel_mix, make_norm, scaled_to_unit
from .layout import TokenLayout
from .memory import PersistentMemory
from .pretrained import FamilyPreTrainedModel
from .recording import exporting, full_precision
from .resonators import ResonatorBank


class Listener(nn.Module):
    """What a mixer hears in one direction: a bank of resonators and, if the config asks for it, past chunks.

    Args:
        config: a [`ResonatorConfig`].
    """

    def __init__(self, config: ResonatorConfig) -> None:
        super().__init__()
        make_bank = partial(
            ResonatorBank,
            config.hidden_size,
            config.num_banks,
            config.num_modes,
            config.lowest_frequency,
            config.highest_frequency,
        )
        self.bank = make_bank()
        self.context = None if config.chunk_length is None else ChunkContext(config.chunk_length, make_bank())

    def state_spec(self) -> dict[str, tuple[int, ...]]:
        return self.bank.state_spec("modes") | ({} if self.context is None else self.context.state_spec())

    def forward(self, u: torch.Tensor, layout: TokenLayout, cache: RecurrentLayer | None) -> torch.Tensor:
        """`[B, T, D]`, zeros at padding, to `[B, T, D]`."""
        before = None if cache is None else cache.get("modes")
        y, state = self.bank(u, before, layout.lengths, layout.document)
        if cache is not None:

            def replay(tokens: int) -> torch.Tensor:
                part = layout.first(tokens)
                return self.bank(u[:, :tokens], before, part.lengths, part.document)[1]

            cache.put("modes", state, layout.length, replay)
        return y if self.context is None else y + self.context(u, layout, cache)


def both_ways(
    listeners: nn.ModuleList, x: torch.Tensor, layout: TokenLayout, cache: RecurrentLayer | None
) -> torch.Tensor:
    """What the first listener hears of `[B, T, D]` and, if there is a second, what that hears from the end."""
    y = listeners[0](x, layout, cache)
    for backward in listeners[1:]:
        y = y + backward(x.flip(1), layout.reversed(), None).flip(1)
    return y


class ResonanceMixer(nn.Module):
    """Token mixer: a gate decides what excites the resonators, and a gate decides what is heard of them.

    The values and their gate come from the filtered input. With `interference` the output gate hears the resonators
    too, all channels of them: oscillations are multiplied, so that sums and differences of their frequencies arise
    (mixing them linearly would fold into the output projection and add nothing). With `memory_dimension` a memory that
    does not resonate is heard next to them. A bidirectional mixer listens both ways, each with resonators and memory of
    its own: with the same ones it could not tell before from after.

    Args:
        config: a [`ResonatorConfig`].
    """

    def __init__(self, config: ResonatorConfig) -> None:
        super().__init__()
        dim, ways = config.hidden_size, range(1 if config.is_causal else 2)
        self.norm_eps = config.norm_eps
        self.filter = SpectralGate(dim, config.gate_taps, config.is_causal, "filter", delayed=0.5)
        self.in_proj = nn.Linear(dim, 2 * dim, bias=False)  # values and their gate
        self.listeners: Any = nn.ModuleList([Listener(config) for _ in ways])
        self.memories: Any = None
        if config.memory_dimension is not None:
            sizes = dim, config.memory_dimension, config.memory_chunk_length
            self.memories = nn.ModuleList([PersistentMemory(*sizes, config.norm_eps) for _ in ways])
        self.skip = nn.Parameter(torch.ones(dim))
        self.norm_weight = nn.Parameter(torch.ones(dim))
        self.gate_proj = nn.Linear(dim, dim, bias=False)
        self.interference_proj = nn.Linear(dim, dim, bias=False) if config.interference else None
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.skip)
        nn.init.ones_(self.norm_weight)

    def state_spec(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the states, without the batch."""
        memory = {} if self.memories is None else self.memories[0].state_spec()
        return self.filter.state_spec() | self.listeners[0].state_spec() | memory

    def forward(
        self, x: torch.Tensor, layout: TokenLayout | None = None, cache: RecurrentLayer | None = None
    ) -> torch.Tensor:
        """`[B, T, D]` to `[B, T, D]`; continues from `cache` and updates it, if given."""
        layout = TokenLayout(x.shape[1]) if layout is None else layout
        filtered = F.silu(self.filter(x, layout, cache))
        value, gate = self.in_proj(filtered).chunk(2, -1)
        u = layout.mask(value * F.silu(gate)).to(at_least_float32(x.dtype))
        with full_precision(x.device):  # the resonators keep their precision
            y = both_ways(self.listeners, u, layout, cache)
            y = scaled_to_unit(torch.addcmul(y, u, self.skip.to(u.dtype)), self.norm_eps)
        y = y.to(x.dtype) * self.norm_weight
        if self.memories is not None:
            y = y + both_ways(self.memories, filtered, layout, cache)
        gate = self.gate_proj(x)
        if self.interference_proj is not None:
            gate = gate + self.interference_proj(y)
        return self.out_proj(y * F.silu(gate))


class ResonanceBlock(GradientCheckpointingLayer):
    """Token mixer and channel mix, each with norm and residual.

    Args:
        config: a [`ResonatorConfig`].
        layer_idx: index of the block, which picks its states in the cache.
    """

    def __init__(self, config: ResonatorConfig, layer_idx: int = 0) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.mixer_norm = make_norm(config)
        self.mixer = ResonanceMixer(config)
        self.channel_norm = make_norm(config)
        self.channel_mix = make_channel_mix(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        remembers = config.learned_state
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
        return x + self.dropout(self.channel_mix(self.channel_norm(x)))


class ResonancePreTrainedModel(FamilyPreTrainedModel):
    config_class = ResonanceConfig
    block_class = ResonanceBlock
    _no_split_modules = ["ResonanceBlock"]
    capabilities = frozenset({"causal", "bidirectional", "constant_state", "packing", "rollback", "strict_arguments"})

    @classmethod
    def state_spec(cls, config: ResonatorConfig) -> list[dict[str, tuple[int, ...]]]:
        with torch.device("meta"):
            return [ResonanceMixer(config).state_spec()] * config.num_hidden_layers

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ResonanceBlock):
            init_residual_(self.config.num_hidden_layers, module.mixer.out_proj, module.channel_mix.out_proj)


class ResonanceModel(ResonancePreTrainedModel, RecurrentBackbone):
    """Resonance without a head: `[B, T]` token ids to hidden states `[B, T, hidden_size]`."""

    def run_blocks(  # type: ignore[override]  # the layout is all that its blocks are called with
        self, x: torch.Tensor, cache: RecurrentCache | None, keep_all: bool, layout: TokenLayout
    ) -> list[torch.Tensor]:
        """A long text goes through all blocks segment by segment, unless gradients or a graph are recorded."""
        run, length = super().run_blocks, self.config.segment_length
        if exporting() or torch.is_grad_enabled() or not self.config.is_causal or layout.length <= length:
            return run(x, cache, keep_all, layout=layout)
        cache = self.new_cache() if cache is None else cache
        starts = range(0, layout.length, length)
        parts = [run(x[:, n : n + length], cache, keep_all, layout=layout.slice(n, n + length)) for n in starts]
        return [torch.cat(segments, 1) for segments in zip(*parts, strict=True)]


class ResonanceForCausalLM(ResonancePreTrainedModel, RecurrentForCausalLM):  # type: ignore[misc]  # as CausalLMHead
    """Resonance that predicts the next token."""

    backbone_class = ResonanceModel


class ResonanceForMaskedLM(ResonancePreTrainedModel, MaskedLMHead):
    """Bidirectional Resonance that fills masked tokens."""

    backbone_class = ResonanceModel


class ResonanceForSequenceClassification(ResonancePreTrainedModel, SequenceClassificationHead):
    """Resonance that classifies whole texts."""

    backbone_class = ResonanceModel


class ResonanceForTokenClassification(ResonancePreTrainedModel, TokenClassificationHead):
    """Resonance that classifies every token."""

    backbone_class = ResonanceModel
