"""Digits of three senses: a noisy picture, a noisy sound and a sentence that says something of one digit, or two.

None of them tells the digit for sure, so that a model which joins them well is better than any of its parts. The test
has other pictures, other recordings and other sentences than the training.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ..errors import HoloError
from . import audio, images
from .audio import Sounds, load_audio, with_noise
from .images import Images, load_images
from .labelled import LabelledCollator, changed, named_augmentations

SENSES = ("text", "vision", "audio")  # in the order of `config.modalities`
KEYS = {"text": "text", "vision": "image", "audio": "audio"}  # what an example calls them
ARGUMENTS = {"text": "text", "vision": "images", "audio": "audio"}  # what a processor calls them
PARTS = {"text": "tokenizer", "vision": "image_processor", "audio": "feature_extractor"}
Question = Literal["digit", "sum"]

PICTURE_NOISE = 0.8  # standard deviation, as a share of white
COVERED = 0.5  # of the side of a picture, by a grey square
DECIBELS = 0.0  # signal to noise of a sound

# Sentences ----------------------------------------------------------------------------------------------------------

PROPERTIES: dict[str, tuple[frozenset[int], tuple[str, ...]]] = {
    "even": (frozenset({0, 2, 4, 6, 8}), ("even", "divisible by two", "not odd", "a multiple of two")),
    "odd": (frozenset({1, 3, 5, 7, 9}), ("odd", "not divisible by two", "not even", "no multiple of two")),
    "small": (frozenset(range(5)), ("less than five", "below five", "at most four", "smaller than five")),
    "large": (frozenset(range(5, 10)), ("five or more", "above four", "at least five", "greater than four")),
    "middle": (frozenset({3, 4, 5, 6}), ("between three and six", "from three to six", "neither small nor large")),
    "outer": (frozenset({0, 1, 2, 7, 8, 9}), ("below three or above six", "not between three and six")),
    "threes": (frozenset({0, 3, 6, 9}), ("divisible by three", "a multiple of three", "a sum of threes")),
    "prime": (frozenset({2, 3, 5, 7}), ("prime", "a prime number", "divisible by one and itself alone")),
}
SUBJECTS = ("the number", "the digit", "it", "what I mean", "the figure", "what you look for", "my number", "this one")
FRAMES = (
    "{} is {}",
    "I know that {} is {}",
    "they say {} is {}",
    "{} is surely {}",
    "note that {} is {}",
    "{} is {} .",
)
HELD_OUT_SENTENCES = 0.2


class Sentence(NamedTuple):
    """What it says, and of which digits that is true."""

    text: str
    digits: frozenset[int]


def sentences(held_out: bool) -> list[Sentence]:
    """All sentences to learn from, or all that are held out: every property is among both, in other words."""
    found = []
    for digits, wordings in PROPERTIES.values():
        whole = [Sentence(f.format(s, w), digits) for w, s, f in product(wordings, SUBJECTS, FRAMES)]
        order = np.random.default_rng(0).permutation(len(whole))
        count = round(HELD_OUT_SENTENCES * len(whole))
        found += [whole[i] for i in (order[:count] if held_out else order[count:])]
    return found


# Examples -----------------------------------------------------------------------------------------------------------


class Digits(Dataset):
    """Examples with `row`, `labels`, `image`, `audio` and `text`, each of them None if that sense is missing.

    An example is a function of its row and the seed.

    Args:
        pictures, sounds: of digits; their classes are called "0" to "9".
        sentences: about digits.
        size: number of examples.
        question: "digit": all senses are about one digit, the label. "sum": the digits of picture and sound are drawn
            independently, the label is the last digit of their sum, there is no sentence, and nothing is obscured.
        seed: of what meets what, and of the noise.
        senses: those that are given; default: all.
    """

    augment = True  # whether a collator may change its examples

    def __init__(
        self,
        pictures: Images,
        sounds: Sounds,
        sentences: Sequence[Sentence],
        size: int,
        question: Question = "digit",
        seed: int = 0,
        senses: Sequence[str] = SENSES,
    ) -> None:
        self.pictures, self.sounds, self.sentences = pictures, sounds, sentences
        self.question, self.seed, self.senses = question, seed, tuple(senses)
        random = np.random.default_rng([seed, size])
        seen, heard = (random.permutation(np.arange(size) % 10) for _ in range(2))
        heard = heard if question == "sum" else seen
        self.seen, self.heard = seen, heard  # the digits of pictures and sounds, [size]
        self.labels = (seen + heard) % 10 if question == "sum" else seen
        self._picture = _drawn(_digits_of(pictures), seen, random)
        self._sound = _drawn(_digits_of(sounds), heard, random)
        true_of = [np.array([n for n, s in enumerate(sentences) if digit in s.digits]) for digit in range(10)]
        self._sentence = np.array([random.choice(true_of[digit]) for digit in seen])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {
            "row": row,
            "augment": self.augment,
            "labels": int(self.labels[row]),
            **{KEYS[sense]: self._sense(sense, row) if sense in self.senses else None for sense in SENSES},
        }

    def _sense(self, sense: str, row: int) -> Any:
        random = np.random.default_rng([self.seed, row, SENSES.index(sense)])
        if sense == "vision":
            image = self.pictures[self._picture[row]]["image"]
            return image if self.question == "sum" else obscured(image, random)
        if sense == "audio":
            sound = self.sounds[self._sound[row]]["audio"]
            return sound if self.question == "sum" else with_noise(sound, DECIBELS, random)
        return self.sentences[self._sentence[row]].text if self.question == "digit" else None

    def with_senses(self, *senses: str) -> "Digits":
        """The same examples, of which only these senses are given."""
        return changed(self, senses=senses)


def _digits_of(examples: Images | Sounds) -> np.ndarray:
    """The digit of every example, whatever the order of the classes.

    Raises:
        HoloError: the classes are no digits.
    """
    if sorted(examples.class_names) != [str(digit) for digit in range(10)]:
        raise HoloError(f"{examples.source}: the classes are {', '.join(examples.class_names)}; 0 to 9 are needed")
    return np.array([int(name) for name in examples.class_names])[examples.labels]


def _drawn(available: np.ndarray, wanted: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """For each wanted digit an example of it; none comes again before all of its digit have come."""
    chosen = np.empty(len(wanted), dtype=int)
    for digit in range(10):
        own, places = np.flatnonzero(available == digit), np.flatnonzero(wanted == digit)
        if not len(own):
            raise HoloError(f"image_data, audio_data: there is no example of the digit {digit}")
        rounds = -(-len(places) // len(own))
        chosen[places] = np.concatenate([random.permutation(own) for _ in range(rounds)] or [own])[: len(places)]
    return chosen


def obscured(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """A grey picture under noise, with a grey square anywhere on it."""
    pixels = np.asarray(image.convert("L"), dtype=np.float32) / 255  # [H, W]
    height, width = (round(COVERED * side) for side in pixels.shape)
    y, x = (int(random.integers(0, side - size + 1)) for side, size in zip(pixels.shape, (height, width), strict=True))
    pixels = pixels.copy()
    pixels[y : y + height, x : x + width] = 0.5
    pixels += PICTURE_NOISE * random.standard_normal(pixels.shape, dtype=np.float32)
    return Image.fromarray((pixels.clip(0, 1) * 255).astype(np.uint8))


@dataclass(frozen=True)
class DigitSplits:
    """What is learned from, and what is held out."""

    train: Digits
    validation: Digits
    class_names: Sequence[str] = tuple(map(str, range(10)))


def load_digits(
    image_data: str,
    audio_data: str,
    question: Question = "digit",
    sampling_rate: int | None = None,
    train_size: int | None = None,
    validation_size: int | None = None,
    seed: int = 0,
) -> DigitSplits:
    """Digits of three senses, made of pictures and recordings; each has a test split of its own, or gets one.

        digits = load_digits("../shared/data/mnist", "../shared/data/fsdd", sampling_rate=8000)
        only_heard = digits.validation.with_senses("audio")

    Args:
        image_data, audio_data: a file, a folder or a data set on the Hub.
        question: see [`Digits`].
        sampling_rate: of the sounds, in Hz; default: as recorded.
        train_size, validation_size: number of examples; default: as many as there are pictures.
        seed: of the examples; those to learn from and those held out differ by all that they are made of.

    Raises:
        HoloError: as [`load_labelled`], or a class is no digit.
    """
    pictures = load_images(**named(image_data))
    sounds = load_audio(**named(audio_data), sampling_rate=sampling_rate)
    sizes = train_size or len(pictures.train), validation_size or len(pictures.validation)
    train, validation = (
        Digits(seen, heard, sentences(held_out), size, question, seed)
        for seen, heard, held_out, size in zip(
            (pictures.train, pictures.validation), (sounds.train, sounds.validation), (False, True), sizes, strict=True
        )
    )
    return DigitSplits(train, validation)


def named(data: str) -> dict[str, Any]:
    """The argument that names files, or a data set on the Hub."""
    return {"train_file": data} if Path(data).exists() or Path(data).suffix else {"dataset_name": data}


# Batches ------------------------------------------------------------------------------------------------------------


class SensesCollator(LabelledCollator):
    """Batches of what a processor makes of texts, pictures and sounds; see [`senses_collator`]."""

    def __init__(
        self,
        process: Callable[[list[Any]], Mapping[str, torch.Tensor]],
        augmentations: Mapping[str, Sequence[Any]],
        seed: int = 0,
    ) -> None:
        super().__init__(process, "", (), seed)
        self.of_sense = augmentations

    def decoded(self, examples: list[dict[str, Any]], random: np.random.Generator) -> list[Any]:
        of_sense = self.of_sense if self.augmenting(examples) else {}
        decoded = [{key: example[key] for key in KEYS.values()} for example in examples]
        for example in decoded:
            for key, augmentations in of_sense.items():
                for augment in augmentations if example[key] is not None else ():
                    example[key] = augment(example[key], random)
        return decoded


def senses_collator(processor: Any, augment: Sequence[str] = (), seed: int = 0) -> SensesCollator:
    """Batches of what `processor` gives, and `labels` `[B]`.

    Args:
        processor: that joins two or three of a tokenizer, an image processor and a feature extractor; senses that it
            has no part for are left out.
        augment: names out of the augmentations of pictures and of sounds.
        seed: of the augmentation.

    Raises:
        HoloError: an augmentation is unknown.
    """
    senses = [sense for sense in SENSES if getattr(processor, PARTS[sense], None) is not None]
    rate = {"sampling_rate": processor.feature_extractor.sampling_rate} if "audio" in senses else {}
    known = {**images.AUGMENTATIONS, **audio.AUGMENTATIONS}
    chosen = named_augmentations(augment, known)
    of_sense = {
        "image": [one for one in chosen if one in images.AUGMENTATIONS.values()],
        "audio": [one for one in chosen if one in audio.AUGMENTATIONS.values()],
    }

    def process(examples: list[dict[str, Any]]) -> Mapping[str, torch.Tensor]:
        given = {ARGUMENTS[sense]: [example[KEYS[sense]] for example in examples] for sense in senses}
        given = {name: values for name, values in given.items() if any(value is not None for value in values)}
        return processor(**given, **(rate if "audio" in given else {}), return_tensors="pt")

    return SensesCollator(process, of_sense, seed)
