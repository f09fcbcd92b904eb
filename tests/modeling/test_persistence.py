"""Saving and loading, as transformers' users do it: safetensors, tied and untied, sharded, through the Auto classes."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from hf_holo import HsnForCausalLM, HsnForMaskedLM, HsnForSequenceClassification, HsnForTokenClassification, HsnModel


def first_tensor(output):
    return output[0] if isinstance(output, tuple) else next(iter(output.values()))


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_saved_model_loads_with_equal_outputs(variant, tiny_model, random_ids, tmp_path, tied):
    model = tiny_model(variant, dtype=torch.float32, tie_word_embeddings=tied)
    embeddings = model.get_input_embeddings().weight
    assert (model.get_output_embeddings().weight is embeddings) == tied
    model.save_pretrained(tmp_path)
    assert not [path.name for path in tmp_path.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".pkl"}]
    assert (tmp_path / "model.safetensors").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is HsnForCausalLM
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
    ids = random_ids(2, 70)
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


@torch.no_grad()
def test_every_tensor_survives(variant, tiny_model, tmp_path):
    """Buffers too: transformers 5 builds models on `meta`, where what is not stored has to be made anew."""
    model = tiny_model(variant, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    loaded, report = HsnForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    for tensors in ("named_parameters", "named_buffers"):
        expected, got = dict(getattr(model, tensors)()), dict(getattr(loaded, tensors)())
        assert got.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=0, atol=0, msg=name)


@torch.no_grad()
def test_shards_load(tiny_model, random_ids, tmp_path):
    model, ids = tiny_model("bundle", dtype=torch.float32), random_ids(1, 9)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


@torch.no_grad()
@pytest.mark.parametrize(
    ("auto_class", "model_class"),
    [
        (AutoModel, HsnModel),
        (AutoModelForCausalLM, HsnForCausalLM),
        (AutoModelForMaskedLM, HsnForMaskedLM),
        (AutoModelForSequenceClassification, HsnForSequenceClassification),
        (AutoModelForTokenClassification, HsnForTokenClassification),
    ],
)
def test_each_auto_class_loads_its_model(auto_class, model_class, tiny_model, random_ids, tmp_path):
    overrides = {"causal": False} if model_class is HsnForMaskedLM else {}
    model, ids = tiny_model("bundle", model_class, dtype=torch.float32, **overrides), random_ids(1, 9)
    model.save_pretrained(tmp_path)
    loaded = auto_class.from_pretrained(tmp_path).eval()
    assert type(loaded) is model_class
    torch.testing.assert_close(first_tensor(loaded(input_ids=ids)), first_tensor(model(input_ids=ids)))


def test_a_head_goes_on_a_pretrained_body(tiny_model, tmp_path):
    """A classifier from a language model's checkpoint: the body's weights are its, the new head starts small."""
    model = tiny_model("bundle", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    classifier, report = HsnForSequenceClassification.from_pretrained(tmp_path, num_labels=3, output_loading_info=True)
    assert report["missing_keys"] and all("model." not in key for key in report["missing_keys"])
    body = classifier.base_model.state_dict()
    for name, tensor in model.base_model.state_dict().items():
        torch.testing.assert_close(body[name], tensor, rtol=0, atol=0, msg=name)


def test_a_fresh_process_loads_through_auto_classes(tiny_model, random_ids, tmp_path):
    model, ids = tiny_model("bundle", dtype=torch.float32), random_ids(1, 9)
    model.save_pretrained(tmp_path)
    code = (
        "import sys, torch, hf_holo\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "print(model(input_ids=torch.tensor([[int(i) for i in sys.argv[2].split()]])).logits.sum().item())\n"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path), " ".join(map(str, ids[0].tolist()))]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    assert float(result.stdout) == pytest.approx(model(input_ids=ids).logits.sum().item(), rel=1e-4)


def test_the_auto_classes_build_from_a_bare_configuration():
    config = AutoConfig.for_model("hsn", vocab_size=97, hidden_size=32, num_hidden_layers=2)
    model = AutoModelForCausalLM.from_config(config)
    assert type(model) is HsnForCausalLM
    assert model(input_ids=torch.arange(97)[None]).logits.shape == (1, 97, 97)


def test_the_configuration_survives_a_round_trip(variant, tiny_config, tmp_path):
    config = tiny_config(variant)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is type(config)
    assert loaded.to_diff_dict() == config.to_diff_dict()


def test_a_configuration_of_a_newer_format_is_refused(tiny_config, tmp_path):
    config = tiny_config()
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    stored["format_version"] = 999
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"999.*hf[-_]holo"):
        AutoConfig.from_pretrained(tmp_path)


# ---------------------------------------------------------------------------------------------- changing a model
@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_token_embeddings_can_be_resized(tiny_model, random_ids, tied):
    model, ids = tiny_model("bundle", dtype=torch.float32, tie_word_embeddings=tied), random_ids(2, 9)
    expected = model(input_ids=ids).logits
    model.resize_token_embeddings(70)
    assert model.config.vocab_size == 70
    logits = model(input_ids=ids).logits
    assert logits.shape[-1] == 70
    torch.testing.assert_close(logits[..., :61], expected)
    assert model(input_ids=torch.tensor([[69]]), labels=torch.tensor([[69]])).loss is not None


def test_lora_reaches_the_projections_and_trains(variant, tiny_model, random_ids):
    peft = pytest.importorskip("peft")
    model, ids = tiny_model(variant, dtype=torch.float32), random_ids(4, 20)
    linear = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM"))
    lora = {n for n, m in adapted.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert {name.removeprefix("base_model.model.") for name in lora} == linear
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(10):
        loss = adapted(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    for name, parameter in adapted.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        if "lora_B" in name:
            assert parameter.abs().max() > 0, name  # trained: it starts at zero
