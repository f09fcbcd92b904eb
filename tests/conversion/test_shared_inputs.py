"""The table of layers that read the same input is right and complete, for every family in it."""

from collections import defaultdict
from functools import partial

import pytest
import torch
from transformers import AutoConfig, AutoModel, PreTrainedModel

import hf_holo  # noqa: F401, registers its families
from hf_holo.conversion.surgery.calibration import find_sites
from hf_holo.conversion.surgery.plan import HoloSurgeryConfig, shared_inputs

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IMAGE = {"image_size": 8, "patch_size": 4}
CHANGES = {  # what a family calls otherwise, or needs besides
    "deit": IMAGE,
    "distilbert": {"hidden_dim": 48},
    "exaone4": {"layer_types": ["full_attention"] * 2},
    "gpt_neo": {"attention_types": [[["global"], 2]], "num_layers": 2},
    "gptj": {"rotary_dim": 4},
    "holo": {"attention_projections": "dense", "mlp_projections": "dense"},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "vit": IMAGE,
}
WITH_HEAD_DIM = ("exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "helium", "ministral", "qwen3", "seed_oss")


def tiny(family: str) -> PreTrainedModel:
    """A random model of the family, or a skipped test where this release of transformers does not know it."""
    changes = {**CHANGES.get(family, {}), **({"head_dim": 8} if family in WITH_HEAD_DIM else {})}
    try:
        config = AutoConfig.for_model(family, **{**SIZES, **changes})
    except ValueError as error:
        pytest.skip(f"not in this release of transformers: {error}")
    torch.manual_seed(0)
    return AutoModel.from_config(config).eval()


@torch.no_grad()
def read_together(model: PreTrainedModel, names: list[str]) -> set[frozenset[str]]:
    """The layers in groups that receive the very same tensor."""
    received: dict[str, torch.Tensor] = {}

    def keep(name: str, layer: torch.nn.Module, args: tuple[torch.Tensor]) -> None:
        received[name] = args[0]

    for name in names:
        model.get_submodule(name).register_forward_pre_hook(partial(keep, name))
    if model.main_input_name == "pixel_values":
        model(pixel_values=torch.randn(1, 3, 8, 8))
    else:
        model(input_ids=torch.arange(3, 12)[None])
    groups = defaultdict(set)
    for name, x in received.items():  # all are alive: one address is one tensor
        groups[x.data_ptr(), x.shape].add(name)
    return {frozenset(group) for group in groups.values()}


@pytest.mark.parametrize("family", sorted(shared_inputs()))
def test_layers_share_a_basis_exactly_where_they_receive_the_same_tensor(family):
    model = tiny(family)
    sites = find_sites(model, HoloSurgeryConfig(shared=True))
    names = [name for site in sites for name in site.layers]
    assert {frozenset(site.layers) for site in sites} == read_together(model, names)
    assert any(len(site.layers) > 1 for site in sites)
