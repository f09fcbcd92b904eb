"""Code of other packages on its way to the Hub: what it needs is said by the command and by the model card."""

import importlib
import re
from pathlib import Path

import pytest

from hf_holo import architectures, register_architecture, registry
from hf_holo.cli import main
from hf_holo.hub.card import make_card
from hf_holo.hub.code import add_code

PLUGIN = """
from transformers import LlamaConfig, LlamaForCausalLM
{extra}


class {name}Config(LlamaConfig):
    model_type = "{type}"


class {name}ForCausalLM(LlamaForCausalLM):
    config_class = {name}Config
"""
SIZES = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Makes the module of a plug-in that imports `extra`, registers it, and saves a model of it; gives the folder."""
    monkeypatch.setattr(registry, "_ARCHITECTURES", architectures())
    monkeypatch.syspath_prepend(tmp_path)

    def make(name: str, extra: str) -> Path:
        (tmp_path / f"{name.lower()}_code.py").write_text(PLUGIN.format(name=name, type=name.lower(), extra=extra))
        module = importlib.import_module(f"{name.lower()}_code")
        config, model = getattr(module, f"{name}Config"), getattr(module, f"{name}ForCausalLM")
        register_architecture(name.lower(), config, {"AutoModelForCausalLM": model})
        model(config(**SIZES)).save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return make


def test_a_dry_run_says_what_the_code_of_a_plugin_needs(plugin, capsys):
    folder = plugin("Needy", "import yaml\nfrom hf_holo import bind")
    with pytest.warns(UserWarning, match="the code of .* imports hf_holo, yaml: to be installed wherever"):
        assert main(["push", str(folder), "me/needy", "--dry-run"]) == 0
    assert "needy_code.py" in capsys.readouterr().out


def test_its_card_promises_no_more_than_that(plugin):
    folder = plugin("Honest", "from hf_holo import bind")
    text = str(make_card(folder, "me/honest"))
    assert "With hf_holo and `honest_code` installed:" in text
    assert "Without `honest_code`, the code in this repository is used, which needs hf_holo installed" in text
    assert len(re.findall(r'from_pretrained\("me/honest", trust_remote_code=True\)', text)) == 2


@pytest.mark.filterwarnings("error")
def test_code_that_needs_nothing_goes_along_without_a_warning(plugin):
    folder = plugin("Modest", "import math\nimport torch\nimport numpy")
    assert "modest_code.py" in add_code(folder)
    assert "the code in this repository is used; read it" in str(make_card(folder, "me/modest"))


def test_the_card_of_code_that_stays_behind_does_not_promise_it(plugin):
    folder = plugin("Rooted", "")
    module = importlib.import_module("rooted_code")
    Path(module.__file__).write_text("from .missing import nothing\n")
    with pytest.warns(UserWarning, match="stays without code"):
        assert add_code(folder) == []
    text = str(make_card(folder, "me/rooted"))
    assert "With hf_holo and `rooted_code` installed:" in text and "trust_remote_code" not in text
