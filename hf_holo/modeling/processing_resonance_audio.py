"""Waveforms as Resonance models for sound take them: one channel, padded, with a mask."""

from typing import Any

import numpy as np
from transformers import BatchFeature, SequenceFeatureExtractor


class ResonanceFeatureExtractor(SequenceFeatureExtractor):
    """Recordings to padded waveforms `input_values` and their `attention_mask`, both `[batch, samples]`.

    Frames, spectra and their normalisation are made inside the model. Nothing here depends on a recording as a whole
    unless `do_normalize` is set, so a recording can be fed in pieces.

    Args:
        sampling_rate: samples a second.
        padding_value: what fills shorter recordings up; the mask makes it count for nothing.
        do_normalize: whether to bring every recording to mean 0 and variance 1. The models do not need it.
        return_attention_mask: whether to return the mask.
        feature_size: channels; only 1.
        kwargs: arguments of [`~transformers.SequenceFeatureExtractor`].

    Raises:
        ValueError: the sampling rate is not positive, there is more than one channel, or padding comes first.
    """

    model_input_names = ["input_values", "attention_mask"]
    _auto_class = "AutoFeatureExtractor"  # its code goes with a checkpoint

    def __init__(
        self,
        sampling_rate: int = 16_000,
        padding_value: float = 0.0,
        do_normalize: bool = False,
        return_attention_mask: bool = True,
        feature_size: int = 1,
        **kwargs: Any,
    ) -> None:
        if not isinstance(sampling_rate, int) or sampling_rate < 1:
            raise ValueError(f"sampling_rate: {sampling_rate!r} is not a positive integer, in hertz")
        if feature_size != 1:
            raise ValueError(f"feature_size: {feature_size!r}; these models hear one channel, feature_size=1")
        if kwargs.get("padding_side", "right") != "right":
            raise ValueError(f"padding_side: {kwargs['padding_side']!r}; padding comes after the samples, 'right'")
        super().__init__(feature_size, sampling_rate, padding_value, **kwargs)
        self.do_normalize = do_normalize
        self.return_attention_mask = return_attention_mask

    def __call__(
        self,
        raw_speech: Any,
        sampling_rate: int | None = None,
        padding: bool | str = True,
        max_length: int | None = None,
        truncation: bool = False,
        pad_to_multiple_of: int | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """
        Args:
            raw_speech: a recording or a list of them; a recording is an array, tensor or list of samples. Floats are
                taken as they are; integers of 16 or 32 bits are brought to [-1, 1) by the size of their type.
            sampling_rate: of the recordings; where it is not given, nothing guards against a wrong one.
            padding, max_length, truncation, pad_to_multiple_of, return_attention_mask, return_tensors: as in
                [`~transformers.SequenceFeatureExtractor.pad`].

        Raises:
            ValueError: another sampling rate, or a recording that is empty, has more than one channel, or has values
                that are NaN or infinite; the message names its place in the list.
        """
        if sampling_rate is not None and sampling_rate != self.sampling_rate:
            raise ValueError(
                f"sampling_rate: {sampling_rate}; this extractor, and the model that it belongs to, take "
                f"{self.sampling_rate} hertz; resample the recordings"
            )
        recordings = [self._waveform(recording, place) for place, recording in enumerate(_as_list(raw_speech))]
        return self.pad(
            BatchFeature({"input_values": recordings}),
            padding=padding,
            max_length=max_length,
            truncation=truncation,
            pad_to_multiple_of=pad_to_multiple_of,
            return_attention_mask=return_attention_mask,
            return_tensors=return_tensors,
        )

    def _waveform(self, recording: Any, place: int) -> np.ndarray:
        """One recording `[samples]` in float32, checked."""
        samples = np.asarray(recording)
        if samples.ndim != 1:
            raise ValueError(
                f"raw_speech: recording {place} has the shape {samples.shape}; give one channel, [samples], such as "
                "the mean of both, and several recordings as a list"
            )
        if not len(samples):
            raise ValueError(f"raw_speech: recording {place} is empty")
        if samples.dtype in (np.int16, np.int32):
            samples = samples / -float(np.iinfo(samples.dtype).min)
        elif not np.issubdtype(samples.dtype, np.floating):
            raise ValueError(f"raw_speech: recording {place} holds {samples.dtype}; give floats, int16 or int32")
        if not np.isfinite(samples).all():
            first = int(np.flatnonzero(~np.isfinite(samples))[0])
            raise ValueError(f"raw_speech: recording {place} is {samples[first]} at sample {first}; all must be finite")
        samples = samples.astype(np.float32)
        if self.do_normalize:
            samples = (samples - samples.mean()) / np.sqrt(samples.var() + 1e-7)
        return samples


def _as_list(raw_speech: Any) -> list:
    """A list of recordings. Only a list holds several: an array with two dimensions may just as well be stereo."""
    if not isinstance(raw_speech, (list, tuple)):
        return [raw_speech]
    if not len(raw_speech):
        raise ValueError("raw_speech: an empty list; give at least one recording")
    return list(raw_speech) if np.ndim(raw_speech[0]) else [raw_speech]
