"""Config of Resonance for sound."""

from typing import Any

from .configuration_base import DEEPEST, WIDEST
from .configuration_resonators import ResonatorConfig
from .validation import check_choice, check_positive, check_probability

FRAME_SECONDS, HOP_SECONDS = 0.025, 0.010  # usual for speech


class ResonanceAudioConfig(ResonatorConfig):
    """Config of the Resonance models for sound (`ResonanceAudioModel` and its heads).

    Args:
        hidden_size: width D of the residual stream.
        num_hidden_layers: number of blocks.
        causal: False: every frame hears the whole recording. True: only what came before, so that a recording can be
            fed in pieces, as it comes.
        sampling_rate: samples a second; there is no resampling inside.
        frame_length, hop_length: samples of a frame, and from one frame to the next. Default: 25 ms and 10 ms.
        frames_per_step: frames that become one step of the model, that is one row of `last_hidden_state`.
        num_mel_bins: mel bands of a frame.
        mel_lowest, mel_highest: the limits of the bands in hertz; the highest defaults to half the sampling rate.
        normalization: how log-mel frames are brought to mean 0 and variance 1: over the whole `"recording"`, over the
            past with a learned memory (`"running"`), or not at all (`"none"`). Default: `"running"` if causal, which
            cannot know the whole, else `"recording"`.
        mask_time_prob, mask_time_length: in training, the share of the steps that masks hide (less where masks meet),
            and the steps of a mask (SpecAugment; Park et al., 2019).
        mask_feature_prob, mask_feature_length: the same along the mel bands, for whole recordings.
        latent_size: values that the autoencoder keeps of a step; default: hidden_size / 4.
        num_decoder_layers: blocks of its decoder.
        kwargs: arguments of the blocks, see [`ResonatorConfig`], and what all families share, see [`FamilyConfig`].

    Raises:
        ValueError: as in [`ResonatorConfig`]; a hop is longer than a frame, the mel limits are not in order or above
            half the sampling rate, or a causal model is to be normalised over the whole recording.
    """

    model_type = "resonance_audio"
    reads_text = False
    attribute_map = {"dim": "hidden_size", "depth": "num_hidden_layers"}

    def __init__(
        self,
        *,
        hidden_size: int = 128,
        num_hidden_layers: int = 4,
        causal: bool = False,
        sampling_rate: int = 16_000,
        frame_length: int | None = None,
        hop_length: int | None = None,
        frames_per_step: int = 2,
        num_mel_bins: int = 64,
        mel_lowest: float = 20.0,
        mel_highest: float | None = None,
        normalization: str | None = None,
        mask_time_prob: float = 0.0,
        mask_time_length: int = 5,
        mask_feature_prob: float = 0.0,
        mask_feature_length: int = 8,
        latent_size: int | None = None,
        num_decoder_layers: int = 2,
        **kwargs: Any,
    ) -> None:
        sizes: dict[str, Any] = {"hidden_size": hidden_size, "num_hidden_layers": num_hidden_layers, "causal": causal}
        # it reads no text: none of its own, and nothing that is tied
        super().__init__(**{"vocab_size": None, "tie_word_embeddings": False} | sizes | kwargs)
        check_positive(sampling_rate=sampling_rate)
        self.sampling_rate = sampling_rate
        self.frame_length = round(FRAME_SECONDS * sampling_rate) if frame_length is None else frame_length
        self.hop_length = round(HOP_SECONDS * sampling_rate) if hop_length is None else hop_length
        self.frames_per_step = frames_per_step
        self.num_mel_bins = num_mel_bins
        self.mel_lowest = mel_lowest
        self.mel_highest = sampling_rate / 2 if mel_highest is None else mel_highest
        self.normalization = ("running" if causal else "recording") if normalization is None else normalization
        self.mask_time_prob = mask_time_prob
        self.mask_time_length = mask_time_length
        self.mask_feature_prob = mask_feature_prob
        self.mask_feature_length = mask_feature_length
        self.latent_size = max(1, self.hidden_size // 4) if latent_size is None else latent_size
        self.num_decoder_layers = num_decoder_layers
        self.check()

    @property
    def samples_per_step(self) -> int:
        """Samples from one step of the model to the next."""
        return self.hop_length * self.frames_per_step

    @property
    def history(self) -> int:
        """Samples that a frame has in common with those before it and after it."""
        return self.frame_length - self.hop_length

    def check(self) -> None:
        super().check()
        check_choice("causal", self.causal, (True, False))
        check_positive(
            WIDEST,
            frame_length=self.frame_length,
            hop_length=self.hop_length,
            num_mel_bins=self.num_mel_bins,
            latent_size=self.latent_size,
        )
        check_positive(
            DEEPEST,
            frames_per_step=self.frames_per_step,
            num_decoder_layers=self.num_decoder_layers,
            mask_time_length=self.mask_time_length,
            mask_feature_length=self.mask_feature_length,
        )
        check_probability(mask_time_prob=self.mask_time_prob, mask_feature_prob=self.mask_feature_prob)
        if self.hop_length > self.frame_length:
            raise ValueError(
                f"hop_length: {self.hop_length} is above frame_length={self.frame_length}, and samples would be lost"
            )
        if not 0 <= self.mel_lowest < self.mel_highest <= self.sampling_rate / 2:
            raise ValueError(
                f"mel_lowest, mel_highest: {self.mel_lowest} and {self.mel_highest} must be in order, from 0 to "
                f"{self.sampling_rate / 2} hertz, half the sampling rate"
            )
        check_choice("normalization", self.normalization, ("recording", "running", "none"))
        if self.causal and self.normalization == "recording":
            raise ValueError("normalization: 'recording' knows the future; a causal model takes 'running' or 'none'")
