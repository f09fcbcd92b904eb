"""Converted models in 8 and 4 bits: what they take, that they load and write, and what they refuse."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

from hf_holo import HoloError, HoloSurgeryConfig, apply_surgery, quantize_linears, restore_linears
from hf_holo.cli import main
from hf_holo.conversion.surgery.rounding import round_thin, rounded
from hf_holo.data.documents import python_help
from hf_holo.data.tokenizers import make_tokenizer
from hf_holo.modeling.harmonics import HoloLinear
from hf_holo.modeling.integers import IntegerLinear, IntegerMatrix
from hf_holo.modeling.quantizer import holo_layers, integer_linears, integer_matrices

KINDS = ("int8", "int4")
SIZES = ["--block_size", "48", "--tokens", "1152", "--fisher_tokens", "384", "--eval_windows", "4"]
SIZES += ["--sample_tokens", "5"]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    (help_text,) = python_help()
    path = tmp_path_factory.mktemp("texts") / "a.txt"
    path.write_text(help_text[:12000], encoding="utf-8")
    return str(path)


@pytest.fixture
def teacher(text, tmp_path, make_teacher):
    """Save a teacher with its tokenizer, and name its folder."""

    def save(name: str = "llama", **changes) -> str:
        tokenizer = make_tokenizer("characters", [Path(text).read_text(encoding="utf-8")])
        tokenizer.add_special_tokens({"mask_token": "[MASK]"})
        folder = tmp_path / "teacher"
        make_teacher(name, torch.float32, vocab_size=len(tokenizer), **changes).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return save


def convert(teacher: str, out: Path, text: str, *words: str) -> dict:
    assert main(["convert", teacher, str(out), "--ratio", "0.7", "--train_file", text, *SIZES, *words]) == 0
    return json.loads((out / "report.json").read_text())


def converted(make_teacher, name: str = "llama", kind: str | None = "int8", **changes):
    """With regenerated bases, the second block dense."""
    model = make_teacher(name, torch.float32, **changes)
    apply_surgery(model, HoloSurgeryConfig(ratio=0.9, folded=True, exclude=[r"\.1\."]))
    return model if kind is None else quantize_linears(model, kind)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 40)[None]).logits


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def size(folder: Path) -> int:
    return (folder / "model.safetensors").stat().st_size


# The command --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "bert", "phi3"))]
)
def test_a_conversion_is_stored_in_integers(teacher, text, tmp_path, name):
    """Tied and other heads, Conv1D, an encoder; the same surgery as without."""
    source = teacher(name)
    auto = AutoModelForMaskedLM if name == "bert" else AutoModelForCausalLM
    plain = convert(source, tmp_path / "plain", text)
    before = logits(auto.from_pretrained(tmp_path / "plain").eval())
    for kind, bits, bound in (("int8", 8, 0.02), ("int4", 4, 0.3)):
        report = convert(source, tmp_path / kind, text, "--quantize", kind)
        assert report["quantize"] == kind and report["kept"] == plain["kept"]
        assert report["numbers"] == plain["numbers"]
        assert report["bytes_on_disk"] == size(tmp_path / kind) < plain["bytes_on_disk"]
        card = (tmp_path / kind / "README.md").read_text()
        assert f"linear layers in {kind}, {bits} bits a value" in card and "hf-holo distill" not in card
        model = auto.from_pretrained(tmp_path / kind).eval()
        assert integer_matrices(model) and all(layer.kind == kind for layer in holo_layers(model))
        assert distance(logits(model), before) < bound
        assert report["texts"][0]["student_perplexity"] == pytest.approx(
            plain["texts"][0]["student_perplexity"], rel=bound
        )


def test_the_files_hold_small_integers(teacher, text, tmp_path):
    convert(teacher("llama", hidden_size=64, intermediate_size=128), tmp_path / "out", text, "--quantize", "int4")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        kinds = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    matrices = {key for key in kinds if "_proj" in key and not key.endswith("order")}
    assert {kinds[key] for key in matrices} == {"U8", "BF16"}
    assert {key.rpartition(".")[2] for key in matrices} == {"values", "scales"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--quantize", "int8", "--method", "harmonic"], "quantize: 'int8' needs the calibrated method"),
        (["--quantize", "int8", "--to", "hsn"], "quantize: 'int8' has no meaning with --to hsn"),
    ],
)
def test_what_has_to_be_trained_is_not_put_into_integers(tmp_path, capsys, words, message):
    assert main(["convert", "nowhere", str(tmp_path / "out"), *words]) != 0
    assert message in capsys.readouterr().err


# Models -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "changes"), [("llama", {}), ("llama", {"tie_word_embeddings": False}), ("gpt2", {})])
def test_saved_and_loaded_it_is_the_same(make_teacher, tmp_path, kind, name, changes):
    dense = converted(make_teacher, name, None, **changes)
    right = logits(dense)
    model = quantize_linears(dense, kind)
    assert distance(logits(model), right) < (0.05 if kind == "int8" else 0.5)
    model.save_pretrained(tmp_path / "a")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a").eval()
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    assert loaded.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False).shape[1] <= 7
    assert type(loaded) is type(model) and torch.isfinite(logits(loaded)).all()
    assert isinstance(loaded.get_output_embeddings(), IntegerLinear) == (not loaded.config.tie_word_embeddings)
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.bfloat16).eval()
    assert distance(logits(half).float(), right) < (0.07 if kind == "int8" else 0.5)
    assert all(matrix.scales.dtype == torch.bfloat16 for matrix in integer_matrices(half))


def test_the_base_model_and_an_untied_head(make_teacher, tmp_path):
    converted(make_teacher, tie_word_embeddings=False).save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path).eval()
    whole = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(whole.lm_head, IntegerLinear) and whole.config.quantization_config.dense[-1] == "lm_head"
    x = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(base(x).last_hidden_state, whole.model(x).last_hidden_state)


def test_a_tied_head_stays(make_teacher):
    model = converted(make_teacher)
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.quantization_config.dense == [
        n for n, m in model.named_modules() if isinstance(m, IntegerLinear)
    ]
    assert len(model.config.quantization_config.dense) == 7  # of the second block


def test_decoding_says_what_reading_says(make_teacher):
    """A token at a time goes through the kernels, a text through the matrices."""
    model = converted(make_teacher, kind="int8")
    ids = torch.arange(3, 33)[None]
    with torch.no_grad():
        whole = model(ids).logits
        cache, steps = None, []
        for i in range(ids.shape[1]):
            output = model(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
    assert distance(torch.cat(steps, 1), whole) < 0.02


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_made_dense_again(make_teacher, tmp_path, name):
    model = converted(make_teacher, name)
    right = logits(model)
    restore_linears(model)
    assert not integer_matrices(model) and not holo_layers(model) and not hasattr(model, "hf_quantizer")
    assert distance(logits(model), right) < 1e-4
    assert any(isinstance(m, Conv1D) for m in model.modules()) == (name == "gpt2")
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_a_dense_model_is_stored_too(make_teacher, tmp_path):
    model = make_teacher("llama", torch.float32)
    right = logits(model)
    quantize_linears(model).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert len(integer_linears(loaded)) == 21 and distance(logits(loaded), right) < 0.05


# Training -----------------------------------------------------------------------------------------------------------


def test_training_is_refused_and_adapters_are_not(make_teacher, tmp_path):
    converted(make_teacher).save_pretrained(tmp_path / "model")
    options = TrainingArguments(str(tmp_path / "run"), max_steps=2, learning_rate=0.1, report_to=[], use_cpu=True)
    rows = [{"input_ids": torch.arange(3, 20), "labels": torch.arange(3, 20)}] * 8
    in_memory, loaded = converted(make_teacher), AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for model in (in_memory, loaded):
        with pytest.raises(ValueError, match="cannot perform fine-tuning on purely quantized models"):
            Trainer(model=model, args=options, train_dataset=rows)
    adapted = get_peft_model(loaded, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    before = logits(adapted.eval())
    Trainer(model=adapted, args=options, train_dataset=rows).train()
    assert distance(logits(adapted.eval()), before) > 1e-3
    with pytest.raises(TypeError, match="keep the adapter separate"):
        adapted.merge_and_unload()


@pytest.mark.slow
def test_distillation_is_refused(teacher, text, tmp_path, capsys):
    source = teacher()
    convert(source, tmp_path / "out", text, "--quantize", "int8")
    words = ["--teacher", source, "--student", str(tmp_path / "out"), "--train_file", text]
    assert main(["distill", "distill-surgery", *words, "--output_dir", str(tmp_path / "run")]) != 0
    assert "are in small integers and cannot be trained; train it before" in capsys.readouterr().err


# Refusals -----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_put_into_integers_is_left_as_it_was(make_teacher):
    model = converted(make_teacher, kind=None)
    for bad, message in (("int3", "quantize: 'int3' is unknown"), ("fp8", "choose one of int8, int4")):
        with pytest.raises(HoloError, match=message):
            quantize_linears(model, bad)
    right = logits(model)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.coefficients[0, 0] = math.inf
    with pytest.raises(HoloError, match="not finite"):
        quantize_linears(model)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.coefficients[0, 0] = 0.0
    assert not integer_matrices(model) and distance(logits(model), right) < 1
    assert isinstance(model.model.layers[0].mlp.up_proj.coefficients, nn.Parameter)
    quantize_linears(model)
    with pytest.raises(HoloError, match="it is in int8 already"):
        quantize_linears(model, "int4")
    with pytest.raises(HoloError, match="converted or quantized already"):
        apply_surgery(model)


def test_a_plan_in_integers_comes_after_the_surgery(make_teacher):
    with pytest.raises(HoloError, match="quantize: 'int8' comes after the surgery"):
        HoloSurgeryConfig(quantize="int8")
    with pytest.raises(HoloError, match="dense: 'lm_head' is to be stored in integers"):
        HoloSurgeryConfig(layers={}, dense=["lm_head"])
    with pytest.raises(HoloError, match="quantize: 'int3' is unknown"):
        HoloSurgeryConfig(layers={}, quantize="int3")


# Rounding -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_fitted_to_inputs_beats_the_nearest(kind):
    """Where inputs are correlated: errors are made up for by the columns that come after."""
    torch.manual_seed(0)
    weight, x = torch.randn(40, 72), torch.randn(500, 8) @ torch.randn(8, 72) + 0.1 * torch.randn(500, 72)
    right = x @ weight.T
    nearest = x @ IntegerMatrix.of(weight, kind).matrix().T
    fitted = x @ rounded(weight, x.T @ x, kind).matrix().T
    assert distance(fitted, right) < 0.5 * distance(nearest, right)


def test_inputs_that_are_much_larger_than_others_do_no_harm():
    """Through a pivoted basis that mixes them into all others."""
    torch.manual_seed(0)
    x = torch.randn(800, 48) * torch.ones(48).index_fill(0, torch.tensor([3, 30]), 300.0)
    target = torch.randn(24, 48) / x.std(0)
    layer = HoloLinear(48, 24, 32, "data", bias=False, folded=True, pivoted=True)
    basis = torch.linalg.svd(target + 0.02 * torch.randn(24, 48) / x.std(0), full_matrices=True)[2][:32]
    change = layer.basis.store(basis)
    layer.load_factors((target @ torch.linalg.pinv(basis)) @ change)
    plain = HoloLinear(48, 24, 32, "data", bias=False, folded=True, pivoted=True)
    plain.load_state_dict(layer.state_dict())
    with torch.no_grad():
        right = layer(x)
        plain.to_integers("int4")
        round_thin([layer], x.T @ x / len(x), "int4")
        fitted, nearest = distance(layer(x), right), distance(plain(x), right)
    assert fitted < 0.5 * nearest
