"""The benchmark scripts run, at their smallest, and write reports that say where the figures come from."""

import csv
import importlib
import io
import itertools
import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, astuple, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from hf_holo import preset_model
from hf_holo.data.documents import stdlib_sources
from hf_holo.data.tokenizers import make_tokenizer
from hf_holo.modeling.cache import CACHE_NAME

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.exists(), reason="the benchmarks live in the repository only")


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs a script's main with its results in a temporary folder; returns the report and what was printed. What the
    README tells of a report must be tellable."""
    monkeypatch.syspath_prepend(BENCHMARKS)

    def run(script: str, *argv: object, report: str | None = None) -> tuple[dict, str]:
        importlib.import_module(script).main([*map(str, argv), "--results", str(tmp_path)])
        name, readme = report or script, importlib.import_module("readme")
        assert name not in readme.SUITE or f"| `{name}` |" in readme.table(tmp_path)
        return json.loads((tmp_path / f"{name}.json").read_text()), capsys.readouterr().out

    return run


def modules() -> list[str]:
    """Names of all scripts that measure something."""
    return sorted(path.stem for path in BENCHMARKS.glob("*.py") if path.stem not in ("readme", "run"))


@pytest.fixture
def suite(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("common.suite")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("It is the east, and Juliet is the sun. " * 40, encoding="utf-8")
    return path


TINY_FIT = ("--rows", 2, "--length", 16, "--width", 32, "--depth", 1)


def test_a_report_says_where_its_figures_come_from(run):
    report, printed = run("static_speed", "--width", 32, "--lengths", 64, 128, "--repeats", 1)
    assert report.keys() == {"benchmark", "figures", "seed", "seconds", "machine", "versions"}
    assert report["machine"]["cores"] >= 1 and report["machine"]["processor"] and report["machine"]["memory_gib"] > 0
    assert report["versions"]["torch"] == torch.__version__
    assert [row["times_tokens"] for row in report["figures"]["rows"]] == [1.0, 2.0]
    assert report["machine"]["processor"] in printed


def test_a_report_replaces_the_older_one_whole(run, tmp_path):
    for lengths in ((64, 128), (64,)):
        report, _ = run("static_speed", "--width", 32, "--lengths", *lengths, "--repeats", 1)
        assert len(report["figures"]["rows"]) == len(lengths)
    assert [path.name for path in tmp_path.iterdir()] == ["static_speed.json"]


def test_timings_take_turns(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    order = []
    tasks = {name: lambda name=name: order.append(name) for name in "ab"}
    medians = importlib.import_module("common.report").interleaved_medians(tasks, repeats=3, warmup=1)
    assert order == ["a", "b", *"ababab"] and medians.keys() == {"a", "b"}


def test_windowed_loss_scores_every_character_once(monkeypatch, text):
    """A model that always says the same: the loss is the mean of one log-probability per scored character."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    characters = importlib.import_module("common.characters")
    data = characters.CharacterText(text)
    logits = torch.randn(data.vocab_size, generator=torch.Generator().manual_seed(0))

    class Constant(torch.nn.Module):
        def forward(self, input_ids, use_cache):
            return type("Output", (), {"logits": logits.expand(*input_ids.shape, -1)})

    expected = -logits.log_softmax(-1)[data.validation[1:]].mean().item()
    assert characters.windowed_loss(Constant(), data.validation, window=50) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_llama_comparison(run, text, monkeypatch, optimizer):
    argv = (text, "--optimizer", optimizer, "--steps", 2, "--learning_rates", 0.001, 0.002, *TINY_FIT)
    name = f"llama_comparison_{optimizer}"
    report, printed = run("llama_comparison", *argv, report=name)
    runs = report["figures"]["runs"]
    assert [run["model"] for run in runs] == ["hsn", "hsn", "llama", "llama"]
    assert abs(runs[2]["parameters"] / runs[0]["parameters"] - 1) <= 0.03
    best = report["figures"]["best"]
    assert report["figures"]["advantage"] == pytest.approx(best["llama"] - best["hsn"])
    assert "lower by" in printed

    monkeypatch.setattr("llama_comparison.fit", lambda *_: pytest.fail("a finished run was repeated"))
    again, _ = run("llama_comparison", *argv, report=name)
    assert again["figures"] == report["figures"]


def test_design_choices(run, text):
    argv = (text, "--variants", "default", "write=cancel", "--seconds", 0.2, *TINY_FIT)
    report, _ = run("design_choices", *argv)
    assert [run["variant"] for run in report["figures"]["runs"]] == ["default", "write=cancel"]
    assert all(run["steps"] >= 1 for run in report["figures"]["runs"])

    argv = (text, "--family", "resonance", "--variants", "interference", "--steps", 2, "--seeds", 0, 1, *TINY_FIT)
    report, _ = run("design_choices", *argv, report="design_choices_resonance")
    runs = report["figures"]["runs"]
    assert [(run["seed"], run["steps"]) for run in runs] == [(0, 2), (1, 2)] and runs[0]["loss"] != runs[1]["loss"]
    assert report["figures"]["step_seconds"]["interference"] > 0


def test_every_design_choice_is_a_model(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    design_choices = importlib.import_module("design_choices")
    for family, variants in design_choices.VARIANTS.items():
        for options in variants.values():
            design_choices.make(family, vocab_size=11, hidden_size=128, num_hidden_layers=1, **options)


def test_pair_recall(run, monkeypatch):
    models = ("resonance", "resonance, memory of 64", "llama with filter")
    sizes = ("--rows", 2, "--pairs", 2, "--filler", 4, "--longer_filler", 40, "--sequences", 2, "--width", 32)
    argv = ("--models", *models, "--learning_rates", 0.002, 0.004, "--steps", 2, *sizes)
    report, _ = run("pair_recall", *argv)
    runs = report["figures"]["runs"]
    assert [(run["model"], run["learning_rate"]) for run in runs] == [(m, r) for m in models for r in (0.002, 0.004)]
    assert all(0 <= run[where] <= 1 for run in runs for where in ("near", "far"))

    best = importlib.import_module("pair_recall").best(runs)
    assert [run["model"] for run in best] == list(models)
    assert all(run["near"] <= chosen["near"] for chosen in best for run in runs if run["model"] == chosen["model"])

    monkeypatch.setattr("pair_recall.fit", lambda *_: pytest.fail("a finished run was repeated"))
    again, _ = run("pair_recall", *argv)
    assert again["figures"] == report["figures"]


def test_multi_query_recall(run, monkeypatch):
    models = ("hsn, write=cancel, num_phases=4", "llama with filter")
    sizes = ("--sizes", "2x16", "--tokens", 32, "--vocabulary", 32, "--width", 32, "--depth", 1, "--sequences", 4)
    argv = ("--models", *models, "--learning_rates", 0.002, "--steps", 2, "--seeds", 0, 1, *sizes)
    report, _ = run("multi_query_recall", *argv)
    runs = report["figures"]["runs"]
    assert [(run["model"], run["seed"]) for run in runs] == [(model, seed) for model in models for seed in (0, 1)]
    assert runs[0]["state_bytes"] > 0 and runs[-1]["state_bytes"] is None
    script = importlib.import_module("multi_query_recall")
    assert "2 pairs in 16 tokens" in script.table(report) and "attention has not learned" in script.table(report)

    monkeypatch.setattr("multi_query_recall.fit", lambda *_: pytest.fail("a finished run was repeated"))
    assert run("multi_query_recall", *argv)[0]["figures"] == report["figures"]


def test_far_recall(run, tmp_path, monkeypatch):
    sizes = (
        "--rows",
        2,
        "--width",
        32,
        "--depth",
        1,
        "--sequences",
        2,
        "--fillers",
        4,
        12,
        "--pairs",
        2,
        "--filler",
        4,
    )
    argv = ("--models", "hsn, far", "--learning_rates", 0.002, "--steps", 2, "--seeds", 0, *sizes)
    report, _ = run("far_recall", *argv)
    (only,) = report["figures"]["runs"]
    assert set(only["accuracies"]) == {"4", "12"} and (tmp_path / "far_recall.png").exists()
    script = importlib.import_module("far_recall")
    assert "12 tokens of filler" in script.table(report) and script.FAR in script.table(report)

    monkeypatch.setattr("far_recall.fit", lambda *_: pytest.fail("a finished run was repeated"))
    assert run("far_recall", *argv)[0]["figures"] == report["figures"]


def test_state_tracking(run, tmp_path):
    sizes = ("--rows", 2, "--width", 32, "--depth", 1, "--sequences", 2, "--lengths", 8, 48)
    argv = ("--models", "hsn", "--tasks", "parity", "S3", "--learning_rates", 0.002, "--steps", 2, "--seeds", 0, *sizes)
    report, _ = run("state_tracking", *argv)
    runs = report["figures"]["runs"]
    assert [run["task"] for run in runs] == ["parity", "S3"] and set(runs[0]["accuracies"]) == {"8", "48"}
    assert (tmp_path / "state_tracking_parity.png").exists()
    assert "48 tokens" in importlib.import_module("state_tracking").table(report)


def test_the_best_learning_rate_is_looked_for_beyond_the_edge(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    contenders = importlib.import_module("common.contenders")
    tried = []

    def score(rate: float, best: float) -> float:
        tried.append(rate)
        return 0.9 - abs(math.log2(rate / best))

    contenders.search((0.001, 0.002), partial(score, best=0.008))
    assert tried == [0.001, 0.002, 0.004, 0.008, 0.016]
    runs = [{"model": "a", "learning_rate": rate, "chosen_by": score(rate, 0.008)} for rate in (0.004, 0.008, 0.016)]
    runs += [{"model": "b", "learning_rate": rate, "chosen_by": rate} for rate in (0.1, 0.2)]
    rows = contenders.at_best_rate(runs, ("model",))
    assert [(row["model"], row["learning_rate"], row["at_edge"]) for row in rows] == [
        ("a", 0.008, False),
        ("b", 0.2, True),
    ]
    assert contenders.edge_note(rows).endswith("for b")
    assert contenders.options_of("hsn, mixer_types=[holographic,window], causal=false") == (
        "hsn",
        {"mixer_types": ["holographic", "window"], "causal": False},
    )


@pytest.mark.slow
def test_leaking_gate(run, text, tmp_path):
    image = tmp_path / "leak.png"
    report, _ = run(
        "leaking_gate", text, "--steps", 60, "--every", 25, "--learning_rate", 0.01, "--image", image, *TINY_FIT
    )
    circular, honest = report["figures"]["models"]
    assert circular["lookahead"] > 0 and honest["lookahead"] == 0
    assert circular["teacher_forced"] < circular["prefix_only"]
    assert honest["teacher_forced"] == pytest.approx(honest["prefix_only"], rel=1e-4)
    assert circular["parameters"] == honest["parameters"]
    points = list(csv.DictReader((tmp_path / "leaking_gate.csv").open()))
    assert [int(point["step"]) for point in points] == 2 * [0, 25, 50, 60]
    assert float(points[-1]["prefix_only"]) == honest["prefix_only"]
    assert image.read_bytes().startswith(b"\x89PNG")


def test_block_speed(run):
    report, _ = run("block_speed", "--shapes", "2x64x64", "--lengths", 64, 128, "--length_width", 32, "--repeats", 1)
    (row,) = report["figures"]["against_llama"]
    assert row["time_ratio"] == pytest.approx(row["hsn_ms"] / row["llama_ms"])
    assert [row["tokens"] for row in report["figures"]["time_per_token"]] == [64, 128]


@pytest.mark.parametrize("width", [128, 256, 512])
def test_the_compared_blocks_have_equal_parameters(monkeypatch, width):
    monkeypatch.syspath_prepend(BENCHMARKS)
    block_speed = importlib.import_module("block_speed")
    hsn, (llama, _) = block_speed.hsn_block(width), block_speed.llama_block(width)
    assert abs(block_speed.parameters(hsn) / block_speed.parameters(llama) - 1) <= 0.03


def test_decode_speed(run):
    argv = ("--contexts", 4, 70, "--tokens", 2, "--segment", 32, "--repeats", 1)
    report, _ = run("decode_speed", *argv)
    assert [row["context"] for row in report["figures"]["rows"]] == [4, 70]


@pytest.mark.slow
def test_saved_prefix(run):
    report, _ = run("saved_prefix", "--preset", "hsn-tiny", "--tokens", 40, "--repeats", 2)
    assert report["figures"]["tokens"] == 40 and report["figures"]["first_ms"] > 0


def test_muon_precision(run):
    report, printed = run("muon_precision", "--widths", 8, 16, "--repeats", 1)
    assert [row["width"] for row in report["figures"]["rows"]] == [8, 16] and "float32_ms" in printed


def test_generation_speed(run):
    argv = ("--contexts", 4, "--tokens", 2, "--repeats", 1, "--width", 32, "--depth", 1)
    report, _ = run("generation_speed", *argv)
    operations = {row["model"]: row["operations_per_token"] for row in report["figures"]["models"]}
    assert operations.keys() == {"hsn", "resonance", "holo", "llama", "gpt2", "mamba"}
    assert all(row["ms_per_token"] > 0 for row in report["figures"]["rows"])


def test_speculative(run):
    report, _ = run(
        "speculative", "--width", 32, "--depth", 1, "--vocab_size", 50, "--tokens", 12, "--guesses", 4, "--repeats", 1
    )
    for row in report["figures"]["rows"]:
        assert row["same_tokens"] and 1 < row["tokens_per_call"] <= 5 and row["cost_of_1"] == 1


def test_stepwise_loss(run, text, tmp_path, monkeypatch):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from hf_holo import HsnConfig, HsnForCausalLM

    vocabulary = {character: i for i, character in enumerate(sorted(set(text.read_text())))}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    checkpoint = tmp_path / "checkpoint"
    PreTrainedTokenizerFast(tokenizer_object=characters).save_pretrained(checkpoint)
    HsnForCausalLM(HsnConfig(vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=1)).save_pretrained(
        checkpoint
    )
    report, _ = run("stepwise_loss", checkpoint, text, "--rows", 2, "--length", 20)
    assert report["figures"]["tokens"] == 40
    assert report["figures"]["difference"] < 1e-4


@pytest.mark.slow
def test_the_shakespeare_recipe_reports_its_last_loss(run, text, tmp_path):
    text.write_text(text.read_text(encoding="utf-8") * 4, encoding="utf-8")
    folder = tmp_path / "run"
    first, _ = run("shakespeare", text, "--output_dir", folder, "--steps", 2)
    assert first["figures"]["steps"] == 2 and first["figures"]["tokens"] == 2 * 16 * 256
    assert 0 < first["figures"]["validation_loss"] < 4
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert (config["channel_mix"], config["hidden_dropout_prob"]) == ("gated", 0.1)  # the model of the recipe
    assert first["seconds"] > 0
    weights = (folder / "model.safetensors").stat().st_mtime_ns
    again, _ = run("shakespeare", text, "--output_dir", folder)
    assert again["figures"] == first["figures"]
    assert (folder / "model.safetensors").stat().st_mtime_ns == weights


@pytest.mark.slow
def test_the_shakespeare_recipe_takes_another_family(run, text, tmp_path):
    text.write_text(text.read_text(encoding="utf-8") * 4, encoding="utf-8")
    folder = tmp_path / "run"
    options = ["--family", "resonance", "--output_dir", folder, "--steps", 1]
    report, _ = run("shakespeare", text, *options, report="shakespeare_resonance")
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"] == "resonance"
    assert report["figures"]["parameters"] < 1_000_000


@pytest.mark.slow
def test_python_code(run, tmp_path, monkeypatch):
    """With the recipes at their smallest: a few files instead of the standard library."""
    train_once = importlib.import_module("common.recipe_runs").train_once
    (tmp_path / "code").mkdir()
    for name, source in stdlib_sources().items():
        if name.startswith("json/"):
            (tmp_path / "code" / Path(name).name).write_text(source, encoding="utf-8")
    small = {"train_file": tmp_path / "code", "validation_fraction": 0.3, "tokenizer": "bytes", "block_size": 64}
    small["model"] = ["hidden_size=32", "num_hidden_layers=1"]
    monkeypatch.setattr("python_code.train_once", lambda *argv: train_once(*argv, **small))
    argv = ("--runs", tmp_path / "runs", "--steps", 2, "--packages", "json", "tomllib")

    with pytest.raises(SystemExit, match="run the part filling"):
        run("python_code", *argv, "--parts", "classification")
    report, _ = run("python_code", *argv, "--parts", "filling", "completion")
    filling, completion = report["figures"]["rows"]
    assert filling["steps"] == completion["steps"] == 2 and filling["parameters"] > completion["parameters"]
    assert all(0 <= row["validation_accuracy"] < 1 and row["seconds"] > 0 for row in (filling, completion))

    report, _ = run("python_code", *argv)
    *trained, classified = report["figures"]["rows"]
    assert trained == [filling, completion]
    assert len(classified["accuracies"]) == 3 and report["seconds"] >= classified["seconds"] > 0
    assert f"{filling['parameters']:,}" in importlib.import_module("python_code").table(report)


@pytest.fixture
def photographs(tmp_path):
    """A folder of tables as those of CIFAR-10, with noise of one colour for each class in place of photographs."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageColumn
    from PIL import Image

    folder, random = tmp_path / "photographs", np.random.default_rng(0)
    folder.mkdir()
    for split, rows in (("train", 40), ("test", 12)):
        labels = [row % 10 for row in range(rows)]
        pixels = [(random.random((32, 32, 3)) * [25 * n, 128, 250 - 25 * n]).astype(np.uint8) for n in labels]
        features = Features({"image": ImageColumn(), "label": ClassLabel(10)})
        table = {"image": [Image.fromarray(p) for p in pixels], "label": labels}
        Dataset.from_dict(table, features).to_parquet(folder / f"{split}.parquet")
    return folder


def test_vision(run, photographs, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    argv = (photographs, "--epochs", 1, "--rows", 8, "--sides", 16, 32, "--seeds", 0)
    report, _ = run("vision", *argv, "--models", "resonance", "--learning_rates", 0.002, report="vision_cifar10")
    report, _ = run("vision", *argv, "--learning_rates", 0.002, report="vision_cifar10")
    runs = report["figures"]["runs"]
    assert [r["model"] for r in runs] == ["resonance", "plain", "vit", "mixer"]  # the first was kept
    sizes = [r["parameters"] for r in runs]
    assert all(abs(size / sizes[0] - 1) < 0.05 for size in sizes)
    assert all(0 <= r["accuracy"] <= 1 for r in runs) and set(report["figures"]["speed"]) == {"16", "32"}
    vision = importlib.import_module("vision")
    assert "MLP-Mixer" in vision.table(report) and "ViT" in vision.sentence(report)


def test_augmented_pictures_are_shifted_and_mirrored(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    vision = importlib.import_module("vision")
    ramp = torch.arange(1.0, 257).view(1, 1, 16, 16)
    for channels, turns in ((1, {1.0}), (3, {1.0, -1.0})):
        got = vision.augmented(ramp.expand(64, channels, 16, 16), torch.Generator().manual_seed(0))
        middle = got[:, 0, 8]
        assert set((middle[:, 9] - middle[:, 8]).tolist()) == turns
        assert len(set(middle[:, 8].tolist())) > 10 and got.shape == (64, channels, 16, 16)


@pytest.fixture
def spoken(tmp_path):
    """A folder of tables as those of the Free Spoken Digit Dataset, with short tones in place of digits."""
    from datasets import Audio, ClassLabel, Dataset

    soundfile, folder = pytest.importorskip("soundfile"), tmp_path / "spoken"
    folder.mkdir()
    for split, takes in (("train", 4), ("test", 1)):
        rows = []
        for speaker in ("george", "jackson", "lucas", "nicolas", "theo", "yweweler"):
            for label in range(takes):
                content = io.BytesIO()
                tone = torch.sin(torch.arange(1200 + 400 * label) * (0.1 + 0.2 * label)).numpy()
                soundfile.write(content, tone, 8000, format="WAV")
                row = {"audio": {"bytes": content.getvalue(), "path": "digit.wav"}, "label": label, "speaker": speaker}
                rows.append(row)
        table = Dataset.from_list(rows).cast_column("audio", Audio(sampling_rate=8000, decode=False))
        table.cast_column("label", ClassLabel(10)).to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.mark.slow
def test_audio(run, spoken, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    audio = importlib.import_module("audio")
    monkeypatch.setattr(audio, "speed", partial(audio.speed, width=16, depth=1))
    argv = (spoken, "--epochs", 1, "--rows", 4, "--width", 32, "--depth", 1, "--left_out", "theo")
    report, _ = run("audio", *argv, "--models", "resonance", "--learning_rates", 0.002, 0.004)
    report, _ = run("audio", *argv, "--learning_rates", 0.004)
    runs = report["figures"]["runs"]
    told = [(r["model"], r["learning_rate"], r["held_out"]) for r in runs]
    assert len(set(told)) == len(told) == 7  # what was there is kept and not repeated
    assert max(r["parameters"] for r in runs) < 1.11 * min(r["parameters"] for r in runs)
    assert all(0 <= r["accuracy"] <= 1 for r in runs) and report["figures"]["speed"]["minute"] > 0
    assert "Spectrogram Transformer" in audio.table(report) and "one seed" in audio.sentence(report)


def test_batches_of_sounds_hold_similar_lengths_and_every_recording_once(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    lengths = [(17 * n) % 100 for n in range(100)]
    batches = importlib.import_module("audio").batches(lengths, 4, np.random.default_rng(0))
    assert sorted(index for batch in batches for index in batch) == list(range(100))
    spreads = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in batches]
    assert sum(spreads) / len(spreads) < 30  # of random ones it is 60


@pytest.mark.slow
@pytest.mark.parametrize("task", ["digit", "sum", "new_pairs"])
def test_multimodal(run, shared_data, task):
    sizes = ("--train_size", 40, "--test_size", 40, "--steps", 1, "--rows", 4, "--seeds", 0, "--learning_rates", 0.001)
    argv = (shared_data / "mnist", shared_data / "fsdd", "--task", task, *sizes)
    run("multimodal", *argv, "--fusions", "binding", report=f"multimodal_{task}")
    alone = ("--alone",) if task == "digit" else ()
    report, _ = run("multimodal", *argv, *alone, report=f"multimodal_{task}")
    runs = report["figures"]["runs"]
    told = [(r["fusion"], r["senses"]) for r in runs]
    assert len(set(told)) == len(told) == (10 if task == "digit" else 4)  # what was there is kept and not repeated
    whole = [r for r in runs if r["senses"] == runs[0]["senses"]]
    assert max(r["parameters"] for r in whole) < 1.05 * min(r["parameters"] for r in whole)
    assert all(0 <= share <= 1 for r in runs for share in r["right"].values())
    script = importlib.import_module("multimodal")
    assert "averaging" in script.table(report) and "one seed" in script.sentence(report)
    assert ("alone" in script.table(report)) == (task == "digit")


def test_pairs_of_digits_are_held_out_of_every_row_and_column(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    held_out = importlib.import_module("multimodal").held_out_pairs()
    assert held_out.sum(0).tolist() == held_out.sum(1).tolist() == [2] * 10


def test_the_readme_shows_what_the_reports_say(run, tmp_path, monkeypatch):
    run("static_speed", "--width", 32, "--lengths", 64, 128, "--repeats", 1)
    table = importlib.import_module("readme").table(tmp_path)
    assert "`static_speed`" in table and "2 times the tokens (128)" in table
    assert "`block_speed`" not in table  # it has not been run
    assert torch.__version__ in importlib.import_module("readme").machines(tmp_path)


def test_every_page_shows_the_figures_of_the_latest_reports(monkeypatch):
    """After a benchmark has run, `python benchmarks/readme.py` brings README and docs up to date."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    readme = importlib.import_module("readme")
    for (page, mark), make in readme.PAGES.items():
        text = page.read_text(encoding="utf-8")
        assert readme.filled(text, mark, make()) == text, (page.name, mark)


@pytest.mark.parametrize("script", [*modules(), "run"])
def test_every_script_explains_itself(monkeypatch, capsys, script):
    monkeypatch.syspath_prepend(BENCHMARKS)
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(script).main(["--help"])
    assert stopped.value.code == 0 and "--results" in capsys.readouterr().out


def test_the_suite_has_every_script_and_every_result(suite):
    assert {benchmark.script for benchmark in suite.SUITE.values()} == set(modules())
    assert {path.stem for path in (BENCHMARKS / "results").glob("*.json")} <= set(suite.SUITE)
    for name, benchmark in suite.SUITE.items():
        assert callable(benchmark.module.sentence) and callable(benchmark.module.main)
        if benchmark.quick:
            assert not benchmark.inputs and 0 < suite.recorded_seconds(name) <= 120, name


def test_every_sentence_says_how_far_it_can_be_trusted(suite):
    """How many seeds, or that it is a median; what is measured on one model or without training says that."""
    report = importlib.import_module("common.report")
    for name, benchmark in suite.SUITE.items():
        result = report.read_report(name)
        if result["seconds"]:
            assert re.search(r"seed|median|one trained model", benchmark.module.sentence(result)), name


def test_sentences_say_what_a_reader_cannot_see(suite):
    """Where a comparison favours us for another reason than the model."""
    report = importlib.import_module("common.report")

    def said(name: str) -> str:
        return suite.SUITE[name].module.sentence(report.read_report(name))

    assert "the Llama has no short filter" in said("llama_comparison_muon")
    assert "BERT has barely begun to learn" in said("infilling")
    assert "llama with filter 100% / " in said("pair_recall")  # attention solves it at the distance of the training
    int8 = next(part for part in said("export_trained").split("; ") if "int8" in part)
    rows = report.read_report("export_trained")["figures"]["rows"]
    (share,) = (row["equal_tokens"] for row in rows if row["format"] == "onnx-int8")
    assert f"{share:.0%} of the generated tokens equal" in int8


def test_a_baseline_that_has_learned_is_not_called_none(suite):
    pair_recall, infilling = importlib.import_module("pair_recall"), importlib.import_module("infilling")
    assert pair_recall.caveat({"runs": [{"model": "llama", "near": 0.99}, {"model": "hsn", "near": 0.1}]}) == ""
    assert infilling.caveat({"best": {"bert": 0.4}, "commonest_token": 0.03, "steps": 9}) == ""


def test_the_readme_has_five_short_lines(suite):
    lines = importlib.import_module("readme").headlines().splitlines()
    assert len(lines) == 2 + 5 and max(map(len, lines)) <= 200


def test_the_page_explains_every_benchmark(suite):
    readme = importlib.import_module("readme")
    page = readme.PAGE.read_text(encoding="utf-8")
    by_hand = re.sub(r"<!-- (\w+): begin -->.*?<!-- \1: end -->", "", page, flags=re.DOTALL)
    for name in suite.SUITE:
        assert f"`{name}`" in by_hand, name
    images = {path.name for path in (readme.DOCS / "images").glob("*.png") if path.stem in modules()}
    assert images == {Path(image).name for image in re.findall(r"!\[.*?\]\((.*?)\)", page)}


# The runner ---------------------------------------------------------------------------------------------------------

WRITES = "import sys, pathlib; pathlib.Path(sys.argv[-1], '{0}.json').write_text('{{}}')"


@pytest.fixture
def runner(suite, monkeypatch, tmp_path):
    """The runner with four scripts: two that write a result, one that fails halfway, one that needs a text."""
    run = importlib.import_module("run")
    scripts = {"first": WRITES.format("first"), "broken": WRITES.format("broken") + "; raise SystemExit(3)"}
    scripts |= {"reads": WRITES.format("reads"), "last": WRITES.format("last")}
    for name, script in scripts.items():
        (tmp_path / f"{name}.py").write_text(script, encoding="utf-8")
    benchmarks = {name: suite.Benchmark(name, quick=True) for name in scripts}
    benchmarks["reads"] = suite.Benchmark("reads", "TINYSHAKESPEARE")
    monkeypatch.setattr(run, "BENCHMARKS", tmp_path)
    monkeypatch.setattr(run, "SUITE", benchmarks)
    monkeypatch.setattr(run, "recorded_seconds", lambda name: {"first": 30.0}.get(name, 0.0))
    monkeypatch.setenv("TINYSHAKESPEARE", "")
    return run


def test_the_runner_goes_through_all_and_says_what_failed(runner, tmp_path, capfd, text):
    results = tmp_path / "results"
    with pytest.raises(SystemExit) as stopped:
        runner.main(["all", "--results", str(results)])
    said = capfd.readouterr().out
    assert stopped.value.code == 1
    assert "first: about 30 s" in said and "needs TINYSHAKESPEARE" in said and "4 of 4 to measure, about 30 s" in said
    assert said.index("first: done") < said.index("broken: failed with exit status 3") < said.index("last: done")
    assert said.rstrip().endswith("broken: failed with exit status 3")
    assert sorted(path.name for path in results.glob("*.json")) == ["broken.json", "first.json", "last.json"]

    (tmp_path / "broken.py").write_text(WRITES.format("broken"), encoding="utf-8")  # it had left half a result
    runner.main(["all", "--results", str(results), "--tinyshakespeare", str(text)])
    said = capfd.readouterr().out
    assert "first: measured already" in said and "2 of 4 to measure" in said
    assert "broken: done" in said and "reads: done" in said and str(text) in said
    runner.main(["all", "--results", str(results)])
    assert "0 of 4 to measure" in capfd.readouterr().out


def test_the_quick_suite_needs_no_input(runner, tmp_path, capfd):
    runner.main(["quick", "--results", str(tmp_path / "results"), "--plan"])
    said = capfd.readouterr().out
    assert "reads" not in said and "3 of 3 to measure" in said and not (tmp_path / "results").exists()


def test_the_runner_names_an_input_that_is_not_there(runner, tmp_path, capfd, monkeypatch):
    runner.main(["all", "--results", str(tmp_path), "--only", "reads", "--tinyshakespeare", str(tmp_path / "none.txt")])
    assert f"there is no {tmp_path / 'none.txt'}" in capfd.readouterr().out


# Every script at its smallest ---------------------------------------------------------------------------------------


def test_memory_recall(run, tmp_path):
    sizes = ("--dimensions", 64, 1024, "--pairs", 2, 48, "--codes", 50, "--rounds", 2, "--reads", 96)
    report, _ = run("memory_recall", *sizes)
    assert [(p["dimension"], p["pairs"]) for p in report["points"]] == [(64, 2), (64, 48), (1024, 2), (1024, 48)]
    assert len(list(csv.DictReader((tmp_path / "memory_recall.csv").open()))) == 4
    assert (tmp_path / "memory_recall.png").read_bytes().startswith(b"\x89PNG")
    table = importlib.import_module("memory_recall").table(report)
    assert f"| 48 | {report['points'][-1]['one_shot']:.1%} |" in table and "| 64 |" in table


def test_llama_filter(run, text):
    report, _ = run("llama_filter", text, "--steps", 2, 3, *TINY_FIT)
    assert [run["steps"] for run in report["figures"]["runs"]] == [2] * 4 + [3] * 4
    runs = {run["model"]: run for run in report["figures"]["runs"][4:]}
    assert list(runs) == ["hsn", "hsn without filter", "llama", "llama with filter"]
    losses = {name: run["loss"] for name, run in runs.items()}
    assert len(set(losses.values())) == 4
    assert runs["llama with filter"]["parameters"] - runs["llama"]["parameters"] == 32 * 4  # a gate: 3 logits, a scale
    compared = {"figures": {"best": {"hsn": 1.234, "llama": 1.345}, "settings": {"steps": 3}}}
    said = importlib.import_module("llama_comparison").headline(compared, report)
    assert f"({losses['llama with filter']:.2f} with" in said and "1.23 nats" in said


@pytest.mark.slow
def test_conformance(run, tmp_path):
    models = ("circular gate", "toy")
    report, printed = run("conformance", "--seeds", 2, "--slow_seeds", 0, "--models", *models)
    wrong, (right,) = report["figures"]["wrong"], report["figures"]["right"]
    assert [row["check"] for row in wrong] == ["suffix exchange", "zero upper triangle", "stepwise loss"]
    assert all(row["caught"] == 2 for row in wrong) and right["accused"] == 0 and right["checks run"] > 40
    assert "circular gate" in printed
    table = importlib.import_module("readme").table(tmp_path)
    assert "1 of 1 models that are wrong on purpose caught with every one of 2 seeds" in table


@pytest.mark.slow
def test_holo_speed(run, monkeypatch):
    argv = ("--width", 64, "--harmonics", 8, "--tokens", 32, "--repeats", 1, "--depth", 1, "--context", 4)
    monkeypatch.setattr(importlib.import_module("holo_speed"), "PREFILL", 8)
    report, _ = run("holo_speed", *argv)
    layers, decoding = report["figures"]["layers"], report["figures"]["decoding"]
    assert all(row["largest"] == (2 if row["layer"] == "nn.Linear" else 1) for row in layers)
    assert all(row["times_quicker"] == 1 for row in layers if row["layer"] == "nn.Linear")
    assert [row["factors"] for row in decoding] == ["thin"] * 2 + ["thin, prefill"] * 2 + ["merged"]
    assert all(0.79 <= row["kept"] <= 0.8 or 0.59 <= row["kept"] <= 0.6 for row in decoding)


@pytest.mark.slow
def test_holo_curve(run, text, tmp_path, monkeypatch):
    image = tmp_path / "curve.png"
    argv = (text, "--steps", 2, "--harmonics", 4, 8, "--image", image, *TINY_FIT)
    report, printed = run("holo_curve", *argv)
    runs = report["figures"]["runs"]
    losses = {(run["basis"], run["harmonics"], run["learning_rate"]): run["loss"] for run in runs}
    assert len(losses) == len(runs)
    chosen = importlib.import_module("holo_curve").best(runs)
    assert [(run["basis"], run["harmonics"]) for run in chosen] == [
        ("dense", None),
        ("random", 4),
        ("random", 8),
        ("data", 4),
        ("data", 8),
    ]
    for best in chosen:
        for factor in (2, 0.5):
            assert losses[best["basis"], best["harmonics"], factor * best["learning_rate"]] >= best["loss"]
    dense, random, _, data, _ = chosen
    assert (
        random["block_parameters"] == data["block_parameters"] == pytest.approx(dense["block_parameters"] / 4, rel=0.2)
    )
    assert random["stored"] == random["block_parameters"] < data["stored"]
    gap = report["figures"]["above_dense_at_a_quarter"]["random"]
    assert gap == pytest.approx(random["loss"] - dense["loss"]) and "against the dense model" in printed
    assert len(list(csv.DictReader((tmp_path / "holo_curve.csv").open()))) == len(runs)
    assert image.read_bytes().startswith(b"\x89PNG")

    trained = []
    monkeypatch.setattr("holo_curve.fit", lambda model, *_: trained.append(model.config.attention_projections))
    again, _ = run("holo_curve", *argv)
    assert again["figures"] == report["figures"] and trained == ["dense"]  # whose directions are needed


def test_gradient_norms(run, tmp_path):
    image = tmp_path / "norms.png"
    argv = ("--depths", 1, 2, "--lengths", 16, 32, "--width", 8, "--modes", 4, "--seeds", 1, "--image", image)
    report, _ = run("gradient_norms", *argv)
    assert [row["weights"] for row in report["figures"]["rows"]] == ["magnitude and phase", "real and imaginary"]
    points = list(csv.DictReader((tmp_path / "gradient_norms.csv").open()))
    for polar, plain in zip(points[::2], points[1::2], strict=True):  # the same filters
        assert float(polar["loss"]) == pytest.approx(float(plain["loss"]), rel=1e-4)
    assert image.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_vocabulary(run, text):
    sizes = {"vocab_size": 300, "large_vocab_size": 5000, "large_width": 32, "width": 32, "depth": 1, "rows": 2}
    sizes |= {"steps": 2, "length": 16, "validation_tokens": 32}
    report, _ = run("vocabulary", text, *(word for name, value in sizes.items() for word in (f"--{name}", value)))
    rows, large = report["figures"]["runs"], report["figures"]["large_step"]
    assert [row["strategy"] for row in rows] == ["standard", "frequency_compressed", "adaptive", "hash"]
    assert all(row["excess"] == pytest.approx(row["loss"] - rows[0]["loss"]) for row in rows)
    assert large["compression"] > 5 and 0 < large["peak_gib"] < 4


@pytest.mark.slow
def test_long_context(run, monkeypatch):
    sizes = {"context": 90, "short": 30, "short_context": 20, "training_tokens": 40, "exact_tokens": 50, "tokens": 2}
    sizes |= {"stability_tokens": 100, "repeats": 1, "sizes": 7}
    argv = [word for name, value in sizes.items() for word in (f"--{name}", value)]
    long_context = importlib.import_module("long_context")
    monkeypatch.setattr(long_context, "in_own_process", lambda _, **part: long_context.run_part(**part))
    report, _ = run("long_context", *argv)
    figures = report["figures"]
    assert figures["reading"]["peak_gib"] >= figures["reading"]["before_gib"] > figures["reading"]["weights_gib"] > 0
    assert [row["tokens"] for row in figures["speed"]] == [30, 90] and figures["training"]["loss"] > 0
    (row,) = figures["pieces"]
    assert max(row["segment_length"], row["fed_in_pieces"]) < 1e-5 < row["largest"]
    short, long = figures["decoding"]
    assert short["state_bytes"] == long["state_bytes"] > 0
    assert figures["stability"][-1]["tokens"] == 100 and all(row["finite"] for row in figures["stability"])

    again, _ = run("long_context", *argv, "--parts", "pieces")
    assert again["figures"]["speed"] == figures["speed"]  # what is there stays
    other, _ = run("long_context", *argv, "--preset", "hsn-tiny", "--parts", "pieces", report="long_context_hsn-tiny")
    assert "segment_length" not in other["figures"]["pieces"][0]
    holo, _ = run(
        "long_context", *argv, "--preset", "holo-tiny", "--parts", "decoding", report="long_context_holo-tiny"
    )
    short, long = (row["state_bytes"] for row in holo["figures"]["decoding"])
    assert long / short > 4  # a cache of attention grows with its context


def in_forks(measure: Callable[..., dict], _: str, each: list[dict]) -> list[dict]:
    """As `in_own_processes`, without another start of Python."""
    with mp.get_context("fork").Pool(len(each)) as pool:
        return pool.starmap(measure, [tuple(arguments.values()) for arguments in each], 1)


def test_context_parallel(run, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    context_parallel = importlib.import_module("context_parallel")
    monkeypatch.setattr(context_parallel, "in_own_processes", partial(in_forks, context_parallel.measure))
    peaks = itertools.count(1.0)  # a fork begins with the peak of its parent, and may not rise above it
    monkeypatch.setattr(context_parallel, "peak_gib", partial(next, peaks))
    report, printed = run("context_parallel", "--tokens", 150, "--vocab_size", 32, "--processes", 1, 2)
    one, two = report["figures"]["rows"]
    assert (one["sent_per_layer"], one["relative"]) == (0, 1)
    assert two["sent_per_layer"] == two["sent_per_layer_short"] > 0
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
    assert two["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-5)
    assert "in each of 2, with losses that differ by" in context_parallel.sentence(report)
    assert context_parallel.table(report).count("| 1") and printed


@pytest.mark.slow
def test_cost_model(run, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    cost_model = importlib.import_module("cost_model")
    monkeypatch.setattr(cost_model, "in_own_processes", partial(in_forks, cost_model.measure))
    tiny = [
        cost_model.Setup("data", 1, 32, 1, 1, 16),
        *(cost_model.Setup(k, 2, 32, 1, 1, 16) for k in cost_model.KINDS),
    ]
    monkeypatch.setattr(cost_model, "FITTED", tiny)
    monkeypatch.setattr(cost_model, "LARGE", {"width": 64, "depth": 3, "bytes": 2})
    monkeypatch.setattr(cost_model, "PER_GPU", dict.fromkeys(cost_model.KINDS, (1, 32)))
    monkeypatch.setattr(cost_model, "PREDICTED", cost_model.Setup("data", 2, 48, 2, 1, 16))
    report, _ = run("cost_model", "--steps", 1)
    assert len(report["figures"]["fitted"]) == 4 and report["figures"]["predicted"]["setup"]["width"] == 48
    assert "of it computing" in cost_model.table(report) and "has not seen" in cost_model.sentence(report)


@pytest.mark.slow
def test_costs_are_counted_and_a_machine_is_found_from_them(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    cost_model = importlib.import_module("cost_model")
    one = cost_model.Setup("data", 1, width=64, depth=3, rows=2, length=32)
    model = cost_model.new_model(64, 3)
    ids = torch.zeros(2, 32, dtype=torch.long)
    with FlopCounterMode(display=False) as counted:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert cost_model.costs(one).operations == pytest.approx(counted.get_total_flops(), rel=0.01)
    four = {kind: cost_model.costs(replace(one, kind=kind, processes=4)) for kind in cost_model.KINDS}
    assert four["data"].bytes == 1.5 * 4 * model.num_parameters() and four["sharded"].bytes == 1.5 * four["data"].bytes
    state = sum(
        part.numel() for part in model.eval()(ids)[CACHE_NAME].layers[0].states.values() if part.is_floating_point()
    )
    assert four["context"].bytes - four["data"].bytes == pytest.approx(2 * 3 * 4 * state, rel=0.2)  # filters have some
    machine = cost_model.Machine(2e9, 3e7, 4e8, 5e-3, cores=2)
    rows = [{"setup": asdict(setup), "seconds": machine.seconds(setup)} for setup in cost_model.FITTED]
    assert astuple(cost_model.fit(rows, 2)) == pytest.approx(astuple(machine), rel=1e-6)


@pytest.mark.slow
def test_infilling(run, monkeypatch):
    sizes = {"steps": 2, "rows": 2, "length": 16, "width": 32, "depth": 1, "vocab_size": 300, "files": 12}
    argv = [*(word for name, value in sizes.items() for word in (f"--{name}", value)), "--validation_windows", 8]
    argv += ["--long_tokens", 200]
    report, printed = run("infilling", *argv, "--learning_rates", 0.001, 0.002)
    figures = report["figures"]
    assert [row["model"] for row in figures["rows"]] == ["resonance", "resonance", "bert", "bert"]
    assert abs(figures["rows"][2]["parameters"] / figures["rows"][0]["parameters"] - 1) <= 0.02
    assert figures["advantage"] == figures["best"]["resonance"] - figures["best"]["bert"]
    assert 0 < figures["commonest_token"] < 1 and "more often than bert" in printed
    assert figures["long_file"]["tokens"] == 200 and figures["long_file"]["peak_gib"] > 0

    monkeypatch.setattr("infilling.fit", lambda *_: pytest.fail("a finished run was repeated"))
    again, _ = run("infilling", *argv, "--learning_rates", 0.001, 0.002)
    assert again["figures"] == figures


@pytest.mark.slow
def test_both_models_of_infilling_learn_from_the_same_batches(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    infilling = importlib.import_module("infilling")
    data, collator = infilling.load(12, 300, 16, 8)
    first, again = (infilling.batches(data, collator, 2, seed=0) for _ in range(2))
    for one, other, _ in zip(first, again, range(3), strict=False):
        assert all(torch.equal(one[name], other[name]) for name in one)
    resonance, bert = (infilling.build(name, 300, 128, width=128, depth=4, seed=0) for name in infilling.MODELS)
    assert abs(bert.num_parameters() / resonance.num_parameters() - 1) <= 0.02
    assert bert.bert.embeddings.position_embeddings.weight.requires_grad
    assert len(infilling.hidden_tokens(data.validation)) > 8


def save_llama(folder, text, layers):
    """A tiny one with random weights, and a tokenizer for the text."""
    tokenizer = make_tokenizer("characters", [text.read_text()])
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": layers, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.3, eos_token_id=None, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_export(run, text, tmp_path, quick_export):
    tokenizer = make_tokenizer("characters", [text.read_text()])
    model = preset_model("hsn-tiny", vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    argv = ("--model", tmp_path / "model", "--text", text, "--formats", "torchscript")
    report, _ = run("export", *argv, report="export_trained")
    (row,) = report["figures"]["rows"]
    assert row["max_difference"] < 1e-4 and row["equal_tokens"] == 1
    assert abs(row["perplexity_rise"]) < 1e-4 and row["ms_per_token"] > 0


@pytest.mark.slow
def test_partial_transfer(run, text, tmp_path):
    save_llama(tmp_path / "model", text, layers=5)
    argv = (tmp_path / "model", "--text", text, "--window", 16, "--eval_windows", 2, "--folder", tmp_path / "runs")
    report, printed = run("partial_transfer", *argv, "--stage_steps", 2)
    figures = report["figures"]
    assert figures["layers"] == [1, 3]  # a quarter, rounded up
    (found,) = figures["texts"].values()
    assert [stage["stage"] for stage in found["stages"]] == ["before", "mixers", "logits"]
    (ratio,) = figures["ratios"].values()
    assert ratio == pytest.approx(math.exp(found["loss"] - found["teacher_loss"]))
    assert f"{ratio:.3f} (text.txt)" in printed


@pytest.mark.slow
def test_large_conversion(run, text, tmp_path):
    tiny = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = json.dumps({**tiny, "num_attention_heads": 2, "num_key_value_heads": 2})
    folder = tmp_path / "models"
    argv = (text, "--window", 16, "--tokens", 64, "--fisher_tokens", 16, "--config", config, "--folder", folder)
    report, printed = run("large_conversion", *argv)
    figures = report["figures"]
    assert (figures["blocks"], figures["depth"]) == (1, 2) and 0 < figures["kept"] <= 0.8
    assert figures["weights_gib"] == pytest.approx(2 * figures["parameters"] / 2**30)  # bfloat16
    assert f"at most {figures['peak_gib']:.2f} GiB of memory" in printed
    assert not folder.exists()


@pytest.mark.slow
def test_pareto(run, text, tmp_path):
    """Every point once; a later run measures only what is new, and students of an earlier one are used again."""
    save_llama(tmp_path / "model", text, layers=1)
    lines = [{"context": "It is the east, and Juliet is the", "target": "sun."}] * 3
    (tmp_path / "lambada.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    windows = ("--window", 16, "--tokens", 128, "--fisher_tokens", 64, "--rounding_tokens", 64, "--eval_windows", 2)
    argv = (tmp_path / "model", "--text", text, *windows, "--students", tmp_path / "students", "--repeats", 2)
    argv += ("--prefill", 8, "--lambada", tmp_path / "lambada.jsonl", "--passages", 2)
    report, _ = run("pareto", *argv, "--ratios", 0.6)
    pareto = importlib.import_module("pareto")
    rows = report["figures"]["rows"]
    names = [row["point"] for row in rows if row["form"] != pareto.TORCHAO]
    assert names == [
        *(f"no surgery, {form}" for form in ("float32", "bfloat16", "int8", "int4")),
        *(f"surgery 60%, {form}" for form in ("bfloat16", "int8", "int4")),
    ]
    sizes = {row["point"]: row["bytes"] for row in rows}
    assert sizes["no surgery, float32"] > sizes["no surgery, bfloat16"] > sizes["no surgery, int8"]
    assert all(row["text.txt"] > 1 and 0 <= row["lambada"] <= 1 and row["resident_bytes"] for row in rows)
    assert len(report["figures"]["speeds"]) == len(rows)
    joined = list(csv.DictReader((tmp_path / "pareto.csv").open()))
    assert [row["point"] for row in joined] == [row["point"] for row in rows]
    assert (tmp_path / "pareto.png").stat().st_size > 10_000
    assert "on the frontier" in pareto.sentence(report) and "no surgery, int4" in pareto.table(report)
    again, _ = run("pareto", *argv, "--ratios", 0.6, 0.5)
    assert [row for row in again["figures"]["rows"] if row["kept"] != 0.5] == rows and len(sizes) + 3 == len(
        again["figures"]["rows"]
    )
    assert len(again["figures"]["speeds"]) == len(again["figures"]["rows"])


def test_the_frontier_is_what_nothing_beats(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    pareto = importlib.import_module("pareto")
    sizes = {"whole": (100, 10.0), "small": (50, 11.0), "worse": (60, 12.0), "equal": (50, 11.0), "tiny": (10, 99.0)}
    rows = [{"point": n, "bytes": size, "a.txt": p, "b.txt": p} for n, (size, p) in sizes.items()]
    found = pareto.with_speeds({"figures": {"texts": ["a.txt", "b.txt"], "rows": rows, "speeds": []}})
    assert [row["point"] for row in found if row["frontier"]] == ["whole", "small", "equal", "tiny"]
    assert found[1]["relative_perplexity"] == pytest.approx(1.1)


@pytest.mark.slow
def test_surgery_and_distillation(run, text, tmp_path):
    """What the first converts and keeps, the second brings nearer to the teacher."""
    save_llama(tmp_path / "model", text, layers=1)
    kept = tmp_path / "students"
    windows = ("--window", 16, "--tokens", 128, "--fisher_tokens", 64, "--eval_windows", 2)
    argv = (tmp_path / "model", "--text", text, *windows, "--students", kept)
    report, _ = run("surgery", *argv, "--ratios", 0.5)
    rows = report["figures"]["rows"]
    surgery = importlib.import_module("surgery")
    both = [surgery.CALIBRATED, surgery.NOT_REFITTED]
    baselines = [surgery.PER_MATRIX, surgery.PLAIN, surgery.RANDOM]
    assert [row["method"] for row in rows if row["scope"] == "all"] == ["teacher", *both, *baselines]
    assert [row["method"] for row in rows if row["scope"] == "attention"] == both
    assert all(row["kept"] <= row["ratio"] for row in rows)
    assert rows[1]["text.txt, ratio"] == pytest.approx(rows[1]["text.txt"] / rows[0]["text.txt"])
    again, _ = run("surgery", *argv, "--ratios", 0.5, 0.7)
    assert [row for row in again["figures"]["rows"] if row["ratio"] != 0.7] == rows  # what is there stays
    assert len(again["figures"]["rows"]) == len(rows) + 1
    saved = {path: path.stat().st_mtime_ns for path in kept.rglob("*.safetensors")}
    (tmp_path / "surgery.json").unlink()
    scored, _ = run("surgery", *argv, "--ratios", 0.5)
    assert scored["figures"]["rows"] == rows
    assert {path: path.stat().st_mtime_ns for path in kept.rglob("*.safetensors")} == saved

    options = ("--steps", 20, "--ratios", 0.5, 0.4, "--folder", tmp_path / "distilled")
    report, _ = run("distillation", tmp_path / "model", kept, "--text", text, *options)
    done = report["figures"]["rows"]
    assert [(row["method"], row["scope"], row["recipe"]) for row in done] == [
        (surgery.CALIBRATED, "all", "distill-surgery"),
        (surgery.NOT_REFITTED, "attention", "distill-attention"),
    ]
    for row in done:
        (start,) = (r for r in rows if (r["method"], r["scope"]) == (row["method"], row["scope"]))
        assert row["steps"] == 20 and row["text.txt, ratio before"] == start["text.txt, ratio"]
        assert row["text.txt, ratio"] != row["text.txt, ratio before"] and row["trained"] > 0
    table = importlib.import_module("readme").table(tmp_path)
    assert "50% of all linear layers kept" in table and "after distillation" in table
