"""Config of Resonance for pictures."""

from collections.abc import Sequence

from transformers import PretrainedConfig

from .configuration_base import DEEPEST, FORMAT, WIDEST
from .feature_maps import BackboneConfigMixin, choose_maps
from .validation import check_choice, check_positive, check_probability

LARGEST = 2**16  # pixels of a side, channels of a pixel: far above any picture


class ResonanceVisionConfig(BackboneConfigMixin, PretrainedConfig):
    """Config of the Resonance models for pictures (`ResonanceVisionModel`, its classifier and its backbone).

    A picture is cut into patches. Each stage runs over a grid, and the next over one of half as many rows and columns,
    where 2 × 2 patches have been merged into one.

    Args:
        num_channels: channels C of a picture.
        image_size: side of the pictures that the model is meant for, in pixels; information only, any size will do.
        patch_size: side of a patch in pixels.
        hidden_sizes: width D of each stage.
        depths: blocks of each stage.
        filter_reaches: how many patches the filters of each stage hear in each direction; one number is for all stages.
        mlp_ratio: inner width of the channel mixes, divided by the width of their stage.
        interference: whether the wave that a filter has passed meets the one that it has not, so that what is heard
            depends on the data; without, the channel mix is a plain one with GELU.
        hidden_dropout_prob: dropout on the output of every sublayer.
        classifier_dropout: dropout before the classifier.
        initializer_range: standard deviation of the classifier at the start; projections start at 0.7/√fan_in.
        norm_eps: epsilon of the normalisations.
        out_features, out_indices: which feature maps the backbone gives, by name (`"stem"`, `"stage1"`, ...) or by
            index; default: the last stage.
        format_version: format of the saved config, checked on loading.
        kwargs: arguments of [`~transformers.PretrainedConfig`], such as `num_labels` or `id2label`.

    Raises:
        ValueError: a size is not positive or absurdly large, the stages are not told of by equally many numbers each, a
            dropout is outside [0, 1), a choice is unknown, or `format_version` is newer than this release can read.
    """

    model_type = "resonance_vision"

    def __init__(
        self,
        num_channels: int = 3,
        image_size: int = 32,
        patch_size: int = 2,
        hidden_sizes: Sequence[int] = (32, 64, 128),
        depths: Sequence[int] = (1, 2, 3),
        filter_reaches: int | Sequence[int] = 7,
        mlp_ratio: float = 3.0,
        interference: bool = True,
        hidden_dropout_prob: float = 0.0,
        classifier_dropout: float = 0.0,
        initializer_range: float = 0.02,
        norm_eps: float = 1e-5,
        out_features: list[str] | None = None,
        out_indices: list[int] | None = None,
        format_version: int = FORMAT,
        **kwargs,
    ) -> None:
        if format_version > FORMAT:
            raise ValueError(
                f"format_version: {format_version} was written by a newer hf_holo; this release reads up to {FORMAT}: "
                "upgrade with `pip install -U hf-holo`"
            )
        self.num_channels = num_channels
        self.image_size = image_size
        self.patch_size = patch_size
        self.hidden_sizes = list(hidden_sizes)
        self.depths = list(depths)
        reaches = [filter_reaches] * len(self.depths) if isinstance(filter_reaches, int) else list(filter_reaches)
        self.filter_reaches = reaches
        self.mlp_ratio = mlp_ratio
        self.interference = interference
        self.hidden_dropout_prob = hidden_dropout_prob
        self.classifier_dropout = classifier_dropout
        self.initializer_range = initializer_range
        self.norm_eps = norm_eps
        self.format_version = FORMAT
        self.check(kwargs.get("num_labels") or 2)
        self.stage_names = ["stem"] + [f"stage{stage}" for stage in range(1, len(self.depths) + 1)]
        choose_maps(self, out_features, out_indices)
        super().__init__(**{"tie_word_embeddings": False} | kwargs)

    def check(self, num_labels: int) -> None:
        check_positive(LARGEST, num_channels=self.num_channels, image_size=self.image_size, patch_size=self.patch_size)
        check_positive(WIDEST, num_labels=num_labels)
        stages = len(self.depths)
        for name, at_most in (("hidden_sizes", WIDEST), ("depths", DEEPEST), ("filter_reaches", DEEPEST)):
            values = getattr(self, name)
            if not values or len(values) != stages:
                raise ValueError(f"{name}: {values}; one number for each stage is needed, as in depths={self.depths}")
            for stage, value in enumerate(values):
                check_positive(at_most, **{f"{name}[{stage}]": value})
        if not (isinstance(self.mlp_ratio, (int, float)) and 0 < self.mlp_ratio < LARGEST):
            raise ValueError(f"mlp_ratio: {self.mlp_ratio!r} is not a positive number")
        check_choice("interference", self.interference, (True, False))
        check_probability(hidden_dropout_prob=self.hidden_dropout_prob, classifier_dropout=self.classifier_dropout)

    @property
    def hidden_size(self) -> int:
        """Width of the last stage: of what the model gives."""
        return self.hidden_sizes[-1]

    @property
    def num_hidden_layers(self) -> int:
        """Blocks of all stages."""
        return sum(self.depths)
