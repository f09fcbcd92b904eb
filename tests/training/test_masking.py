"""Masked language modelling: what is hidden, what is scored, what a run leaves, and which models can."""

import csv
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, pipeline

from hf_holo import architectures
from hf_holo.data.masking import MaskedWindows, Masking, MaskingCollator, fill, masked_splits
from hf_holo.data.tokenizers import make_tokenizer
from hf_holo.errors import HoloError
from hf_holo.modeling.losses import IGNORED
from hf_holo.training.train import main

from .conftest import TINY, prose

MASKED = ("--task", "masked", "--tokenizer", "bytes")
WITH_A_MASKED_HEAD = sorted(name for name, family in architectures().items() if "AutoModelForMaskedLM" in family.models)


@pytest.fixture
def tokenizer():
    return make_tokenizer("bpe", [prose(600)], vocab_size=300, masked=True)


def rows(tokenizer, count: int = 40, length: int = 50) -> torch.Tensor:
    """Random ids of plain text `[count, length]`."""
    return torch.randint(2, len(tokenizer) - 1, (count, length))  # the specials are the first two and the last


# What is hidden


def test_fifteen_percent_are_hidden_as_in_bert(tokenizer):
    ids = rows(tokenizer, 400)
    inputs, labels = Masking(tokenizer, 0.15)(ids, seed=1)
    hidden = labels != IGNORED
    assert hidden.float().mean() == pytest.approx(0.15, abs=0.01)
    assert torch.equal(labels[hidden], ids[hidden]) and torch.equal(inputs[~hidden], ids[~hidden])
    masks = inputs[hidden] == tokenizer.mask_token_id
    assert masks.float().mean() == pytest.approx(0.8, abs=0.02)
    same = inputs[hidden] == ids[hidden]
    assert same.float().mean() == pytest.approx(0.1, abs=0.02)


def test_special_tokens_and_padding_are_never_hidden(tokenizer):
    ids = rows(tokenizer)
    ids[:, ::2] = tokenizer.eos_token_id
    ids[:, 1::4] = tokenizer.pad_token_id
    inputs, labels = Masking(tokenizer, 0.9)(ids, seed=1)
    specials = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    assert (labels[specials] == IGNORED).all() and torch.equal(inputs[specials], ids[specials])
    assert (labels[~specials] != IGNORED).any()


def test_a_batch_always_has_something_to_predict(tokenizer):
    masking = Masking(tokenizer, 0.01)
    assert all((masking(rows(tokenizer, 1, 2), seed)[1] != IGNORED).any() for seed in range(20))
    empty = torch.full((1, 3), tokenizer.eos_token_id)
    assert (masking(empty, 0)[1] == IGNORED).all()


def test_the_masks_of_a_batch_follow_from_its_tokens_and_the_seed(tokenizer):
    examples = [{"input_ids": row} for row in rows(tokenizer, 4)]

    def masked(examples, seed=3):
        return MaskingCollator(Masking(tokenizer, 0.15), tokenizer.pad_token_id, seed)(examples)

    first = masked(examples)
    torch.rand(5)  # the global random state has no part in it
    again = masked(examples)
    assert torch.equal(first["input_ids"], again["input_ids"]) and torch.equal(first["labels"], again["labels"])
    assert not torch.equal(first["labels"], masked(examples, seed=4)["labels"])
    assert not torch.equal(first["labels"][0], masked([examples[0], *examples[:3]])["labels"][0])  # another batch


def test_short_windows_are_padded_with_a_mask(tokenizer):
    examples = [{"input_ids": row[:length]} for row, length in zip(rows(tokenizer, 2), (9, 4), strict=True)]
    batch = MaskingCollator(Masking(tokenizer, 0.5), tokenizer.pad_token_id, 0)(examples)
    assert batch["attention_mask"].tolist() == [[1] * 9, [1] * 4 + [0] * 5]
    assert (batch["input_ids"][1, 4:] == tokenizer.pad_token_id).all() and (batch["labels"][1, 4:] == IGNORED).all()


def test_a_validation_set_is_masked_once_for_all_batch_sizes(tokenizer):
    texts = [prose(300, seed) for seed in range(3)]
    splits = masked_splits(texts[:2], texts[2:], tokenizer, block_size=32)
    scored = splits.validation
    assert isinstance(scored, MaskedWindows) and splits.characters is None
    hidden = sum(int((example["labels"] != IGNORED).sum()) for example in scored)
    assert splits.tokens == scored.tokens == hidden > 20
    whole = torch.cat([e["input_ids"].where(e["labels"] == IGNORED, e["labels"]) for e in scored])
    assert tokenizer.decode(whole) == texts[2]  # every token of the text, once
    assert all((e["input_ids"][e["labels"] != IGNORED] == tokenizer.mask_token_id).all() for e in scored)
    collator = MaskingCollator(Masking(tokenizer, 0.15), 0, seed=7)
    pair, single = collator([scored[0], scored[1]]), collator([scored[1]])
    assert torch.equal(pair["labels"][1], single["labels"][0]) and torch.equal(single["labels"][0], scored[1]["labels"])


def test_documents_kept_apart_share_no_window(tokenizer):
    texts = ["ab " * 40, "xy " * 9, "pq " * 25]
    splits = masked_splits(texts, texts[:2], tokenizer, block_size=16, apart=True)
    shown = [tokenizer.decode(splits.train[i]["input_ids"]) for i in range(len(splits.train))]
    assert all(len(set(text) & set("axp")) == 1 for text in shown)
    assert {char for text in shown for char in text} == set("abxypq ")


# A run


@pytest.mark.feature("training", "masked language modelling")
@pytest.mark.parametrize("family", WITH_A_MASKED_HEAD)
def test_every_family_with_a_masked_head_trains(tiny_run, tmp_path, family, capsys):
    recipe = tmp_path / "empty.yaml"  # it asks for no prompt
    recipe.write_text("")
    preset = next(iter(architectures()[family].presets))
    sizes = ("--model", "hidden_size=16", "num_hidden_layers=1", "causal=null")
    trainer = tiny_run(
        *MASKED, "--recipe", str(recipe), "--preset", preset, *sizes, "--max_steps", "3", "--optimizer", "adamw"
    )
    folder = tmp_path / "run"

    last = list(csv.DictReader((folder / "metrics.csv").open()))[-1]
    loss, accuracy = float(last["validation_loss"]), float(last["validation_accuracy"])
    assert 0 < loss < 8 and 0 <= accuracy <= 1
    assert float(last["validation_perplexity"]) == pytest.approx(math.exp(loss))
    assert "validation_bits_per_character" not in last
    sample = (folder / "sample.txt").read_text()
    masked, filled = sample.split("----- masked:\n")[1].split("----- filled:\n")
    assert "<|mask|>" in masked and "<|mask|>" not in filled and "right):" in filled
    said = capsys.readouterr().out
    assert f"validation loss: {loss:.4f} nats per token, perplexity" in said
    assert f'AutoModelForMaskedLM.from_pretrained("{folder}")' in said

    model = AutoModelForMaskedLM.from_pretrained(folder)
    assert type(model) is type(trainer.model) and model.config.causal is False
    guesses = pipeline("fill-mask", str(folder), top_k=3)("The wa<|mask|>e of a <|mask|>ey")
    assert [len(of_one_mask) for of_one_mask in guesses] == [3, 3]


def test_the_reported_figures_are_those_of_every_hidden_token_once(tiny_run, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(12):  # of different lengths
        (folder / f"{number:02}.txt").write_text(prose(20 + 9 * number, number))
    flags = ("--documents", "apart", "--validation_fraction", "0.3", "--per_device_eval_batch_size", "3")
    trainer = tiny_run(*MASKED, *flags, "--train_file", str(folder))
    nats, tokens, hits = 0.0, 0, 0
    for example in trainer.eval_dataset:
        with torch.no_grad():
            logits = trainer.model.eval()(example["input_ids"][None]).logits[0]
        hidden = example["labels"] != IGNORED
        nats += F.cross_entropy(logits[hidden], example["labels"][hidden], reduction="sum").item()
        hits += (logits.argmax(-1) == example["labels"])[hidden].sum().item()
        tokens += hidden.sum().item()
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(nats / tokens, rel=1e-4)
    assert metrics["eval_accuracy"] == pytest.approx(hits / tokens)


@pytest.mark.slow
def test_masked_training_learns(tiny_run):
    flags = ("--max_steps", "40", "--eval_steps", "20", "--ema_decay", "0", "--logging_steps", "40")
    history = tiny_run(*MASKED, *flags).state.log_history
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_a_resumed_run_draws_the_same_masks(tiny_run, tmp_path):
    flags = (*MASKED, "--max_steps", "4", "--save_steps", "2", "--gradient_accumulation_steps", "2", "--stride", "32")
    tiny_run(*flags, folder="whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "part" / "checkpoint-2")
    tiny_run(*flags, "--resume_from_checkpoint", folder="part")
    whole, part = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "part"))
    assert all(torch.equal(part[name], weight) for name, weight in whole.items())
    assert (tmp_path / "whole" / "sample.txt").read_text() == (tmp_path / "part" / "sample.txt").read_text()


def test_a_prompt_is_filled_and_a_bidirectional_config_needs_no_task(tiny_run, tmp_path):
    trainer = tiny_run(
        "--tokenizer", "bytes", "--model", "hidden_size=16", "num_hidden_layers=1", "causal=false",
        "--max_steps", "2", "--sample_prompt", "the wa<|mask|>e",
    )  # fmt: skip
    sample = (tmp_path / "run" / "sample.txt").read_text()
    assert sample.startswith("----- masked:\nthe wa<|mask|>e\n") and "right" not in sample
    ids = AutoTokenizer.from_pretrained(tmp_path / "run")("the wa<|mask|>e", return_tensors="pt").input_ids[0]
    filled = fill(trainer.model, trainer.processing_class, ids)
    assert torch.equal(filled == ids, ids != trainer.processing_class.mask_token_id)
    assert not set(filled.tolist()) & set(trainer.processing_class.all_special_ids)


def test_a_prompt_without_a_gap_gets_one_at_its_end(tiny_run, tmp_path):
    tiny_run(*MASKED, "--max_steps", "1", "--sample_prompt", "the wav")
    assert (tmp_path / "run" / "sample.txt").read_text().startswith("----- masked:\nthe wav<|mask|>\n")


def test_a_masked_model_trains_on(tiny_run, tmp_path):
    tiny_run(*MASKED, "--max_steps", "2", folder="base")
    base = str(tmp_path / "base")
    tiny_run("--model_name_or_path", base, "--model", "hidden_dropout_prob=0.0", "--max_steps", "2", folder="more")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "more")) == len(AutoTokenizer.from_pretrained(base))


# Bad input


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--mlm_probability 1", "mlm_probability: 1.0"),
        ("--mlm_probability 0", "mlm_probability: 0.0"),
        ("--data_format alpaca", "task: 'masked' hides tokens of plain text"),
        ("--model causal=true", "causal: True; .* needs causal=False in its config"),
        ("--preset python-code --task causal --model hidden_size=16", "needs causal=True in its config"),
        ("--documents apart", "0.1 of 1 whole documents leaves none to train on"),
        ("--tokenizer words", "characters, bytes, bpe"),
        ("--task filling", "task"),
    ],
)
def test_bad_flags(text_file, tmp_path, flags, message):
    start = [*TINY, *MASKED, "--train_file", str(text_file), "--output_dir", str(tmp_path / "run")]
    with pytest.raises(HoloError, match=message) as error:
        main([*start, *flags.split()])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_family_without_a_masked_head_is_refused(text_file, tmp_path):
    sizes = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes)).save_pretrained(tmp_path / "llama")
    make_tokenizer("bytes", []).save_pretrained(tmp_path / "llama")
    flags = ("--model_name_or_path", str(tmp_path / "llama"), "--train_file", str(text_file))
    with pytest.raises(HoloError, match="task: 'llama' has no model for the task 'masked', only for 'causal'"):
        main([*TINY, *MASKED, *flags, "--output_dir", str(tmp_path / "run")])
