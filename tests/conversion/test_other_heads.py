"""A converted checkpoint loads as everything that the dense one loads as, and takes its code along."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    CLIPVisionModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from hf_holo import HoloSurgeryConfig, apply_surgery, restore_linears
from hf_holo.modeling.quantizer import holo_layers

SIZES = {"vocab_size": 80, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = LlamaConfig(**SIZES, initializer_range=0.15)
BERT = BertConfig(**SIZES, initializer_range=0.15)
GPT2 = GPT2Config(vocab_size=80, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2, pad_token_id=0)
IDS = torch.randint(5, 80, (2, 12), generator=torch.Generator().manual_seed(1))


def converted(cls: type, config, **options) -> PreTrainedModel:
    torch.manual_seed(0)
    model = cls(copy.deepcopy(config)).eval()
    apply_surgery(model, HoloSurgeryConfig(**{"harmonics": 8, **options}))
    return model


@torch.no_grad()
def hidden(model: PreTrainedModel) -> torch.Tensor:
    return model.eval().base_model(input_ids=IDS)[0]


@pytest.mark.parametrize("options", [{}, {"basis": "dct", "folded": True, "shared": True}], ids=["random", "shared"])
@pytest.mark.parametrize(
    ("made", "config", "others"),
    [
        (LlamaForCausalLM, LLAMA, [LlamaModel, LlamaForSequenceClassification]),
        (LlamaModel, LLAMA, [LlamaForCausalLM]),
        (GPT2LMHeadModel, GPT2, [GPT2Model, GPT2ForSequenceClassification]),
        (BertForMaskedLM, BERT, [BertModel, BertForTokenClassification]),
        (BertModel, BERT, [BertForMaskedLM, BertForTokenClassification]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_other_heads_and_the_base_model(made, config, others, options, tmp_path):
    model = converted(made, config, **options)
    model.save_pretrained(tmp_path / "made")
    for other in others:
        loaded = other.from_pretrained(tmp_path / "made")
        assert len(holo_layers(loaded)) == len(holo_layers(model))
        torch.testing.assert_close(hidden(loaded), hidden(model))
        loaded.save_pretrained(tmp_path / "again")  # and back, from the names that the other class has
        for cls in (made, other):
            torch.testing.assert_close(hidden(cls.from_pretrained(tmp_path / "again")), hidden(model))


def test_a_converted_head_stays_behind(tmp_path):
    model = converted(LlamaForCausalLM, LLAMA, modules=["lm_head", "mlp"])
    model.save_pretrained(tmp_path / "made")
    base = LlamaModel.from_pretrained(tmp_path / "made")
    torch.testing.assert_close(hidden(base), hidden(model))
    base.save_pretrained(tmp_path / "base")
    assert "lm_head" not in json.loads((tmp_path / "base/config.json").read_text())["quantization_config"]["layers"]
    torch.testing.assert_close(hidden(LlamaForCausalLM.from_pretrained(tmp_path / "base")), hidden(model))


def test_fewer_blocks(tmp_path):
    model = converted(LlamaForCausalLM, LLAMA)
    model.save_pretrained(tmp_path)
    first = AutoModel.from_pretrained(tmp_path, num_hidden_layers=1)
    assert len(holo_layers(first)) == 7
    del model.model.layers[1]
    torch.testing.assert_close(hidden(first), hidden(model))


@torch.no_grad()
def test_an_encoder_alone(tmp_path):
    t5 = converted(
        T5ForConditionalGeneration, T5Config(vocab_size=80, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    )
    t5.save_pretrained(tmp_path / "t5")
    encoder = T5EncoderModel.from_pretrained(tmp_path / "t5").eval()
    torch.testing.assert_close(encoder(input_ids=IDS)[0], t5.encoder(input_ids=IDS)[0])


@torch.no_grad()
def test_the_parts_of_a_composite_model(tmp_path):
    """They have configs of their own, which transformers takes out of the whole."""
    sizes = {key: value for key, value in SIZES.items() if key != "vocab_size"}
    text = {**sizes, "vocab_size": 80, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    vision = {**sizes, "image_size": 8, "patch_size": 4}
    model = converted(CLIPModel, CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    pixels = torch.linspace(-1, 1, 192).view(1, 3, 8, 8)
    model.save_pretrained(tmp_path / "clip")
    for folder in ("clip", "again"):
        texts, images = (
            CLIPTextModel.from_pretrained(tmp_path / folder),
            CLIPVisionModel.from_pretrained(tmp_path / folder),
        )
        assert len(holo_layers(texts)) == len(holo_layers(images)) == 12
        torch.testing.assert_close(texts(input_ids=IDS)[0], model.text_model(input_ids=IDS)[0])
        torch.testing.assert_close(images(pixel_values=pixels)[0], model.vision_model(pixel_values=pixels)[0])
        CLIPModel.from_pretrained(tmp_path / folder).save_pretrained(tmp_path / "again")
    restore_linears(model).save_pretrained(tmp_path / "dense")
    assert not holo_layers(CLIPTextModel.from_pretrained(tmp_path / "dense"))


def test_layers_of_another_release_are_refused(tmp_path):
    """A block is there, and the layer is not in it."""
    converted(LlamaForCausalLM, LLAMA).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace("mlp.up_proj", "mlp.w3"))
    for cls in (AutoModelForCausalLM, AutoModel):
        with pytest.raises(ValueError, match=r"has no linear layer 'model\.layers\.0\.mlp\.w3'.*another release"):
            cls.from_pretrained(tmp_path)


@pytest.mark.skipif(transformers.__version__ < "5", reason="experts are layers of their own")
def test_experts_that_are_fused_now_are_named(tmp_path):
    config = {**SIZES, "num_key_value_heads": 2, "num_local_experts": 4}
    model = converted(MixtralForCausalLM, MixtralConfig(**config))
    entry = {"harmonics": 8, "basis": "dct", "folded": True, "pivoted": False, "lender": None}
    model.config.quantization_config.layers["model.layers.0.block_sparse_moe.experts.0.w1"] = entry
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"experts.0.w1' was converted where .* fused, in one tensor '.*gate_up_proj'"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


# ---------------------------------------------------------------------------------------------- the code
ELSEWHERE = """
import sys, torch
sys.modules["hf_holo"] = None  # as if it were not installed
from transformers import AutoModelForCausalLM
x, right = torch.load(sys.argv[1])
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    torch.testing.assert_close(model(input_ids=x).logits, right, rtol=0, atol=1e-4)
"""


@pytest.mark.slow
@torch.no_grad()
def test_saved_again_or_restored_it_loads_without_hf_holo(tmp_path):
    model = converted(LlamaForCausalLM, LLAMA)
    folders = [tmp_path / name for name in ("made", "copied", "again", "with_code", "restored", "restored_too")]
    model.save_pretrained(folders[0])
    copy.deepcopy(model).save_pretrained(folders[1])
    loaded = AutoModelForCausalLM.from_pretrained(folders[0])
    loaded.save_pretrained(folders[2])
    with_code = AutoModelForCausalLM.from_pretrained(folders[0], trust_remote_code=True)
    with_code.save_pretrained(folders[3])
    restore_linears(loaded).save_pretrained(folders[4])
    assert not list(folders[4].glob("*.py")) and "auto_map" not in (folders[4] / "config.json").read_text()
    restore_linears(with_code).save_pretrained(folders[5])  # its class is one of the code's
    torch.save((IDS, model(input_ids=IDS).logits), tmp_path / "right.pt")
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "right.pt"), *map(str, folders)]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment)
    assert done.returncode == 0, done.stderr


def test_only_the_main_process_writes_code(tmp_path):
    model = converted(LlamaForCausalLM, LLAMA)
    model.save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.glob("*.py"))


def test_a_classifier_takes_its_code_along_too(tmp_path):
    converted(LlamaForSequenceClassification, LLAMA).save_pretrained(tmp_path)
    named = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert named == {"AutoModelForSequenceClassification": "converted.LlamaForSequenceClassification"}
    assert isinstance(AutoModelForSequenceClassification.from_pretrained(tmp_path), nn.Module)
    assert (tmp_path / "converted.py").is_file()


def test_the_auto_class_of_a_masked_model(tmp_path):
    converted(BertForMaskedLM, BERT).save_pretrained(tmp_path)
    torch.testing.assert_close(
        hidden(AutoModelForMaskedLM.from_pretrained(tmp_path)), hidden(BertForMaskedLM.from_pretrained(tmp_path))
    )
