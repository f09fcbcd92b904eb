"""The tasks of pictures, sounds and several senses: to tell classes."""

import textwrap
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from transformers import (
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PretrainedConfig,
)

from ..data.audio import AUGMENTATIONS as OF_SOUNDS
from ..data.audio import audio_collator, load_audio
from ..data.images import AUGMENTATIONS as OF_PICTURES
from ..data.images import image_collator, load_images
from ..data.labelled import LabelledCollator, named_augmentations
from ..data.processors import new_processor, saved_processor
from ..data.scenes import load_scenes
from ..data.senses import KEYS, SENSES, load_digits, senses_collator
from ..data.tokenizers import make_tokenizer
from ..errors import HoloError
from ..eval.classes import draw_image, draw_sound, write_confusion, write_predictions, write_senses, write_sheet
from ..eval.metrics import ClassScores
from ..hub.card import write_card
from ..registry import get_architecture, preset_config
from .report import folder_of
from .task import Task
from .trainer import HoloTrainer


class ClassTask(Task):
    """What these tasks share: classes, and what is reported of them."""

    auto_processor: ClassVar[str]
    known_augmentations: ClassVar[Mapping[str, Any]]
    class_names: Sequence[str]
    logits: np.ndarray  # of all held-out examples, after the training

    def load(self, checkpoint: Path | None) -> None:
        named_augmentations(self.run.data.augment, self.known_augmentations)
        self.run.training.remove_unused_columns = False  # the collator needs them
        splits = self.splits(checkpoint)
        self.train, self.validation, self.class_names = splits.train, splits.validation, splits.class_names
        wanted = self.run.model_overrides.get("num_labels", len(self.class_names))
        if wanted != len(self.class_names):
            raise HoloError(
                f"model: num_labels={wanted}, but the data has {len(self.class_names)} classes; leave num_labels out"
            )
        self.validation.augment = False

    def splits(self, checkpoint: Path | None) -> Any:
        """The data; sets the processor, too."""
        raise NotImplementedError

    def configured(self) -> PretrainedConfig:
        """The config of the model, with the values that the run changes."""
        preset, source = self.run.model.preset, self.run.model.model_name_or_path
        if source:
            return type(self.config).from_dict({**self.config.to_dict(), **self.run.model_overrides})
        try:
            return preset_config(str(preset), **self.run.model_overrides)
        except TypeError as error:
            raise HoloError(f"model: {error}") from None

    def loaded_processor(self, checkpoint: Path | None) -> Any:
        """That of the checkpoint, of the model that the run starts from, or one that fits a new model."""
        source = self.run.model.model_name_or_path
        if checkpoint:
            return saved_processor(self.auto_processor, checkpoint, "resume_from_checkpoint")
        if source:
            return saved_processor(self.auto_processor, source, "model_name_or_path")
        return self.new_processor()

    def new_processor(self) -> Any:
        """One that fits a new model."""
        return new_processor(self.auto_processor, self.configured())

    def options(self) -> dict[str, Any]:
        """The arguments of the run for a reader of labelled data."""
        data = self.run.data
        return {
            "train_file": data.train_file or None,
            "dataset_name": data.dataset_name,
            "dataset_config_name": data.dataset_config_name,
            "label_column": data.label_column,
            "validation_fraction": data.validation_fraction,
            "hold_out": pairs(data.hold_out),
        }

    def model_values(self) -> dict[str, Any]:
        labels = dict(enumerate(self.class_names))
        numbers = {name: number for number, name in labels.items()}
        return {"num_labels": len(labels), "id2label": labels, "label2id": numbers}

    def loading_options(self) -> dict[str, Any]:
        """A head for other classes is a new one."""
        known = self.config.id2label or {}
        if {int(number): name for number, name in known.items()} == dict(enumerate(self.class_names)):
            return {}
        return {**ClassTask.model_values(self), "ignore_mismatched_sizes": True}

    def scores(self) -> ClassScores:
        return ClassScores()

    def description(self) -> list[str]:
        lines = [
            f"data: {self.name_of_data()}, {len(self.class_names)} classes",
            f"      {len(self.train):,} examples to learn from, {len(self.validation):,} held-out ones are scored",
        ]
        augment = self.run.data.augment
        return [*lines, f"      in training changed by {', '.join(augment)}"] if augment else lines

    def model_knows(self) -> str:
        return f"{len(self.class_names):,} classes known"

    def score_more(self, trainer: HoloTrainer) -> None:
        self.logits = self._logits(trainer, self.validation)

    def _logits(self, trainer: HoloTrainer, examples: Any) -> np.ndarray:
        return np.asarray(trainer.predict(examples).predictions)

    def write_results(self, trainer: HoloTrainer, metrics: dict[str, float]) -> None:
        """Write predictions, confusion matrix, a sheet of examples and the model card."""
        folder, labels = folder_of(self.run.training), np.asarray(self.validation.labels)
        write_predictions(folder, self.logits, labels, self.class_names)
        write_confusion(folder, self.logits.argmax(-1), labels, self.class_names)
        write_sheet(folder, self.validation, self.logits, labels, self.class_names, self.draw)
        write_card(folder)
        print(f"\nWhat the model says of held-out examples: {folder / 'predictions.png'}, {folder / 'confusion.png'}")
        print(
            f"validation loss: {metrics['eval_loss']:.4f} nats, {metrics['eval_accuracy']:.1%} right, "
            f"F1 {metrics['eval_f1']:.3f} ({len(labels):,} examples, each scored once)"
        )

    @staticmethod
    def draw(axes: Any, example: Mapping[str, Any]) -> None:
        """Draw an example."""
        raise NotImplementedError


class ImageTask(ClassTask):
    """Tell the class of a picture."""

    auto_class = AutoModelForImageClassification
    auto_processor = "AutoImageProcessor"
    known_augmentations = OF_PICTURES
    draw = staticmethod(draw_image)

    def splits(self, checkpoint: Path | None) -> Any:
        self.processor = self.loaded_processor(checkpoint)
        return load_images(**self.options(), image_column=self.run.data.image_column).checked()

    def collator(self) -> LabelledCollator:
        return image_collator(self.processor, self.run.data.augment, self.run.training.seed)


class AudioTask(ClassTask):
    """Tell the class of a sound."""

    auto_class = AutoModelForAudioClassification
    auto_processor = "AutoFeatureExtractor"
    known_augmentations = OF_SOUNDS
    draw = staticmethod(draw_sound)

    def splits(self, checkpoint: Path | None) -> Any:
        self.processor = self.loaded_processor(checkpoint)
        rate = self.processor.sampling_rate
        return load_audio(**self.options(), audio_column=self.run.data.audio_column, sampling_rate=rate).checked()

    def collator(self) -> LabelledCollator:
        return audio_collator(self.processor, self.run.data.augment, self.run.training.seed)


class MultimodalTask(ClassTask):
    """Tell a digit from what is seen, heard and read of it, or of the sum of two."""

    auto_class = AutoModelForSequenceClassification
    auto_processor = "AutoProcessor"
    known_augmentations = {**OF_PICTURES, **OF_SOUNDS}
    accuracies: dict[str, float]

    def splits(self, checkpoint: Path | None) -> Any:
        data, audio_config = self.run.data, getattr(self.configured(), "audio_config", None)
        rate = None if audio_config is None else audio_config.sampling_rate
        if data.train_file or data.dataset_name:
            options = {name: value for name, value in self.options().items() if name != "hold_out"}
            columns = {name: getattr(data, name) for name in ("image_column", "audio_column", "text_column")}
            splits: Any = load_scenes(**options, **columns, sampling_rate=rate).checked()
            self._texts = [text for text in splits.train.senses.get("text", ()) if text]
        elif data.image_data and data.audio_data:
            splits = load_digits(data.image_data, data.audio_data, data.question, rate, seed=self.run.training.seed)
            self._texts = [sentence.text for sentence in splits.train.sentences]
        else:
            raise HoloError(
                "train_file: name a table, or pictures and recordings of digits as image_data and audio_data"
            )
        self.processor = self.loaded_processor(checkpoint)
        return splits

    def new_processor(self) -> Any:
        """A processor of the parts that the encoders need; the tokenizer is made from the sentences to learn from."""
        config, parts = self.configured(), {}
        if "text" in config.modalities:
            parts["tokenizer"] = make_tokenizer(
                self.run.data.tokenizer or "characters", self._texts, self.run.data.vocab_size
            )
        if "vision" in config.modalities:
            parts["image_processor"] = new_processor("AutoImageProcessor", config.vision_config)
        if "audio" in config.modalities:
            parts["feature_extractor"] = new_processor("AutoFeatureExtractor", config.audio_config)
        return get_architecture(config.model_type).processor(**parts)

    def config_values(self) -> dict[str, Any]:
        """With the vocabulary of the tokenizer in the config of the text encoder."""
        values, tokenizer = super().config_values(), getattr(self.processor, "tokenizer", None)
        if tokenizer is not None:
            ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
            values["text_config"] = {**self.configured().text_config.to_dict(), **ids}
        return values

    def collator(self) -> LabelledCollator:
        return senses_collator(self.processor, self.run.data.augment, self.run.training.seed)

    def name_of_data(self) -> str:
        if self.run.data.train_file or self.run.data.dataset_name:
            return super().name_of_data()
        return f"{self.run.data.image_data} and {self.run.data.audio_data}, question: {self.run.data.question}"

    def score_more(self, trainer: HoloTrainer) -> None:
        """All held-out examples, with each choice of the senses that all of them have."""
        super().score_more(trainer)
        known = [sense for sense in SENSES if sense in trainer.model.config.modalities]
        examples = [self.validation[number] for number in range(len(self.validation))]
        senses = [sense for sense in known if all(example[KEYS[sense]] is not None for example in examples)]
        self.accuracies, labels = {}, np.asarray(self.validation.labels)
        for count in range(1, len(senses) + 1):
            for given in combinations(senses, count):
                logits = self._logits(trainer, self.validation.with_senses(*given))
                self.accuracies[" + ".join(given)] = float((logits.argmax(-1) == labels).mean())

    def write_results(self, trainer: HoloTrainer, metrics: dict[str, float]) -> None:
        super().write_results(trainer, metrics)
        folder = folder_of(self.run.training)
        if self.accuracies:
            write_senses(folder, self.accuracies)
        for given, accuracy in self.accuracies.items():
            print(f"  given {given}: {accuracy:.1%} right")

    @staticmethod
    def draw(axes: Any, example: Mapping[str, Any]) -> None:
        if example["image"] is not None:
            draw_image(axes, example)
        elif example["audio"] is not None:
            draw_sound(axes, example)
        axes.axis("on")
        axes.set(xticks=[], yticks=[])
        axes.set_xlabel("\n".join(textwrap.wrap(example["text"] or "", 24)[:2]), fontsize=6)


def pairs(words: Sequence[str]) -> dict[str, str] | None:
    """`COLUMN=VALUE` words as a mapping.

    Raises:
        HoloError: a word is not of that form.
    """
    for word in words:
        if "=" not in word:
            raise HoloError(f"hold_out: {word!r} is not of the form COLUMN=VALUE")
    return dict(word.split("=", 1) for word in words) or None
