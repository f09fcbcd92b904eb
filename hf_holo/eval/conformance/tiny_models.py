"""Tiny models with random weights of the causal language model classes of transformers, for [the zoo](zoo.py)."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ...errors import HoloError, first_line

LARGEST = 10_000_000  # parameters of a model that counts as tiny
# Fields of configs by their usual names, and what a tiny model has there. Only those that a config has are given.
TINY: Mapping[str, Any] = {
    "vocab_size": 97,
    "vocab_size_per_layer_input": 97,
    "unpadded_vocab_size": 97,
    "n_words": 97,
    "pronunciation_vocab_size": 97,
    "shape_vocab_size": 97,
    "hidden_size": 32,
    "hidden_size_per_layer_input": 8,
    "d_model": 32,
    "n_embd": 32,
    "embedding_size": 32,
    "embedding_dim": 32,
    "emb_dim": 32,
    "word_embed_proj_dim": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "expert_ffn_hidden_size": 16,
    "ffn_hidden_size": 48,
    "block_auto_adjust_ff_dim": False,
    "bidirectional": False,
    "causal": True,
    "use_mamba_kernels": False,
    "ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "d_ff": 48,
    "d_inner": 48,
    "lru_width": 32,
    "attention_hidden_size": 32,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 8,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 2,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "head_dim": 8,
    "rotary_dim": 4,
    "d_kv": 8,
    "kv_channels": 8,
    "global_head_dim": 8,
    "swa_head_dim": 8,
    "v_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "index_n_heads": 4,
    "index_head_dim": 16,
    "index_topk": 16,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_d_head": 8,
    "mamba_head_dim": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_d_ssm": 64,
    "mamba_chunk_size": 16,
    "ssm_state_size": 8,
    "state_size": 8,
    "n_groups": 1,
    "time_step_rank": 4,
    "mamba_dt_rank": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "chunk_size": 16,
    "block_size": 16,
    "max_position_embeddings": 1024,
    "n_positions": 1024,
    "num_local_experts": 4,
    "num_experts": 4,
    "moe_num_experts": 4,
    "n_routed_experts": 4,
    "zero_expert_num": 2,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "sliding_window": 16,
    "attention_window_size": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
DEPTHS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "encoder_layers",
    "num_decoder_layers",
)
DEEPEST = 9  # layers, among which every kind of a hybrid should occur
KINDS = ("layer_types", "layers_block_type", "mlp_layer_types")  # fields that name the kind of each layer
EVEN_IF_NONE = (
    "num_key_value_heads",
    "num_experts_per_tok",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "time_step_rank",
)
OWN: Mapping[str, Mapping[str, Any]] = {  # what some cannot do without; with two layers, unless it says
    "bamba": {"attn_layer_indices": [1]},
    "dory": {"num_hidden_layers": 4, "n_input_layers": 1, "n_output_layers": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [32, 32]},
    "xlnet": {"attn_type": "uni"},
    "xmod": {"default_language": "en_XX"},
}
ALWAYS = {"is_decoder": True, "is_encoder_decoder": False}  # encoders with a causal head look back only as decoders


def tiny_config(model_class: type[PreTrainedModel]) -> PretrainedConfig:
    """A config of this class whose sizes are tiny, its parts included."""
    usual = usual_config(model_class)
    return type(usual)(**tiny_arguments(usual))


def usual_config(model_class: type[PreTrainedModel]) -> PretrainedConfig:
    """What a model of this class is by default."""
    return cast(type[PretrainedConfig], model_class.config_class)()


def tiny_arguments(usual: PretrainedConfig) -> dict[str, Any]:
    """What makes a config tiny that is by default as `usual`, in a form that can be written to JSON."""
    fields = vars(usual)
    known = {name for name, value in fields.items() if value is not None or name in EVEN_IF_NONE}
    arguments = {name: _no_more(name, value, fields[name]) for name, value in TINY.items() if name in known}
    if "kv_lora_rank" in known:
        arguments["num_key_value_heads"] = TINY["num_attention_heads"]  # its keys are made for every head
    for name, part in fields.items():
        if isinstance(part, PretrainedConfig):
            arguments[name] = {"model_type": part.model_type} | tiny_arguments(part)
    own = OWN.get(usual.model_type, {})

    def of_layers(count: int) -> dict[str, Any]:
        return {**arguments, **ALWAYS, **{name: count for name in DEPTHS if name in known}, **own}

    if own:
        return of_layers(2)
    return of_layers(_until_all_are_seen(_kinds_of_layers(type(usual)(**of_layers(DEEPEST)))))


def _no_more(name: str, tiny: Any, usual: Any) -> Any:
    """A size that is smaller than the tiny one by default means something: no part of that kind, one choice only."""
    is_size = isinstance(usual, int) and not isinstance(tiny, bool) and not name.endswith("_id")
    return min(tiny, usual) if is_size else tiny


def _kinds_of_layers(config: PretrainedConfig) -> list[Any]:
    """What the config says of each layer, where it says it."""
    return next((kinds for name in KINDS if isinstance(kinds := getattr(config, name, None), list)), [])


def _until_all_are_seen(kinds: list[Any]) -> int:
    """The depth at which every kind of layer has occurred; 2 at least."""
    return max([2, *(kinds.index(kind) + 1 for kind in set(kinds))])


def tiny_model(model_class: type[PreTrainedModel]) -> PreTrainedModel:
    """A model of this class with random weights, which has run on 40 tokens.

    Raises:
        HoloError: it cannot be built, is not that small, or does not run.
    """
    try:
        config = tiny_config(model_class)
        with torch.device("meta"):
            size = sum(p.numel() for p in model_class(config).parameters())
        if size > LARGEST:
            raise HoloError(f"{size:,} parameters with tiny sizes: its config names more of them than we know")
        torch.manual_seed(0)
        model = model_class(config).eval()
        with torch.no_grad():
            model(torch.arange(3, 83).reshape(2, 40))
    except HoloError:
        raise
    except Exception as error:
        raise HoloError(f"{type(error).__name__}: {first_line(error)}") from error
    return model
