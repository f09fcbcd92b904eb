"""`hf-holo distill` for the benchmarks that bring converted models back."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from hf_holo.conversion.distill.command import main as distill

from .report import flags


def distil(
    recipe: str, teacher: str | Path, student: Path, folder: Path, texts: Sequence[str | Path], **options: object
) -> dict:
    """Distil by a recipe into `folder`, unless a distilled model is saved there, and return the report of the run.

    Args:
        recipe: name of the recipe.
        teacher: folder of the model to learn from.
        student: folder of the model that learns.
        folder: of the run.
        texts: files to learn from.
        options: other arguments of the command.
    """
    if not (folder / "model.safetensors").exists():
        arguments = {
            "teacher": teacher,
            "student": student,
            "output_dir": folder,
            "train_file": list(texts),
            "overwrite": "true",  # an unfinished run
            "use_cpu": not torch.cuda.is_available(),  # transformers asks for it before it takes bf16 there
        }
        distill([recipe, *flags(arguments | options)])
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def shortened(stage_steps: int | None) -> dict[str, int]:
    """Options that give every stage this many steps; without a number, those of the recipe."""
    return {"max_steps": stage_steps, "warmup_steps": 1} if stage_steps else {}
