"""Runs of recipes as benchmarks: trained once, then read from their folder."""

import csv
from pathlib import Path

import yaml
from transformers import TrainingArguments

from hf_holo.training.train import TASKS
from hf_holo.training.train import main as train

from .report import flags

FIRST_FILE, LAST_FILE = "recipe.yaml", "sample.txt"  # that a run writes: before the first step, after the evaluation


def train_once(recipe: str, run: Path, steps: int | None = None, **arguments: object) -> None:
    """Trains by a recipe into the folder `run`, unless a finished run is saved there. Other `steps` than those of the
    recipe have a twentieth of warm-up."""
    if not (run / LAST_FILE).exists():
        if steps:
            arguments |= {"max_steps": steps, "warmup_steps": max(1, steps // 20)}
        train(flags({"recipe": recipe, "output_dir": run, **arguments}))


def followed(run: Path) -> dict:
    """The recipe that a run has followed, with what was changed on the command line."""
    return yaml.safe_load((run / FIRST_FILE).read_text(encoding="utf-8"))


def seed(run: Path) -> int:
    return followed(run).get("seed", TrainingArguments.seed)  # a recipe leaves out what is transformers' default


def figures(run: Path) -> dict[str, float | int]:
    """What a finished run says about itself: its size, what it has read, and every figure of its last validation."""
    recipe = followed(run)
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        last = list(csv.DictReader(file))[-1]
    steps, batch = int(last["step"]), "per_device_train_batch_size"
    sizes = {
        "parameters": TASKS[recipe.get("task", "causal")].auto_class.from_pretrained(run).num_parameters(),
        "steps": steps,
        "tokens": steps * recipe.get(batch, getattr(TrainingArguments, batch)) * recipe["block_size"],
        "window": recipe["block_size"],
    }
    return sizes | {key: float(value) for key, value in last.items() if key.startswith("validation_") and value}


def seconds(run: Path) -> float:
    return (run / LAST_FILE).stat().st_mtime - (run / FIRST_FILE).stat().st_mtime
