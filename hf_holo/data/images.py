"""Labelled pictures: read with Pillow, augmented, and brought into batches by the processor of a model."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

from .labelled import Augmentation, Labelled, LabelledCollator, LabelledSplits, load_labelled, named_augmentations

SHIFT = 1 / 8  # of the side, as 4 of 32 pixels
ANGLE = 12.0  # degrees
ERASED = 1 / 2  # of the side
CONTRAST = 0.3


class Images(Labelled):
    """Labelled pictures; an example has `image`, a `PIL.Image` as its file has it, turned as its EXIF data says."""

    feature, key = "Image", "image"

    def decode(self, content: bytes) -> Image.Image:
        image = Image.open(io.BytesIO(content))
        image.load()
        return ImageOps.exif_transpose(image)

    def arrays(self) -> np.ndarray:
        """All pictures `[N, H, W, C]` in uint8 (C = 3, or 1 if all are grey), where all have one size.

        Raises:
            ValueError: they have several sizes.
        """
        images = [self.read(int(row)) for row in self.rows]
        mode = "L" if {image.mode for image in images} == {"L"} else "RGB"
        arrays = np.stack([np.asarray(image.convert(mode)) for image in images])
        return arrays[..., None] if mode == "L" else arrays


def load_images(
    train_file: str | Sequence[str] | None = None,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    validation_fraction: float = 0.1,
    hold_out: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> LabelledSplits[Images]:
    """Labelled pictures from parquet files, a folder with one folder for each class, or the Hub, in two parts.

        pictures = load_images("../shared/data/mnist")
        pictures.train.arrays(), pictures.train.labels, pictures.class_names

    Args, errors: as [`load_labelled`]; files are not decoded before they are asked for, see [`Labelled.check`].
    """
    return load_labelled(
        Images,
        train_file,
        dataset_name,
        dataset_config_name,
        image_column,
        label_column,
        validation_fraction,
        hold_out,
        seed,
    )


def image_collator(processor: Any, augment: Sequence[str] = (), seed: int = 0) -> LabelledCollator:
    """Batches of `pixel_values` `[B, C, H, W]`, `labels` `[B]` and what else the processor gives.

    Args:
        processor: an image processor of transformers.
        augment: names out of `AUGMENTATIONS`.
        seed: of the augmentation.

    Raises:
        HoloError: an augmentation is unknown.
    """

    def process(images: list[Image.Image]) -> Mapping[str, torch.Tensor]:
        return processor(images=images, return_tensors="pt")

    return LabelledCollator(process, Images.key, named_augmentations(augment, AUGMENTATIONS), seed)


# Augmentation -------------------------------------------------------------------------------------------------------


def crop(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """A crop of the picture with a black margin of an eighth around it, as large as the picture."""
    x, y = (int(random.integers(-round(SHIFT * side), round(SHIFT * side) + 1)) for side in image.size)
    return image.crop((x, y, x + image.width, y + image.height))


def flip(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """Left and right exchanged, half of the time."""
    return ImageOps.mirror(image) if random.random() < 0.5 else image


def rotate(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """Turned by up to twelve degrees."""
    return image.rotate(random.uniform(-ANGLE, ANGLE), Image.Resampling.BILINEAR)


def erase(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """A black square of half the side, anywhere, partly outside too, half of the time (cutout, DeVries and Taylor,
    2017)."""
    if random.random() < 0.5:
        return image
    half = [round(ERASED * side) for side in image.size]
    x, y = (int(random.integers(-h // 2, side - h // 2)) for h, side in zip(half, image.size, strict=True))
    bands, erased = len(image.getbands()), image.copy()
    erased.paste(0 if bands == 1 else (0,) * bands, (x, y, x + half[0], y + half[1]))
    return erased


def colour(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """Brightness, contrast and saturation, each by up to 30 % more or less."""
    for kind in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = kind(image).enhance(random.uniform(1 - CONTRAST, 1 + CONTRAST))
    return image


AUGMENTATIONS: dict[str, Augmentation] = {
    "crop": crop,
    "flip": flip,
    "rotate": rotate,
    "erase": erase,
    "colour": colour,
}
