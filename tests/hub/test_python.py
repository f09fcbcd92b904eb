"""Saving, pushing and pulling from Python: what transformers' own methods do for models of this package."""

import json
import os
import re
import subprocess
import sys

import pytest
from huggingface_hub import ModelCard
from small_hub import TOKEN, SmallHub
from transformers import AutoModelForCausalLM

from hf_holo.hub.card import make_card

pytestmark = pytest.mark.feature("Hub", "saving, pushing and pulling from Python", family="hsn")
OWN = "My own words.\n"

PUSH = """
import sys
from pathlib import Path

from huggingface_hub import HfApi
import hf_holo
from transformers import AutoModelForCausalLM

model, folder = AutoModelForCausalLM.from_pretrained(sys.argv[1]), Path(sys.argv[2])
model.push_to_hub("me/new", tags=["mine"])
model.push_to_hub("me/described")
model.save_pretrained(str(folder / "saved"), push_to_hub=True, repo_id="me/saved")
model.save_pretrained(folder / "earlier")
model.save_pretrained(str(folder / "earlier"), push_to_hub=True, repo_id="me/earlier")
(folder / "own").mkdir()
(folder / "own" / "README.md").write_text(sys.argv[3])
for repo in ("me/own", "me/described"):
    model.save_pretrained(str(folder / "own"), push_to_hub=True, repo_id=repo)
"""

PUSH_CONVERTED = """
import sys

import hf_holo
from transformers import LlamaConfig, LlamaForCausalLM

sizes = dict(vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
model = LlamaForCausalLM(LlamaConfig(**sizes))
hf_holo.apply_surgery(model, hf_holo.HoloSurgeryConfig(harmonics=4))
model.push_to_hub("me/pushed")
model.save_pretrained(sys.argv[1] + "/saved", push_to_hub=True, repo_id="me/saved")
"""

PULL = """
import json, sys

from huggingface_hub import constants
import hf_holo
from hf_holo import cli
from transformers import AutoModelForCausalLM

constants.DOWNLOAD_CHUNK_SIZE = 1000  # so that a tiny model arrives in more than one piece


def pull(repo, token):
    try:
        return type(AutoModelForCausalLM.from_pretrained(repo, token=token)).__name__
    except OSError as error:
        return f"refused: {' '.join(str(error).split())}"


print(json.dumps([pull(*pair) for pair in json.loads(sys.argv[1])]))
sys.exit(cli.main(["generate", sys.argv[2], "--prompt", "a"]))
"""


@pytest.fixture
def hub():
    with SmallHub() as served:
        yield served


@pytest.fixture
def run(hub, tmp_path):
    """Runs Python code with arguments in a process that takes the small Hub for the real one."""

    def run(code: str, *arguments: object, token: str = TOKEN) -> subprocess.CompletedProcess:
        settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": token}
        environment = {**os.environ, **settings, "HF_HOME": str(tmp_path / "home")}
        command = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)

    return run


def names(card: str) -> set[str]:
    """What the card says to load."""
    return set(re.findall(r'from_pretrained\("([^"]*)"', card))


def test_a_saved_model_has_a_card(saved):
    text = (saved / "README.md").read_text()
    assert text.rstrip() == str(make_card(saved, "tiny")).rstrip()
    assert "| architecture | HsnForCausalLM |" in text and names(text) == {"tiny"}


def test_a_card_that_is_there_stays(saved):
    (saved / "README.md").write_text(OWN)
    AutoModelForCausalLM.from_pretrained(saved).save_pretrained(saved)
    assert (saved / "README.md").read_text() == OWN


def test_only_the_main_process_writes_a_card(saved, tmp_path):
    AutoModelForCausalLM.from_pretrained(saved).save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other" / "README.md").exists()


def test_a_card_that_cannot_be_made_costs_a_warning_only(saved):
    model = AutoModelForCausalLM.from_pretrained(saved)
    (saved / "README.md").unlink()
    (saved / "recipe.yaml").write_text("- 1")
    with pytest.warns(UserWarning, match="saved without a model card: .*recipe.yaml"):
        model.save_pretrained(saved)
    assert AutoModelForCausalLM.from_pretrained(saved) is not None


@pytest.mark.slow
def test_what_is_pushed_from_python_has_code_and_a_card_of_facts(hub, run, saved, tmp_path):
    hub.create("me/described")["files"]["README.md"] = b"---\ntags: [theirs]\n---\nDescribed on the Hub.\n"
    done = run(PUSH, saved, tmp_path, OWN)
    assert done.returncode == 0, done.stderr[-3000:]
    cards = {name: repo["files"]["README.md"].decode() for name, repo in hub.repos.items()}
    for name in ("me/new", "me/saved", "me/earlier"):
        files = hub.repos[name]["files"]
        assert {"config.json", "model.safetensors", "modeling_hsn.py", "heads.py"} <= set(files)
        assert "AutoModelForMaskedLM" in json.loads(files["config.json"])["auto_map"]
        assert "| architecture | HsnForCausalLM |" in cards[name] and names(cards[name]) == {name}
        assert "More Information Needed" not in cards[name]
    assert ModelCard(cards["me/new"]).data.tags == ["hf-holo", "hsn", "mine"]
    assert cards["me/own"] == (tmp_path / "own" / "README.md").read_text() == OWN
    assert "Described on the Hub." in cards["me/described"] and OWN not in cards["me/described"]
    assert hub.repos["me/described"]["commits"] == 2


@pytest.mark.slow
def test_a_converted_model_is_pushed_with_its_code(hub, run, tmp_path):
    done = run(PUSH_CONVERTED, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("me/pushed", "me/saved"):
        files = hub.repos[name]["files"]
        assert {"config.json", "model.safetensors", "converted.py", "quantizer.py", "harmonics.py"} <= set(files)
        assert json.loads(files["config.json"])["auto_map"]["AutoModelForCausalLM"] == "converted.LlamaForCausalLM"


@pytest.mark.slow
def test_pulling_ends_with_the_model_or_with_a_clear_error(hub, run, saved):
    files = {path.name: path.read_bytes() for path in saved.iterdir() if path.is_file()}
    for name in ("me/good", "me/flaky", "me/gated", "me/closed"):
        hub.create(name, gated=name in ("me/gated", "me/closed"))["files"] |= files
    hub.faults["drop download me/flaky"] = 1
    wanted = {
        ("me/gated", "hf_reader"): "refused: You are trying to access a gated repo",
        ("me/gated", TOKEN): "HsnForCausalLM",
        ("me/good", "hf_wrong"): "refused: There was a specific connection error when trying to load me/good: ",
        ("me/good", "hf_reader"): "HsnForCausalLM",
        ("me/none", TOKEN): "refused: me/none is not a local folder and is not a valid model identifier",
    }
    attempts = [*wanted, *[("me/flaky", TOKEN)] * 2]  # transformers 5 continues by itself, 4.57 when it is called again
    done = run(PULL, json.dumps(attempts), "me/closed", token="hf_reader")
    assert done.returncode == 2, done.stderr[-3000:]
    *found, first, second = json.loads(done.stdout.splitlines()[-1])
    for result, expected in zip(found, wanted.values(), strict=True):
        assert result.startswith(expected)
    assert "401" in found[2] and "Invalid credentials" in found[2]
    assert first == "HsnForCausalLM" or "Connection broken" in first
    assert second == "HsnForCausalLM" and hub.requests["resumed download"] == 1
    assert "hf-holo: error: path: 'me/closed' is not a causal language model" in done.stderr
    assert "gated repo" in done.stderr and "Traceback" not in done.stderr
