"""The traces of a run: metrics.csv, loss.png and the console lines."""

import csv
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..files import replacing

ALWAYS = ("step", "epoch", "train_loss", "validation_loss")  # other columns appear when there is something in them
COLUMNS = {
    "step": "step",
    "epoch": "epoch",
    "train_loss": "loss",
    "validation_loss": "eval_loss",
    "validation_perplexity": "eval_perplexity",
    "validation_accuracy": "eval_accuracy",
    "validation_f1": "eval_f1",
    "validation_bits_per_character": "eval_bits_per_character",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
}


class RunReport(TrainerCallback):
    """Writes metrics.csv and loss.png into the output folder, each time from Trainer's whole history; of several
    processes, the first does.

    The history is part of every checkpoint, so a resumed run continues both files without a seam.

    Args:
        loss_unit: of the loss.
    """

    def __init__(self, loss_unit: str = "nats per token") -> None:
        self.loss_unit = loss_unit

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            write_metrics(state.log_history, folder_of(args) / "metrics.csv")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            plot_losses(state.log_history, folder_of(args) / "loss.png", self.loss_unit)


def folder_of(args: TrainingArguments) -> Path:
    """The output folder."""
    return Path(args.output_dir)  # type: ignore[arg-type]  # Trainer has filled it in


def write_metrics(history: list[dict[str, float]], path: Path) -> None:
    """Write Trainer's log history as a table with one row per step at which a loss was logged."""
    rows: dict[float, dict[str, float]] = {}
    for entry in history:
        if "loss" in entry or "eval_loss" in entry:
            rows.setdefault(entry["step"], {}).update(entry)
    measured = {key for entry in rows.values() for key in entry}
    columns = {name: key for name, key in COLUMNS.items() if name in ALWAYS or key in measured}
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([entry.get(key, "") for key in columns.values()] for entry in rows.values())


def plot_losses(history: list[dict[str, float]], path: Path, unit: str = "nats per token") -> None:
    """Plot training and validation loss over the steps and, of a classifier, accuracy and F1 next to it."""
    from matplotlib.figure import Figure  # slow to import, and needed once

    classes = any("eval_f1" in entry for entry in history)
    figure = Figure(figsize=(11 if classes else 7, 4.5), layout="constrained")
    panels = figure.subplots(1, 1 + classes, squeeze=False)[0]
    _plot(panels[0], history, {"loss": ("training", "-"), "eval_loss": ("validation", "o-")})
    panels[0].set(xlabel="step", ylabel=f"loss ({unit})")
    if classes:
        _plot(panels[1], history, {"eval_accuracy": ("accuracy", "o-"), "eval_f1": ("F1, mean of the classes", "s--")})
        panels[1].set(xlabel="step", ylabel="held-out examples", ylim=(0, 1))
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _plot(axes: Any, history: list[dict[str, float]], curves: dict[str, tuple[str, str]]) -> None:
    for key, (label, style) in curves.items():
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=f"{label}, last {points[-1][1]:.3f}", markersize=4)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()


def loss_line(metrics: dict[str, float], tokens: int, label: str) -> str:
    """One line with the loss in nats per token, in bits per character if they are known, and what else is scored."""
    bits = metrics.get("eval_bits_per_character")
    return (
        f"{label}: {metrics['eval_loss']:.4f} nats per token, "
        + ("" if bits is None else f"{bits:.4f} bits per character, ")
        + f"perplexity {metrics['eval_perplexity']:.2f}, {metrics['eval_accuracy']:.1%} right "
        f"({tokens:,} tokens, each scored once)"
    )
