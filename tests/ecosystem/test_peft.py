"""LoRA, VeRA and IA3 work on every family without a word on what to adapt."""

import subprocess
import sys

import pytest
import torch
from peft import (
    AdaLoraConfig,
    FourierFTConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from hf_holo import get_architecture, restore_linears

pytestmark = pytest.mark.feature("PEFT", "{method}")

CONFIGS = {
    "LoRA": lambda **kwargs: LoraConfig(r=4, init_lora_weights=False, **kwargs),
    "VeRA": lambda **kwargs: VeraConfig(r=8, d_initial=0.5, init_weights=False, **kwargs),
    "IA3": lambda **kwargs: IA3Config(init_ia3_weights=False, **kwargs),
}


@pytest.fixture(params=CONFIGS)
def method(request) -> str:
    return request.param


def linears_in_blocks(model: PreTrainedModel) -> set[str]:
    found = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return {name for name in found if ".layers." in name}


def adapted(model: nn.Module) -> set[str]:
    """Names of the layers that an adapter reaches, as they are called without it."""
    return {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model.eval()(input_ids=ids).logits


@pytest.mark.feature("PEFT", "LoRA and VeRA reach every linear layer of the blocks")
def test_lora_and_vera_reach_every_linear_layer_of_the_blocks(tiny, family):
    for variant in get_architecture(family).variants:
        for method in ("LoRA", "VeRA"):
            model = tiny(family, variant=variant)
            wanted = linears_in_blocks(model)
            assert adapted(get_peft_model(model, CONFIGS[method]())) == wanted


ALIKE = (LoHaConfig, LoKrConfig, OFTConfig, HRAConfig, FourierFTConfig, AdaLoraConfig)


@pytest.mark.feature("PEFT", "LoHa, LoKr, OFT, HRA, FourierFT, AdaLoRA without names of layers")
@pytest.mark.parametrize("config", ALIKE, ids=lambda config: config.__name__.removesuffix("Config"))
def test_what_adapts_the_same_layers_as_lora_needs_no_names_either(tiny, family, config):
    options = {FourierFTConfig: {"n_frequency": 10}, AdaLoraConfig: {"total_step": 10}}.get(config, {})
    model = tiny(family)
    wanted = linears_in_blocks(model)
    assert adapted(get_peft_model(model, config(**options))) == wanted


SCALED = {
    "hsn": {"mixer.k_proj", "mixer.v_proj", "channel_mix.down_proj", "channel_mix.up_proj"},
    "holo": {"attention.k_proj", "attention.v_proj", "mlp.down_proj"},
    "resonance": {"mixer.in_proj", "channel_mix.down_proj"},
}


@pytest.mark.feature("PEFT", "IA3")
def test_ia3_scales_keys_values_and_inner_activations(tiny, family):
    reached = adapted(get_peft_model(tiny(family), CONFIGS["IA3"]()))
    assert reached == {f"model.layers.{index}.{name}" for index in range(2) for name in SCALED[family]}


@pytest.mark.feature("PEFT", "LoRA on a classifier")
@pytest.mark.parametrize("head", ["AutoModelForSequenceClassification", "AutoModelForTokenClassification"])
def test_a_new_head_is_trained_and_saved_whole(tiny, family, head, tmp_path, repeating_ids):
    task = {"AutoModelForSequenceClassification": "SEQ_CLS", "AutoModelForTokenClassification": "TOKEN_CLS"}[head]
    model = get_peft_model(tiny(family, head), CONFIGS["LoRA"](task_type=task))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("score" in name for name in trained)
    assert all("lora_" in name or "score.modules_to_save" in name for name in trained)
    expected = logits(model, repeating_ids(2))
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(tiny(family, head), tmp_path), repeating_ids(2)), expected
    )


def test_an_adapter_is_saved_and_loaded(tiny, family, method, tmp_path, repeating_ids):
    ids = repeating_ids(2)
    model = get_peft_model(tiny(family), CONFIGS[method]())
    expected = logits(model, ids)
    assert not torch.allclose(expected, logits(tiny(family), ids), atol=1e-4)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(tiny(family), tmp_path), ids), expected)


def test_an_adapter_is_merged_and_unloaded(tiny, family, method, tmp_path, repeating_ids):
    """Holographic layers have no dense weight to merge into: they are made dense first. What is left is saved."""
    ids = repeating_ids(2)
    model = get_peft_model(tiny(family), CONFIGS[method]())
    expected = logits(model, ids)
    merged = restore_linears(model).merge_and_unload()
    assert not adapted(merged)
    torch.testing.assert_close(logits(merged, ids), expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(type(merged).from_pretrained(tmp_path), ids), logits(merged, ids))
    unloaded = restore_linears(get_peft_model(tiny(family), CONFIGS[method]())).unload()
    torch.testing.assert_close(logits(unloaded, ids), logits(tiny(family), ids), rtol=1e-4, atol=1e-4)


@pytest.mark.feature("PEFT", "several adapters")
def test_several_adapters_on_one_model(tiny, family, repeating_ids):
    ids = repeating_ids(2)
    model = get_peft_model(tiny(family), CONFIGS["LoRA"](), adapter_name="first")
    first = logits(model, ids)
    torch.manual_seed(1)
    model.add_adapter("second", CONFIGS["LoRA"]())
    model.set_adapter("second")
    second = logits(model, ids)
    assert not torch.allclose(first, second, atol=1e-4)
    model.set_adapter("first")
    torch.testing.assert_close(logits(model, ids), first)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, ids), logits(tiny(family), ids))


def test_an_adapter_on_a_frozen_base_learns(tiny, family, method, repeating_ids):
    ids = repeating_ids()
    model = get_peft_model(tiny(family), CONFIGS[method]())
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=2e-2)
    losses = []
    for _ in range(15):
        losses.append(model(input_ids=ids, labels=ids).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.05
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if not p.requires_grad)


@pytest.mark.slow
@pytest.mark.feature("PEFT", "any order of imports", family="hsn")
@pytest.mark.parametrize("order", ["import hf_holo, peft", "import peft, hf_holo"])
def test_the_order_of_the_imports_does_not_matter(order):
    code = f"{order}\nfrom peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as table\n"
    done = subprocess.run([sys.executable, "-c", code + "print('hsn' in table)"], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr
