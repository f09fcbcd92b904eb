"""Tiny models of all families."""

from collections.abc import Callable

import pytest
import torch
from small_models import new_model
from transformers import PreTrainedModel

from hf_holo import architectures, get_architecture

FAMILIES = ["hsn", "holo", "resonance"]
VOCABULARY = 61


def tiny(family: str, head: str = "AutoModelForCausalLM", variant: int | str = 0, **overrides) -> PreTrainedModel:
    """A new model of a variant of a family, with its weights moved away from their start."""
    name = variant if isinstance(variant, str) else [*get_architecture(family).variants][variant]
    model = new_model(family, head, name, **overrides)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def repeating_ids(rows: int = 8, length: int = 24) -> torch.Tensor:
    """Texts that are easily learned: a word of four tokens, again and again `[rows, length]`."""
    words = torch.randint(1, VOCABULARY, (rows, 4), generator=torch.Generator().manual_seed(0))
    return words.repeat(1, length // 4)


@pytest.fixture(name="tiny", scope="session")
def tiny_fixture() -> Callable[..., PreTrainedModel]:
    return tiny


@pytest.fixture(name="repeating_ids", scope="session")
def repeating_ids_fixture() -> Callable[..., torch.Tensor]:
    return repeating_ids


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    assert set(FAMILIES) <= set(architectures())
    return request.param
