"""Converted models whose parameters do not all have one dtype, and whose weights are frozen."""

import copy

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from hf_holo import HoloSurgeryConfig, apply_surgery
from hf_holo.modeling.harmonics import HoloLinear
from hf_holo.modeling.quantizer import holo_layers, swap

IDS = torch.randint(5, 80, (2, 12), generator=torch.Generator().manual_seed(1))
DATA = {"harmonics": 8, "basis": "data", "folded": True, "pivoted": True, "lender": None}


def spread(got: torch.Tensor, right: torch.Tensor) -> float:
    """Root mean square of the difference, in standard deviations."""
    return float(((got.float() - right).square().mean() / right.var()).sqrt())


def stored_bases(model) -> None:
    """All linear layers of the blocks in pivoted bases, as `hf-holo convert` leaves them."""
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n.count(".") > 1]
    config = HoloSurgeryConfig(layers={name: dict(DATA) for name in names})
    for layer in swap(model, config).values():
        layer.load_factors(torch.randn(layer.out_features, 8) / 8, torch.randn(8, layer.in_features) / 8)
    model.config.quantization_config = config


@pytest.mark.parametrize("folded", [False, True])
def test_prepared_for_kbit_training(make_teacher, folded, tmp_path):
    """Casts every parameter to float32 and no buffer."""
    model = make_teacher("llama", torch.float32)
    apply_surgery(model, HoloSurgeryConfig(harmonics=8, folded=folded))
    model.save_pretrained(tmp_path)
    right = model(input_ids=IDS).logits.detach()
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    prepared = prepare_model_for_kbit_training(half, use_gradient_checkpointing=False)
    adapted = get_peft_model(prepared, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    output = adapted(input_ids=IDS, labels=IDS)
    output.loss.backward()
    assert spread(output.logits.detach(), right) < 0.05
    assert all(p.grad is not None for n, p in adapted.named_parameters() if "lora_B" in n)


@pytest.mark.parametrize("convert", [lambda m: apply_surgery(m, HoloSurgeryConfig(harmonics=8)), stored_bases])
def test_layers_that_transformers_keeps_in_float32(convert, tmp_path):
    """T5 in float16: `wo` and its basis stay in float32."""
    sizes = {"vocab_size": 80, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(**sizes)).eval()
    convert(model)
    model.save_pretrained(tmp_path)
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS[:, :5]}
    half = T5ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float16).eval()
    assert {layer.weight.dtype for layer in holo_layers(half)} == {torch.float16, torch.float32}
    assert all(layer.weight.dtype == layer.own_basis.dtype for layer in holo_layers(half))
    with torch.no_grad():
        assert spread(half(**inputs).logits, model(**inputs).logits) < 0.01


def test_a_basis_in_another_dtype():
    layer = HoloLinear(32, 16, harmonics=8)
    right = layer(torch.ones(32))
    layer.own_basis.bfloat16()
    assert layer(torch.ones(32)).dtype == layer.weight.dtype == torch.float32
    torch.testing.assert_close(layer(torch.ones(32)), right, rtol=0, atol=0.03)
    layer.eval().merge()
    torch.testing.assert_close(layer(torch.ones(32)), right, rtol=0, atol=0.03)
    with pytest.raises(RuntimeError, match="dtype"):  # as nn.Linear
        layer(torch.ones(32, dtype=torch.float64))


@pytest.mark.parametrize("folded", [False, True])
def test_freezing_the_weight_freezes_its_factors(folded):
    layer = HoloLinear(32, 16, harmonics=8, folded=folded)
    before = layer.weight.detach().clone()
    layer.weight.requires_grad = False
    trained = [name for name, p in layer.named_parameters() if p.requires_grad]
    assert trained == ["bias"] and not layer.weight.requires_grad
    layer.weight.requires_grad_(True)
    assert layer.weight.requires_grad and all(p.requires_grad for p in layer.parameters())
    assert torch.equal(layer.weight, before)


def test_adalora_starts_as_the_model_and_learns(make_teacher):
    model = make_teacher("llama", torch.float32)
    apply_surgery(model, HoloSurgeryConfig(harmonics=8))
    before = copy.deepcopy(model)(input_ids=IDS).logits
    adapted = get_peft_model(model, AdaLoraConfig(init_r=2, total_step=10, target_modules=["q_proj", "v_proj"]))
    torch.testing.assert_close(adapted(input_ids=IDS).logits, before)
    optimizer = torch.optim.Adam((p for p in adapted.parameters() if p.requires_grad), lr=0.05)
    losses = []
    for _ in range(4):
        losses.append(adapted(input_ids=IDS, labels=IDS).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
