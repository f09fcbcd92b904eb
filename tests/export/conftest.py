"""Tiny trained-like models, saved with their tokenizer, that the exporters are tried on."""

from pathlib import Path

import pytest
from small_models import new_model

from hf_holo.data.tokenizers import make_tokenizer
from hf_holo.eval.conformance.subject import perturb
from hf_holo.export.graph import TASKS, WITH_PAST

TEXT = "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer"


def tiny_model(family: str, variant: str | None = None, auto: str = "AutoModelForCausalLM", **overrides):
    """A model of a variant (default: the first) whose weights are moved away from where they start."""
    return perturb(new_model(family, auto, variant, **overrides)).requires_grad_(False)


def save(model, folder: Path) -> Path:
    """Save a model and a tokenizer of characters that fits it."""
    model.save_pretrained(folder)
    make_tokenizer("characters", [TEXT]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def hsn_folder(tmp_path_factory) -> Path:
    """A saved HSN that generates."""
    return save(tiny_model("hsn"), tmp_path_factory.mktemp("hsn"))


def bytes_in(model) -> int:
    """Of the values that a model computes with: parameters, tied ones once, and buffers."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def auto_of(task: str) -> str:
    return TASKS[task.removesuffix(WITH_PAST)]
