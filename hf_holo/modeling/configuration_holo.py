"""Configuration of the HOLO family."""

from .configuration_base import RecurrentConfig, check_choice, check_divides, check_positive
from .harmonics import BASES

PROJECTIONS = ("holographic", "dense")
ACTIVATIONS = ("silu", "sine")
HEAD_WIDTH = 32  # channels of a head unless the config says otherwise


class HoloConfig(RecurrentConfig):
    """Configuration of HOLO: a transformer whose projections are holographic, dense, or some of each.

    Any `hidden_size` works without further arguments.

    Args:
        vocab_size: number of tokens.
        hidden_size: width D of the residual stream.
        num_hidden_layers: number of blocks.
        num_attention_heads: query heads; default: one for every 32 channels.
        num_key_value_heads: key heads, each shared by as many query heads; default: `num_attention_heads`.
        intermediate_size: inner width of the channel mix; default: 8/3 of `hidden_size` for "silu", 4 times it for
            "sine", which has no gate.
        harmonics: harmonics R of every holographic projection; default: an eighth of `hidden_size`, which is a quarter
            of the parameters of a dense one.
        basis: "random", "dct", "golden" (made anew from `basis_seed`, no storage) or "data" (fitted and stored).
        basis_seed: seed of random bases; each projection mixes its place into it.
        attention_projections: "holographic" or "dense": those of queries, keys, values and outputs.
        mlp_projections: "holographic" or "dense": those of the channel mix.
        activation: "silu" (gated, SwiGLU) or "sine" (SIREN).
        sine_frequency: frequency ω of sine activations; their input is scaled to suit, so that it changes how fast
            they learn and not where they start.
        causal: True, False (bidirectional), or None: what the head needs, and True where it works with both.
        rotary_base: rotary positions turn by 1 radian a token down to 1/rotary_base.
        hidden_dropout_prob: dropout on every sublayer's output.
        classifier_dropout: dropout before a classification head.
        max_position_embeddings: sequence length that the model is meant for; a hint, not a limit.
        initializer_range: standard deviation of the embeddings.
        norm_eps: epsilon of the norms.
        use_cache: keep keys and values when not training.
        tie_word_embeddings: the head shares the embedding matrix.
        kwargs: further arguments of `PretrainedConfig`.

    Raises:
        ValueError: a value is out of range or does not divide what it must divide.
    """

    model_type = "holo"

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 256,
        num_hidden_layers: int = 6,
        num_attention_heads: int | None = None,
        num_key_value_heads: int | None = None,
        intermediate_size: int | None = None,
        harmonics: int | None = None,
        basis: str = "random",
        basis_seed: int = 0,
        attention_projections: str = "holographic",
        mlp_projections: str = "holographic",
        activation: str = "silu",
        sine_frequency: float = 1.0,
        causal: bool | None = None,
        rotary_base: float = 10000.0,
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
        **kwargs,
    ):
        check_positive(vocab_size=vocab_size, hidden_size=hidden_size, num_hidden_layers=num_hidden_layers)
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = default_heads(hidden_size) if num_attention_heads is None else num_attention_heads
        self.num_key_value_heads = self.num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.activation = activation
        if intermediate_size is None:
            intermediate_size = 4 * hidden_size if activation == "sine" else max(8, hidden_size * 8 // 3 // 8 * 8)
        self.intermediate_size = intermediate_size
        self.harmonics = max(1, hidden_size // 8) if harmonics is None else harmonics
        self.basis = basis
        self.basis_seed = basis_seed
        self.attention_projections = attention_projections
        self.mlp_projections = mlp_projections
        self.sine_frequency = sine_frequency
        self.causal = causal
        self.rotary_base = rotary_base
        self.hidden_dropout_prob = hidden_dropout_prob
        self.classifier_dropout = classifier_dropout
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.norm_eps = norm_eps
        self.use_cache = use_cache
        self._check()
        super().__init__(
            tie_word_embeddings=tie_word_embeddings,
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            **kwargs,
        )

    def _check(self) -> None:
        check_positive(
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            intermediate_size=self.intermediate_size,
            harmonics=self.harmonics,
        )
        check_divides("num_attention_heads", self.num_attention_heads, "hidden_size", self.hidden_size)
        check_divides("num_key_value_heads", self.num_key_value_heads, "num_attention_heads", self.num_attention_heads)
        if self.head_dim % 2:
            raise ValueError(f"hidden_size / num_attention_heads = {self.head_dim} must be even for rotary positions")
        check_choice("basis", self.basis, BASES)
        check_choice("attention_projections", self.attention_projections, PROJECTIONS)
        check_choice("mlp_projections", self.mlp_projections, PROJECTIONS)
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("causal", self.causal, (None, True, False))
        if self.harmonics > self.hidden_size:
            raise ValueError(f"harmonics={self.harmonics} is more than hidden_size={self.hidden_size}")
        if not self.sine_frequency > 0:
            raise ValueError(f"sine_frequency={self.sine_frequency} must be positive")
        for name in ("hidden_dropout_prob", "classifier_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1)")

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.hidden_size // self.num_attention_heads


def default_heads(hidden_size: int) -> int:
    """The largest number of heads whose even width is at least 32, or else one head."""
    widths = (w for w in range(min(HEAD_WIDTH, hidden_size), hidden_size + 1) if hidden_size % w == 0 and w % 2 == 0)
    return hidden_size // next(widths, hidden_size)
