"""Models of the registered families that are small enough for tests."""

import torch
from transformers import PreTrainedModel

from hf_holo import get_architecture


def new_model(
    family: str, head: str = "AutoModelForCausalLM", variant: str | None = None, **overrides
) -> PreTrainedModel:
    """A new model of a variant (default: the first) of a family, on the CPU and in evaluation mode."""
    architecture = get_architecture(family)
    arguments = architecture.variants[variant or next(iter(architecture.variants))]
    torch.manual_seed(0)
    return architecture.models[head](architecture.config(**{**arguments, **overrides})).eval()
