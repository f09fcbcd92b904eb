"""HoloSpectralNet: language models that bind, bundle and unbind instead of attending."""

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .base import (
    MaskedLMHead,
    RecurrentBackbone,
    RecurrentForCausalLM,
    RecurrentPreTrainedModel,
    SequenceClassificationHead,
    TokenClassificationHead,
)
from .cache import RecurrentCache
from .configuration_base import RecurrentConfig  # noqa: F401 (for remote.py)
from .configuration_hsn import HsnConfig
from .configuration_vocabulary import lay_out_vocabulary  # noqa: F401 (for remote.py)
from .layers import (
    GatedChannelMix,
    LiteChannelMix,
    RotaryEmbedding,
    SpectralGate,
    TokenLayout,
    init_residual_,
    make_channel_mix,
    make_norm,
)
from .loading import check_finite  # noqa: F401 (for remote.py)
from .mixers import AttentionMixer, HolographicMixer
from .ops import bind as fft_circular_conv
from .ops import unbind as fft_circular_corr
from .remote import with_code  # noqa: F401 (for remote.py)
from .vocabulary import make_embedding  # noqa: F401 (for remote.py)

MIXERS = {"holographic": HolographicMixer, "attention": AttentionMixer}


class HoloSpectralBlock(GradientCheckpointingLayer):
    """Token mixer, spectral gate (if it is a sublayer of its own) and channel mix, each with norm and residual.

    Args:
        config: an [`HsnConfig`].
        layer_idx: index of the block, which picks its mixer and its states in the cache.
    """

    def __init__(self, config: HsnConfig, layer_idx: int = 0):
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

    def forward(
        self,
        hidden_states: torch.Tensor,
        layout: TokenLayout | None = None,
        past_key_values: RecurrentCache | None = None,
    ) -> torch.Tensor:
        """`[B, T, D]` to `[B, T, D]`."""
        x = hidden_states
        cache = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        x = x + self.dropout(self.mixer(self.mixer_norm(x), layout, cache))
        if self.gate is not None:
            x = x + self.dropout(self.gate(self.gate_norm(x), layout, cache))
        return x + self.dropout(self.channel_mix(self.channel_norm(x)))

    def state_spec(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the states, without the batch; the keys of attention grow and are not listed."""
        spec = self.mixer.state_spec() if isinstance(self.mixer, HolographicMixer) else {}
        return spec | (self.gate.state_spec() if self.gate is not None else {})


class HsnPreTrainedModel(RecurrentPreTrainedModel):
    config_class = HsnConfig
    block_class = HoloSpectralBlock
    _no_split_modules = ["HoloSpectralBlock"]
    capabilities = frozenset({"causal", "bidirectional", "constant_state", "packing", "rollback"})

    @classmethod
    def state_spec(cls, config: HsnConfig) -> list[dict[str, tuple[int, ...]]]:
        with torch.device("meta"):
            return [HoloSpectralBlock(config, index).state_spec() for index in range(config.num_hidden_layers)]

    @classmethod
    def capabilities_of(cls, config: HsnConfig) -> frozenset[str]:
        attends = "attention" in config.mixer_types  # then keys and values grow with the text
        return cls.capabilities - {"constant_state"} if attends else cls.capabilities

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, HoloSpectralBlock):  # the residual stream keeps its size at any depth
            init_residual_(self.config.num_hidden_layers, module.mixer.out_proj, module.channel_mix.out_proj)


class HsnModel(HsnPreTrainedModel, RecurrentBackbone):
    """HoloSpectralNet without a head: `[B, T]` token ids to hidden states `[B, T, hidden_size]`."""


class HsnForCausalLM(HsnPreTrainedModel, RecurrentForCausalLM):
    """HoloSpectralNet that predicts the next token."""

    backbone_class = HsnModel


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
