"""The traces of a run: metrics.csv, loss.png and the console lines."""

import csv
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..files import replacing

COLUMNS = {
    "step": "step",
    "epoch": "epoch",
    "train_loss": "loss",
    "validation_loss": "eval_loss",
    "validation_perplexity": "eval_perplexity",
    "validation_accuracy": "eval_accuracy",
    "validation_bits_per_character": "eval_bits_per_character",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
}


class RunReport(TrainerCallback):
    """Writes metrics.csv and loss.png into the output folder, each time from Trainer's whole history; of several
    processes, the first does.

    The history is part of every checkpoint, so a resumed run continues both files without a seam.
    """

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            write_metrics(state.log_history, folder_of(args) / "metrics.csv")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            plot_losses(state.log_history, folder_of(args) / "loss.png")


def folder_of(args: TrainingArguments) -> Path:
    """The output folder."""
    return Path(args.output_dir)  # type: ignore[arg-type]  # Trainer has filled it in


def write_metrics(history: list[dict[str, float]], path: Path) -> None:
    """Write Trainer's log history as a table with one row per step at which a loss was logged."""
    rows: dict[float, dict[str, float]] = {}
    for entry in history:
        if "loss" in entry or "eval_loss" in entry:
            rows.setdefault(entry["step"], {}).update(entry)
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows([entry.get(key, "") for key in COLUMNS.values()] for entry in rows.values())


def plot_losses(history: list[dict[str, float]], path: Path) -> None:
    """Plot training and validation loss over the steps."""
    from matplotlib.figure import Figure  # slow to import, and needed once

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "validation", "o-")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=f"{label}, last {points[-1][1]:.3f}", markersize=4)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def loss_line(metrics: dict[str, float], tokens: int, label: str) -> str:
    """One line with the loss in nats per token, in bits per character if they are known, and what else is scored."""
    bits = metrics.get("eval_bits_per_character")
    return (
        f"{label}: {metrics['eval_loss']:.4f} nats per token, "
        + ("" if bits is None else f"{bits:.4f} bits per character, ")
        + f"perplexity {metrics['eval_perplexity']:.2f}, {metrics['eval_accuracy']:.1%} right "
        f"({tokens:,} tokens, each scored once)"
    )
