"""What prepares pictures and sounds for a model: that of a checkpoint, or a new one that fits a config."""

import inspect
from pathlib import Path
from typing import Any

import transformers
from transformers import PretrainedConfig

from ..errors import HoloError, first_line
from ..registry import get_architecture

PREPROCESSORS = {  # by name of the Auto class: what it is called
    "AutoImageProcessor": "image processor",
    "AutoFeatureExtractor": "feature extractor",
    "AutoProcessor": "processor",
}
SECONDS = 0.25  # of a sound


def new_processor(auto_class: str, config: PretrainedConfig) -> Any:
    """The processor of a new model: its arguments that are called as values of the config have these values.

    Args:
        auto_class: one of `PREPROCESSORS`.
        config: of a registered family.

    Raises:
        HoloError: the family has none of this kind.
    """
    part = get_architecture(config.model_type).preprocessors.get(auto_class)
    if part is None:
        raise HoloError(
            f"preset: the family {config.model_type!r} has no {PREPROCESSORS[auto_class]} of its own; start from a "
            "checkpoint with --model_name_or_path"
        )
    known = inspect.signature(part.__init__).parameters
    return part(**{name: getattr(config, name) for name in known if name != "self" and hasattr(config, name)})


def saved_processor(auto_class: str, name: str | Path, argument: str) -> Any:
    """The processor in a folder or on the Hub.

    Args:
        auto_class: one of `PREPROCESSORS`.
        name: folder or Hub name.
        argument: how the error calls it.

    Raises:
        HoloError: there is none, or it is damaged.
    """
    try:
        return getattr(transformers, auto_class).from_pretrained(str(name))
    except Exception as error:  # of a damaged file, transformers raises anything
        raise HoloError(
            f"{argument}: {str(name)!r} has no {PREPROCESSORS[auto_class]}, or a damaged one: {first_line(error)}"
        ) from error


def input_sizes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Sizes, without the batch, of the picture and the sound that a config is meant for: `pixel_values` `(C, H, W)`, if
    it names an `image_size`, and `input_values` `(samples,)`, a quarter of a second, if it names a `sampling_rate`."""
    seen = getattr(config, "vision_config", None) or config
    heard = getattr(config, "audio_config", None) or config
    size, rate = getattr(seen, "image_size", None), getattr(heard, "sampling_rate", None)
    sizes: dict[str, tuple[int, ...]] = {}
    if size is not None:
        sides = (size, size) if isinstance(size, int) else tuple(size)
        sizes["pixel_values"] = (getattr(seen, "num_channels", 3), *sides)
    if rate is not None:
        sizes["input_values"] = (int(SECONDS * rate),)
    return sizes
