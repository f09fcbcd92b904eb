"""What a conversion of linear layers shows of them: a table before, a file and two pictures afterwards."""

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..surgery.apply import SurgeryReport


@dataclass(frozen=True)
class LayerRow:
    """One site: layers that share a basis.

    Attributes:
        layers: their names.
        harmonics: None where it stays dense.
        full: the largest rank that makes sense, min(outputs, inputs).
        dense, stored: values of the weights before, and on disk now.
        error: mean squared error of the outputs on the calibration text relative to their mean square; where
            nothing was fitted to a text, squared error of the weights relative to their square.
    """

    layers: tuple[str, ...]
    harmonics: int | None
    full: int
    dense: int
    stored: int
    error: float

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


def print_coverage(report: SurgeryReport, layers: dict[str, dict[str, Any]]) -> None:
    """Print every module with values of its own: what it is, what it becomes, and how many values that takes."""
    table = Table(title="every module that has values of its own")
    table.add_column("module", overflow="fold")
    table.add_column("from → to", overflow="fold")
    for column in ("values", "on disk", "trained", "ratio"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in report.rows:
        name, before, stored = row["module"], row["numbers_before"], row["stored"]
        becomes = f"{row['before']} → {row['after']} {layers[name]['harmonics']}" if name in layers else row["before"]
        table.add_row(name, becomes, f"{before:,}", f"{stored:,}", f"{row['trained']:,}", f"{stored / before:.3f}")
    console = Console()
    console.print(table)
    before, stored, trained = (report.total(column) for column in ("numbers_before", "stored", "trained"))
    console.print(
        f"{len(report.converted)} of {len(report.rows)} modules converted, {report.kept:.1%} of their values kept on "
        f"disk (bases included)\nwhole model: {before:,} → {stored:,} values on disk, {trained:,} of them parameters; "
        f"merged for inference {before:,} again",
        highlight=False,
    )


def write_layers(path: Path, rows: Sequence[LayerRow]) -> None:
    """One line for each site."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["block", "layers", "harmonics", "largest_rank", "dense", "stored", "relative_squared_error"])
        for row in rows:
            rank = "dense" if row.harmonics is None else row.harmonics
            layers = " ".join(row.layers)
            writer.writerow([row.block, layers, rank, row.full, row.dense, row.stored, f"{row.error:.6g}"])


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
    axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]  # a MaxNLocator's
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
