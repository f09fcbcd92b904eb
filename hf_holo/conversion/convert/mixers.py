"""Attention becomes holographic mixers: a Llama or Phi-3 turns into a HoloSpectralNet, to be distilled."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, set_seed

from ...files import write_csv
from ...modeling.modeling_hsn import HsnForCausalLM
from ..sources import Source, Text
from ..surgery.transfer import Part, compare, transfer_to_hsn
from ..work_folder import WorkFolder
from .arguments import ConvertArguments
from .conversion import Conversion, size_in_bytes


class MixerTransfer(Conversion):
    """The weights go to an `HsnForCausalLM` of the same width; see [`transfer_to_hsn`]. No text is needed.

    Memory: teacher and student.
    """

    lesson = "distill-hsn"
    advice = "Its mixers are only a start: it writes noise until it has been distilled from its teacher:"

    def __init__(self, source: Source, options: ConvertArguments) -> None:
        super().__init__(source, options)
        student = self._transfer(self.twin)
        self.parts: list[Part] = compare(self.twin, student)
        self.replaced = [i for i, kind in enumerate(student.config.mixer_types) if kind == "holographic"]
        self.depth = student.config.num_hidden_layers
        self.disk = size_in_bytes(student)

    def _transfer(self, teacher: PreTrainedModel) -> HsnForCausalLM:
        return transfer_to_hsn(teacher, self.options.layers or None)

    def print_coverage(self) -> None:
        table = Table(title="every part of the teacher, and what takes its place")
        table.add_column("part", overflow="fold")
        table.add_column("from → to", overflow="fold")
        table.add_column("taken from the teacher", overflow="fold")
        for column in ("parameters", "of the student"):
            table.add_column(column, justify="right", no_wrap=True)
        for part in self.parts:
            becomes = f"{part.before} → {part.after}"
            table.add_row(part.module, becomes, part.taken, f"{part.numbers_before:,}", f"{part.numbers_after:,}")
        console = Console()
        console.print(table)
        before, after = (sum(getattr(p, f"numbers_{when}") for p in self.parts) for when in ("before", "after"))
        sizes = f"whole model: {before:,} → {after:,} parameters"
        console.print(f"{self.summary(self._counts())}\n{sizes}", highlight=False)

    def measure(self, model: PreTrainedModel, texts: list[Text], work: WorkFolder) -> None:
        """The weights say it all."""

    def apply(self, model: PreTrainedModel, texts: list[Text], work: WorkFolder) -> PreTrainedModel:
        set_seed(self.options.seed)
        return self._transfer(model)

    def figures(self, stored: Mapping[str, int]) -> dict[str, Any]:
        return self._counts()

    def _counts(self) -> dict[str, Any]:
        counts = {name: sum(getattr(part, name) for part in self.parts) for name in ("copied", "derived", "fresh")}
        return {"replaced": self.replaced, **counts}

    def summary(self, figures: dict[str, Any]) -> str:
        total = figures["copied"] + figures["derived"] + figures["fresh"]
        return (
            f"{len(figures['replaced'])} of {self.depth} attention layers replaced by holographic mixers; of the "
            f"student's parameters {figures['copied'] / total:.1%} are the teacher's, {figures['derived'] / total:.1%} "
            f"phases made of its queries and keys, {figures['fresh'] / total:.1%} fresh"
        )

    def write_layers(self, result: Path) -> None:
        write_csv([{**asdict(part), "fresh": part.fresh} for part in self.parts], result / "layers.csv")
