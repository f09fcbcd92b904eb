"""The zoo: classes of transformers, tiny, each in a process of its own; the table says what was found."""

import json
import shutil
from pathlib import Path

import pytest
import transformers

from hf_holo import HoloError, cli
from hf_holo.eval.conformance import tiny_models, zoo
from hf_holo.eval.conformance.tiny_models import LARGEST, TINY, tiny_config, tiny_model

FEW = ("llama", "mamba", "gpt2")
PAGE = Path(__file__).parents[2] / "docs" / "zoo.md"
SCRIPTS = PAGE.with_suffix("")
MAJOR = transformers.__version__.partition(".")[0]

RARE = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("mixtral", "bert", "gemma3_text")]


@pytest.mark.parametrize("kind", [*FEW, "bart", *RARE])
def test_tiny_models_are_built(kind):
    model = tiny_model(getattr(transformers, zoo.classes()[kind]))
    assert 0 < sum(p.numel() for p in model.parameters()) <= LARGEST
    assert not model.config.is_encoder_decoder


@pytest.mark.parametrize(("kind", "field"), [("bamba", "layers_block_type"), ("qwen3_next", "layer_types")])
def test_every_kind_of_layer_of_a_hybrid_occurs(kind, field):
    config = tiny_model(getattr(transformers, zoo.classes()[kind])).config
    assert len(set(getattr(config, field))) == 2 and config.num_hidden_layers <= tiny_models.DEEPEST


def test_a_size_that_is_smaller_by_default_stays_and_special_tokens_differ():
    config = tiny_config(transformers.GPTBigCodeForCausalLM)
    assert config.num_key_value_heads == 1 and config.n_embd == TINY["n_embd"]
    config = tiny_config(transformers.MambaForCausalLM)
    assert len({config.pad_token_id, config.bos_token_id, config.eos_token_id}) == 3


def test_what_does_not_run_counts_as_not_built(monkeypatch):
    def forward(self, *args, **kwargs):
        raise RuntimeError("not today")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", forward)
    with pytest.raises(HoloError, match="RuntimeError: not today"):
        tiny_model(transformers.LlamaForCausalLM)


def test_names_are_model_types_or_classes():
    assert zoo.chosen(["llama", "GPT2LMHeadModel"]) == {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel"}
    assert len(zoo.chosen([])) >= 100 and not {"hsn", "holo", "resonance"} & set(zoo.chosen([]))
    with pytest.raises(HoloError, match="unknown model of transformers 'lama': did you mean 'llama'"):
        zoo.chosen(["lama"])


def test_three_classes_one_of_them_out_of_time(tmp_path, capsys):
    page = tmp_path / "zoo.md"
    page.write_text(f"a\n<!-- transformers-{MAJOR}: begin -->\nold\n<!-- transformers-{MAJOR}: end -->\nz\n", "utf-8")
    shutil.copytree(SCRIPTS, tmp_path / "zoo")
    records = tmp_path / "records"
    records.mkdir()
    done = [
        {"parameters": 9},
        {"check": "suffix exchange", "group": "causality", "status": "failed", "detail": "looks"},
    ]
    for kind in FEW[:2]:  # as processes have left them
        lines = [*map(json.dumps, done), json.dumps({"finished": True, "trouble": ""})]
        (records / f"{kind}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    words = ["--transformers", *FEW, "--records", str(records), "--page", str(page), "--limit", "0.05"]
    assert cli.main(["check", *words]) == 0
    assert "2 of 3 classes" in capsys.readouterr().out
    text = page.read_text(encoding="utf-8")
    assert text.startswith("a\n") and text.endswith("\nz\n") and "old" not in text
    assert "| `LlamaForCausalLM` | ? | – |" in text  # no script sees what the kit is said to have seen
    (last,) = [line for line in text.splitlines() if line.startswith("| `GPT2LMHeadModel`")]
    assert "not finished in 0 s" in last


def failing(name: str, column: str) -> zoo.Animal:
    failed = {"check": zoo.COLUMNS[column][0], "group": "of the kit", "status": "failed", "detail": "looks wrong"}
    return zoo.Animal(name, name, parameters=1, results=[failed])


def test_no_failure_is_named_unless_a_script_in_plain_transformers_shows_it(tmp_path):
    scripts = shutil.copytree(SCRIPTS, tmp_path / "zoo")
    animals = [failing("BartForCausalLM", "padding"), failing("LlamaForCausalLM", "padding")]
    bart, llama = zoo.confirm(animals, scripts)
    assert bart.cell("padding") == "✗" and "pads on the left" in bart.confirmed["padding"]
    assert animals[0].cell("padding") == "? left padding"
    assert "| `BartForCausalLM` | padding | with 5 pads on the left" in zoo.failures([bart, llama])
    assert llama.cell("padding") == "?" and llama.confirmed == {"padding": ""}
    said = json.loads((scripts / f"confirmed-{MAJOR}.json").read_text(encoding="utf-8"))
    assert said == {"BartForCausalLM": bart.confirmed, "LlamaForCausalLM": llama.confirmed}


@pytest.mark.parametrize("column", [pytest.param(column, marks=pytest.mark.slow) for column in zoo.COLUMNS])
def test_the_scripts_see_nothing_in_honest_models(tmp_path, column):
    scripts = shutil.copytree(SCRIPTS, tmp_path / "zoo")
    for animal in zoo.confirm([failing("LlamaForCausalLM", column), failing("OPTForCausalLM", column)], scripts):
        assert animal.confirmed == {column: ""}


def test_the_scripts_need_nothing_of_ours():
    for script in SCRIPTS.glob("*.py"):
        assert "hf_holo" not in script.read_text(encoding="utf-8"), script


@pytest.mark.parametrize("major", ["4", "5"])
def test_every_failure_on_the_page_has_its_sentence(major):
    page = PAGE.read_text(encoding="utf-8").partition(f"<!-- transformers-{major}: begin -->")[2].partition("<!--")[0]
    said = json.loads((SCRIPTS / f"confirmed-{major}.json").read_text(encoding="utf-8"))
    rows = [
        [cell.strip(" `") for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| `")
    ]
    told = {(name, column): words for name, column, words in (row for row in rows if len(row) == 3)}
    marks = [row for row in rows if len(row) > 3]
    assert len(marks) >= 100
    failed = {
        (row[0], column) for row in marks for column, cell in zip(zoo.COLUMNS, row[1:], strict=False) if cell == "✗"
    }
    assert failed == set(told) and all(said[name][column] == words for (name, column), words in told.items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", FEW)
def test_a_class_is_checked_in_a_process_of_its_own(tmp_path, kind):
    (animal,) = zoo.visit([kind], tmp_path, limit=280)
    assert animal.trouble == "" and animal.parameters > 0
    assert animal.cell("sees no later token") == "✓", animal.results
    assert len(animal.results) > 30


def test_what_cannot_be_built_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_models, "tiny_config", lambda kind: (_ for _ in ()).throw(KeyError("width")))
    zoo.check_class("llama", tmp_path / "llama.jsonl")
    assert json.loads((tmp_path / "llama.jsonl").read_text(encoding="utf-8")) == {
        "trouble": "not built: KeyError: 'width'"
    }


def test_a_page_without_marks_is_refused(tmp_path):
    with pytest.raises(HoloError, match="has no marks"):
        zoo.write_page([], tmp_path / "missing.md")
