"""Models of transformers itself, dense and converted: what Optimum exports, `hf-holo export` exports too."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from hf_holo import HoloSurgeryConfig, apply_surgery, quantize_linears
from hf_holo.cli import main
from hf_holo.data.tokenizers import make_tokenizer

pytest.importorskip("optimum.exporters.onnx")
onnxruntime = pytest.importorskip("onnxruntime")

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1}
MODELS = {
    "bert": (AutoModelForMaskedLM, {"initializer_range": 0.15}),  # has an input that hf_holo's own models lack
    "opt": (AutoModelForCausalLM, {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.15}),  # reads its mask
    "gemma2": (
        AutoModelForCausalLM,  # Optimum gives it no positions
        {"num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16},
    ),
}
IDS = torch.randint(5, 80, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("converted", [pytest.param(False, marks=pytest.mark.slow), True], ids=["dense", "converted"])
@pytest.mark.parametrize("name", MODELS)
def test_onnx(name, converted, tmp_path, quick_export):
    auto, sizes = MODELS[name]
    tokenizer = make_tokenizer("bytes", [], masked=True)
    torch.manual_seed(0)
    model = auto.from_config(AutoConfig.for_model(name, vocab_size=len(tokenizer), **SIZES, **sizes)).eval()
    if converted:
        apply_surgery(model, HoloSurgeryConfig(harmonics=8))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "out"), "--format", "onnx"]) == 0
    session = onnxruntime.InferenceSession(tmp_path / "out/onnx/model.onnx")
    given = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "position_ids": torch.arange(12).expand(2, 12)}
    empty = torch.zeros(2, model.config.num_key_value_heads if name == "gemma2" else 4, 0, 8)
    feed = {
        entry.name: given.get(entry.name, empty if "past" in entry.name else torch.zeros_like(IDS)).numpy()
        for entry in session.get_inputs()
    }
    logits = torch.from_numpy(session.run(["logits"], feed)[0])
    torch.testing.assert_close(logits, model(input_ids=IDS).logits.detach(), rtol=0, atol=1e-4)
    report = json.loads((tmp_path / "out/onnx/report.json").read_text())
    assert max(row["max_relative"] for row in report["parity"]) < 1e-4


def test_layers_in_small_integers_are_not_exported(tmp_path, capsys):
    auto, sizes = MODELS["opt"]
    model = auto.from_config(AutoConfig.for_model("opt", vocab_size=80, **SIZES, **sizes))
    apply_surgery(model, HoloSurgeryConfig(harmonics=8))
    quantize_linears(model).save_pretrained(tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "out"), "--format", "onnx"]) != 0
    assert "are in small integers, which have no form in exported graphs" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.onnx"))
