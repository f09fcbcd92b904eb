"""One training loop for all comparisons, so that two models differ in nothing but themselves."""

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from hf_holo.training.optim import MuonAdamW, split_parameters

KEPT_BACK = 0.1  # share of what is learned from, by which a learning rate is chosen where there is a test as well
OPTIMIZERS = {"muon": "Muon", "adamw": "AdamW"}  # and what tables call them


class Batches(Protocol):
    """What is learned: a text, or a task that makes its own sequences."""

    def batch(self, rows: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and, for each, the one to predict (-100: none), both `[rows, T]`; `length` sets T."""


@dataclass
class Fit:
    """How a model is trained. Exactly one of `steps` and `seconds` bounds the run."""

    learning_rate: float
    optimizer: str = "muon"  # one of OPTIMIZERS
    steps: int | None = None
    seconds: float | None = None
    rows: int = 16
    length: int = 256
    seed: int = 0

    def __post_init__(self):
        if (self.steps is None) == (self.seconds is None):
            raise ValueError(f"give either steps or seconds, got steps={self.steps} and seconds={self.seconds}")


def make_optimizer(
    name: str, model: torch.nn.Module, learning_rate: float, weight_decay: float = 0.1
) -> torch.optim.Optimizer:
    if name == "muon":
        return MuonAdamW.for_model(model, lr=learning_rate, weight_decay=weight_decay)
    if name == "adamw":
        parameters = split_parameters(model)
        groups = [
            {"params": parameters["hidden"] + parameters["matrices"], "weight_decay": weight_decay},
            {"params": parameters["rest"], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))
    raise ValueError(f"optimizer must be 'muon' or 'adamw', got {name!r}")


def fit(model: torch.nn.Module, task: Batches, how: Fit, on_step: Callable[[int], None] = lambda step: None) -> int:
    """Trains `model` in place on random batches (the same for every model of a seed) and returns the steps taken.

    The learning rate rises over the first tenth of the run and then falls along a cosine to a tenth of its peak. After
    each step, `on_step` gets the number of steps so far.
    """
    optimizer = make_optimizer(how.optimizer, model, how.learning_rate)
    peaks = [group["lr"] for group in optimizer.param_groups]
    generator = torch.Generator().manual_seed(how.seed)
    torch.manual_seed(how.seed)  # dropout
    model.train()
    start, step = time.perf_counter(), 0
    while (progress := _progress(how, step, time.perf_counter() - start)) < 1:
        x, y = task.batch(how.rows, how.length, generator)
        loss = F.cross_entropy(model(input_ids=x, use_cache=False).logits.flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * _scale(progress)
        optimizer.step()
        step += 1
        on_step(step)
        if step % 50 == 0:
            print(f"  step {step}: loss {loss.item():.3f}, {time.perf_counter() - start:.0f} s", flush=True)
    return step


def _progress(how: Fit, step: int, elapsed: float) -> float:
    """The share of the run that is over; counted in steps, it never starts at a learning rate of zero."""
    return elapsed / how.seconds if how.steps is None else (step + 0.5) / how.steps


def _scale(progress: float) -> float:
    return min(1.0, progress / 0.1) * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def rates_tried(runs: Sequence[Mapping]) -> str:
    """At which learning rate a model is shown, in words: nothing is best of one."""
    tried = Counter(model for model, _ in {(run["model"], run["learning_rate"]) for run in runs})
    most = max(tried.values())
    return "at one learning rate" if most == 1 else f"at the best of up to {most} learning rates, by data kept back"
