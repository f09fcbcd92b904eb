"""Trainer with exact validation losses, an average of the weights, and checkpoints that are whole or ignored."""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim import Optimizer
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .data import IGNORED


class WeightAverage(TrainerCallback):
    """Exponential moving average of the trained weights.

    The average lies in the optimizer's state, so that every checkpoint carries it and a resumed run continues it
    exactly. It starts from the first update and looks back over at most a tenth of the steps so far, so that the
    initial weights are soon forgotten.

    Args:
        decay: share of the old average that each step keeps, in (0, 1).

    Raises:
        ValueError: `decay` is out of range.
    """

    def __init__(self, decay: float) -> None:
        if not 0.0 < decay < 1.0:
            raise ValueError(f"ema_decay: {decay} is not between 0 and 1")
        self.decay = decay

    @torch.no_grad()
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"]
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        for parameter, own in _updated(optimizer):
            if "average" in own:
                own["average"].lerp_(parameter, 1.0 - decay)
            else:
                own["average"] = parameter.clone()

    @contextmanager
    def applied(self, optimizer: Optimizer) -> Iterator[None]:
        """Put the averages into the model, and the trained weights back at the end."""
        self.swap(optimizer)
        try:
            yield
        finally:
            self.swap(optimizer)

    @torch.no_grad()
    def swap(self, optimizer: Optimizer) -> None:
        """Exchange the trained weights and their averages."""
        for parameter, own in _updated(optimizer):
            if "average" in own:
                trained = parameter.clone()
                parameter.copy_(own["average"])
                own["average"].copy_(trained)


def _updated(optimizer: Optimizer) -> Iterator[tuple[torch.nn.Parameter, dict[str, torch.Tensor]]]:
    """The parameters that the optimizer has updated so far, with their state."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if optimizer.state.get(parameter):
                yield parameter, optimizer.state[parameter]


def aligned(logits: torch.Tensor | tuple, labels: torch.Tensor, shift: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and the labels that they are to predict; `shift`: those of the next position."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    return (logits[:, :-1], labels[:, 1:]) if shift else (logits, labels)


def summed_losses(logits: torch.Tensor | tuple, labels: torch.Tensor, shift: bool = True) -> torch.Tensor:
    """Loss of each row and the number of tokens it is summed over: `[B, T, V], [B, T] -> [B, 2]`."""
    logits, targets = aligned(logits, labels, shift)
    losses = F.cross_entropy(logits.float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
    return torch.stack([losses.sum(1), (targets != IGNORED).sum(1)], dim=1)


def summed_scores(logits: torch.Tensor | tuple, labels: torch.Tensor, shift: bool = True) -> torch.Tensor:
    """[`summed_losses`], and the number of tokens that were the model's first guess: `[B, 3]`."""
    guesses, targets = aligned(logits, labels, shift)
    hits = (guesses.argmax(-1) == targets).sum(1, keepdim=True)  # an ignored label is no token's id
    return torch.cat([summed_losses(logits, labels, shift), hits], dim=1)


class HoloTrainer(Trainer):
    """Trainer whose `eval_loss` is the mean over all validation tokens, each counted once.

    (Trainer's own is a mean of the means of batches, which depends on the batch size.) It adds `eval_perplexity`,
    `eval_accuracy` (the share of tokens that were the model's first guess) and `eval_bits_per_character`. With
    `ema_decay`, evaluation sees the averaged weights; checkpoints keep both.

    Args:
        characters: number of characters that the scored validation tokens stand for; None: no bits per character.
        ema_decay: decay of the weight average, 0 for none.
        shift: whether a label belongs to the logits of the position before, as for causal models.
    """

    def __init__(
        self, *args: Any, characters: int | None = None, ema_decay: float = 0.0, shift: bool = True, **kwargs: Any
    ) -> None:
        self.characters = characters
        self.average = WeightAverage(ema_decay) if ema_decay else None
        scores = partial(summed_scores, shift=shift)
        super().__init__(*args, compute_metrics=self.means, preprocess_logits_for_metrics=scores, **kwargs)
        if self.average:
            self.add_callback(self.average)

    def means(self, prediction: EvalPrediction) -> dict[str, float]:
        """The metrics of a whole evaluation, from the rows of [`summed_scores`]."""
        nats, tokens, hits = prediction.predictions.astype(np.float64).sum(0)
        per_character = {"bits_per_character": nats / self.characters / math.log(2)} if self.characters else {}
        loss = nats / tokens
        return {"loss": loss, "perplexity": math.exp(min(loss, 700)), "accuracy": hits / tokens, **per_character}

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate the averaged weights if there are any, else the trained ones."""
        averaged = self.average and self.optimizer
        with self.average.applied(self.optimizer) if averaged else nullcontext():
            return super().evaluate(*args, **kwargs)

    def adopt_average(self) -> None:
        """Make the averages the weights of the model, for good; training cannot go on afterwards."""
        if self.average:
            self.average.swap(self.optimizer)
            self.average = None

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        # What an interrupted or overtaken run left under this name must not mix with the new files.
        shutil.rmtree(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}", ignore_errors=True)
        super()._save_checkpoint(model, trial)


def complete_checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints of a run that were written to the end, oldest first.

    Trainer writes `trainer_state.json` last: a checkpoint is complete when that file is there and is valid JSON.
    """
    found = []
    for path in Path(folder).glob("checkpoint-*"):
        try:
            found.append((json.loads((path / "trainer_state.json").read_text())["global_step"], path))
        except (OSError, ValueError, KeyError):
            continue  # half-written
    return [path for _, path in sorted(found)]
