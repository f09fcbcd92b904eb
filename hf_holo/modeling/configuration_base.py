"""What the configs of all families share."""

from typing import Any, cast

from transformers import PretrainedConfig
from transformers.utils import logging

from .validation import check_choice, check_positive, check_probability

logger = logging.get_logger(__name__)

# Rises when a config or checkpoint means something else than to older releases, which refuse it then. 2: bidirectional
# models see the order of tokens, zero-phase filters are symmetric, static binding has keys in place of projections.
FORMAT = 2
WIDEST, DEEPEST = 2**20, 2**10  # far above any model: a config beyond them is damaged, or meant to do damage
HEAD_WIDTH = 32  # the default width of a head: wide enough to tell values apart, small enough to be fast on a CPU


class FamilyConfig(PretrainedConfig):
    """The arguments that the configs of all families share, and their checks.

    The names of HoloSpectralNet are understood too: `dim`, `depth`, `max_seq_len` and `tie_weights`.

    Args:
        vocab_size: number of tokens; None where the class says that it does not read (`reads_text`).
        hidden_size: width D of the residual stream.
        num_hidden_layers: number of blocks.
        causal: whether a token sees only the past. None: what the head needs (masked LM: False, all others: True).
        hidden_dropout_prob: dropout on the output of every sublayer.
        classifier_dropout: dropout before a classification head.
        max_position_embeddings: length that the model is meant for; information only, there is no limit.
        initializer_range: standard deviation of the embeddings at the start; projections start at 0.7/√fan_in.
        norm_eps: epsilon of the normalisations.
        use_cache: whether to return the state (or keys and values) when not training.
        tie_word_embeddings: whether the head shares the embedding matrix.
        pad_token_id, bos_token_id, eos_token_id: special tokens; default: none.
        format_version: format of the saved config, checked on loading; what is loaded goes over to the present one.
        kwargs: arguments of [`~transformers.PretrainedConfig`].

    Raises:
        ValueError: a size is not positive or absurdly large, a dropout is outside [0, 1), `causal` is unknown, or
            `format_version` is newer than this release can read.
    """

    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    attribute_map = {
        "dim": "hidden_size",
        "depth": "num_hidden_layers",
        "max_seq_len": "max_position_embeddings",
        "tie_weights": "tie_word_embeddings",
    }
    reads_text = True  # without a vocabulary only where this is False
    norm_type = "layer"  # what a family normalises with, unless its config says otherwise

    def __init__(
        self,
        vocab_size: int | None = 32000,
        hidden_size: int = 256,
        num_hidden_layers: int = 6,
        causal: bool | None = None,
        hidden_dropout_prob: float = 0.0,
        classifier_dropout: float = 0.0,
        max_position_embeddings: int = 2048,
        initializer_range: float = 0.02,
        norm_eps: float = 1e-5,
        use_cache: bool = True,
        tie_word_embeddings: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        format_version: int = FORMAT,
        **kwargs,
    ) -> None:
        if format_version > FORMAT:
            raise ValueError(
                f"format_version: {format_version} was written by a newer hf_holo; this release reads up to {FORMAT}: "
                "upgrade with `pip install -U hf-holo`"
            )
        if self.reads_text or vocab_size is not None:
            check_positive(vocab_size=cast(int, vocab_size))
        check_positive(WIDEST, hidden_size=hidden_size, num_labels=kwargs.get("num_labels") or 2)
        check_positive(DEEPEST, num_hidden_layers=num_hidden_layers)
        check_choice("causal", causal, (None, True, False))
        check_probability(hidden_dropout_prob=hidden_dropout_prob, classifier_dropout=classifier_dropout)
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.causal = causal
        self.hidden_dropout_prob = hidden_dropout_prob
        self.classifier_dropout = classifier_dropout
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.norm_eps = norm_eps
        self.use_cache = use_cache
        self.format_version = format_version
        super().__init__(
            tie_word_embeddings=tie_word_embeddings,
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            **kwargs,
        )

    def own_names(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments under the names that this config gives them, see `attribute_map`.

        Raises:
            ValueError: one is given under two names, with different values.
        """
        own: dict[str, Any] = {}
        for name, value in arguments.items():
            known = self.attribute_map.get(name, name)
            if own.setdefault(known, value) != value:
                raise ValueError(f"{name}: {value!r} is another name of {known}={own[known]!r}: give one of them")
        return own

    def check(self) -> None:
        """Raise ValueError where the arguments do not fit each other; every family adds its own checks."""

    def take_over_format(self, changed: str | None) -> None:
        """Go over to the present format; `changed` says what a model saved by an older release computes differently."""
        if self.format_version < FORMAT and changed is not None:
            logger.warning_once(  # type: ignore[attr-defined]  # transformers gives loggers this method
                f"format_version: {self.format_version}, saved by an older hf_holo. {changed}"
            )
        self.format_version = FORMAT

    @property
    def is_causal(self) -> bool:
        """Whether a token sees only the past: True unless `causal` is False."""
        return self.causal is not False

    @property
    def head_dim(self) -> int:
        """Channels of one head, in a family that has heads."""
        return self.hidden_size // self.num_attention_heads


def default_heads(hidden_size: int, multiple: int = 1, least: int = HEAD_WIDTH) -> int:
    """As many heads as there can be whose width is at least `least` and a multiple of `multiple`; one if none fits."""
    widths = range(min(least, hidden_size), hidden_size + 1)
    fitting = (width for width in widths if hidden_size % width == 0 and width % multiple == 0)
    return hidden_size // next(fitting, hidden_size)


def default_intermediate(hidden_size: int) -> int:
    """Inner width of a gated channel mix: 8/3 of `hidden_size`, as a multiple of 8."""
    return max(8, hidden_size * 8 // 3 // 8 * 8)
