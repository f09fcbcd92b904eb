"""Classifiers of sounds: how many held-out ones are right, also in noise; and the time of up to a minute."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ...data.audio import Sounds, audio_collator, with_noise
from ...data.labelled import load_to_score
from .classifying import UNCHANGED, Conditions, Scoring, data_of, sense_parts, sense_told, timed
from .models import Evaluated
from .options import Options
from .run import Part, Row, Tables

SECONDS = (1, 4, 16, 60)


def noisy(samples: np.ndarray, random: np.random.Generator, decibels: float) -> np.ndarray:
    return with_noise(samples, decibels, random)


def softer(samples: np.ndarray, random: np.random.Generator) -> np.ndarray:
    return samples * np.float32(0.1)


CONDITIONS: Conditions = {
    UNCHANGED: None,
    "noise 20 dB below": partial(noisy, decibels=20.0),
    "noise 10 dB below": partial(noisy, decibels=10.0),
    "noise as loud": partial(noisy, decibels=0.0),
    "a tenth as loud": softer,
}


def parts(models: Sequence[Evaluated], options: Options) -> Iterator[Part]:
    """Classes, conditions and times of every model.

    Raises:
        HoloError: the sounds are missing or damaged, or a model does not know one of their classes.
    """
    sounds = load_to_score(Sounds, data_of(options, "audio"), options.audio_column, options.label_column).check()
    for model in models:
        chosen = options.chosen("eval_file", "audio_column", "label_column", "limit", "batch_size")
        settings = {"model": model.fingerprint, **chosen, "examples": len(sounds)}
        extractor = model.needed_processor()
        scoring = Scoring(model, sounds.at(extractor.sampling_rate), audio_collator(extractor), options)
        yield from sense_parts(scoring, settings, CONDITIONS, speed)


def speed(model: Evaluated, repeats: int, seed: int, seconds: float | None = None) -> list[Row]:
    """Time of one sound of every length, in turns."""
    random, extractor = np.random.default_rng(seed), model.needed_processor()
    rate = extractor.sampling_rate
    inputs = {}
    for length in SECONDS:
        samples = random.standard_normal(length * rate, dtype=np.float32)
        prepared = extractor(samples, sampling_rate=rate, return_tensors="pt")
        inputs[length] = {name: value for name, value in prepared.items() if torch.is_floating_point(value)}
    return timed(model, "seconds", inputs, repeats)


def told(tables: Tables, folder: Path) -> str:
    """The section of the report."""
    return sense_told(tables, folder, "audio", "sounds", "seconds", "seconds of sound")
