"""Texts, pictures and sounds together, as the multimodal Resonance models take them."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoTokenizer,
    BatchFeature,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.dynamic_module_utils import custom_object_save
from transformers.feature_extraction_utils import FeatureExtractionMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import PROCESSOR_NAME

from .remote_code import complete_code, reference


class Part(NamedTuple):
    """A part of the processor: what it must be, what loads it, the argument of a call that it is for, and under which
    names the model takes what it gives."""

    kind: type
    loader: Any
    argument: str
    outputs: dict[str, str]


PARTS = {  # in the order of the modalities
    "tokenizer": Part(
        PreTrainedTokenizerBase,
        AutoTokenizer,
        "text",
        {"input_ids": "input_ids", "attention_mask": "attention_mask"},
    ),
    "image_processor": Part(
        BaseImageProcessor,
        AutoImageProcessor,
        "images",
        {"pixel_values": "pixel_values", "pixel_mask": "pixel_mask"},
    ),
    "feature_extractor": Part(
        FeatureExtractionMixin,
        AutoFeatureExtractor,
        "audio",
        {"input_values": "input_values", "attention_mask": "audio_attention_mask"},
    ),
}


class ResonanceProcessor(ProcessorMixin):
    """A tokenizer, an image processor and a feature extractor as one, any two of them or all three.

    `None` in the place of a text, picture or sound says that this example has none; a `modality_mask` tells the model.

    It is saved in the form of transformers 5, one `processor_config.json` with all parts but the tokenizer, which both
    4.57 and 5 load: the older form has one file name for image processors and feature extractors.

    Args:
        tokenizer: for texts.
        image_processor: for pictures.
        feature_extractor: for sounds.

    Raises:
        TypeError: a part is of the wrong kind.
        ValueError: fewer than two parts.
    """

    # transformers 4.57 asks for these
    attributes = list(PARTS)
    tokenizer_class = "AutoTokenizer"
    image_processor_class = "AutoImageProcessor"
    feature_extractor_class = "AutoFeatureExtractor"
    _auto_class = "AutoProcessor"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        image_processor: BaseImageProcessor | None = None,
        feature_extractor: FeatureExtractionMixin | None = None,
    ) -> None:
        # without ProcessorMixin's, which wants all parts
        self.chat_template = None
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.feature_extractor = feature_extractor
        self.attributes = [name for name in PARTS if getattr(self, name) is not None]
        for name in self.attributes:
            part, kind = getattr(self, name), PARTS[name].kind
            if not isinstance(part, kind):
                raise TypeError(f"{name} is a {type(part).__name__}; give a {kind.__name__} of transformers")
        if len(self.attributes) < 2:
            has = f"only {self.attributes[0]}" if self.attributes else "none"
            raise ValueError(f"{', '.join(PARTS)}: {has} is given; two are needed, or all three")

    def __call__(  # type: ignore[override]  # no videos
        self,
        images: Any = None,
        text: str | Sequence[str | None] | None = None,
        audio: Any = None,
        *,
        sampling_rate: int | None = None,
        return_tensors: str | None = None,
        text_kwargs: Mapping[str, Any] | None = None,
        images_kwargs: Mapping[str, Any] | None = None,
        audio_kwargs: Mapping[str, Any] | None = None,
    ) -> BatchFeature:
        """
        Args:
            images, text, audio: one of each, or lists of the same length, where None is the place of what is missing.
            sampling_rate: of the sounds, in hertz.
            return_tensors: `"pt"` or `"np"`; default: numpy arrays.
            text_kwargs, images_kwargs, audio_kwargs: further arguments of the parts, such as `truncation` of the
                tokenizer; texts are padded to the longest.

        Returns:
            What the model's `forward` is given: `input_ids`, `attention_mask`, `pixel_values`, `pixel_mask` where the
            image processor gives one, `input_values`, `audio_attention_mask`. If something is missing, also
            `modality_mask` `[batch, modalities]`, with zeros in the place of what is missing.

        Raises:
            ValueError: nothing is given, something for which there is no part, lists of several lengths, or an example
                without anything.
        """
        given = {"tokenizer": _listed(text), "image_processor": _listed(images), "feature_extractor": _listed(audio)}
        if sampling_rate is not None:
            audio_kwargs = {"sampling_rate": sampling_rate, **(audio_kwargs or {})}
        further = {
            "tokenizer": {"padding": True, **(text_kwargs or {})},
            "image_processor": images_kwargs or {},
            "feature_extractor": audio_kwargs or {},
        }
        present = self._present(given)
        data: dict[str, np.ndarray] = {}
        for part, mask in present.items():
            examples = given[part]
            if examples is not None and mask.any():
                real = [example for example in examples if example is not None]
                outputs = getattr(self, part)(real, return_tensors="np", **further[part])
                for name, values in outputs.items():
                    known = PARTS[part].outputs.get(name)
                    if known is not None:
                        data[known] = _spread(values, mask)
        named = [part for part in self.attributes if given[part] is not None]
        if not all(present[part].all() for part in named):
            data["modality_mask"] = np.stack([*present.values()], 1)  # [batch, modalities]
        return BatchFeature(data, tensor_type=return_tensors)

    def _present(self, given: Mapping[str, list | None]) -> dict[str, np.ndarray]:
        """For every part, of which examples it has something, `[batch]`."""
        lengths = {PARTS[part].argument: len(examples) for part, examples in given.items() if examples is not None}
        for part, examples in given.items():
            if examples is not None and part not in self.attributes:
                raise ValueError(
                    f"{PARTS[part].argument}: this processor has no {part}; it has {', '.join(self.attributes)}"
                )
        if not lengths:
            raise ValueError(f"give at least one of {', '.join(PARTS[part].argument for part in self.attributes)}")
        if len(set(lengths.values())) > 1:
            sizes = ", ".join(f"{name} has {size}" for name, size in lengths.items())
            raise ValueError(f"the numbers of examples differ: {sizes}; None takes the place of what is missing")
        size = next(iter(lengths.values()))
        present = {
            part: np.array(
                [given[part] is not None and given[part][row] is not None for row in range(size)], dtype=bool
            )
            for part in self.attributes
        }
        empty = np.flatnonzero(~np.any([*present.values()], 0)).tolist()
        if empty:
            raise ValueError(f"the examples {empty} have nothing at all: neither {' nor '.join(lengths)}")
        return present

    @property
    def model_input_names(self) -> list[str]:
        """Names of what a call returns."""
        return [name for part in self.attributes for name in PARTS[part].outputs.values()] + ["modality_mask"]

    def to_dict(self, legacy_serialization: bool = False) -> dict[str, Any]:
        """What `processor_config.json` holds: the names of the parts, and all of them but the tokenizer.

        `legacy_serialization`, an argument of transformers 4.57, changes nothing.
        """
        parts = {name: getattr(self, name).to_dict() for name in self.attributes if name != "tokenizer"}
        code = {"auto_map": {self._auto_class: reference(type(self))}} if self._auto_class is not None else {}
        return {"processor_class": type(self).__name__, "parts": self.attributes, **parts, **code}

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Write the tokenizer and a `processor_config.json`, with the code of the processors.

        Args:
            save_directory: a folder, which is made if it does not exist.
            push_to_hub: whether to push it to the Hub as well.
            kwargs: arguments of `push_to_hub`, and what transformers gives to every `save_pretrained`.

        Returns:
            The files.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        travelling = [part for part in (self, self.image_processor, self.feature_extractor) if _travels(part)]
        for part in travelling:
            custom_object_save(part, folder, config=part)
        complete_code(folder, [type(part) for part in travelling])
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        file = folder / PROCESSOR_NAME
        unfinished = folder / f"{PROCESSOR_NAME}.unfinished"
        unfinished.write_text(self.to_json_string(), encoding="utf-8")
        unfinished.replace(file)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)
        return [str(file)]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "ResonanceProcessor":
        """The processor in a folder or on the Hub, from either major of transformers.

        Raises:
            OSError: a part is missing.
        """
        saved, _ = cls.get_processor_dict(pretrained_model_name_or_path, **kwargs)
        parts = saved.get("parts", [*PARTS])
        return cls(
            **{name: PARTS[name].loader.from_pretrained(pretrained_model_name_or_path, **kwargs) for name in parts}
        )


def _travels(part: Any) -> bool:
    """Whether the code of a part goes with it."""
    return getattr(part, "_auto_class", None) is not None


def _listed(examples: Any) -> list | None:
    """One example or several as a list. An array is one, but for a batch of pictures."""
    if examples is None or isinstance(examples, str):
        return None if examples is None else [examples]
    if isinstance(examples, (list, tuple)):
        if not len(examples):
            raise ValueError("an empty list: give at least one example")
        numbers = all(isinstance(number, (int, float)) for number in examples)
        return [np.asarray(examples)] if numbers else list(examples)
    return list(examples) if getattr(examples, "ndim", 0) == 4 else [examples]


def _spread(values: np.ndarray, present: np.ndarray) -> np.ndarray:
    """The rows of `values` in the places where `present` `[batch]` is True, zeros elsewhere: `[batch, ...]`."""
    values = np.asarray(values)
    spread = np.zeros((len(present), *values.shape[1:]), values.dtype)
    spread[present] = values
    return spread
