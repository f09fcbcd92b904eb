"""A second environment, without hf_holo, and a small Hub."""

import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hf_holo import get_architecture
from hf_holo.data.tokenizers import character_tokenizer

sys.path.append(str(Path(__file__).parent))  # for small_hub

TEXT = "a small text, seen by all"


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory) -> Callable[..., str]:
    """Runs Python code with arguments in an environment that has all packages but hf_holo; gives what it prints."""
    root = tmp_path_factory.mktemp("elsewhere")
    venv.create(root / "env", symlinks=os.name != "nt")
    scheme = {"base": str(root / "env"), "platbase": str(root / "env")}
    packages = Path(sysconfig.get_path("purelib", "venv", scheme)) / "shared.pth"
    packages.write_text(f"{sysconfig.get_path('purelib')}\n")  # its own .pth files, such as hf_holo's, do not count
    python = Path(sysconfig.get_path("scripts", "venv", scheme)) / Path(sys.executable).name

    def run(code: str, *arguments: object, **environment: str) -> str:
        proof = "import importlib.util\nassert importlib.util.find_spec('hf_holo') is None\n"
        variables = {**os.environ, "HF_HOME": str(root / "home"), "HF_HUB_OFFLINE": "1", **environment}
        variables.pop("PYTHONPATH", None)
        command = [python, "-c", proof + code, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=root)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


@pytest.fixture(scope="session")
def tokenizer():
    return character_tokenizer([TEXT])


@pytest.fixture(scope="session")
def expected() -> Callable[..., torch.Tensor]:
    """What a model says to the text."""

    @torch.no_grad()
    def say(model, tokenizer) -> torch.Tensor:
        output = model.eval()(**tokenizer(TEXT, return_tensors="pt"))
        return output.logits if "logits" in output else output.last_hidden_state

    return say


@pytest.fixture
def saved(tmp_path, tokenizer) -> Path:
    """The folder of a tiny model with its tokenizer."""
    torch.manual_seed(0)
    family = get_architecture("hsn")
    model = family.main_model(family.config(**family.variants["bundle"]))
    model.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"
