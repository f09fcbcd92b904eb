"""What `hf-holo convert` asks of a way to convert."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..sources import Source, Text
from ..work_folder import WorkFolder
from .arguments import ConvertArguments


class Conversion(ABC):
    """One way to convert a teacher. It is made from the config alone, so that bad input shows before weights are read.

    Args:
        source: the teacher.
        options: of the command.

    Attributes:
        twin: the teacher on the meta device.
        disk: bytes that the result and the work for it take at most.
        lesson: the recipe of `hf-holo distill` for the student.
        advice: one sentence on what that brings.

    Raises:
        HoloError: teacher and options do not fit.
    """

    disk: int
    lesson: str
    advice: str

    def __init__(self, source: Source, options: ConvertArguments) -> None:
        self.source, self.options = source, options
        self.twin = source.without_weights()

    @abstractmethod
    def print_coverage(self) -> None:
        """Print what becomes of every module."""

    @abstractmethod
    def measure(self, model: PreTrainedModel, texts: list[Text], work: WorkFolder) -> None:
        """Learn from the dense teacher and the texts, into the work folder."""

    @abstractmethod
    def apply(self, model: PreTrainedModel, texts: list[Text], work: WorkFolder) -> PreTrainedModel:
        """Make the student; the teacher may be used up."""

    @abstractmethod
    def figures(self, stored: Mapping[str, int]) -> dict[str, Any]:
        """What the report says of a student that stores so many values, by the keys of its checkpoint."""

    @abstractmethod
    def summary(self, figures: dict[str, Any]) -> str:
        """The figures as one sentence."""

    @abstractmethod
    def write_layers(self, result: Path) -> None:
        """Write layers.csv, and pictures where there is something to show."""


def size_in_bytes(model: PreTrainedModel) -> int:
    """Of the parameters."""
    return sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())
