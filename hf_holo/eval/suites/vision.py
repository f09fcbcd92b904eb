"""Classifiers of pictures: how many held-out ones are right, also noisy, blurred or grey; and the time by size."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ...data.images import Images, image_collator
from ...data.labelled import load_to_score
from .classifying import UNCHANGED, Conditions, Scoring, data_of, sense_parts, sense_told, timed
from .models import Evaluated
from .options import Options
from .run import Part, Row, Tables

SIDES = (32, 64, 128, 256, 512)  # pixels


def noisy(image: Image.Image, random: np.random.Generator, size: float) -> Image.Image:
    """With noise of this standard deviation, as a share of white."""
    pixels = np.asarray(image.convert("L" if image.mode == "L" else "RGB"), dtype=np.float32) / 255
    pixels = pixels + size * random.standard_normal(pixels.shape, dtype=np.float32)
    return Image.fromarray((pixels.clip(0, 1) * 255).astype(np.uint8))


def blurred(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """As if it had been taken with half the pixels."""
    image = image.convert("L" if image.mode == "L" else "RGB")
    half = image.resize((max(1, image.width // 2), max(1, image.height // 2)), Image.Resampling.BOX)
    return half.resize(image.size, Image.Resampling.BILINEAR)


def grey(image: Image.Image, random: np.random.Generator) -> Image.Image:
    return image.convert("L").convert("L" if image.mode == "L" else "RGB")


CONDITIONS: Conditions = {
    UNCHANGED: None,
    "noise of 0.1": partial(noisy, size=0.1),
    "noise of 0.2": partial(noisy, size=0.2),
    "half the pixels": blurred,
    "grey": grey,
}


def parts(models: Sequence[Evaluated], options: Options) -> Iterator[Part]:
    """Classes, conditions and times of every model.

    Raises:
        HoloError: the pictures are missing or damaged, or a model does not know one of their classes.
    """
    examples = load_to_score(Images, data_of(options, "vision"), options.image_column, options.label_column).check()
    for model in models:
        chosen = options.chosen("eval_file", "image_column", "label_column", "limit", "batch_size")
        settings = {"model": model.fingerprint, **chosen, "examples": len(examples)}
        scoring = Scoring(model, examples, image_collator(model.needed_processor()), options)
        yield from sense_parts(scoring, settings, CONDITIONS, speed)


def speed(model: Evaluated, repeats: int, seed: int, seconds: float | None = None) -> list[Row]:
    """Time of one picture of every size, in turns."""
    generator = torch.Generator().manual_seed(seed)
    channels = getattr(model.model.config, "num_channels", 3)
    inputs = {side: {"pixel_values": torch.randn(1, channels, side, side, generator=generator)} for side in SIDES}
    return timed(model, "side", inputs, repeats)


def told(tables: Tables, folder: Path) -> str:
    """The section of the report."""
    return sense_told(tables, folder, "vision", "pictures", "side", "pixels of a side")
