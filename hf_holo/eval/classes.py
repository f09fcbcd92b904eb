"""What a run leaves of a classifier: confusion matrix, all predictions, and a sheet of examples that a person
understands, each as a picture with the numbers next to it."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..files import replacing, write_csv
from .metrics import confusion_matrix

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHEET = (5, 8)  # rows and columns of the sheet of predictions
LARGEST_WRITTEN = 20  # classes whose counts are written into the cells


def probabilities(logits: np.ndarray) -> np.ndarray:
    """`[N, classes]`, each row summing to one."""
    scores = np.exp(logits - logits.max(-1, keepdims=True))
    return scores / scores.sum(-1, keepdims=True)


def write_predictions(folder: Path, logits: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> None:
    """predictions.csv: a row for every held-out example."""
    chances, guesses = probabilities(logits), logits.argmax(-1)
    rows = [
        {
            "example": number,
            "label": names[label],
            "prediction": names[guess],
            "probability": round(float(chances[number, guess]), 4),
            "right": int(label == guess),
        }
        for number, (label, guess) in enumerate(zip(labels, guesses, strict=True))
    ]
    write_csv(rows, folder / "predictions.csv")


def write_confusion(folder: Path, guesses: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> None:
    """confusion.csv and confusion.png: what was taken for what."""
    counts = confusion_matrix(guesses, labels, len(names))
    table = [
        {"class": name, **dict(zip(names, row.tolist(), strict=True))} for name, row in zip(names, counts, strict=True)
    ]
    write_csv(table, folder / "confusion.csv")
    draw_confusion(counts, names, folder / "confusion.png")


def draw_confusion(counts: np.ndarray, names: Sequence[str], path: Path, title: str = "") -> None:
    """A PNG of a confusion matrix `[true, predicted]`; `title` stands before the share that is right."""
    from matplotlib.figure import Figure

    shares = counts / counts.sum(1, keepdims=True).clip(1)
    side = min(12.0, 3.0 + 0.55 * len(names))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the examples of a class", shrink=0.8)
    if len(names) <= LARGEST_WRITTEN:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                colour = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, f"{count:,}", ha="center", va="center", fontsize=8, color=colour)
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axes.set_yticks(range(len(names)), names)
    right = counts.trace() / max(counts.sum(), 1)
    told = f"{right:.1%} of {counts.sum():,} held-out examples are right"
    axes.set(xlabel="predicted", ylabel="true", title=f"{title}\n{told}" if title else told)
    _save(figure, path)


def write_sheet(
    folder: Path,
    examples: Any,
    logits: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    draw: Callable[["Axes", Mapping[str, Any]], None],
) -> None:
    """predictions.png: held-out examples with what the model takes them for; first those where it errs most surely.

    Args:
        examples: all of them, in the order of the logits.
        draw: draws an example.
    """
    from matplotlib.figure import Figure

    chances, guesses = probabilities(logits), logits.argmax(-1)
    shown = _shown(chances, guesses, labels)
    columns = min(SHEET[1], len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(1.6 * columns, 2.05 * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels:
        axes.axis("off")
    for axes, number in zip(panels, shown, strict=False):
        draw(axes, examples[number])
        guess, label = guesses[number], labels[number]
        right = guess == label
        text = f"{names[guess]} {chances[number, guess]:.0%}" + ("" if right else f"\nis {names[label]}")
        axes.set_title(text, fontsize=8, color="darkgreen" if right else "firebrick")
    wrong = int((guesses != labels).sum())
    figure.suptitle(f"what the model says; red: wrong, {wrong} of {len(labels):,} held-out examples", fontsize=10)
    _save(figure, folder / "predictions.png")


def _shown(chances: np.ndarray, guesses: np.ndarray, labels: np.ndarray) -> list[int]:
    """Half of the sheet for errors, the surest first, and the rest for what is right, from everywhere."""
    places = min(SHEET[0] * SHEET[1], len(labels))
    sure = chances.max(-1)
    wrong = np.flatnonzero(guesses != labels)
    wrong = wrong[np.argsort(-sure[wrong], kind="stable")][: places // 2]
    right = np.flatnonzero(guesses == labels)
    right = right[np.linspace(0, len(right) - 1, min(places - len(wrong), len(right))).astype(int)]
    return [*wrong.tolist(), *right.tolist()]


def draw_image(axes: "Axes", example: Mapping[str, Any]) -> None:
    """A picture."""
    image = example["image"]
    grey = image.mode in ("1", "L", "LA", "I", "F") or image.mode.startswith("I;16")
    axes.imshow(
        np.asarray(image.convert("L" if image.mode in ("1", "LA") else image.mode if grey else "RGB")), cmap="gray"
    )


def draw_sound(axes: "Axes", example: Mapping[str, Any]) -> None:
    """The spectrogram of a sound: time to the right, frequency upward, loudness over 60 dB."""
    samples = np.asarray(example["audio"], dtype=np.float64)
    window = min(256, len(samples))
    frames = np.lib.stride_tricks.sliding_window_view(samples, window)[:: max(1, window // 4)] * np.hanning(window)
    power = np.square(np.abs(np.fft.rfft(frames))).T  # [frequencies, frames]
    decibels = 10 * np.log10(power / max(power.max(), 1e-20) + 1e-10)
    axes.imshow(decibels, origin="lower", aspect="auto", cmap="magma", vmin=-60, vmax=0)


def write_senses(folder: Path, accuracies: Mapping[str, float]) -> None:
    """senses.csv and senses.png: accuracy with every choice of the senses that an example has.

    Args:
        accuracies: by the names of the senses that were given.
    """
    from matplotlib.figure import Figure

    write_csv(
        [{"given": given, "accuracy": round(value, 4)} for given, value in accuracies.items()], folder / "senses.csv"
    )
    figure = Figure(figsize=(7, 0.5 * len(accuracies) + 1.2), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh([*accuracies], [*accuracies.values()], color="steelblue")
    axes.bar_label(bars, fmt="{:.1%}", padding=3)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.12), xlabel="accuracy on held-out examples", title="what is given of each example")
    _save(figure, folder / "senses.png")


def _save(figure: Any, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
