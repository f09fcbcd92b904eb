"""The image processor of Resonance: pictures of every usual kind to `pixel_values`, with numpy and Pillow alone."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from .validation import check_choice, check_positive

FORMATS = ("channels_first", "channels_last")
EDGES = ({"height", "width"}, {"shortest_edge"}, {"longest_edge"})  # what a size may name
FULL = {"uint8": 255, "uint16": 65535, "bool": 1}  # what white is in arrays of whole numbers; of others it is 255
MODES = {"1", "L", "LA", "RGB", "RGBA"}  # of Pillow, whose arrays need no conversion


class ResonanceImageProcessor(BaseImageProcessor):
    """Makes `pixel_values` `[B, C, H, W]` of pictures: turned as their EXIF data says, in grey or RGB, resized,
    normalised. Pictures of unequal sizes are padded at the right and at the bottom, and `pixel_mask` `[B, H, W]` says
    where they are real (1); if all have one size, there is no mask and nothing is padded.

    Args:
        size: what pictures are resized to, in pixels: the side of a square, `{"height": ..., "width": ...}`, or, to
            keep the aspect, `{"shortest_edge": ...}` or `{"longest_edge": ...}`. Default: they keep their size.
        resample: how Pillow resizes; 2 is bilinear, 3 bicubic.
        num_channels: 3 for RGB, 1 for grey.
        image_mean, image_std: of each channel, or of all, where black is 0 and white is 1.
        background: what shows through transparent pixels: 0 is black, 1 is white.
        patch_size: side of the smallest picture that is accepted, in pixels.
        kwargs: arguments of [`~transformers.BaseImageProcessor`].

    Raises:
        ValueError: an argument is out of range.
    """

    model_input_names = ["pixel_values", "pixel_mask"]
    _auto_class = "AutoImageProcessor"  # its code goes with a checkpoint

    def __init__(
        self,
        size: int | Mapping[str, int] | None = None,
        resample: int = 2,
        num_channels: int = 3,
        image_mean: float | Sequence[float] = 0.5,
        image_std: float | Sequence[float] = 0.5,
        background: float = 1.0,
        patch_size: int = 1,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        check_choice("num_channels", num_channels, (1, 3))
        check_choice("resample", resample, tuple(range(6)))
        check_positive(patch_size=patch_size)
        if not 0 <= background <= 1:
            raise ValueError(f"background: {background!r} is not from 0 (black) to 1 (white)")
        self.size = _named_size(size)
        self.resample = resample
        self.num_channels = num_channels
        self.image_mean = _for_channels("image_mean", image_mean, num_channels)
        self.image_std = _for_channels("image_std", image_std, num_channels)
        if min(self.image_std) <= 0:
            raise ValueError(f"image_std: {image_std!r} is not positive")
        self.background = background
        self.patch_size = patch_size

    def preprocess(  # type: ignore[override]  # transformers' takes any arguments
        self,
        images: Any,
        size: int | Mapping[str, int] | None = None,
        input_data_format: str | None = None,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """
        Args:
            images: a picture or a list of them: a `PIL.Image` in any mode, or an array (numpy or torch) `[H, W]`,
                `[H, W, C]` or `[C, H, W]`, where C is 1 (grey), 2 (grey and opacity), 3 (RGB) or 4 (RGBA). White is
                65535 in uint16, 1 in bool and in floats, and 255 in other integers. An array with four dimensions is a
                batch.
            size: in place of that of the processor.
            input_data_format: `"channels_first"` or `"channels_last"`; needed only where the shape does not tell.
            return_tensors: `"pt"` or `"np"`; default: lists of arrays.

        Raises:
            ValueError: no pictures; one that is none, has other channels or no pixels, is smaller than a patch, holds
                NaN or values out of range; the message says which.
        """
        size = self.size if size is None else _named_size(size)
        if input_data_format is not None:
            check_choice("input_data_format", getattr(input_data_format, "value", input_data_format), FORMATS)
            input_data_format = getattr(input_data_format, "value", input_data_format)
        pictures = [self._prepare(image, size, input_data_format, n) for n, image in enumerate(_as_list(images))]
        shapes = [picture.shape[1:] for picture in pictures]
        height, width = (max(sides) for sides in zip(*shapes, strict=True))
        if len(set(shapes)) == 1:
            return BatchFeature({"pixel_values": pictures}, tensor_type=return_tensors)
        margins = [(height - h, width - w) for h, w in shapes]
        pixels = [np.pad(p, ((0, 0), (0, h), (0, w))) for p, (h, w) in zip(pictures, margins, strict=True)]
        masks = [
            np.pad(np.ones(s, dtype=np.int64), ((0, h), (0, w))) for s, (h, w) in zip(shapes, margins, strict=True)
        ]
        return BatchFeature({"pixel_values": pixels, "pixel_mask": masks}, tensor_type=return_tensors)

    def _prepare(self, image: Any, size: Mapping[str, int] | None, data_format: str | None, index: int) -> np.ndarray:
        """One picture as [C, H, W]."""
        try:
            picture = _read_pil(image) if isinstance(image, Image.Image) else _read_array(image, data_format)
            if min(picture.shape[:2]) < self.patch_size:
                height, width = picture.shape[:2]
                raise ValueError(
                    f"{width} × {height} pixels are less than one patch of {self.patch_size} × {self.patch_size}"
                )
        except ValueError as error:
            raise ValueError(f"images[{index}]: {error}") from error
        picture = _to_channels(picture, self.num_channels, self.background)
        if size is not None:
            picture = _resize(picture, size, self.resample)
        normalised = (picture - np.array(self.image_mean, np.float32)) / np.array(self.image_std, np.float32)
        return np.ascontiguousarray(normalised.transpose(2, 0, 1), dtype=np.float32)


def _named_size(size: int | Mapping[str, int] | None) -> dict[str, int] | None:
    if size is None:
        return None
    if isinstance(size, int):
        size = {"height": size, "width": size}
    if not (isinstance(size, Mapping) and set(size) in EDGES):
        raise ValueError(
            f"size: {size!r}; give a number of pixels, or name height and width, shortest_edge or longest_edge"
        )
    check_positive(2**16, **{f"size[{edge!r}]": pixels for edge, pixels in size.items()})
    return dict(size)


def _for_channels(name: str, value: float | Sequence[float], channels: int) -> list[float]:
    values = [float(value)] * channels if isinstance(value, (int, float)) else [float(v) for v in value]
    if len(values) != channels or not np.isfinite(values).all():
        raise ValueError(f"{name}: {value!r}; give one number, or one for each of num_channels={channels}")
    return values


def _as_list(images: Any) -> list[Any]:
    """The pictures one by one."""
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        images = list(images)
    if not isinstance(images, (list, tuple)):
        images = [images]
    if not images:
        raise ValueError("images: the list is empty; give at least one picture")
    return list(images)


def _read_pil(image: Image.Image) -> np.ndarray:
    """[H, W, C] in float32 from 0 to 1."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # "I" is what older releases of Pillow read 16 bits as
        values = np.asarray(image)
        if image.mode == "I" and values.size and values.max() > FULL["uint8"]:
            values = values.clip(0).astype(np.uint16)
        return _read_array(values.astype(np.uint16) if image.mode.startswith("I;16") else values, None)
    if image.mode not in MODES:
        transparent = image.mode in ("PA", "La", "RGBa") or "transparency" in image.info
        image = image.convert("RGBA" if transparent else "RGB")
    elif image.mode in ("L", "RGB") and "transparency" in image.info:
        image = image.convert("RGBA")
    return _read_array(np.asarray(image), "channels_last")


def _read_array(image: Any, data_format: str | None) -> np.ndarray:
    """[H, W, C] in float32 from 0 to 1."""
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.dtype in (torch.bfloat16, torch.float16) else image).numpy()
    if not isinstance(image, np.ndarray):
        what = f"the text {image!r}" if isinstance(image, str) else f"a {type(image).__name__}"
        raise ValueError(
            f"{what} is not a picture; give a PIL.Image or an array (a pipeline opens paths and addresses)"
        )
    if image.ndim not in (2, 3):
        raise ValueError(f"an array of shape {image.shape} is not a picture; give [H, W], [H, W, C] or [C, H, W]")
    if 0 in image.shape:
        raise ValueError(f"an array of shape {image.shape} has no pixels")
    values = _from_zero_to_one(image)
    if values.ndim == 2:
        return values[..., None]
    return values.transpose(1, 2, 0) if _data_format(image.shape, data_format) == "channels_first" else values


def _from_zero_to_one(image: np.ndarray) -> np.ndarray:
    if not (np.issubdtype(image.dtype, np.number) or image.dtype == bool) or np.iscomplexobj(image):
        raise ValueError(f"an array of {image.dtype} is not a picture; give integers or floats")
    values = image.astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError("it has values that are NaN or infinite")
    floats = np.issubdtype(image.dtype, np.floating)
    white = 1 if floats else FULL.get(str(image.dtype), 255)
    low, high = values.min(), values.max()
    if low < 0 or high > white * (1 + 1e-6):
        raise ValueError(
            f"values from {low:g} to {high:g} in an array of {image.dtype}; they must be from 0 to {white}"
        )
    return values / np.float32(white)


def _data_format(shape: tuple[int, ...], data_format: str | None) -> str:
    """Where the channels of an array with three dimensions are."""
    possible = [name for name, channels in zip(FORMATS, (shape[0], shape[2]), strict=True) if 1 <= channels <= 4]
    if data_format is not None:
        if data_format not in possible:
            raise ValueError(f"an array of shape {shape} has not 1 to 4 channels where {data_format} has them")
        return data_format
    if len(possible) != 1:
        trouble = (
            "may have its channels first or last: say input_data_format" if possible else "has not 1 to 4 channels"
        )
        raise ValueError(f"an array of shape {shape} {trouble}")
    return possible[0]


def _to_channels(picture: np.ndarray, channels: int, background: float) -> np.ndarray:
    """[H, W, 1 to 4] over the background, in grey or in RGB."""
    colours = picture
    if picture.shape[2] in (2, 4):
        opacity = picture[..., -1:]
        colours = picture[..., :-1] * opacity + np.float32(background) * (1 - opacity)
    if colours.shape[2] == channels:
        return colours
    if channels == 3:
        return np.repeat(colours, 3, axis=2)
    return colours @ np.array([[0.299], [0.587], [0.114]], np.float32)  # luma of ITU-R BT.601, as in Pillow


def _resize(picture: np.ndarray, size: Mapping[str, int], resample: int) -> np.ndarray:
    """[H, W, C] to the size, one channel at a time in float32."""
    height, width = picture.shape[:2]
    if "height" in size:
        target = size["height"], size["width"]
    else:
        ((edge, pixels),) = size.items()
        scale = pixels / (min(height, width) if edge == "shortest_edge" else max(height, width))
        target = max(1, round(height * scale)), max(1, round(width * scale))
    if target == (height, width):
        return picture
    how = Image.Resampling(resample)
    channels = [Image.fromarray(np.ascontiguousarray(c)).resize(target[::-1], how) for c in picture.transpose(2, 0, 1)]
    return np.stack([np.asarray(channel) for channel in channels], axis=2)
