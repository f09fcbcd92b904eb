"""Configuration of the HOLO family."""

from .configuration_base import WIDEST, FamilyConfig, default_heads, default_intermediate
from .harmonics import BASES
from .validation import check_choice, check_divides, check_positive

PROJECTIONS = ("holographic", "dense")
ACTIVATIONS = ("silu", "sine")


class HoloConfig(FamilyConfig):
    """Configuration of HOLO: a transformer whose projections are holographic, dense, or some of each.

    Any `hidden_size` works without further arguments.

    Args:
        num_attention_heads: query heads; default: one for every 32 channels.
        num_key_value_heads: key heads, each shared by as many query heads; default: `num_attention_heads`.
        intermediate_size: inner width of the channel mix; default: 8/3 of `hidden_size` for "silu", 4 times it for
            "sine", which has no gate.
        harmonics: harmonics R of every holographic projection; default: an eighth of `hidden_size`, which is a quarter
            of the parameters of a dense one.
        basis: "random", "dct", "golden" (computed from `basis_seed`, no storage) or "data" (fitted and stored).
        basis_seed: seed of random bases; each projection mixes its place into it.
        attention_projections: "holographic" or "dense": those of queries, keys, values and outputs.
        mlp_projections: "holographic" or "dense": those of the channel mix.
        activation: "silu" (gated, SwiGLU) or "sine" (SIREN).
        sine_frequency: frequency ω of sine activations; their input is scaled to suit, so that it changes how fast
            they learn and not where they start.
        rotary_base: rotary positions turn by 1 radian a token down to 1/rotary_base.
        kwargs: what all families share, see [`FamilyConfig`] (`vocab_size`, `hidden_size`, `num_hidden_layers`,
            `causal`, ...), and arguments of [`~transformers.PretrainedConfig`].

    Raises:
        ValueError: a value is out of range or does not divide what it must divide.
    """

    model_type = "holo"

    def __init__(
        self,
        *,
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
        rotary_base: float = 10000.0,
        **kwargs,
    ) -> None:
        super().__init__(**self.own_names(kwargs))
        hidden_size = self.hidden_size
        self.num_attention_heads = (
            default_heads(hidden_size, multiple=2) if num_attention_heads is None else num_attention_heads
        )
        self.num_key_value_heads = self.num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.activation = activation
        if intermediate_size is None:
            intermediate_size = 4 * hidden_size if activation == "sine" else default_intermediate(hidden_size)
        self.intermediate_size = intermediate_size
        self.harmonics = max(1, hidden_size // 8) if harmonics is None else harmonics
        self.basis = basis
        self.basis_seed = basis_seed
        self.attention_projections = attention_projections
        self.mlp_projections = mlp_projections
        self.sine_frequency = sine_frequency
        self.rotary_base = rotary_base
        self.check()
        self.take_over_format(None)

    def make_dense(self) -> None:
        """Describe the model whose holographic layers became dense, as `restore_linears` leaves it."""
        self.attention_projections = self.mlp_projections = "dense"

    def check(self) -> None:
        check_positive(
            WIDEST,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            intermediate_size=self.intermediate_size,
            harmonics=self.harmonics,
        )
        check_divides("num_attention_heads", self.num_attention_heads, "hidden_size", self.hidden_size)
        check_divides("num_key_value_heads", self.num_key_value_heads, "num_attention_heads", self.num_attention_heads)
        if self.head_dim % 2:
            raise ValueError(
                f"num_attention_heads: {self.num_attention_heads} gives heads of odd width {self.head_dim}; rotary "
                "positions need an even one"
            )
        check_choice("basis", self.basis, BASES)
        check_choice("attention_projections", self.attention_projections, PROJECTIONS)
        check_choice("mlp_projections", self.mlp_projections, PROJECTIONS)
        check_choice("activation", self.activation, ACTIVATIONS)
        if self.harmonics > self.hidden_size:
            raise ValueError(f"harmonics: {self.harmonics} is more than hidden_size={self.hidden_size}")
        if not isinstance(self.rotary_base, (int, float)) or not self.rotary_base > 1:
            raise ValueError(f"rotary_base: {self.rotary_base!r} is not a number above 1")
        if not self.sine_frequency > 0:
            raise ValueError(f"sine_frequency: {self.sine_frequency} is not positive")
