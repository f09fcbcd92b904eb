"""`hf-holo convert`, from the command line to the files, with tiny random teachers."""

import csv
import errno
import importlib
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BartConfig,
    Phi3Config,
    T5Config,
    ViTConfig,
)

import hf_holo  # noqa: F401, registers the quantizer
from hf_holo import HoloError
from hf_holo.conversion import work_folder
from hf_holo.conversion.convert import command
from hf_holo.conversion.convert import linears as convert_linears
from hf_holo.conversion.convert.linears import CalibratedSurgery
from hf_holo.conversion.surgery import refit
from hf_holo.data.documents import python_help
from hf_holo.data.tokenizers import make_tokenizer
from hf_holo.modeling.harmonics import HoloLinear

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
WINDOW = 48
QUICK = ["--block_size", str(WINDOW), "--tokens", "1152", "--fisher_tokens", "384", "--eval_windows", "4"]
QUICK += ["--sample_tokens", "5"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> list[str]:
    """Two text files."""
    folder = tmp_path_factory.mktemp("texts")
    (help_text,) = python_help()
    parts = {"a.txt": help_text[:12000], "b.txt": help_text[50000:60000]}
    for name, text in parts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [str(folder / name) for name in parts]


@pytest.fixture(scope="module")
def tokenizer(texts):
    tokenizer = make_tokenizer("characters", [Path(path).read_text(encoding="utf-8") for path in texts])
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    return tokenizer


@pytest.fixture
def saved(tmp_path, make_teacher, tokenizer):
    """Save a teacher with its tokenizer, and name its folder."""

    def save(name: str = "llama", dtype: torch.dtype = torch.float32) -> str:
        folder = tmp_path / "teacher"
        make_teacher(name, dtype, vocab_size=len(tokenizer)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return save


def run(*words: str) -> None:
    command.main([*map(str, words), *QUICK])


def load(folder: Path | str, auto=AutoModelForCausalLM):
    return auto.from_pretrained(folder).eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 40)[None]).logits


def fingerprint(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


# What it delivers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["phi3", "gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "bert"))]
)
def test_every_architecture_converts_and_loads(saved, texts, tmp_path, name):
    """Fused projections (Phi-3), Conv1D (GPT-2), an encoder (BERT)."""
    teacher, out = saved(name), tmp_path / "out"
    before = fingerprint(teacher)
    run(teacher, out, "--ratio", "0.7", "--train_file", *texts)
    auto = AutoModelForMaskedLM if name == "bert" else AutoModelForCausalLM
    student = load(out, auto)
    assert any(isinstance(module, HoloLinear) for module in student.modules())
    assert fingerprint(teacher) == before
    report = json.loads((out / "report.json").read_text())
    assert report["kept"] == pytest.approx(0.7, abs=0.01)
    assert [row["text"] for row in report["texts"]] == ["a.txt", "b.txt"]
    assert all(0 < row["ratio"] < 3 for row in report["texts"])
    files = {"README.md", "layers.csv", "ranks.png", "error.png", "config.json", "model.safetensors"}
    assert files | ({"sample.txt"} if name != "bert" else set()) <= {path.name for path in out.iterdir()}
    assert (
        AutoTokenizer.from_pretrained(out)("print").input_ids
        == AutoTokenizer.from_pretrained(teacher)("print").input_ids
    )
    assert not work_folder.work_path(out).exists()


def test_reloaded_output_is_identical(saved, texts, tmp_path, monkeypatch):
    students, apply = [], CalibratedSurgery.apply
    monkeypatch.setattr(CalibratedSurgery, "apply", lambda *args: students.append(apply(*args)) or students[-1])
    run(saved(), tmp_path / "out", "--train_file", *texts)
    assert torch.equal(logits(students[0]), logits(load(tmp_path / "out")))


@pytest.mark.slow
def test_more_numbers_keep_more_meaning(saved, texts, tmp_path):
    teacher = saved()
    errors = []
    for ratio in ("0.95", "0.6", "0.3"):
        run(teacher, tmp_path / ratio, "--ratio", ratio, "--train_file", *texts)
        errors.append(float((logits(load(tmp_path / ratio)) - logits(load(teacher))).square().mean()))
    assert errors == sorted(errors)
    assert errors[0] < 0.02 * float(logits(load(teacher)).var())


@pytest.mark.slow
def test_kept_share_is_what_the_files_hold(saved, texts, tmp_path):
    teacher, out = saved(), tmp_path / "out"
    run(teacher, out, "--ratio", "0.6", "--train_file", *texts)
    in_blocks = [
        sum(tensor.numel() for key, tensor in load_file(Path(folder) / "model.safetensors").items() if "_proj" in key)
        for folder in (out, teacher)
    ]
    report = json.loads((out / "report.json").read_text())
    assert report["kept"] == in_blocks[0] / in_blocks[1]
    assert report["numbers"]["student"] == sum(t.numel() for t in load_file(out / "model.safetensors").values())
    with (out / "layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    assert sum(int(row["stored"]) for row in rows) == in_blocks[0]


@pytest.mark.slow
def test_attention_only(saved, texts, tmp_path):
    run(saved(), tmp_path / "out", "--recipe", "convert-attention", "--train_file", *texts)
    student = load(tmp_path / "out")
    assert {name.split(".")[-2] for name, m in student.named_modules() if isinstance(m, HoloLinear)} == {"self_attn"}


@pytest.mark.slow
def test_keep_first_last_and_exclude(saved, texts, tmp_path):
    run(saved(), tmp_path / "out", "--keep_first", "1", "--exclude", "o_proj", "--train_file", *texts)
    converted = [name for name, m in load(tmp_path / "out").named_modules() if isinstance(m, HoloLinear)]
    assert converted
    assert not any(".layers.0." in name or "o_proj" in name for name in converted)


def test_harmonic_method_regenerates_its_bases(saved, texts, tmp_path):
    teacher, out = saved(), tmp_path / "out"
    run(teacher, out, "--method", "harmonic", "--basis", "dct", "--harmonics", "8", "--train_file", *texts)
    student = load(out)
    assert student.model.layers[0].mlp.up_proj.harmonics == 8
    assert not any("basis" in key for key in load_file(out / "model.safetensors"))
    assert json.loads((out / "report.json").read_text())["recipe"]["basis"] == "dct"
    assert (out / "ranks.png").exists() and (out / "error.png").exists()
    dense = load(teacher)
    with (out / "layers.csv").open() as file:
        for row in csv.DictReader(file):
            old, new = (model.get_submodule(row["layers"]).weight.detach() for model in (dense, student))
            error = float((new - old).square().sum() / old.square().sum())
            assert float(row["relative_squared_error"]) == pytest.approx(error, rel=1e-3)
            assert 0 < error < 1


def test_recipe_file_and_card(saved, texts, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"ratio": 0.5, "text": texts, "modules": ["mlp"], "seed": 3}))
    out = tmp_path / "out"
    run(saved(), out, "--recipe", recipe, "--ratio", "0.6")
    card = (out / "README.md").read_text()
    embedded = yaml.safe_load(card.partition("```yaml\n")[2].partition("```")[0])
    assert "\nmodel_name: out\n" in card  # `hf-holo push` puts the name of the repository in its place
    assert embedded["ratio"] == 0.6
    assert embedded["modules"] == ["mlp"]
    assert embedded["seed"] == 3
    assert "| a.txt | 4 |" in card


def test_half_precision_stays_half(saved, texts, tmp_path):
    run(saved("phi3", torch.bfloat16), tmp_path / "out", "--ratio", "0.9", "--train_file", *texts)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["texts"][0]["ratio"] < 1.1


@pytest.mark.slow
def test_little_memory_gives_the_same_model(saved, texts, tmp_path):
    """Statistics of one site at a time: the text is read more often, nothing else changes."""
    teacher = saved()
    run(teacher, tmp_path / "roomy", "--train_file", *texts)
    run(teacher, tmp_path / "tight", "--memory", "1e-9", "--train_file", *texts)
    assert torch.equal(logits(load(tmp_path / "roomy")), logits(load(tmp_path / "tight")))


@pytest.mark.slow
def test_layers_are_refitted_unless_told_otherwise(saved, texts, tmp_path):
    teacher = saved()
    choices = {"by default": [], "asked for": ["--refit", "true"], "not": ["--refit", "false"]}
    students = {}
    for name, choice in choices.items():
        run(teacher, tmp_path / name, "--ratio", "0.6", *choice, "--train_file", *texts)
        students[name] = logits(load(tmp_path / name))
    assert torch.equal(students["by default"], students["asked for"])
    assert not torch.allclose(students["by default"], students["not"], atol=1e-3)


def test_only_calibrated_layers_can_be_refitted(saved, tmp_path):
    with pytest.raises(HoloError, match="refit"):
        run(saved(), tmp_path / "out", "--method", "harmonic", "--refit", "true")


@pytest.mark.slow
@pytest.mark.skipif(not BENCHMARKS.exists(), reason="the benchmarks live in the repository only")
def test_benchmark_compares_at_the_same_share(saved, texts, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    arguments = [
        "--window",
        str(WINDOW),
        *QUICK[2:-2],
        "--ratios",
        "0.8",
        "--attention_ratios",
        "0.4",
        "--results",
        str(tmp_path),
    ]
    importlib.import_module("surgery").main([saved(), "--text", *texts, *arguments])
    rows = json.loads((tmp_path / "surgery.json").read_text())["figures"]["rows"]
    assert [(row["method"], row["scope"]) for row in rows] == [
        ("teacher", "all"),
        ("calibrated", "all"),
        ("calibrated", "attention"),
        ("calibrated, not refitted", "attention"),
        ("calibrated, not refitted", "all"),
        ("activation-aware SVD per matrix", "all"),
        ("plain SVD per matrix", "all"),
        ("random basis", "all"),
    ]
    assert all(0.9 * row["ratio"] < row["kept"] <= row["ratio"] for row in rows[1:])


# Dry run ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_dry_run_names_every_module_and_needs_no_weights(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    folder = tmp_path / "config-only"
    Phi3Config(
        vocab_size=32064,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=32,
        num_attention_heads=32,
        architectures=["Phi3ForCausalLM"],
        pad_token_id=32000,
    ).save_pretrained(folder)
    command.main([str(folder), "--dry-run", "--recipe", "convert-original"])
    shown = capsys.readouterr().out
    assert "3,821,079,552 → 327,224,320" in shown
    assert "model.layers.31.mlp.gate_up_proj" in shown
    assert "model.norm" in shown
    assert sum(line.count("→ HoloLinear 64") for line in shown.splitlines()) == 128
    command.main(["--dry-run", str(folder), "--ratio", "0.8"])
    assert "128 of 195 modules converted, 80.0% of their values kept" in capsys.readouterr().out


# Resuming -----------------------------------------------------------------------------------------------------------


def stopping_after(calls: int, function, finished: list):
    """The function, which is interrupted when it has been called so often; `finished` takes its first arguments."""

    def stopping(first, *rest):
        if len(finished) == calls:
            raise KeyboardInterrupt
        finished.append(first)
        return function(first, *rest)

    return stopping


@pytest.mark.slow
def test_a_stopped_run_continues(saved, texts, tmp_path, monkeypatch, capsys):
    teacher, out, words = saved(), tmp_path / "out", ["--train_file", *texts, "--memory", "1e-5"]
    run(teacher, tmp_path / "whole", *words)
    finished, original = [], convert_linears.factorise
    monkeypatch.setattr(convert_linears, "factorise", stopping_after(5, original, finished))
    with pytest.raises(SystemExit):
        run(teacher, out, *words)
    assert not out.exists()
    assert "the same command resumes from there" in capsys.readouterr().out

    again = []
    monkeypatch.setattr(convert_linears, "factorise", lambda site, *rest: again.append(site) or original(site, *rest))
    run(teacher, out, *words)
    assert len(again) == 7
    assert not set(again) & set(finished)
    assert torch.equal(logits(load(out)), logits(load(tmp_path / "whole")))


@pytest.mark.slow
def test_refitting_goes_on_after_its_last_finished_block(saved, texts, tmp_path, monkeypatch):
    teacher, out, words = saved(), tmp_path / "out", ["--ratio", "0.6", "--train_file", *texts]
    run(teacher, tmp_path / "whole", *words)
    fitted, fit, judge = [], refit.fit, command.judge
    monkeypatch.setattr(refit, "fit", stopping_after(5, fit, fitted))  # in the second of three blocks of four sites
    with pytest.raises(SystemExit):
        run(teacher, out, *words)

    def stopping_at_the_student(model, job, work, who):
        if who == "student":
            raise KeyboardInterrupt
        return judge(model, job, work, who)

    fitted.clear()
    monkeypatch.setattr(refit, "fit", lambda *args: fitted.append(args) or fit(*args))
    monkeypatch.setattr(command, "judge", stopping_at_the_student)
    with pytest.raises(SystemExit):
        run(teacher, out, *words)
    assert len(fitted) == 8  # the two other blocks
    assert not out.exists()

    fitted.clear()
    monkeypatch.setattr(command, "judge", judge)
    run(teacher, out, *words)
    assert not fitted
    for name in ("model.safetensors", "layers.csv"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_unfinished_work_with_other_options_is_not_mixed_in(saved, texts, tmp_path, monkeypatch):
    teacher, out = saved(), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(convert_linears, "refit", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit):
            run(teacher, out, "--train_file", *texts)
    with pytest.raises(HoloError, match="unfinished run with other options"):
        run(teacher, out, "--ratio", "0.5", "--train_file", *texts)
    run(teacher, out, "--ratio", "0.5", "--overwrite", "--train_file", *texts)
    assert json.loads((out / "report.json").read_text())["kept"] == pytest.approx(0.5, abs=0.01)


# Bad input ----------------------------------------------------------------------------------------------------------


def refused(message: str, *words: str) -> None:
    with pytest.raises(HoloError, match=message) as caught:
        run(*words)
    assert "\n" not in str(caught.value)


def test_options_that_make_no_sense_are_refused(saved, texts, tmp_path):
    teacher, out = saved(), tmp_path / "out"
    text = ["--train_file", *texts]
    refused("'nowhere' matches none", teacher, out, "--modules", "nowhere", *text)
    refused(r"ratio: 0\.001 cannot be reached", teacher, out, "--ratio", "0.001", *text)
    refused(r"ratio: 1\.5 is not between", teacher, out, "--ratio", "1.5", *text)
    refused(r"harmonics: 8 is chosen", teacher, out, "--harmonics", "8", *text)
    refused("needs --train_file", teacher, out)
    refused(r"two are called 'a\.txt'", teacher, out, "--train_file", texts[0], texts[0])
    refused("seed: -1 is not", teacher, out, "--seed", "-1", *text)
    refused("3 shares for 2 texts", teacher, out, "--validation_fraction", "0.1", "0.2", "0.3", *text)
    refused("no file or folder", teacher, out, "--train_file", str(tmp_path / "missing.txt"))
    refused("tied to the input embeddings", teacher, out, "--modules", "lm_head", *text)
    refused("name a folder for the result", teacher)
    refused("is the teacher", teacher, teacher + "/inside", *text)
    refused("is not a model of transformers", str(tmp_path / "nothing"), out, *text)
    refused("neither a file nor one of convert-attention", teacher, out, "--recipe", "unknown", *text)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("ratios: 0.5")
    refused("sets the unknown option 'ratios'; did you mean ratio", teacher, out, "--recipe", str(recipe), *text)
    recipe.write_text("method: magic")
    refused("magic", teacher, out, "--recipe", str(recipe), *text)
    assert not out.exists()
    assert not work_folder.work_path(out).exists()


def test_a_short_text_is_refused(saved, texts, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("A few words. " * 40)
    refused("tokens to calibrate on, but its share", saved(), tmp_path / "out", "--train_file", texts[0], str(short))


def test_windows_longer_than_the_positions_are_refused(saved, texts, tmp_path):
    with pytest.raises(HoloError, match="block_size: 65 is longer than the 64 positions"):
        command.main([saved("gpt2"), str(tmp_path / "out"), "--train_file", *texts, "--block_size", "65"])


def test_a_teacher_without_tokenizer_is_refused(saved, texts, tmp_path):
    teacher = saved()
    for path in Path(teacher).glob("*token*"):
        path.unlink()
    refused("has no tokenizer", teacher, tmp_path / "out", "--train_file", *texts)


def test_activations_that_are_not_finite_are_refused(saved, texts, tmp_path):
    teacher, out = saved(), tmp_path / "out"
    model = load(teacher)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = math.nan
    model.save_pretrained(teacher)
    refused("are not finite", teacher, out, "--train_file", *texts)
    assert not out.exists()


def test_an_existing_output_stays_unless_overwritten(saved, texts, tmp_path):
    teacher, out = saved(), tmp_path / "out"
    run(teacher, out, "--train_file", *texts)
    before = fingerprint(str(out))
    refused("exists; name another folder, or give --overwrite", teacher, out, "--train_file", *texts)
    refused("cannot be reached", teacher, out, "--overwrite", "--ratio", "0.001", "--train_file", *texts)
    assert fingerprint(str(out)) == before
    run(teacher, out, "--overwrite", "--ratio", "0.5", "--train_file", *texts)
    assert json.loads((out / "report.json").read_text())["recipe"]["ratio"] == 0.5

    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("all I have")
    refused("is not an earlier conversion", teacher, precious, "--overwrite", "--train_file", *texts)
    (precious / "report.json").write_text('{"teacher": {}, "student": {}, "stages": []}')  # as a distillation's
    refused("is not an earlier conversion", teacher, precious, "--overwrite", "--train_file", *texts)
    assert (precious / "thesis.txt").exists()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that takes no folders")
def test_a_place_that_takes_no_folder_is_said_clearly(saved, texts):
    refused("'/proc/result.work' cannot be created", saved(), "/proc/result", "--train_file", *texts)


def test_a_full_disk_is_said_clearly_and_loses_nothing(saved, texts, tmp_path, monkeypatch):
    teacher, out = saved(), tmp_path / "out"
    run(teacher, out, "--train_file", *texts)
    before = fingerprint(str(out))
    with monkeypatch.context() as patch:
        patch.setattr(
            work_folder, "save_file", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left"))
        )
        refused("the disk is full", teacher, out, "--overwrite", "--seed", "1", "--train_file", *texts)
    with monkeypatch.context() as patch:
        patch.setattr(command.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
        refused("GiB of free disk space", teacher, out, "--overwrite", "--seed", "1", "--train_file", *texts)
    assert fingerprint(str(out)) == before


@pytest.mark.parametrize("config", [ViTConfig(), T5Config(), BartConfig()], ids=["vit", "t5", "bart"])
def test_other_models_than_causal_and_masked_ones_are_refused(config, tmp_path):
    config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForConditionalGeneration"]
    config.save_pretrained(tmp_path / "teacher")
    refused("neither a causal nor a masked language model; `apply_surgery`", tmp_path / "teacher", tmp_path / "out")


def test_a_converted_model_is_no_teacher(saved, texts, tmp_path):
    run(saved(), tmp_path / "out", "--train_file", *texts)
    refused("converted already", str(tmp_path / "out"), tmp_path / "twice", "--train_file", *texts)
    assert AutoConfig.from_pretrained(tmp_path / "out").model_type == "llama"
