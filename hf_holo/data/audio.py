"""Labelled sounds: read with soundfile, augmented, and brought into batches by the feature extractor of a model."""

import io
from collections.abc import Mapping, Sequence
from math import gcd
from typing import Any

import numpy as np
import soundfile
import torch

from ..errors import HoloError
from .labelled import Augmentation, Labelled, LabelledCollator, LabelledSplits, load_labelled, named_augmentations

SHIFT = 0.1  # of the length
NOISE = (10.0, 40.0)  # signal to noise, in dB
GAIN = 6.0  # dB
SPEED = 0.1
SILENCE = 0.1  # of the length


class Sounds(Labelled):
    """Labelled sounds; an example has `audio`, samples `[T]` in float32, channels averaged.

    Attributes:
        sampling_rate: of all of them, in Hz; what was recorded at another rate is resampled.
    """

    feature, key = "Audio", "audio"
    # of folders of sounds, `datasets` wants a decoder of its own
    folder_suffixes = frozenset(f".{name.lower()}" for name in (*soundfile.available_formats(), "aif", "oga", "opus"))
    sampling_rate: int | None = None

    def at(self, sampling_rate: int) -> "Sounds":
        """The same sounds at this rate, resampled where needed."""
        resampled = self.select(range(len(self)))
        resampled.sampling_rate = sampling_rate
        return resampled

    def decode(self, content: bytes) -> np.ndarray:
        samples, rate = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)  # [T, channels]
        if not len(samples):
            raise ValueError("it holds no sound, 0 samples")
        if not np.isfinite(samples).all():
            raise ValueError("it holds samples that are not finite")
        return resample(samples.mean(1), rate, self.sampling_rate or rate)


def load_audio(
    train_file: str | Sequence[str] | None = None,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    audio_column: str | None = None,
    label_column: str | None = None,
    validation_fraction: float = 0.1,
    hold_out: Mapping[str, Any] | None = None,
    seed: int = 0,
    sampling_rate: int | None = None,
) -> LabelledSplits[Sounds]:
    """Labelled sounds from parquet files, a folder with one folder for each class, or the Hub, in two parts.

        sounds = load_audio("../shared/data/fsdd", sampling_rate=8000)
        one_speaker_left_out = load_audio("../shared/data/fsdd", hold_out={"speaker": "theo"})

    Args:
        sampling_rate: bring all of them to this rate, in Hz; default: as they are.
        others, errors: as [`load_labelled`]; files are not decoded before they are asked for, see [`Labelled.check`].
    """
    splits = load_labelled(
        Sounds,
        train_file,
        dataset_name,
        dataset_config_name,
        audio_column,
        label_column,
        validation_fraction,
        hold_out,
        seed,
    )
    return splits if sampling_rate is None else splits.each(lambda part: part.at(sampling_rate))


def audio_collator(extractor: Any, augment: Sequence[str] = (), seed: int = 0) -> LabelledCollator:
    """Batches of `input_values` `[B, T]`, `labels` `[B]` and what else the feature extractor gives.

    Args:
        extractor: a feature extractor of transformers; the sounds must be at its sampling rate.
        augment: names out of `AUGMENTATIONS`.
        seed: of the augmentation.

    Raises:
        HoloError: an augmentation is unknown.
    """

    def process(sounds: list[np.ndarray]) -> Mapping[str, torch.Tensor]:
        return extractor(sounds, sampling_rate=extractor.sampling_rate, padding=True, return_tensors="pt")

    return LabelledCollator(process, Sounds.key, named_augmentations(augment, AUGMENTATIONS), seed)


def resample(samples: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """Samples `[T]` at another rate, by a polyphase filter of scipy.

    Raises:
        HoloError: scipy is not installed.
    """
    if rate == wanted:
        return samples
    try:
        from scipy.signal import resample_poly
    except ImportError:
        raise HoloError(
            f"sampling_rate: the sound has {rate} Hz and {wanted} Hz are needed; convert it, or install scipy"
        ) from None
    common = gcd(rate, wanted)
    return resample_poly(samples, wanted // common, rate // common).astype(np.float32)


# Augmentation -------------------------------------------------------------------------------------------------------


def shift(samples: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Later or earlier by up to a tenth of the length, with silence where nothing is left."""
    most = int(SHIFT * len(samples))
    by = int(random.integers(-most, most + 1))
    moved = np.zeros_like(samples)
    moved[max(by, 0) : len(samples) + min(by, 0)] = samples[max(-by, 0) : len(samples) - max(by, 0)]
    return moved


def noise(samples: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """White noise, 10 to 40 dB below the sound."""
    return with_noise(samples, random.uniform(*NOISE), random)


def with_noise(samples: np.ndarray, decibels: float, random: np.random.Generator) -> np.ndarray:
    """White noise at this ratio of signal to noise."""
    size = np.sqrt(np.mean(np.square(samples))) * 10 ** (-decibels / 20)
    return samples + (size * random.standard_normal(len(samples))).astype(np.float32)


def gain(samples: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Louder or softer by up to 6 dB."""
    return samples * np.float32(10 ** (random.uniform(-GAIN, GAIN) / 20))


def speed(samples: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Faster and higher, or slower and lower, by up to a tenth."""
    length = max(1, round(len(samples) / random.uniform(1 - SPEED, 1 + SPEED)))
    places = np.linspace(0, len(samples) - 1, length)
    return np.interp(places, np.arange(len(samples)), samples).astype(np.float32)


def silence(samples: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A stretch of up to a tenth of the length is silent."""
    length = int(random.integers(0, int(SILENCE * len(samples)) + 1))
    start = int(random.integers(0, len(samples) - length + 1))
    quiet = samples.copy()
    quiet[start : start + length] = 0
    return quiet


AUGMENTATIONS: dict[str, Augmentation] = {
    "shift": shift,
    "noise": noise,
    "gain": gain,
    "speed": speed,
    "silence": silence,
}
