"""`hf-holo convert` in two processes gives what it gives in one; each reads a part of the windows."""

import json

import pytest
import torch
from safetensors.torch import load_file
from several_processes import in_processes
from small_distillations import TEXT, TOKENIZER, make_teacher
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from hf_holo_cli import main

OPTIONS = ["--ratio", "0.6", "--tokens", "560", "--fisher_tokens", "80", "--block_size", "16", "--sample_tokens", "5"]

HARMONIC = ["--method", "harmonic", "--harmonics", "6"]


@pytest.fixture
def folder(tmp_path):
    """With a teacher in float64, where rounding does not hide what differs, and a text."""
    make_teacher("surgery").double().save_pretrained(tmp_path / "teacher")
    TOKENIZER.save_pretrained(tmp_path / "teacher")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path


def words(folder, out, *options):
    return ["convert", *(str(folder / name) for name in ("teacher", out)), *options]


def in_two(folder, words):
    codes, said = in_processes(2, folder, main, words)
    assert codes == [0, 0], "\n".join(said)
    return said


@pytest.mark.parametrize("refit", ["true", pytest.param("false", marks=pytest.mark.slow)])
def test_two_processes_give_what_one_gives(refit, folder):
    options = [*OPTIONS, "--train_file", str(folder / "text.txt"), "--refit", refit]
    assert main(words(folder, "one", *options)) == 0
    said = in_two(folder, words(folder, "two", *options))
    assert [line.count("The model is saved in") for line in said] == [1, 0]
    one, two = (load_file(folder / out / "model.safetensors") for out in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=1e-7, atol=1e-7)
    reports = [json.loads((folder / out / "report.json").read_text()) for out in ("one", "two")]
    for who in ("teacher", "student"):
        first, second = (report["texts"][0][f"{who}_perplexity"] for report in reports)
        assert second == pytest.approx(first, rel=1e-6)
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["one", "teacher", "two"]  # no OUT.work


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--to", "hsn"], HARMONIC])
def test_what_is_not_split_runs_all_the_same(options, folder):
    assert main(words(folder, "one", *options)) == 0
    in_two(folder, words(folder, "two", *options))
    one, two = (load_file(folder / out / "model.safetensors") for out in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=0, atol=0)


def test_an_output_that_exists_ends_all_with_one_message(folder):
    (folder / "two").mkdir()
    (folder / "two/mine.txt").write_text("keep me")
    codes, said = in_processes(2, folder, main, words(folder, "two", *HARMONIC))
    assert 2 in codes and 0 not in codes
    assert "".join(said).count("hf-holo: error: OUT:") == 1
    assert [path.name for path in (folder / "two").iterdir()] == ["mine.txt"]


@pytest.mark.slow
def test_experts_that_only_some_processes_call(folder):
    """Every window calls other experts, so that the processes must agree on what they fit together."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MixtralConfig(
        vocab_size=len(TOKENIZER), num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=1, **sizes
    )
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(folder / "teacher")  # transformers 5 has no experts in float64
    few = ["--ratio", "0.7", "--tokens", "64", "--fisher_tokens", "64", "--block_size", "16", "--sample_tokens", "1"]
    options = [*few, "--train_file", str(folder / "text.txt"), "--refit", "true"]
    assert main(words(folder, "one", *options)) == 0
    in_two(folder, words(folder, "two", *options))
    # in float32 the factors of an expert that few tokens came to are not unique, but what they do is
    one, two = (AutoModelForCausalLM.from_pretrained(folder / out) for out in ("one", "two"))
    ids = torch.arange(len(TOKENIZER))[None]
    with torch.no_grad():
        torch.testing.assert_close(two(ids).logits, one(ids).logits, rtol=1e-2, atol=1e-3)
    scores = [json.loads((folder / out / "report.json").read_text())["texts"][0] for out in ("one", "two")]
    assert scores[1]["student_perplexity"] == pytest.approx(scores[0]["student_perplexity"], rel=1e-4)
