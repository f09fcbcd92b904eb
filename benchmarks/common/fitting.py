"""One training loop for all comparisons, so that two models differ in nothing but themselves."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from hf_holo.eval.learning import Batches, learn
from hf_holo.training.optim import MuonAdamW, split_parameters

KEPT_BACK = 0.1  # share of what is learned from, by which a learning rate is chosen where there is a test as well
OPTIMIZERS = {"muon": "Muon", "adamw": "AdamW"}  # and what tables call them


@dataclass
class Fit:
    """How a model is trained. Exactly one of `steps` and `seconds` bounds the run."""

    learning_rate: float
    optimizer: str = "muon"  # one of OPTIMIZERS
    steps: int | None = None
    seconds: float | None = None
    rows: int = 16
    length: int | tuple[int, int] = 256  # or the shortest and the longest, between which every step draws one
    seed: int = 0
    growing: float = 0.0  # share of the run over which the longest grows from the shortest

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
    """Trains `model` in place, see [`learn`], says how it goes, and returns the steps taken.

    After each step, `on_step` gets the number of steps so far.
    """
    start = time.perf_counter()

    def say(step: int, loss: torch.Tensor) -> None:
        on_step(step)
        if step % 50 == 0:
            print(f"  step {step}: loss {loss.item():.3f}, {time.perf_counter() - start:.0f} s", flush=True)

    bounds = {"steps": how.steps, "seconds": how.seconds, "lengths": how.length, "growing": how.growing}
    optimizer = make_optimizer(how.optimizer, model, how.learning_rate)
    return learn(model, task, optimizer, **bounds, rows=how.rows, seed=how.seed, on_step=say)


def rates_tried(runs: Sequence[Mapping]) -> str:
    """At which learning rate a model is shown, in words: nothing is best of one."""
    tried = Counter(model for model, _ in {(run["model"], run["learning_rate"]) for run in runs})
    most = max(tried.values())
    return "at one learning rate" if most == 1 else f"at the best of up to {most} learning rates, by data kept back"
