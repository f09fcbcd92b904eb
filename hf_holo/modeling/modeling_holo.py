"""HOLO: transformers whose projections are harmonic, with attention, rotary positions and transformers' own cache."""

from functools import partial, reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from .backbone import Backbone, check_cache_rows
from .cache import RecurrentCache
from .configuration_holo import HoloConfig
from .harmonics import BASES, HarmonicBasis, HoloLinear, SineActivation, harmonic_basis, named_seed
from .heads import CausalLMHead, MaskedLMHead, SequenceClassificationHead, TokenClassificationHead
from .layers import init_copy_
from .phases import RotaryEmbedding, home_of_float64, rotate_pairs
from .pretrained import FamilyPreTrainedModel
from .recording import exporting
from .validation import check_choice, check_divides

logger = logging.get_logger(__name__)


class HoloAttention(nn.Module):
    """Softmax attention with holographic projections, rotary positions and grouped queries.

    Args:
        dim: channels D.
        heads: query heads.
        harmonics: R of the projections; None: dense projections.
        key_heads: key heads, a divisor of `heads`; default: `heads`.
        basis, seed: of the projections, see [`HoloLinear`].
        causal: a token sees no later one.
        rotary_base: see [`RotaryEmbedding`]; None: no positions.
        bias: biases in the projections.
        layer_idx: index of its keys and values in the cache.

    Raises:
        ValueError: `heads` does not divide `dim`, or `key_heads` does not divide `heads`.
    """

    batch_first: bool

    def __init__(
        self,
        dim: int,
        heads: int,
        harmonics: int | None = None,
        key_heads: int | None = None,
        basis: str = "random",
        seed: int = 0,
        causal: bool = True,
        rotary_base: float | None = 10000.0,
        bias: bool = False,
        layer_idx: int = 0,
    ) -> None:
        super().__init__()
        self.heads, self.key_heads, self.head_dim = heads, key_heads or heads, dim // heads
        check_divides("heads", heads, "dim", dim)
        check_divides("key_heads", self.key_heads, "heads", heads)
        self.causal, self.layer_idx = causal, layer_idx
        self.rotary = None if rotary_base is None else RotaryEmbedding(self.head_dim, base=rotary_base)
        project = partial(_projection, harmonics=harmonics, basis=basis, seed=seed, bias=bias)
        self.q_proj = project(dim, dim, name="q_proj")
        self.k_proj = project(dim, self.key_heads * self.head_dim, name="k_proj")
        self.v_proj = project(dim, self.key_heads * self.head_dim, name="v_proj")
        self.o_proj = project(dim, dim, name="o_proj")

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> torch.Tensor:
        """`[B, T, D]` to `[B, T, D]`.

        Args:
            x: the input.
            mask: `[B, 1, T, S]`, True where a token sees a key, or values to add to the scores; default: everything,
                or the past if causal.
            positions: `[B, T]` or `[1, T]`; default: from 0 on.
            past_key_values: keys and values of earlier tokens, updated in place.
        """
        q, k, v = (self._heads(projection(x)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        if self.rotary is not None:
            if positions is None:
                positions = torch.arange(x.shape[1], device=home_of_float64(x.device))[None]
            angle = self.rotary.angles(positions)[:, None]  # [B, 1, T, V / 2]
            q, k = rotate_pairs(q, angle), rotate_pairs(k, angle)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        groups = self.heads // self.key_heads
        if groups > 1 and torch.onnx.is_in_onnx_export():  # where Optimum leaves `enable_gqa` out
            k, v, groups = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), 1
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=self.causal and mask is None and x.shape[1] > 1, enable_gqa=groups > 1
        )
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, H·V] to [B, H, T, V]."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class HoloMLP(nn.Module):
    """Channel mix with holographic projections: gated with SiLU (SwiGLU), or plain with a sine.

    Args:
        dim: channels D.
        intermediate: inner width.
        harmonics: R of the projections; None: dense projections.
        basis, seed: of the projections, see [`HoloLinear`].
        activation: "silu" or "sine".
        frequency: of the sine.
        bias: biases in the projections.
    """

    def __init__(
        self,
        dim: int,
        intermediate: int,
        harmonics: int | None = None,
        basis: str = "random",
        seed: int = 0,
        activation: str = "silu",
        frequency: float = 30.0,
        bias: bool = False,
    ) -> None:
        super().__init__()
        project = partial(_projection, harmonics=harmonics, basis=basis, seed=seed, bias=bias)
        self.gate_proj: Any = project(dim, intermediate, name="gate_proj") if activation == "silu" else None
        self.up_proj = project(dim, intermediate, name="up_proj")
        self.down_proj = project(intermediate, dim, name="down_proj")
        self.sine = SineActivation(frequency) if activation == "sine" else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, T, D]` to `[B, T, D]`."""
        up = self.up_proj(x)
        return self.down_proj(F.silu(self.gate_proj(x)) * up if self.sine is None else self.sine(up))


class HoloTransformerBlock(nn.Module):
    """In place of `nn.TransformerEncoderLayer`, with holographic projections, also inside `nn.TransformerEncoder`.

    As in HOLO-PyTorch the norms come first and the activation is a sine. The norms are RMSNorm: a LayerNorm there would
    not hear a change that all channels of a token share. Positions are the caller's business, as with torch's layer.
    The copies that `nn.TransformerEncoder` makes have their own parameters and equal bases.

    Args:
        dim: channels D.
        heads: attention heads.
        harmonics: R of every projection.
        intermediate: inner width of the channel mix; default: 4 D.
        dropout: on the output of each sublayer.
        basis, seed: of the projections, see [`HoloLinear`].
        frequency: of the sine.
        bias: biases in the projections.
        norm_eps: epsilon of the norms.
        batch_first: inputs are `[B, T, D]`, as in HOLO-PyTorch; False: `[T, B, D]`, the default of torch's layer.

    Raises:
        ValueError: `heads` does not divide `dim`, `basis` is "data" (it needs data), or as [`HoloLinear`].
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        harmonics: int,
        intermediate: int | None = None,
        dropout: float = 0.1,
        basis: str = "random",
        seed: int = 0,
        frequency: float = 1.0,
        bias: bool = True,
        norm_eps: float = 1e-5,
        batch_first: bool = True,
    ) -> None:
        super().__init__()
        check_divides("heads", heads, "dim", dim)
        check_choice("basis", basis, tuple(kind for kind in BASES if kind != "data"))
        options: dict[str, Any] = {"harmonics": harmonics, "basis": basis, "seed": seed, "bias": bias}
        self.norm1 = nn.RMSNorm(dim, eps=norm_eps)  # LayerNorm is deaf to what all channels share
        self.self_attn = HoloAttention(dim, heads, causal=False, rotary_base=None, **options)
        self.self_attn.batch_first = batch_first  # nn.TransformerEncoder looks for it there
        self.norm2 = nn.RMSNorm(dim, eps=norm_eps)
        self.mlp = HoloMLP(dim, intermediate or 4 * dim, activation="sine", frequency=frequency, **options)
        if self.mlp.sine is not None:
            self.mlp.sine.init_linear_(self.mlp.up_proj)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        src: torch.Tensor,
        src_mask: torch.Tensor | None = None,
        src_key_padding_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        """`[B, T, D]`, `[T, B, D]` without `batch_first`, or `[T, D]`, to the same shape.

        Args:
            src: the input.
            src_mask: `[T, T]` or `[B·H, T, T]`, True where a key is hidden, or values to add to the scores.
            src_key_padding_mask: `[B, T]` (`[T]` without a batch), likewise.
            is_causal: hide later tokens; with a `src_mask` it says that this is what the mask does, and is not needed.
        """
        batched, batch_dim = src.dim() == 3, 0 if self.self_attn.batch_first else 1
        x = src.movedim(batch_dim, 0) if batched else src[None]  # [B, T, D]
        if is_causal and src_mask is None:
            src_mask = x.new_ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        mask = _added(x, self.self_attn.heads, src_mask, src_key_padding_mask)
        x = x + self.dropout(self.self_attn(self.norm1(x), mask))
        x = x + self.dropout(self.mlp(self.norm2(x)))
        return x.movedim(0, batch_dim) if batched else x[0]


def _added(
    x: torch.Tensor, heads: int, src_mask: torch.Tensor | None, key_padding_mask: torch.Tensor | None
) -> torch.Tensor | None:
    """torch's two masks as values to add to the scores `[B, H, T, T]`, or None."""
    rows, length = x.shape[:2]
    masks = []
    if src_mask is not None:
        masks.append(src_mask if src_mask.dim() == 2 else src_mask.view(rows, heads, length, length))
    if key_padding_mask is not None:
        masks.append(key_padding_mask.view(rows, 1, 1, length))
    zero = x.new_zeros(())
    added = [zero.masked_fill(m, float("-inf")) if m.dtype == torch.bool else m.to(x.dtype) for m in masks]
    return reduce(torch.add, added) if masks else None


class HoloBlock(GradientCheckpointingLayer):
    """Attention and channel mix, each with norm and residual.

    Args:
        config: a [`HoloConfig`].
        layer_idx: index of the block.
    """

    def __init__(self, config: HoloConfig, layer_idx: int = 0) -> None:
        super().__init__()
        dim = config.hidden_size
        of_layer: dict[str, Any] = {"basis": config.basis, "seed": named_seed(config.basis_seed, f"layers.{layer_idx}")}
        self.attention_norm = nn.LayerNorm(dim, eps=config.norm_eps, bias=False)
        self.attention = HoloAttention(
            dim,
            config.num_attention_heads,
            config.harmonics if config.attention_projections == "holographic" else None,
            config.num_key_value_heads,
            causal=config.is_causal,
            rotary_base=config.rotary_base,
            layer_idx=layer_idx,
            **of_layer,
        )
        self.mlp_norm = nn.LayerNorm(dim, eps=config.norm_eps, bias=False)
        self.mlp = HoloMLP(
            dim,
            config.intermediate_size,
            config.harmonics if config.mlp_projections == "holographic" else None,
            activation=config.activation,
            frequency=config.sine_frequency,
            **of_layer,
        )
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> torch.Tensor:
        """`[B, T, D]` to `[B, T, D]`; arguments as in [`HoloAttention.forward`]."""
        x = hidden_states
        x = x + self.dropout(self.attention(self.attention_norm(x), mask, positions, past_key_values))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class HoloPreTrainedModel(FamilyPreTrainedModel):
    config_class = HoloConfig
    block_class = HoloBlock
    _no_split_modules = ["HoloBlock"]
    capabilities = frozenset({"causal", "bidirectional", "rollback", "strict_arguments"})

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, HoloLinear):  # before nn.Linear, which it is too
            module.reset_parameters()
        elif isinstance(module, HarmonicBasis):
            module.regenerate()
            if module.kind == "data" and not module.pivoted:
                init_copy_(module.table, random_start(module))
        else:
            super()._init_weights(module)
        if isinstance(module, HoloMLP) and module.sine is not None:
            module.sine.init_linear_(module.up_proj)

    def train(self, mode: bool = True) -> "HoloPreTrainedModel":
        """As in torch. Says once if the model is to be trained with "data" bases that have seen no data."""
        basis = next((m for m in self.modules() if isinstance(m, HarmonicBasis) and m.kind == "data"), None)
        if mode and basis is not None and not basis.pivoted and not basis.table.is_meta:
            row = basis.table[0].float().cpu()  # tells enough
            if torch.allclose(row, random_start(basis, 1)[0].float(), rtol=0.01):  # in bfloat16 too
                logger.warning_once(  # type: ignore[attr-defined]  # transformers gives loggers this method
                    "basis='data' was never fitted: the bases are random ones, which are stored. Call "
                    "hf_holo.fit_bases(model, batches) before training, or take basis='random', which costs no storage."
                )
        return super().train(mode)


def random_start(basis: HarmonicBasis, harmonics: int | None = None) -> torch.Tensor:
    """The first rows `[harmonics, I]` (default: all) of what a "data" basis is until it is fitted."""
    return torch.from_numpy(harmonic_basis("random", harmonics or basis.harmonics, basis.in_features, basis.seed))


class HoloModel(HoloPreTrainedModel, Backbone):
    """HOLO without a head: `[B, T]` token ids to hidden states `[B, T, hidden_size]`."""

    def new_cache(self) -> DynamicCache:
        return DynamicCache()

    def check_cache(self, cache: Cache, rows: int | None = None) -> None:
        if not isinstance(cache, Cache) or isinstance(cache, RecurrentCache):
            raise ValueError(
                f"past_key_values: a {type(cache).__name__}; HOLO continues from the keys and values of a cache such "
                "as DynamicCache"
            )
        if cache.is_compileable:
            raise ValueError(
                f"past_key_values: a {type(cache).__name__}; HOLO continues from a cache that grows, such as "
                "DynamicCache, not from a static one: leave cache_implementation out"
            )
        if not exporting():
            self._check_keys(cache, rows)

    def _check_keys(self, cache: Cache, rows: int | None) -> None:
        """Raise ValueError if the cache holds keys of another model, or of another number of texts."""
        layers = [layer for layer in getattr(cache, "layers", ()) if layer.get_seq_length()]
        if layers and len(layers) not in (len(self.layers), self.config.num_hidden_layers):
            raise ValueError(
                f"past_key_values: a cache of {len(layers)} layers; this {type(self).__name__} has {len(self.layers)}"
            )
        heads, size = self.config.num_key_value_heads, self.config.head_dim
        for keys in (layer.keys for layer in layers):
            if keys.dim() == 4 and (keys.shape[1], keys.shape[3]) != (heads, size):
                raise ValueError(
                    f"past_key_values: keys of {keys.shape[1]} heads of {keys.shape[3]}; this {type(self).__name__} "
                    f"has {heads} of {size}"
                )
            if keys.dim() == 4 and rows is not None:
                check_cache_rows(rows, keys)

    def prepare(
        self,
        x: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        seq_idx: torch.Tensor | None,
        cache: Cache | None,
    ) -> tuple[torch.Tensor, dict[str, Any], torch.Tensor | None]:
        """Of `position_ids` only the differences matter; by default they are counted on from the cache. Tokens see
        their own document of `seq_idx` only; it cannot be combined with a cache that holds tokens. Without it, without
        a mask and without such a cache, a 0 in `position_ids` begins a new document, as in transformers' own models."""
        past = 0 if cache is None else cache.get_seq_length()
        if seq_idx is not None and past:
            raise ValueError(
                "seq_idx: it cannot be combined with a cache that holds tokens; feed packed documents at once"
            )
        if position_ids is None:
            position_ids = torch.arange(past, past + x.shape[1], device=home_of_float64(x.device))[None]
        elif seq_idx is None and attention_mask is None and not past and not exporting():
            starts = position_ids == 0
            seq_idx = starts.cumsum(1) if bool(starts[:, 1:].any()) else None
        mask = visible(x, attention_mask, seq_idx, past, self.config.is_causal)
        return x, {"mask": mask, "positions": position_ids}, None


def visible(
    x: torch.Tensor, attention_mask: torch.Tensor | None, seq_idx: torch.Tensor | None, past: int, causal: bool
) -> torch.Tensor | None:
    """Which token sees which key: `[B, 1, T, S]` with S = past + T, or None where nothing but causality hides keys."""
    length = x.shape[1]
    if attention_mask is not None and not exporting() and bool(attention_mask.all()):
        attention_mask = None
    if attention_mask is None and seq_idx is None and (not past or length == 1):
        return None
    keys = torch.arange(past + length, device=x.device)
    queries = keys[past:, None]
    seen = (keys <= queries if causal else keys >= 0)[None]  # [1, T, S]
    if attention_mask is not None:
        seen = seen & F.pad(attention_mask.bool(), (past + length - attention_mask.shape[1], 0), value=True)[:, None]
    if seq_idx is not None:
        seen = seen & (seq_idx[:, :, None] == seq_idx[:, None])
    return (seen | (keys == queries))[:, None]  # padding sees itself: a row that sees nothing would turn into NaN


def _projection(
    in_features: int, out_features: int, name: str, harmonics: int | None, basis: str, seed: int, bias: bool
) -> nn.Linear:
    """A dense projection without harmonics, else a holographic one with a basis of its own."""
    if harmonics is None:
        return nn.Linear(in_features, out_features, bias=bias)
    return HoloLinear(in_features, out_features, harmonics, basis, bias, named_seed(seed % 2**32, name))


class HoloForCausalLM(HoloPreTrainedModel, CausalLMHead):  # type: ignore[misc]  # as CausalLMHead
    """HOLO that predicts the next token; generates with transformers' own cache of keys and values."""

    backbone_class = HoloModel


class HoloForMaskedLM(HoloPreTrainedModel, MaskedLMHead):
    """Bidirectional HOLO that fills masked tokens."""

    backbone_class = HoloModel


class HoloForSequenceClassification(HoloPreTrainedModel, SequenceClassificationHead):
    """HOLO that classifies whole texts."""

    backbone_class = HoloModel


class HoloForTokenClassification(HoloPreTrainedModel, TokenClassificationHead):
    """HOLO that classifies every token."""

    backbone_class = HoloModel
