"""Tiny random transformers of four architectures, which the conversion tests work on."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
)

VOCABULARY = 80
BORDERS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, **BORDERS}


def llama(**changes) -> PreTrainedModel:
    config = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(**{**config, **changes}))


def phi3(**changes) -> PreTrainedModel:
    return Phi3ForCausalLM(Phi3Config(**{**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, **changes}))


def gpt2(**changes) -> PreTrainedModel:
    sizes = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **BORDERS, **changes}))


def bert(**changes) -> PreTrainedModel:
    config = {**SIZES, "num_attention_heads": 4, "max_position_embeddings": 64}
    return BertForMaskedLM(BertConfig(**{**config, **changes}))


TEACHERS = {"llama": llama, "phi3": phi3, "gpt2": gpt2, "bert": bert}


def make_teacher(name: str, dtype: torch.dtype = torch.float64, **changes) -> PreTrainedModel:
    """In evaluation mode, with weights large and uneven enough that layers and directions differ."""
    torch.manual_seed(0)
    model = TEACHERS[name](**changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5 * torch.rand(parameter.shape[-1]) ** 2)
    return model.to(dtype).eval()


@pytest.fixture(name="make_teacher")
def make_teacher_fixture():
    return make_teacher


@pytest.fixture(params=list(TEACHERS))
def teacher(request) -> PreTrainedModel:
    """Each of them, in float64."""
    return make_teacher(request.param)
