"""The variants of a tiny HSN that the proofs run over."""

import pytest
import torch

from hf_holo import HsnConfig, HsnForCausalLM, get_architecture

VARIANTS = get_architecture("hsn").variants
VOCAB_SIZE = VARIANTS["bundle"]["vocab_size"]


def tiny_config(variant: str = "bundle", **overrides) -> HsnConfig:
    return HsnConfig(**{**VARIANTS[variant], **overrides})


def tiny_model(variant: str = "bundle", model_class=HsnForCausalLM, seed=0, dtype=torch.float64, **overrides):
    """A model in evaluation mode whose weights are moved away from their initial values: no claim may rest on them."""
    torch.manual_seed(seed)
    model = model_class(tiny_config(variant, **overrides)).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


def random_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Token ids [rows, length] without the padding id 0."""
    return torch.randint(1, VOCAB_SIZE, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=list(VARIANTS))
def variant(request) -> str:
    return request.param


@pytest.fixture(name="tiny_config")
def tiny_config_fixture():
    return tiny_config


@pytest.fixture(name="tiny_model")
def tiny_model_fixture():
    return tiny_model


@pytest.fixture
def model(variant):
    """The causal language model of every variant, in float64."""
    return tiny_model(variant)


@pytest.fixture(name="random_ids")
def random_ids_fixture():
    return random_ids
