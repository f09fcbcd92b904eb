"""Learning a generated task, and how far beyond the lengths of its training a model can still do it."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from ..files import write_csv, write_text
from ..modeling.losses import IGNORED
from .figures import draw_lines
from .tasks import Batch, Task

UNSEEN = 2**31  # seed of the sequences that are scored; those of training have small ones


class Batches(Protocol):
    """What is learned: a [`Task`], or a text that gives windows."""

    def batch(self, rows: int, length: int, generator: torch.Generator) -> Batch:
        """Tokens and, for each, what the logits there should say (-100: nothing), both `[rows, T]`; `length` sets T."""


def learn(
    model: nn.Module,
    task: Batches,
    optimizer: torch.optim.Optimizer,
    *,
    lengths: int | tuple[int, int],
    growing: float = 0.0,
    steps: int | None = None,
    seconds: float | None = None,
    rows: int = 32,
    seed: int = 0,
    on_step: Callable[[int, torch.Tensor], None] = lambda step, loss: None,
) -> int:
    """Train any causal language model in place on batches that are the same for every model of a seed.

    The learning rate rises over the first tenth of the run to that of the optimizer, and then falls along a cosine to
    a tenth of it.

    Args:
        model: that learns, on its device.
        task: what it learns.
        optimizer: of its parameters.
        lengths: of the sequences in tokens: one, or the shortest and the longest, between which every step draws one.
        growing: share of the run over which the longest length grows from the shortest: a curriculum.
        steps, seconds: exactly one of them bounds the run.
        rows: sequences in a batch.
        seed: of the sequences and of dropout.
        on_step: gets, after each step, the number of steps so far and the loss of its batch.

    Returns:
        The steps taken.

    Raises:
        ValueError: both or neither of `steps` and `seconds` are given, `lengths` are not in order, or `growing` is not
            between 0 and 1.
    """
    if (steps is None) == (seconds is None):
        raise ValueError(f"give either steps or seconds, got steps={steps} and seconds={seconds}")
    shortest, longest = (lengths, lengths) if isinstance(lengths, int) else lengths
    if not 0 < shortest <= longest:
        raise ValueError(f"lengths: {lengths} are not at least 1 and in order")
    if not 0 <= growing <= 1:
        raise ValueError(f"growing: {growing} is not between 0 and 1")
    device = next(model.parameters()).device
    peaks = [group["lr"] for group in optimizer.param_groups]
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # dropout
    model.train()
    start, step = time.perf_counter(), 0
    while (progress := _progress(step, steps, seconds, time.perf_counter() - start)) < 1:
        length = _length(shortest, longest, progress / growing if growing else 1.0, generator)
        x, y = (part.to(device) for part in task.batch(rows, length, generator))
        loss = F.cross_entropy(model(input_ids=x, use_cache=False).logits.flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * _scale(progress)
        optimizer.step()
        step += 1
        on_step(step, loss.detach())
    return step


def _progress(step: int, steps: int | None, seconds: float | None, elapsed: float) -> float:
    """The share of the run that is over; counted in steps, it never starts at a learning rate of zero."""
    return (step + 0.5) / steps if steps is not None else elapsed / (seconds or 1.0)


def _scale(progress: float) -> float:
    return min(1.0, progress / 0.1) * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def _length(shortest: int, longest: int, grown: float, generator: torch.Generator) -> int:
    """The length of the next batch; nothing is drawn where there is one only."""
    longest = shortest + round(min(1.0, grown) * (longest - shortest))
    return shortest if shortest == longest else int(torch.randint(shortest, longest + 1, (), generator=generator))


@torch.no_grad()
def accuracy(
    model: nn.Module, task: Task, length: int, sequences: int = 1024, rows: int = 64, seed: int = UNSEEN
) -> float:
    """Share of the asked places whose most likely token is the right one.

    Args:
        model: a causal language model; it is left in evaluation mode.
        task: what is asked.
        length: of the sequences, in tokens.
        sequences: to score.
        rows: of them at a time.
        seed: of the sequences; the default is one that no training has seen.
    """
    model.eval()
    device, generator = next(model.parameters()).device, torch.Generator().manual_seed(seed)
    right = asked = 0
    for first in range(0, sequences, rows):
        tokens, labels = (x.to(device) for x in task.batch(min(rows, sequences - first), length, generator))
        right += int((model(input_ids=tokens, use_cache=False).logits.argmax(-1) == labels).sum())
        asked += int((labels != IGNORED).sum())
    return right / asked


def over_length(
    models: Mapping[str, nn.Module],
    task: Task,
    lengths: Sequence[int],
    folder: Path,
    name: str = "lengths",
    **options: Any,
) -> list[dict[str, Any]]:
    """Accuracy of models at several lengths, written as `name`.json, `name`.csv and a picture, `name`.png.

    Args:
        models: by the names that the picture has.
        task: what is asked.
        lengths: in tokens.
        folder: for the files; it must exist.
        name: of the files.
        options: of [`accuracy`].

    Returns:
        A row for every model and length.
    """
    rows = [
        {"model": model_name, "length": length, "accuracy": accuracy(model, task, length, **options)}
        for model_name, model in models.items()
        for length in lengths
    ]
    record = {"task": task.name, "accuracy": f"share of {task.asked}", "chance": task.chance, "rows": rows}
    write_text(folder / f"{name}.json", json.dumps(record, indent=2) + "\n")
    write_csv(rows, folder / f"{name}.csv")
    draw_accuracies(rows, task.name, folder / f"{name}.png")
    return rows


def draw_accuracies(rows: Sequence[Mapping[str, Any]], title: str, path: Path, by: str = "model") -> None:
    """A PNG of `accuracy` over `length`, a line for each value of `by`."""
    draw_lines(rows, "length", "accuracy", path, title, ("tokens", "accuracy"), by=by)
