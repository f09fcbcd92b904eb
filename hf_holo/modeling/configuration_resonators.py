"""What configs of all families share whose blocks are those of Resonance: the resonators and what is around them."""

import math
from typing import Any

from .configuration_base import WIDEST, FamilyConfig, default_heads, default_intermediate
from .validation import check_choice, check_divides, check_frequencies, check_positive, check_state_start

BANK_WIDTH = 8  # channels that share one damping, unless the config says otherwise


class ResonatorConfig(FamilyConfig):
    """The arguments of a [`ResonanceBlock`], and their checks. A step is a token of a text or a frame of a sound.

    Args:
        num_banks: banks of resonators G, a divisor of `hidden_size`; the channels of a bank share its damping.
            Default: banks of the smallest width that divides `hidden_size` and is at least 8.
        num_modes: damped modes K per bank, the first of which does not turn.
        lowest_frequency, highest_frequency: of the other modes, in radians per step; they are spread between the two,
            evenly in the logarithm. Default: one turn in 512 steps, and one turn in two.
        interference: whether the output gate hears all resonators, so that modes multiply modes, or the input alone.
        chunk_length: steps of a chunk of the hierarchical context; None: no such context.
        memory_dimension: phasors of the memory of every layer, a [`PersistentMemory`]; None: no memory.
        memory_chunk_length: steps after which what they have written can be read from that memory.
        gate_taps: length K of the spectral gate before the mixer's projections, in steps; a bidirectional one hears
            K // 2 steps on each side.
        channel_mix: `"gated"` (SwiGLU) or `"factorized"` (D → rank → D with GELU).
        intermediate_size: inner width of the gated channel mix; default: 8/3 hidden_size, a multiple of 8.
        rank: inner width of the factorized channel mix; default: hidden_size / 8.
        learned_state: whether every layer learns the state that a text begins with (False: it begins empty); in a
            bidirectional model that of the forward direction. See [`InitialState`].
        state_start: standard deviation of these states at the start of training; 0: they start empty. A model that is
            to count starts with 1: turns of a state are heard only where it holds something.
        kwargs: what all families share, see [`FamilyConfig`], and arguments of [`~transformers.PretrainedConfig`].

    Raises:
        ValueError: a size is not positive or does not divide what it must, a choice is unknown, or the frequencies are
            not numbers, not positive, not in order or above π.
    """

    def __init__(
        self,
        *,
        num_banks: int | None = None,
        num_modes: int = 16,
        lowest_frequency: float = 2 * math.pi / 512,
        highest_frequency: float = math.pi,
        interference: bool = False,
        chunk_length: int | None = None,
        memory_dimension: int | None = None,
        memory_chunk_length: int = 256,
        gate_taps: int = 4,
        channel_mix: str = "gated",
        intermediate_size: int | None = None,
        rank: int | None = None,
        learned_state: bool = False,
        state_start: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**self.own_names(kwargs))
        hidden_size = self.hidden_size
        self.num_banks = default_heads(hidden_size, least=BANK_WIDTH) if num_banks is None else num_banks
        self.num_modes = num_modes
        self.lowest_frequency = lowest_frequency
        self.highest_frequency = highest_frequency
        self.interference = interference
        self.chunk_length = chunk_length
        self.memory_dimension = memory_dimension
        self.memory_chunk_length = memory_chunk_length
        self.gate_taps = gate_taps
        self.channel_mix = channel_mix
        self.intermediate_size = default_intermediate(hidden_size) if intermediate_size is None else intermediate_size
        self.rank = max(1, hidden_size // 8) if rank is None else rank
        self.learned_state = learned_state
        self.state_start = state_start

    def check(self) -> None:
        check_positive(
            WIDEST,
            num_banks=self.num_banks,
            num_modes=self.num_modes,
            gate_taps=self.gate_taps,
            intermediate_size=self.intermediate_size,
            rank=self.rank,
        )
        check_positive(memory_chunk_length=self.memory_chunk_length)
        if self.chunk_length is not None:
            check_positive(chunk_length=self.chunk_length)
        if self.memory_dimension is not None:
            check_positive(WIDEST, memory_dimension=self.memory_dimension)
        check_divides("num_banks", self.num_banks, "hidden_size", self.hidden_size)
        check_choice("channel_mix", self.channel_mix, ("gated", "factorized"))
        check_choice("interference", self.interference, (True, False))
        check_choice("learned_state", self.learned_state, (True, False))
        check_state_start(self.state_start, self.learned_state)
        check_frequencies(lowest_frequency=self.lowest_frequency, highest_frequency=self.highest_frequency)
