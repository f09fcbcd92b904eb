"""What a conversion leaves beside the model: report.json, layers.csv with two pictures, sample.txt and README.md."""

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from .surgery import SurgeryReport


@dataclass(frozen=True)
class Score:
    """How well one model predicts the held-out part of a text."""

    text: str
    windows: int
    perplexity: float


@dataclass(frozen=True)
class LayerRow:
    """One site: layers that share a basis.

    Attributes:
        layers: their names.
        harmonics: None where it stays dense.
        full: the largest rank that makes sense, min(outputs, inputs).
        dense, stored: numbers of the weights before, and on disk now.
        error: mean squared error of the outputs on the calibration text relative to their mean square; None if unknown.
    """

    layers: tuple[str, ...]
    harmonics: int | None
    full: int
    dense: int
    stored: int
    error: float | None

    @property
    def block(self) -> int:
        """Number of the block, or 0 for layers outside."""
        number = re.search(r"\.(\d+)\.", self.layers[0])
        return int(number[1]) if number else 0

    @property
    def kind(self) -> str:
        """What the site is called in every block."""
        return " + ".join(re.split(r"\.\d+\.", name, maxsplit=1)[-1].rpartition(".")[2] for name in self.layers)

    @property
    def path(self) -> str:
        """The kind with the modules around it: two kinds may end alike."""
        return re.split(r"\.\d+\.", self.layers[0], maxsplit=1)[-1].rpartition(".")[0] + ": " + self.kind


@dataclass(frozen=True)
class Outcome:
    """Everything that a conversion found out.

    Attributes:
        name: of the result.
        teacher: folder or Hub name.
        auto_class: that loads both.
        recipe: the options.
        kept: numbers on disk of the converted layers, bases included, over those of the dense layers.
        numbers: in the whole checkpoint, "teacher" and "student".
        before, after: perplexities of teacher and student on each text.
        samples: a text of each, or nothing.
        rows: of every site.
        seconds: by part.
        peak_memory_gib: of the process.
    """

    name: str
    teacher: str
    auto_class: str
    recipe: dict[str, Any]
    kept: float
    numbers: dict[str, int]
    before: list[Score]
    after: list[Score]
    samples: dict[str, str]
    rows: list[LayerRow]
    seconds: dict[str, float]
    peak_memory_gib: float

    @property
    def texts(self) -> list[dict[str, Any]]:
        return [
            {
                "text": old.text,
                "windows": old.windows,
                "teacher_perplexity": old.perplexity,
                "student_perplexity": new.perplexity,
                "ratio": new.perplexity / old.perplexity,
            }
            for old, new in zip(self.before, self.after, strict=True)
        ]


# On the console -----------------------------------------------------------------------------------------------------


def print_coverage(report: SurgeryReport, layers: dict[str, dict[str, Any]]) -> None:
    """Print every module with numbers of its own: what it is, what it becomes, and how many numbers that takes."""
    table = Table(title="every module that has numbers of its own")
    table.add_column("module", overflow="fold")
    table.add_column("from → to", overflow="fold")
    for column in ("numbers", "on disk", "trained", "ratio"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in report.rows:
        name, before, stored = row["module"], row["numbers_before"], row["stored"]
        becomes = f"{row['before']} → {row['after']} {layers[name]['harmonics']}" if name in layers else row["before"]
        table.add_row(name, becomes, f"{before:,}", f"{stored:,}", f"{row['trained']:,}", f"{stored / before:.3f}")
    console = Console()
    console.print(table)
    before, stored, trained = (report.total(column) for column in ("numbers_before", "stored", "trained"))
    console.print(
        f"{len(report.converted)} of {len(report.rows)} modules converted, {report.kept:.1%} of their numbers kept on "
        f"disk (bases included)\nwhole model: {before:,} → {stored:,} numbers on disk, {trained:,} of them parameters; "
        f"merged for inference {before:,} again",
        highlight=False,
    )


def print_scores(outcome: Outcome) -> None:
    """Print what was kept, and the perplexities."""
    console = Console()
    console.print(
        f"{outcome.kept:.1%} of the numbers of the chosen layers kept on disk, bases included", highlight=False
    )
    if outcome.texts:
        table = Table("held-out text", "windows", "teacher", "student", "ratio", title="perplexity")
        for row in outcome.texts:
            table.add_row(
                row["text"],
                str(row["windows"]),
                f"{row['teacher_perplexity']:.2f}",
                f"{row['student_perplexity']:.2f}",
                f"{row['ratio']:.3f}",
            )
        console.print(table)


# In the folder ------------------------------------------------------------------------------------------------------


def write_report(folder: Path, outcome: Outcome) -> None:
    """Write all files of the report into the folder of the result."""
    values = asdict(outcome) | {"texts": outcome.texts}
    for key in ("before", "after", "samples", "rows"):
        del values[key]
    (folder / "report.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    write_layers(folder / "layers.csv", outcome.rows)
    plot_layers(folder / "ranks.png", outcome.rows, "harmonics", "harmonics ÷ largest rank (dense: 1)")
    if all(row.error is not None for row in outcome.rows):
        plot_layers(folder / "error.png", outcome.rows, "error", "squared error of the outputs, relative")
    if outcome.samples:
        parts = [f"--- {who}\n{text}\n" for who, text in outcome.samples.items()]
        (folder / "sample.txt").write_text("\n".join(parts), encoding="utf-8")
    (folder / "README.md").write_text(model_card(outcome), encoding="utf-8")


def write_layers(path: Path, rows: Sequence[LayerRow]) -> None:
    """One line for each site."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["block", "layers", "harmonics", "largest_rank", "dense", "stored", "relative_squared_error"])
        for row in rows:
            rank = "dense" if row.harmonics is None else row.harmonics
            error = "" if row.error is None else f"{row.error:.6g}"
            writer.writerow([row.block, " ".join(row.layers), rank, row.full, row.dense, row.stored, error])


def plot_layers(path: Path, rows: Sequence[LayerRow], what: str, label: str) -> None:
    """A line for each kind of site over the blocks.

    Args:
        path: the PNG.
        rows: of every site.
        what: "harmonics", shown as a share of the largest rank, or "error".
        label: of the vertical axis.
    """
    from matplotlib.figure import Figure  # slow to import, and needed once

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for kind in dict.fromkeys(row.path for row in rows):
        chosen = [row for row in rows if row.path == kind]
        if what == "error":
            values = [row.error for row in chosen]
        else:
            values = [1.0 if row.harmonics is None else row.harmonics / row.full for row in chosen]
        axes.plot([row.block for row in chosen], values, "o-", markersize=4, label=chosen[0].kind)
    axes.set(xlabel="block", ylabel=label)
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


CARD = """---
library_name: transformers
base_model: {teacher}
tags: [hf-holo, holographic, layer-surgery]
---
# {name}

{teacher} with holographic linear layers (HoloLinear), made by `hf-holo convert`. Of the numbers of the chosen layers
{kept:.1%} are kept on disk, stored bases included; the whole checkpoint went from {before:,} to {after:,} numbers.

{scores}
To load it:

```python
import hf_holo  # registers the layers
from transformers import {auto_class}

model = {auto_class}.from_pretrained("{name}")
```

`layers.csv` and its pictures show each layer, `sample.txt` has a text of both models, `report.json` the figures.
Limits and licence are those of {teacher}.

## Recipe

```yaml
{recipe}```
"""


def model_card(outcome: Outcome) -> str:
    """The README of the result, with the recipe in it."""
    scores = "No held-out text was measured.\n"
    if outcome.texts:
        lines = ["| held-out text | windows | teacher | student | ratio |", "|---|---|---|---|---|"]
        for row in outcome.texts:
            numbers = f"{row['teacher_perplexity']:.2f} | {row['student_perplexity']:.2f} | {row['ratio']:.3f}"
            lines.append(f"| {row['text']} | {row['windows']} | {numbers} |")
        scores = "Perplexity:\n\n" + "\n".join(lines) + "\n"
    teacher = Path(outcome.teacher).name if Path(outcome.teacher).is_dir() else outcome.teacher
    return CARD.format(
        teacher=teacher,
        name=outcome.name,
        kept=outcome.kept,
        before=outcome.numbers["teacher"],
        after=outcome.numbers["student"],
        scores=scores,
        auto_class=outcome.auto_class,
        recipe=yaml.safe_dump(outcome.recipe, sort_keys=False, allow_unicode=True),
    )
