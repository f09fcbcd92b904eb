"""The model card says what is so: counted, read off the run, and usable as it stands."""

import csv
import re

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_holo import HoloError, HoloSurgeryConfig, apply_surgery, check_causality, get_architecture
from hf_holo.hub.card import PIPELINES, make_card, write_card

RECIPE = {
    "preset": "hsn-tiny",
    "train_file": "/home/someone/secret/plays.txt",
    "validation_fraction": 0.1,
    "max_steps": 9,
}
ROWS = [
    {"step": 5, "train_loss": 2.0, "validation_loss": 2.125, "validation_bits_per_character": 3.0657},
    {"step": 8, "train_loss": 1.5, "validation_loss": "", "validation_bits_per_character": ""},
    {"step": 9, "train_loss": "", "validation_loss": 1.75, "validation_bits_per_character": 2.5247},
]


@pytest.fixture
def run_folder(saved):
    """What a training run leaves."""
    (saved / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    with (saved / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ROWS[0])
        writer.writeheader()
        writer.writerows(ROWS)
    return saved


def test_a_card_tells_what_the_folder_shows(run_folder):
    model = AutoModelForCausalLM.from_pretrained(run_folder)
    write_card(run_folder, check_causality(model, (17,)))
    text = (run_folder / "README.md").read_text()
    assert f"| values in the checkpoint | {model.num_parameters():,} |" in text
    assert "| architecture | HsnForCausalLM |" in text and "| hidden size | 32 |" in text
    assert "Trained on `plays.txt`, of which 10% was held out." in text
    assert "| validation loss | 1.7500 nats per token |" in text and "2.5247 bits per character" in text
    assert "no look-ahead, tested at " in text and "by prefixes" in text
    assert "max_steps: 9" in text and torch.__version__ in text
    assert "secret" not in text and str(run_folder.parent) not in text


def test_paths_are_cut_wherever_they_stand_and_repositories_are_named(saved, monkeypatch):
    monkeypatch.chdir(saved.parent)
    recipe = {
        "teacher": "someone/large-model",
        "student": "tiny/config.json",
        "train_files": ["/home/someone/secret/a.txt", "../secret/b.txt"],
        "validation_fraction": [0.5, 0.1],
        "stages": [{"match": "logits", "folder": "~/secret/c"}, {"match": "states", "folder": r"C:\secret\d"}],
    }
    (saved / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    text = str(make_card(saved, "me/it"))
    assert "teacher: someone/large-model" in text and "student: config.json" in text and "folder: c" in text
    assert "Trained on `a.txt, b.txt`, of which 50%, 10% was held out." in text
    assert "folder: d" in text and "secret" not in text


@pytest.mark.parametrize("content", [b"a: [", b"- 1", b"3", b"\xff\xfe\x00", b"a: &a [*a]", b"[" * 100_000])
def test_a_recipe_that_is_none_is_named(saved, content):
    (saved / "recipe.yaml").write_bytes(content)
    with pytest.raises(HoloError, match=r"recipe\.yaml' is not "):
        make_card(saved, "me/it")


@pytest.mark.parametrize(
    "line",
    ["validation_fraction: lots", "validation_fraction: 3", "train_file: [3]", "train_files: [3]", "dataset_name: 1"],
)
def test_a_recipe_may_not_say_everything(saved, line):
    (saved / "recipe.yaml").write_text(line)
    with pytest.raises(HoloError, match=rf"recipe\.yaml' says {line.partition(':')[0]}=.* which is not a value for it"):
        make_card(saved, "me/it")


@pytest.mark.parametrize(
    "content", [b"step,validation_loss\n1,abc\n", b"step,validation_loss\n1,\0\n", b"\xff\xfe\x00"]
)
def test_metrics_that_are_none_are_named(saved, content):
    (saved / "metrics.csv").write_bytes(content)
    with pytest.raises(HoloError, match=r"metrics\.csv' is not a table of metrics"):
        make_card(saved, "me/it")


@pytest.mark.parametrize("content", [b"", b"123", b"\x02" + bytes(7) + b"[]", b"\x08" + bytes(7) + b'{"a": 1}'])
def test_weights_that_cannot_be_counted_are_named(saved, content):
    (saved / "model.safetensors").write_bytes(content)
    with pytest.raises(HoloError, match="are not complete safetensors"):
        make_card(saved, "me/it")


def test_the_header_is_what_the_hub_reads(run_folder):
    write_card(run_folder)
    data = ModelCard.load(run_folder / "README.md").data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "text-generation", None)
    assert data.tags == ["hf-holo", "hsn"]
    scores = {result.metric_type: result.metric_value for result in data.eval_results}
    assert scores == {"loss": 1.75, "bits_per_character": 2.5247}
    assert {result.dataset_type for result in data.eval_results} == {"plays.txt"}


def test_the_code_in_a_card_runs(saved, monkeypatch):
    write_card(saved)
    monkeypatch.chdir(saved.parent)
    with_hf_holo, without = re.findall(r"```python\n(.*?)```", (saved / "README.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(with_hf_holo, names)
    assert type(names["model"]).__name__ == "HsnForCausalLM"
    compile(without, "README.md", "exec")
    assert "trust_remote_code=True" in without


FAMILY_OF = {
    "AutoModelForImageClassification": "vision",
    "AutoBackbone": "vision",
    "AutoModelForAudioClassification": "audio",
}


@pytest.mark.feature("Hub", "model card for every head", family="resonance")
@pytest.mark.parametrize("head", PIPELINES)
def test_every_head_has_its_pipeline(tmp_path, head):
    family = get_architecture("_".join(filter(None, ("resonance", FAMILY_OF.get(head)))))
    family.models[head](family.config(**family.variants["plain"])).save_pretrained(tmp_path)
    card = make_card(tmp_path, "me/it", license="apache-2.0")
    assert (card.data.pipeline_tag, card.data.license) == (PIPELINES[head], "apache-2.0")
    assert f'{head}.from_pretrained("me/it")' in card.text


def test_what_is_not_known_is_not_claimed(saved):
    text = str(make_card(saved, "me/it"))
    for sentence in ("It is not known", "Nothing was measured.", "Not judged here.", "No recipe came with it."):
        assert sentence in text


def test_a_converted_model_is_said_to_be_one(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=61, **sizes))
    apply_surgery(model, HoloSurgeryConfig(harmonics=8))
    model.save_pretrained(tmp_path)
    text = str(make_card(tmp_path, "me/it"))
    assert "`LlamaForCausalLM`, some of whose linear layers are holographic" in text
    assert 'AutoModelForCausalLM.from_pretrained("me/it"' in text


def test_a_folder_without_a_config_has_no_card(tmp_path):
    with pytest.raises(HoloError, match="no config"):
        write_card(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_body_alone_is_named_as_such(saved, tmp_path):
    AutoModel.from_pretrained(saved).save_pretrained(tmp_path / "body")
    assert make_card(tmp_path / "body", "me/it").data.pipeline_tag == "feature-extraction"
