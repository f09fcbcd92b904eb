"""Config of Resonance."""

from typing import Any

from .configuration_base import WIDEST
from .configuration_resonators import ResonatorConfig
from .configuration_vocabulary import lay_out_vocabulary
from .validation import check_positive


class ResonanceConfig(ResonatorConfig):
    """Config of the Resonance models for text (`ResonanceModel` and its heads).

    Args:
        segment_length: where no gradients are recorded, a causal model reads a longer text in segments of this
            many tokens, which bounds the memory and changes no result. A bidirectional one hears every text from both
            ends at once: its memory grows with the length.
        embedding_strategy: how tokens are stored: `"standard"`, `"frequency_compressed"`, `"adaptive"` or `"hash"`.
            Default: by the size of the vocabulary, see [`lay_out_vocabulary`].
        embedding_options: sizes of the tables of a compressed vocabulary that differ from the defaults, see there.
        max_position_embeddings: information only, there is no limit; the length that has been measured.
        num_attention_heads: changes nothing: there are none, but PEFT asks every config for soft prompts.
        kwargs: arguments of the blocks, see [`ResonatorConfig`] (`num_banks`, `num_modes`, `chunk_length`, ...), and
            what all families share, see [`FamilyConfig`] (`vocab_size`, `hidden_size`, `num_hidden_layers`, `causal`,
            ...).

    Raises:
        ValueError: as in [`ResonatorConfig`], or the tables do not fit the vocabulary.
    """

    model_type = "resonance"

    def __init__(
        self,
        *,
        segment_length: int = 4096,
        embedding_strategy: str | None = None,
        embedding_options: dict | None = None,
        max_position_embeddings: int = 262_144,
        num_attention_heads: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**{"max_position_embeddings": max_position_embeddings} | self.own_names(kwargs))
        self.num_attention_heads = num_attention_heads
        self.segment_length = segment_length
        self.embedding_strategy, self.embedding_options = lay_out_vocabulary(
            self.vocab_size,  # type: ignore[arg-type]  # None where a model reads no text, which this one does
            embedding_strategy,
            embedding_options,
        )
        self.check()
        lopsided = not self.is_causal and self.gate_taps % 2 == 0
        changed = f"Bidirectional filters of gate_taps={self.gate_taps} are symmetric now: train the model again"
        self.take_over_format(changed if lopsided else None)

    def check(self) -> None:
        super().check()
        check_positive(WIDEST, num_attention_heads=self.num_attention_heads)
        check_positive(segment_length=self.segment_length)
