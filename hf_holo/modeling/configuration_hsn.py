"""Config of HoloSpectralNet."""

import math
from collections.abc import Sequence
from typing import Any

from .configuration_base import WIDEST, FamilyConfig, default_heads, default_intermediate
from .validation import check_choice, check_divides, check_positive, check_state_start


class HsnConfig(FamilyConfig):
    r"""Config of the HoloSpectralNet models (`HsnModel` and its heads).

    Args:
        num_heads: query heads; default: heads of the smallest width that divides `hidden_size` and is at least 32.
        num_key_heads: heads of keys, values and state; default: `num_heads`. Fewer share one state among queries.
        num_phases: phases P per head; default: half the head width.
        binding: `"dynamic"` (keys computed from the input, which select by content) or `"static"` (the form of
            HoloSpectralNet: two learned keys of `hidden_size` values in place of all projections of the mixer, which
            mix tokens by their distance alone, in `num_heads` memories of different length).
        write: `"bundle"` (superpose) or `"cancel"` (subtract what the key recalls first); dynamic binding only.
        mixer_types: `"holographic"`, `"attention"` (to the whole text, keys and values grow with it) or `"window"`
            (attention to the last `window` tokens, the state has a constant size) for every layer; default:
            holographic everywhere.
        window: tokens W that layers with a window see, the present one included; a bidirectional one sees W - 1 tokens
            on each side.
        channel_mix: `"factorized"` (D → rank → D with GELU) or `"gated"` (SwiGLU).
        rank: inner width of the factorized channel mix; default: hidden_size / 8.
        intermediate_size: inner width of the gated channel mix; default: 8/3 hidden_size, a multiple of 8.
        gate_placement: `"mixer"` (the spectral gate is the short filter before the mixer's projections) or
            `"sublayer"` (a residual sublayer of its own).
        gate_taps: length K of the gate's kernel in tokens; a bidirectional gate hears K // 2 tokens on each side.
        write_range: β of the cancelling write is in (0, `write_range`), at most 2. Above 1 a write turns round what the
            key recalled, which lets a state count (negative eigenvalues; Grazzi et al., 2024, arXiv 2411.12537).
        write_start: β of the cancelling write at the start of training, below `write_range`.
        phase_spread: how many times as wide as by default the phases of queries and keys start; above 1 the keys of
            different tokens are less alike from the start.
        memory: tokens `[shortest, longest]` that the heads remember at the start of training, evenly in the logarithm;
            default: from 2 to 55. `[2, 10000]` has heads that hold.
        drift: `"fixed"` (phases drift with the position) or `"data"` (every token turns the state of a head further by
            an angle computed from it; Mamba-3, arXiv 2603.15569); dynamic binding only.
        turn_fractions: with `drift="data"`, fractions n of a turn, for one key head after another and over again: the
            angles of a head are drawn to whole multiples of 1/n of a turn, so that it counts modulo n and small errors
            do not add up. 1 is a head that is not turned. Default: (2, 3, 4, 6).
        drift_base: the phase drift runs from 1 radian a token down to 1/drift_base, evenly in the logarithm.
        drift_share: share of the phases of a head that drift with the position (which hear the order), from 0 to 1; the
            others stand still and hear contents alone, at any distance.
        norm_type: `"layer"` (LayerNorm without bias) or `"rms"` (RMSNorm, as Llama and Phi-3 have it).
        rotary_base: base of the rotary positions of attention layers, which are as in Llama; None: they have none, and
            those with a window 10,000.
        learned_state: whether every layer learns the state that a text begins with (False: it begins empty); in a
            bidirectional model that of the forward direction. See [`InitialState`].
        state_start: standard deviation of these states at the start of training; 0: they start empty. A model that is
            to count starts with 1: turns of a state are heard only where it holds something.
        kwargs: what all families share, see [`FamilyConfig`] (`vocab_size`, `hidden_size` or `dim`,
            `num_hidden_layers` or `depth`, `causal`, ...), and arguments of [`~transformers.PretrainedConfig`].

    Raises:
        ValueError: a width is not positive or not divisible, a choice is unknown, or a bidirectional model has no layer
            that sees the order of tokens.
    """

    model_type = "hsn"
    attribute_map = {
        **FamilyConfig.attribute_map,
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_key_heads",
    }

    def __init__(
        self,
        *,
        num_heads: int | None = None,
        num_key_heads: int | None = None,
        num_phases: int | None = None,
        binding: str = "dynamic",
        write: str = "bundle",
        mixer_types: list[str] | None = None,
        window: int = 64,
        channel_mix: str = "factorized",
        rank: int | None = None,
        intermediate_size: int | None = None,
        gate_placement: str = "mixer",
        gate_taps: int = 4,
        drift_base: float = 1000.0,
        drift_share: float = 1.0,
        drift: str = "fixed",
        turn_fractions: Sequence[int] = (2, 3, 4, 6),
        memory: Sequence[float] | None = None,
        write_range: float = 1.0,
        write_start: float = 0.5,
        phase_spread: float = 1.0,
        norm_type: str = "layer",
        rotary_base: float | None = None,
        learned_state: bool = False,
        state_start: float = 0.0,
        **kwargs,
    ) -> None:
        heads = {"num_heads": num_heads, "num_key_heads": num_key_heads}
        kwargs = self.own_names({name: value for name, value in heads.items() if value is not None} | kwargs)
        num_heads, num_key_heads = kwargs.pop("num_heads", None), kwargs.pop("num_key_heads", None)
        super().__init__(**kwargs)
        hidden_size = self.hidden_size
        self.num_heads = default_heads(hidden_size) if num_heads is None else num_heads
        self.num_key_heads = self.num_heads if num_key_heads is None else num_key_heads
        check_positive(num_heads=self.num_heads, num_key_heads=self.num_key_heads)
        check_divides("num_heads", self.num_heads, "hidden_size", hidden_size)
        check_divides("num_key_heads", self.num_key_heads, "num_heads", self.num_heads)
        self.num_phases = max(1, self.head_dim // 2) if num_phases is None else num_phases
        self.binding = binding
        self.write = write
        self.mixer_types = ["holographic"] * self.num_hidden_layers if mixer_types is None else list(mixer_types)
        self.window = window
        self.channel_mix = channel_mix
        self.rank = max(1, hidden_size // 8) if rank is None else rank
        self.intermediate_size = default_intermediate(hidden_size) if intermediate_size is None else intermediate_size
        self.gate_placement = gate_placement
        self.gate_taps = gate_taps
        self.drift_base = drift_base
        self.drift_share = drift_share
        self.drift = drift
        self.turn_fractions = list(turn_fractions)
        self.memory = None if memory is None else list(memory)
        self.write_range = write_range
        self.write_start = write_start
        self.phase_spread = phase_spread
        self.norm_type = norm_type
        self.rotary_base = rotary_base
        self.learned_state = learned_state
        self.state_start = state_start
        self.check()
        changed = "This bidirectional model could not tell before from after and can now: train it again"
        self.take_over_format(None if self.is_causal else changed)

    @property
    def drifting_phases(self) -> int:
        """How many phases of a head drift."""
        return math.ceil(self.drift_share * self.num_phases)

    def check(self) -> None:
        check_positive(
            WIDEST,
            num_phases=self.num_phases,
            rank=self.rank,
            intermediate_size=self.intermediate_size,
            gate_taps=self.gate_taps,
            window=self.window,
        )
        check_choice("binding", self.binding, ("dynamic", "static"))
        check_choice("write", self.write, ("bundle", "cancel"))
        check_choice("drift", self.drift, ("fixed", "data"))
        for fraction in self.turn_fractions:
            check_positive(turn_fractions=fraction)
        if not self.turn_fractions:
            raise ValueError("turn_fractions: [] is empty; give at least one, such as [2, 3]")
        check_choice("channel_mix", self.channel_mix, ("factorized", "gated"))
        check_choice("gate_placement", self.gate_placement, ("mixer", "sublayer"))
        check_choice("norm_type", self.norm_type, ("layer", "rms"))
        check_choice("learned_state", self.learned_state, (True, False))
        check_state_start(self.state_start, self.learned_state)
        for name in self.mixer_types:
            check_choice("mixer_types", name, ("holographic", "attention", "window"))
        if len(self.mixer_types) != self.num_hidden_layers:
            raise ValueError(
                f"mixer_types: {len(self.mixer_types)} entries, but num_hidden_layers={self.num_hidden_layers}; "
                "give one entry for every layer"
            )
        if self.binding == "static" and self.format_version < 2:
            raise ValueError(
                f"format_version: {self.format_version} with binding='static'; two keys have taken the place of the "
                "mixer's projections since, so this checkpoint cannot be read; train the model again"
            )
        if self.binding == "static" and self.write == "cancel":
            raise ValueError("write: 'cancel' needs binding='dynamic'; static binding accepts write='bundle'")
        attends = "attention" in self.mixer_types or "window" in self.mixer_types
        if self.binding == "static" and self.num_key_heads != self.num_heads and not attends:
            raise ValueError(
                f"num_key_heads: {self.num_key_heads} needs binding='dynamic' or attention; static binding has no "
                f"queries that could share keys: leave it at num_heads={self.num_heads}"
            )
        if not self.is_causal and self.rotary_base is None and set(self.mixer_types) == {"attention"}:
            raise ValueError(
                "causal: False; attention without positions in all layers cannot tell before from after; set "
                "rotary_base (10000.0), or keep a holographic layer"
            )
        if self.window < 2:
            raise ValueError(f"window: {self.window} holds no token before the present one; give at least 2")
        if "window" in self.mixer_types and self.head_dim % 2:
            raise ValueError(
                f"num_heads: {self.num_heads} makes heads of width {self.head_dim}; a window turns channels in pairs, "
                "so the width must be even"
            )
        if self.binding == "static" and self.drift == "data":
            raise ValueError("drift: 'data' needs binding='dynamic'; static binding accepts drift='fixed'")
        self._check_memory()
        if not 0 <= self.drift_share <= 1:
            raise ValueError(f"drift_share: {self.drift_share} is not in [0, 1]")
        if not 0 < self.write_range <= 2:
            raise ValueError(f"write_range: {self.write_range} is not above 0 and at most 2")
        if not 0 < self.write_start < self.write_range:
            raise ValueError(f"write_start: {self.write_start} is not between 0 and write_range={self.write_range}")
        if self.phase_spread <= 0:
            raise ValueError(f"phase_spread: {self.phase_spread} is not above 0")
        if self.drift_base < 1:
            raise ValueError(f"drift_base: {self.drift_base} is not at least 1")
        if self.rotary_base is not None and (self.rotary_base <= 1 or self.head_dim % 2):
            raise ValueError(
                f"rotary_base: {self.rotary_base} is not above 1, or the width of a head ({self.head_dim}) not even"
            )

    def _check_memory(self) -> None:
        tokens = self.memory
        if tokens is not None and not (len(tokens) == 2 and 1 < tokens[0] <= tokens[1] < float("inf")):
            raise ValueError(f"memory: {tokens} is not [shortest, longest] in tokens, each above 1")


def reference_config(dim: int = 256, max_seq_len: int = 512, rank: int = 32, **options) -> HsnConfig:
    """The form of HoloSpectralNet: two learned keys mix the tokens, and the spectral gate is a sublayer of its own.

    Args:
        dim: width D.
        max_seq_len: length that the model is meant for; information only, there is no limit.
        rank: inner width of the channel mix.
        options: other arguments of [`HsnConfig`]. `norm_type` is "rms" unless given: LayerNorm does not hear a change
            that all channels of a token share.
    """
    sizes: dict[str, Any] = {"hidden_size": dim, "max_position_embeddings": max_seq_len, "rank": rank}
    form = {"binding": "static", "gate_placement": "sublayer", "norm_type": "rms"}
    return HsnConfig(**{**form, **sizes, **options})
