"""One vocabulary of options and one held-out loss for train, convert and distill."""

import csv
import json
import math

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from hf_holo.conversion.convert import arguments as convert_arguments
from hf_holo.conversion.convert.command import main as convert
from hf_holo.conversion.distill import arguments as distill_arguments
from hf_holo.conversion.distill.command import main as distill
from hf_holo.data.documents import python_help
from hf_holo.data.scoring import held_out_loss
from hf_holo.data.tokenizers import make_tokenizer
from hf_holo.errors import HoloError
from hf_holo.training.arguments import parse
from hf_holo.training.train import main as train

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
QUIET = ["--use_cpu", "--disable_tqdm", "true", "--overwrite"]


@pytest.fixture
def model(tmp_path):
    """The folder of a small Llama with its tokenizer, and a text next to it."""
    (text,) = python_help()
    (tmp_path / "text.txt").write_text(text[:6000], encoding="utf-8")
    tokenizer = make_tokenizer("characters", [text[:6000]])
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SIZES)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow
@pytest.mark.parametrize("eval_windows", [0, 5])
def test_every_command_gives_the_same_model_the_same_loss(model, tmp_path, eval_windows):
    """To the last digit: the same text is read, split, cut and summed by the same functions."""
    data = ["--train_file", str(tmp_path / "text.txt"), "--validation_fraction", "0.2", "--block_size", "40"]
    data += ["--eval_windows", str(eval_windows)]
    one = ["--per_device_eval_batch_size", "1", "--max_steps", "1", "--sample_tokens", "1", *QUIET]

    start = ["--model_name_or_path", str(model), "--output_dir", str(tmp_path / "trained")]
    start += ["--causality_check", "false"]
    train(["quickstart", *start, *data, *one, "--learning_rate", "0", "--muon_lr_ratio", "1", "--weight_decay", "0"])
    with (tmp_path / "trained" / "metrics.csv").open(newline="") as file:
        trained = float(list(csv.DictReader(file))[-1]["validation_loss"])

    sizes = ["--tokens", "2000", "--fisher_tokens", "400", "--sample_tokens", "1"]
    convert([str(model), str(tmp_path / "converted"), *data, *sizes])
    (converted,) = json.loads((tmp_path / "converted" / "report.json").read_text())["texts"]

    places = ["--teacher", str(model), "--student", str(tmp_path / "converted"), "--output_dir", str(tmp_path / "out")]
    distill(["distill-surgery", *places, *data, *one, "--optimizer", "adamw", "--save_strategy", "no"])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    distilled = report["teacher"]["scores"]["text"]["loss"]

    assert trained == distilled
    assert converted["teacher_perplexity"] == math.exp(distilled)
    student = report["student"]["scores"]["text"]["perplexity"]
    assert (
        converted["student_perplexity"] == pytest.approx(student, rel=1e-12)
        and student != converted["teacher_perplexity"]
    )


def test_the_loss_does_not_depend_on_the_batch_size(model):
    loaded = LlamaForCausalLM.from_pretrained(model)
    windows = [{"input_ids": torch.arange(3, n), "labels": torch.arange(3, n)} for n in (20, 9, 14)]
    losses = [held_out_loss(loaded, windows, size) for size in (1, 2, 3)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


# Old names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "word", "value"),
    [
        ("text", "train_file", "a.txt", ["a.txt"]),
        ("held_out", "validation_fraction", "0.25", [0.25]),
        ("window", "block_size", "64", 64),
        ("prompt", "sample_prompt", "Once", "Once"),
    ],
)
@pytest.mark.parametrize("form", ["--{old} {word}", "--{old}={word}", "--{hyphens} {word}", "recipe"])
def test_old_names_of_convert(tmp_path, capsys, old, new, word, value, form):
    flags = form.format(old=old, hyphens=old.replace("_", "-"), word=word).split()
    if form == "recipe":
        (tmp_path / "old.yaml").write_text(yaml.safe_dump({old: value}))
        flags = ["--recipe", str(tmp_path / "old.yaml")]
    options = convert_arguments.parse(["teacher", "out", *flags], "").options
    assert getattr(options, new) == value
    assert capsys.readouterr().err == f"hf-holo: {old} is called {new} now; the old name works until the next version\n"
    with pytest.raises(SystemExit):
        convert_arguments.parse(["--help"], "")
    assert f"--{old} " not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("old", "new", "word", "value"),
    [("train_files", "train_file", "a.txt", ["a.txt"]), ("evaluation_windows", "eval_windows", "3", 3)],
)
@pytest.mark.parametrize("form", ["word", "recipe", "stage"])
def test_old_names_of_distill(tmp_path, capsys, old, new, word, value, form):
    recipe = {"train_file": "b.txt", "stages": [{"match": "logits"}]}
    if form != "word":
        part = recipe if form == "recipe" else recipe["stages"][0]
        part[old] = value
        if form == "recipe" and new in recipe:
            del recipe[new]
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(recipe))
    run = distill_arguments.parse([str(tmp_path / "old.yaml"), *([f"--{old}", word] if form == "word" else [])])
    assert form == "stage" or getattr(run.texts, new) == value
    assert f"{old} is called {new} now" in capsys.readouterr().err


def test_a_name_and_its_old_one_are_refused_together(tmp_path):
    (tmp_path / "both.yaml").write_text("window: 64\nblock_size: 32")
    with pytest.raises(HoloError, match="sets 'block_size' twice, also under its old name 'window'"):
        convert_arguments.parse(["teacher", "out", "--recipe", str(tmp_path / "both.yaml")], "")


# Recipes ------------------------------------------------------------------------------------------------------------


def test_every_command_takes_its_recipe_as_a_word_or_as_an_option():
    for words in (["alpaca"], ["--recipe", "alpaca"]):
        assert parse([*words, "--train_file", "a", "b"]).data.data_format == "alpaca"
        names = [words[0].replace("alpaca", "distill-hsn"), *(["distill-hsn"] if len(words) > 1 else [])]
        assert len(distill_arguments.parse([*names, "--train_file", "a", "b"]).stages) == 3
        names = [words[0].replace("alpaca", "convert-original"), *(["convert-original"] if len(words) > 1 else [])]
        assert convert_arguments.parse(["teacher", "out", *names], "").options.method == "harmonic"


def test_two_recipes_are_refused():
    with pytest.raises(HoloError, match="recipe: 'alpaca' and 'quickstart'; name one"):
        parse(["alpaca", "--recipe", "quickstart"])


def test_several_files_are_read_in_their_order(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # the quickstart may have left its run where the tests are started
    assert parse(["--train_file", "b.txt", "a.txt"]).data.train_file == ["b.txt", "a.txt"]
    with pytest.raises(HoloError, match=r"train_file: there is no file or folder 'b\.txt'"):
        train(["--train_file", "b.txt", "a.txt"])
