"""`hf-holo train` from end to end on tiny models: what it writes, what it reports, and what it refuses."""

import csv
import json
import math

import pytest
import torch
import torch.nn.functional as F
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_holo.data.documents import hold_out_documents, read_documents
from hf_holo.errors import HoloError
from hf_holo.modeling.losses import IGNORED
from hf_holo.recipes import recipe_names
from hf_holo.training.arguments import parse
from hf_holo.training.train import main

from .conftest import TINY, prose


def test_a_run_writes_all_it_promises(tiny_run, tmp_path, capsys):
    trainer = tiny_run()
    folder = tmp_path / "run"

    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(float(row["train_loss"]) > 0 for row in rows)
    assert [row["step"] for row in rows if row["validation_loss"]] == ["3", "6"]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "sample.txt").read_text()
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}
    assert not list(folder.glob("*.bin")), "a pickle next to the final model"

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("the wave").input_ids) == "the wave"
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.use_cache
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name

    said = capsys.readouterr().out
    last = float(rows[-1]["validation_loss"])
    assert f"validation loss: {last:.4f} nats per token, {last / math.log(2):.4f} bits per character" in said
    assert float(rows[-1]["validation_perplexity"]) == pytest.approx(math.exp(last))
    assert f'model = AutoModelForCausalLM.from_pretrained("{folder}")' in said


@pytest.mark.slow
def test_the_resolved_recipe_repeats_the_run(tiny_run, tmp_path):
    first = tiny_run()
    recipe = tmp_path / "run" / "recipe.yaml"
    values = yaml.safe_load(recipe.read_text())
    assert values["max_steps"] == 6
    assert values["model"] == {"hidden_size": 16, "num_hidden_layers": 2, "hidden_dropout_prob": 0.1}
    again = parse(["--recipe", str(recipe), "--output_dir", str(tmp_path / "again")])
    assert again.recipe == values
    main(["--recipe", str(recipe), "--output_dir", str(tmp_path / "again"), "--disable_tqdm", "true"])
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "again").state_dict()
    for name, value in first.model.state_dict().items():
        assert torch.equal(second[name], value), name


def test_the_reported_loss_is_that_of_every_token_once(tiny_run):
    trainer = tiny_run("--per_device_eval_batch_size", "3")
    total, count, hits = 0.0, 0, 0
    with torch.no_grad():
        for window in trainer.eval_dataset:
            logits = trainer.model.eval()(window["input_ids"][None]).logits[0, :-1]
            total += F.cross_entropy(logits, window["labels"][1:], reduction="sum").item()
            hits += (logits.argmax(-1) == window["labels"][1:]).sum().item()
            count += len(logits)
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] == pytest.approx(hits / count)
    assert metrics["eval_loss"] == pytest.approx(total / count, rel=1e-5)
    assert metrics["eval_bits_per_character"] == pytest.approx(total / count / math.log(2), rel=1e-5)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_bits_per_character_do_not_depend_on_the_size_of_tokens(tiny_run, text_file, tokenizer):
    trainer = tiny_run("--tokenizer", tokenizer, "--vocab_size", "300", "--max_steps", "1")
    metrics = trainer.evaluate()
    tokens = sum((window["labels"] != IGNORED).sum().item() for window in trainer.eval_dataset)
    text = text_file.read_text()
    characters = len(text) - int(0.9 * len(text)) - len(trainer.processing_class.decode(trainer.eval_dataset.ids[:1]))
    bits = metrics["eval_loss"] * tokens / characters / math.log(2)
    assert metrics["eval_bits_per_character"] == pytest.approx(bits)


@pytest.mark.feature("training", "hf-holo train", family="hsn")
def test_training_learns(tiny_run, tmp_path):
    trainer = tiny_run("--max_steps", "40", "--logging_steps", "20", "--eval_steps", "20", "--ema_decay", "0")
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[-1] < losses[0] < math.log(trainer.model.config.vocab_size)


def test_adamw_and_plain_packing(tiny_run):
    trainer = tiny_run("--optimizer", "adamw", "--stride", "32", "--ema_decay", "0")
    assert isinstance(trainer.optimizer.optimizer, torch.optim.AdamW)
    assert trainer.state.global_step == 6


@pytest.mark.slow
def test_averages_are_evaluated_and_saved_while_training_goes_on_without_them(tiny_run, tmp_path):
    plain = tiny_run("--ema_decay", "0", folder="plain").model.state_dict()
    averaged = tiny_run("--ema_decay", "0.9", folder="averaged").model.state_dict()
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "averaged" / "checkpoint-6").state_dict()
    name = "model.embed_tokens.weight"
    assert torch.equal(trained[name], plain[name])
    assert not torch.equal(averaged[name], plain[name])


def test_documents_kept_apart(tiny_run, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number:02}.txt").write_text(prose(20 + 9 * number, number))
    trainer = tiny_run("--documents", "apart", "--train_file", str(folder), "--validation_fraction", "0.2")
    (_, held_out) = hold_out_documents(read_documents(str(folder)), 0.2)
    assert len(trainer.eval_dataset.datasets) == len(held_out) < 12
    assert trainer.compute_metrics.characters == sum(map(len, held_out))


@pytest.mark.slow
@pytest.mark.feature("training", "instructions in Alpaca's format", family="hsn")
def test_alpaca_starts_from_a_checkpoint_and_lowers_the_held_out_loss(tiny_run, tmp_path, capsys):
    tiny_run(folder="base")
    records = [{"instruction": f"Say {word}.", "input": "", "output": word} for word in ("wave", "key", "value") * 20]
    (tmp_path / "records.json").write_text(json.dumps(records))
    flags = f"--recipe alpaca --train_file {tmp_path}/records.json --model_name_or_path {tmp_path}/base"
    flags += f" --output_dir {tmp_path}/tuned --num_train_epochs 2 --sample_tokens 8 --num_answers 2 --use_cpu"
    main(flags.split())
    said = capsys.readouterr().out
    before, after = (
        float(said.split(f"held-out response loss {when} training: ")[1].split()[0]) for when in ("before", "after")
    )
    assert after < before
    answers = (tmp_path / "tuned" / "answers.txt").read_text()
    assert answers.count("### Response:") == answers.count("--- answer in the data:") == 2
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "tuned").config.hidden_size == 16


@pytest.mark.parametrize("name", recipe_names("hf_holo.training"))
def test_recipes_parse(name):
    run = parse(["--recipe", name])
    assert run.training.output_dir == f"runs/{name}"
    assert run.training.max_steps > 0 or run.training.num_train_epochs > 0


def test_the_command_line_beats_the_recipe(capsys):
    run = parse(["--recipe", "shakespeare-char", "--max_steps", "7", "--model", "hidden_dropout_prob=0.5", "rank=3"])
    assert run.training.max_steps == 7
    assert run.model_overrides == {"channel_mix": "gated", "hidden_dropout_prob": 0.5, "rank": 3}
    other = parse(["--recipe", "shakespeare-char", "--preset", "hsn-small", "--dataset_name", "x"])
    assert (other.model.preset, other.model_overrides, other.data.dataset_name) == ("hsn-small", {}, "x")
    assert "of the recipe 'shakespeare-char' is for hsn-tiny, left out with hsn-small" in capsys.readouterr().out
    same = parse(["--recipe", "shakespeare-char", "--preset", run.model.preset])
    assert same.model_overrides == {"channel_mix": "gated", "hidden_dropout_prob": 0.1}
    assert parse(["--train_file", "x"]).data.dataset_name is None
    assert (run.data.block_size, run.data.stride) == (256, 64)
    assert parse(["--recipe", "shakespeare-char", "--block-size", "32"]).data.stride is None


# Bad input: one line that says what to do.


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--preset hsn-tine", "hsn-tiny"),
        ("--recipe quickstrat", "quickstart"),
        ("--train_file nowhere.txt", "no file or folder 'nowhere.txt'"),
        ("--learning_rat 1", "unknown argument --learning_rat; did you mean learning_rate"),
        ("--max_steps many", "max_steps.*invalid int value"),
        ("--tokenizer words", "characters, bytes, bpe"),
        ("--block_size 100000", "fewer than one block of 100000"),
        ("--stride 33", "stride: 33"),
        ("--validation_fraction 1.5", "validation_fraction: 1.5"),
        ("--ema_decay 1", "ema_decay: 1.0"),
        ("--ema_decay 0.9 --load_best_model_at_end --metric_for_best_model loss", "ema_decay"),
        ("--prediction_loss_only", "prediction_loss_only"),
        ("--model hidden_sise=3", "no value 'hidden_sise'"),
        ("--model hidden_size", "'hidden_size' is not of the form KEY=VALUE"),
        ("--model num_heads=5", "num_heads: 5 does not divide"),
        ("--model vocab_size=5", "vocab_size: the tokenizer has .* the model only 5"),
        ("--model_name_or_path no/such/folder", "model_name_or_path: 'no/such/folder' is not a model"),
        ("--resume_from_checkpoint nowhere/checkpoint-3", "is not a complete checkpoint"),
        ("--output_dir {file}", "is a file"),
    ],
)
def test_bad_flags(text_file, tmp_path, flags, message):
    start = [*TINY, "--train_file", str(text_file), "--output_dir", str(tmp_path / "run")]
    with pytest.raises(HoloError, match=message) as error:
        main([*start, *flags.format(file=text_file).split()])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        ("lerning_rate: 1", "'lerning_rate'; did you mean learning_rate"),
        ("a: [", "not valid YAML"),
        ("- 1", "not a mapping"),
        ("model: 3", "not a mapping"),
    ],
)
def test_bad_recipes(tmp_path, content, message):
    (tmp_path / "bad.yaml").write_text(content)
    with pytest.raises(HoloError, match=message) as error:
        parse(["--recipe", str(tmp_path / "bad.yaml")])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"short"])
def test_bad_text_leaves_no_trace(tmp_path, content):
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(HoloError):
        main([*TINY, "--train_file", str(tmp_path / "bad.txt"), "--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_alpaca_needs_a_model(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"instruction": "a", "output": "b"}] * 20))
    with pytest.raises(HoloError, match="--model_name_or_path"):
        main(["--recipe", "alpaca", "--train_file", str(tmp_path / "a.json"), "--output_dir", str(tmp_path / "run")])
