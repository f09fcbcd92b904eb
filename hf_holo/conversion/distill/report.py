"""The traces of a distillation: report.json, losses.csv and losses.png."""

import csv
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...files import replacing, write_text


@dataclass
class DistillReport:
    """What teacher and student lose on the held-out texts, before and after every stage.

    Attributes:
        folder: of its files.
        teacher, student: parameters, scores by text and a sample, before the first stage.
        stages: the same after every stage, and how it went.
    """

    folder: Path
    teacher: dict[str, Any] = field(default_factory=dict)
    student: dict[str, Any] = field(default_factory=dict)
    stages: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def load(cls, folder: Path, stages: int) -> "DistillReport":
        """The report of an earlier run, up to its first `stages` stages."""
        saved = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        return cls(folder, saved["teacher"], saved["student"], saved["stages"][:stages])

    def write(self) -> None:
        """Write all files again, each under a temporary name first."""
        values = {"teacher": self.teacher, "student": self.student, "stages": self.stages}
        write_text(self.folder / "report.json", json.dumps(values, indent=2) + "\n")
        with replacing(self.folder / "losses.csv") as temporary:
            self._write_table(temporary)
        with replacing(self.folder / "losses.png") as temporary:
            self._plot(temporary)

    def line(self, entry: dict[str, Any]) -> str:
        """One line with the losses of a student and their ratio to the teacher's."""
        parts = []
        for name, found in entry["scores"].items():
            wanted = self.teacher["scores"][name]
            parts.append(
                f"{name} {found['loss']:.4f} nats per token (teacher {wanted['loss']:.4f}, "
                f"perplexity ratio {found['perplexity'] / wanted['perplexity']:.3f})"
            )
        return "; ".join(parts)

    def _write_table(self, path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["stage", "step", "stage_loss", "validation_loss", "learning_rate"])
            for stage in self.stages:
                for log in stage["history"]:
                    values = (log.get(key, "") for key in ("loss", "eval_loss", "learning_rate"))
                    writer.writerow([stage["name"], log["step"], *values])

    def _plot(self, path: Path) -> None:
        from matplotlib.figure import Figure  # slow to import

        figure = Figure(figsize=(10, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        begin = 0
        for stage in self.stages:
            points = [(begin + log["step"], log["loss"]) for log in stage["history"] if "loss" in log]
            if points:
                left.plot(*zip(*points, strict=True), label=f"{stage['name']}, last {points[-1][1]:.3g}")
            begin += stage["steps"]
        left.set(xlabel="step", ylabel="loss of the stage", yscale="log")
        if left.lines:
            left.legend()
        names = ["before", *(stage["name"] for stage in self.stages)]
        for text, wanted in self.teacher["scores"].items():
            losses = [entry["scores"][text]["loss"] for entry in (self.student, *self.stages)]
            (line,) = right.plot(names, losses, "o-", label=f"{text}, student {losses[-1]:.3f}")
            right.axhline(
                wanted["loss"], color=line.get_color(), ls="--", label=f"{text}, teacher {wanted['loss']:.3f}"
            )
        right.set(xlabel="after stage", ylabel="validation loss (nats per token)")
        right.legend()
        for axes in (left, right):
            axes.grid(alpha=0.3)
        figure.savefig(path, format="png", dpi=120)
