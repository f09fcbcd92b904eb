"""The page "Your own architecture" does what it says: its file becomes a package, and its commands are run in order."""

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from plugin_environment import python_with

from hf_holo import HoloError
from hf_holo.export.formats import FORMATS

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = (REPOSITORY / "docs" / "your-own-architecture.md").read_text(encoding="utf-8")

ELSEWHERE = """
import importlib.util, sys
assert importlib.util.find_spec("gated_average") is None
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
tokens = model.generate(**tokenizer("A function ", return_tensors="pt"), max_new_tokens=5, do_sample=False)
print(type(model).__module__.partition(".")[0], tokens.shape[1] - len("A function "))
"""


def block(language: str) -> str:
    """The first block of a language on the page."""
    return re.search(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)[1]


def has_onnx() -> bool:
    try:
        FORMATS["onnx"].require()
    except HoloError:  # with transformers 5
        return False
    return True


def test_the_file_is_short():
    assert len(block("python").splitlines()) <= 80


@pytest.mark.slow
def test_from_an_empty_file_to_the_hub(tmp_path):
    package, work = tmp_path / "package", tmp_path / "work"
    package.mkdir()
    work.mkdir()
    (package / "gated_average.py").write_text(block("python"))
    (package / "pyproject.toml").write_text(block("toml"))
    install, *commands = block("bash").splitlines()
    assert install.startswith("pip install ") and len(commands) == 5
    python = python_with(package, tmp_path)
    said, onnx = {}, has_onnx()
    for command in commands:
        verb, *arguments = shlex.split(command.removeprefix("hf-holo "))
        if not onnx:
            arguments = [argument for argument in arguments if argument != "onnx"]
        call = [python, "-m", "hf_holo.cli", verb, *arguments]
        done = subprocess.run(call, cwd=work, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        said[verb] = done.stdout + done.stderr

    model = work / "runs" / "average"
    with (model / "metrics.csv").open(newline="") as file:
        losses = [float(row["train_loss"]) for row in csv.DictReader(file) if row["train_loss"]]
    assert losses[-1] < 0.85 * losses[0]
    assert "tokenizer: characters" in said["train"]
    assert re.search(r"\b[1-9]\d passed, 0 failed", said["check"])
    graph = work / "exported" / ("onnx" if onnx else "torchscript")
    assert "past_key_values.0.average" in (graph / "README.md").read_text()
    report = json.loads((graph / "report.json").read_text())
    assert report["generation"]["greedy"] == 1.0
    assert "gated_average.py" in said["push"] and "imports hf_holo: to be installed" in said["push"]
    card = (model / "README.md").read_text()
    assert "Without `gated_average`, the code in this repository is used, which needs hf_holo installed" in card

    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HOME": str(tmp_path / "home")}
    call = [sys.executable, "-c", ELSEWHERE, model]
    done = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["transformers_modules", "5"], done.stderr[-2000:]
