"""A third-party package, built and installed with pip, works through the Auto classes; a broken plug-in warns."""

import json
import subprocess
from pathlib import Path

import pytest
from plugin_environment import python_with

PYPROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "toy-holo"
version = "1.0"

[tool.setuptools]
py-modules = ["toy_holo", "toy_called"]

[project.entry-points."hf_holo.architectures"]
toy = "toy_holo"
called = "toy_called:register"
broken = "toy_missing:register"
"""

MODULE = """
from transformers import LlamaConfig, LlamaForCausalLM

from hf_holo import register_architecture


class ToyConfig(LlamaConfig):
    model_type = "toy"


class ToyForCausalLM(LlamaForCausalLM):
    config_class = ToyConfig


SIZES = dict(vocab_size=11, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
register_architecture("toy", ToyConfig, {"AutoModelForCausalLM": ToyForCausalLM}, presets={"toy-small": SIZES})
"""

CALLED = """
from transformers import LlamaConfig

from hf_holo import register_architecture


class CalledConfig(LlamaConfig):
    model_type = "toy-called"


def register():
    register_architecture("toy-called", CalledConfig, {"AutoModel": "toy_called:Model"})
"""

USE = """
import json, sys, warnings

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import hf_holo
import torch
from transformers import AutoModelForCausalLM

torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(hf_holo.preset_config("toy-small", vocab_size=13)).eval()
model.save_pretrained(sys.argv[1])
again = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
ids = torch.arange(13)[None]
with torch.no_grad():
    same = torch.equal(model(ids).logits, again(ids).logits)
print(json.dumps({
    "class": type(again).__name__,
    "same": same,
    "families": sorted(hf_holo.architectures()),
    "warnings": [str(w.message) for w in caught if "plug-in" in str(w.message)],
}))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """The interpreter of a new environment that sees this one's packages and has the plug-ins installed."""
    root = tmp_path_factory.mktemp("plugin")
    source = root / "source"
    source.mkdir()
    (source / "pyproject.toml").write_text(PYPROJECT)
    (source / "toy_holo.py").write_text(MODULE)
    (source / "toy_called.py").write_text(CALLED)
    return python_with(source, root)


@pytest.mark.slow
def test_plugins_of_an_installed_package_work_through_auto_classes(python, tmp_path):
    done = subprocess.run([python, "-c", USE, tmp_path / "saved"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["class"] == "ToyForCausalLM" and report["same"]
    assert {"hsn", "toy", "toy-called"} <= set(report["families"])
    (warning,) = report["warnings"]
    assert "'broken' (toy_missing:register) was left out: ModuleNotFoundError" in warning


@pytest.mark.slow
def test_a_plugin_may_be_imported_before_the_package(python):
    code = "import toy_holo, hf_holo; print('toy' in hf_holo.architectures())"
    done = subprocess.run([python, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.slow
def test_the_plain_command_of_optimum_knows_plugins_of_an_installed_package(python, tmp_path):
    """Found by its entry point, without an import of its own."""
    pytest.importorskip("optimum.exporters.onnx", reason="needs the extra `onnx`")
    done = subprocess.run([python, "-c", USE, tmp_path / "saved"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    command = [python, "-m", "optimum.commands.optimum_cli", "export", "onnx", "--model", tmp_path / "saved"]
    command += ["--task", "text-generation-with-past", tmp_path / "onnx"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "onnx" / "model.onnx").is_file(), done.stderr
