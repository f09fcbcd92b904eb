"""`hf-holo convert --to hsn`: from the command line to a student that learns, with tiny random teachers."""

import csv
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Phi3Config

from hf_holo import HoloError, HsnForCausalLM
from hf_holo.conversion.convert import command
from hf_holo.conversion.distill.command import main as distill
from hf_holo.conversion.work_folder import work_path
from hf_holo.data.documents import python_help
from hf_holo.data.tokenizers import make_tokenizer

QUICK = ["--block_size", "48", "--eval_windows", "4", "--sample_tokens", "5"]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    (help_text,) = python_help()
    path = tmp_path_factory.mktemp("texts") / "help.txt"
    path.write_text(help_text[:12000], encoding="utf-8")
    return str(path)


@pytest.fixture
def saved(tmp_path, make_teacher, text):
    """Save a teacher with its tokenizer, and name its folder."""

    def save(name: str = "llama", dtype: torch.dtype = torch.float32, **changes) -> str:
        folder = tmp_path / "teacher"
        tokenizer = make_tokenizer("characters", [Path(text).read_text(encoding="utf-8")])
        teacher = make_teacher(name, dtype, vocab_size=len(tokenizer), **changes)
        teacher.generation_config = GenerationConfig(eos_token_id=[2, 7], pad_token_id=0)
        teacher.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return save


def run(*words: str | Path) -> None:
    command.main([*map(str, words), *QUICK])


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 40)[None]).logits


def refused(message: str, *words: str | Path) -> None:
    with pytest.raises(HoloError, match=message) as caught:
        run(*words)
    assert "\n" not in str(caught.value)


# What it delivers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_the_student_loads_and_says_what_it_is(saved, text, tmp_path, name, capsys):
    teacher, out = saved(name), tmp_path / "out"
    before = {path.name: path.read_bytes() for path in Path(teacher).iterdir()}
    run(teacher, out, "--to", "hsn", "--layers", "0", "-1", "--train_file", text)
    student = HsnForCausalLM.from_pretrained(out)
    assert student.config.mixer_types == ["holographic", "attention", "holographic"]
    assert type(AutoModelForCausalLM.from_pretrained(out)) is HsnForCausalLM
    assert student.generation_config.eos_token_id == [2, 7]
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (teacher, out)]
    assert tokenizers[0]("print").input_ids == tokenizers[1]("print").input_ids
    assert {path.name: path.read_bytes() for path in Path(teacher).iterdir()} == before
    assert not work_path(out).exists()

    report = json.loads((out / "report.json").read_text())
    assert report["replaced"] == [0, 2]
    assert report["recipe"] == {"to": "hsn", "layers": [0, -1], "train_file": [text], "block_size": 48} | {
        "eval_windows": 4,
        "sample_tokens": 5,
    }
    (row,) = report["texts"]
    assert row["text"] == "help.txt" and row["windows"] == 4
    assert row["teacher_perplexity"] > 1 and row["student_perplexity"] > 1
    assert (out / "sample.txt").read_text().count("--- ") == 2
    card = (out / "README.md").read_text()
    assert "2 of 3 attention layers replaced" in card and "until it has been distilled" in card
    assert "hf-holo distill distill-hsn --teacher teacher --student out --train_file" in card
    assert yaml.safe_load(card.rpartition("```yaml\n")[2].partition("```")[0]) == report["recipe"]
    assert f"--teacher {teacher} --student {out}" in capsys.readouterr().out


def test_every_number_is_counted_once(saved, tmp_path):
    teacher, out = saved("phi3"), tmp_path / "out"
    run(teacher, out, "--to", "hsn", "--layers", "1")
    old, new = AutoModelForCausalLM.from_pretrained(teacher), AutoModelForCausalLM.from_pretrained(out)
    with (out / "layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sum(int(row["numbers_before"]) for row in rows) == old.num_parameters()
    assert sum(int(row["numbers_after"]) for row in rows) == new.num_parameters()
    report = json.loads((out / "report.json").read_text())
    assert report["numbers"] == {"teacher": old.num_parameters(), "student": new.num_parameters()}
    assert report["copied"] + report["derived"] + report["fresh"] == new.num_parameters()
    fresh = [row["module"] for row in rows if int(row["fresh"])]
    assert fresh == ["model.layers.1.self_attn"]
    # what counts as copied is copied: all but the mixer, and of the mixer values and output
    mixer, attention = new.model.layers[1].mixer, old.model.layers[1].self_attn
    assert torch.equal(mixer.out_proj.weight, attention.o_proj.weight)
    assert torch.equal(mixer.v_proj.weight, attention.qkv_proj.weight[-len(mixer.v_proj.weight) :])
    row = next(row for row in rows if row["module"] == "model.layers.1.self_attn")
    assert int(row["copied"]) == mixer.out_proj.weight.numel() + mixer.v_proj.weight.numel()


def test_without_a_text_and_with_the_recipe_all_layers_go(saved, tmp_path):
    out = tmp_path / "out"
    teacher = saved(max_position_embeddings=64)  # fewer than a window has: no matter
    command.main([teacher, str(out), "--recipe", "convert-hsn"])
    assert set(HsnForCausalLM.from_pretrained(out).config.mixer_types) == {"holographic"}
    report = json.loads((out / "report.json").read_text())
    assert report["texts"] == [] and report["replaced"] == [0, 1, 2]
    assert not (out / "sample.txt").exists()


def test_the_same_seed_gives_the_same_student(saved, tmp_path):
    teacher = saved()
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(teacher, tmp_path / name, "--to", "hsn", "--seed", seed)
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert any(not torch.equal(a[key], c[key]) for key in a)


def test_half_precision_stays_half(saved, tmp_path, monkeypatch):
    students, save = [], HsnForCausalLM.save_pretrained
    monkeypatch.setattr(
        HsnForCausalLM, "save_pretrained", lambda self, *a, **k: (students.append(self), save(self, *a))
    )
    run(saved("llama", torch.bfloat16), tmp_path / "out", "--to", "hsn", "--layers", "1")
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}
    assert logits(student).isfinite().all()
    assert torch.equal(logits(student), logits(students[0]))


@pytest.mark.slow
def test_the_student_distils(saved, text, tmp_path):
    """The command that the card names runs, and its first stage brings the mixers nearer to the attention."""
    teacher, out, distilled = saved("phi3"), tmp_path / "out", tmp_path / "distilled"
    run(teacher, out, "--to", "hsn", "--train_file", text)
    words = re.search(r"hf-holo distill (.*) --train_file", (out / "README.md").read_text())[1].split()
    assert words == ["distill-hsn", "--teacher", "teacher", "--student", "out"]
    quick = {"block_size": 32, "stride": 32, "max_steps": 6, "logging_steps": 1, "per_device_train_batch_size": 4}
    quick |= {"eval_windows": 4, "sample_tokens": 0, "use_cpu": "true", "disable_tqdm": "true"}
    words = ["distill-hsn", "--teacher", teacher, "--student", out, "--train_file", text, "--output_dir", distilled]
    distill([*map(str, words), *(word for name, value in quick.items() for word in (f"--{name}", str(value)))])
    stages = json.loads((distilled / "report.json").read_text())["stages"]
    assert [stage["name"] for stage in stages] == ["mixers", "blocks", "logits"]
    losses = [log["loss"] for log in stages[0]["history"] if "loss" in log]
    assert losses[-1] < 0.9 * losses[0]
    assert type(AutoModelForCausalLM.from_pretrained(distilled)) is HsnForCausalLM


# Dry run ------------------------------------------------------------------------------------------------------------


def test_dry_run_names_every_part_and_needs_no_weights(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "180")
    folder = tmp_path / "config-only"
    Phi3Config(architectures=["Phi3ForCausalLM"], sliding_window=None).save_pretrained(folder)
    command.main([str(folder), "--dry-run", "--to", "hsn", "--layers", *map(str, range(0, 32, 2))])
    shown = capsys.readouterr().out
    assert shown.count("Phi3Attention → HolographicMixer") == shown.count("Phi3Attention → AttentionMixer") == 16
    assert "values and output; queries and keys as phases" in shown
    assert all(f"model.layers.31.{name} " in shown for name in ("input_layernorm", "self_attn", "mlp"))
    assert "16 of 32 attention layers replaced" in shown
    assert "whole model: 3,821,079,552 → " in shown


# Bad input ----------------------------------------------------------------------------------------------------------


def test_options_that_do_not_fit_are_refused(saved, text, tmp_path):
    teacher, out = saved(), tmp_path / "out"
    hsn = [teacher, out, "--to", "hsn"]
    refused(r"ratio: 0\.5 has no meaning with --to hsn: attention is chosen with --layers", *hsn, "--ratio", "0.5")
    refused("method: 'calibrated' has no meaning with --to hsn", *hsn, "--method", "calibrated")
    refused(r"modules: \['mlp'\] has no meaning", *hsn, "--modules", "mlp")
    refused("keep_first: 1 has no meaning", *hsn, "--keep_first", "1")
    refused("tokens: 96 has no meaning", *hsn, "--tokens", "96")
    refused(r"layers: \[0\] has no meaning with --to holo: linear layers are chosen", teacher, out, "--layers", "0")
    refused("there is no layer 3; the teacher has 3", *hsn, "--layers", "3")
    refused("invalid choice: 'gru'", teacher, out, "--to", "gru")
    refused("is the teacher", teacher, teacher + "/inside", "--to", "hsn")
    assert not out.exists()
    assert not work_path(out).exists()


@pytest.mark.parametrize(
    ("name", "changes", "layers", "said"),
    [
        ("gpt2", {}, [], "'gpt2' cannot become an hsn; these families can: llama, mistral, phi3"),
        ("bert", {}, [], "'bert' cannot become an hsn"),
        ("llama", {"attention_bias": True}, [], "is a bias"),
        ("phi3", {"sliding_window": 8}, ["--layers", "0"], "sliding_window=8"),
    ],
)
def test_teachers_that_do_not_fit_are_refused_before_their_weights_are_read(
    saved, tmp_path, monkeypatch, name, changes, layers, said
):
    teacher = saved(name, **changes)
    for path in Path(teacher).glob("*.safetensors"):
        path.unlink()
    refused(said, teacher, tmp_path / "out", "--to", "hsn", *layers)


def test_an_existing_output_stays_unless_overwritten(saved, tmp_path):
    teacher, out = saved(), tmp_path / "out"
    run(teacher, out, "--to", "hsn")
    refused("exists; name another folder, or give --overwrite", teacher, out, "--to", "hsn")
    refused("no layer 9", teacher, out, "--to", "hsn", "--layers", "9", "--overwrite")
    assert json.loads((out / "report.json").read_text())["replaced"] == [0, 1, 2]
    run(teacher, out, "--to", "hsn", "--layers", "1", "--overwrite")
    assert json.loads((out / "report.json").read_text())["replaced"] == [1]
