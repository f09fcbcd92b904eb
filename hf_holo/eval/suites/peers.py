"""Models of transformers with random weights and about as many parameters as another has, to be timed next to it."""

from collections.abc import Callable, Mapping

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

HEAD = 32  # channels of an attention head
CLOSE = 0.03  # relative difference of parameters that counts as equal


def _llama(vocab: int, width: int, depth: int, inner: int, positions: int) -> PretrainedConfig:
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=width // HEAD,
        intermediate_size=inner,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )


def _gpt2(vocab: int, width: int, depth: int, inner: int, positions: int) -> PretrainedConfig:
    return GPT2Config(
        vocab_size=vocab,
        n_embd=width,
        n_layer=depth,
        n_head=width // HEAD,
        n_inner=inner,
        n_positions=positions,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )


def _mamba(vocab: int, width: int, depth: int, inner: int, positions: int) -> PretrainedConfig:
    """Twice the layers, as Mamba has none for channels alone; `inner` is the width of their state."""
    config = MambaConfig(
        vocab_size=vocab,
        hidden_size=width,
        num_hidden_layers=2 * depth,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    config.intermediate_size = inner  # which the config takes as a multiple of the width only
    return config


PEERS: Mapping[str, tuple[Callable[..., PretrainedConfig], type[PreTrainedModel]]] = {
    "llama": (_llama, LlamaForCausalLM),
    "gpt2": (_gpt2, GPT2LMHeadModel),
    "mamba": (_mamba, MambaForCausalLM),
}


def peer(kind: str, model: PreTrainedModel, positions: int) -> PreTrainedModel:
    """A model with random weights that has the vocabulary, the width and the depth of `model`, and its parameters.

    Args:
        kind: one of `PEERS`.
        model: to be compared with.
        positions: that it must take.

    Returns:
        In float32 on the CPU, in evaluation mode. What the vocabulary and learned positions cost counts as parameters,
        so a model without them gets a wider MLP for it; see `parameters` in the tables for what came of it.
    """
    make, model_class = PEERS[kind]
    config, wanted = model.config.get_text_config(), sum(p.numel() for p in model.parameters())
    width, depth = max(HEAD, round(config.hidden_size / HEAD) * HEAD), config.num_hidden_layers

    def size(depth: int, inner: int) -> int:
        with torch.device("meta"):
            return sum(
                p.numel() for p in model_class(make(config.vocab_size, width, depth, inner, positions)).parameters()
            )

    def nearest(depth: int) -> tuple[int, int]:
        """That depth, and the inner width that brings it closest."""
        low, high = 1, 64 * width
        while low < high:  # the smallest with at least as many parameters
            middle = (low + high) // 2
            low, high = (low, middle) if size(depth, middle) >= wanted else (middle + 1, high)
        return depth, min((max(1, low - 1), low), key=lambda inner: abs(size(depth, inner) - wanted))

    found = [nearest(depth)]
    while abs(size(*found[-1]) / wanted - 1) > CLOSE and found[-1][0] > 1:  # its layers are too large, so fewer of them
        found.append(nearest(found[-1][0] - 1))
    depth, inner = min(found, key=lambda sizes: abs(size(*sizes) - wanted))
    return model_class(make(config.vocab_size, width, depth, inner, positions)).eval()
