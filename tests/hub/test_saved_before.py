"""Checkpoints of an earlier release load: by this release, and by the code that they brought along; saved again, they
carry the code of this one. tests/fixtures/make_saved_before.py made them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_holo.hub.code import add_code
from hf_holo.modeling import remote_code

SAVED = Path(__file__).parents[1] / "fixtures" / "saved_before"
WITHOUT_HF_HOLO = """
import sys
import torch, transformers
from safetensors.torch import load_file
sys.modules["hf_holo"] = None  # cannot be imported
expected = load_file(f"{sys.argv[1]}/expected.safetensors")
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
with torch.no_grad():
    torch.testing.assert_close(model(expected["ids"]).logits, expected["logits"], rtol=0, atol=1e-5)
if len(sys.argv) > 2:
    text = model.generate(expected["ids"], max_new_tokens=5, do_sample=False, pad_token_id=0)
    again = model.generate(expected["ids"], max_new_tokens=5, do_sample=False, pad_token_id=0, use_cache=False)
    assert torch.equal(text, again)
"""


@pytest.fixture
def brought(tmp_path) -> Path:
    """A copy of the checkpoint that has its code."""
    return Path(shutil.copytree(SAVED / "hsn", tmp_path / "hsn"))


@torch.no_grad()
@pytest.mark.parametrize("family", ["hsn", "holo", "resonance"])
def test_this_release_loads_them(family):
    expected = load_file(SAVED / family / "expected.safetensors")
    model = AutoModelForCausalLM.from_pretrained(SAVED / family).eval()
    torch.testing.assert_close(model(expected["ids"]).logits, expected["logits"], rtol=0, atol=1e-5)


def load_elsewhere(folder: Path, *generate: str) -> None:
    command = [sys.executable, "-c", WITHOUT_HF_HOLO, folder, *generate]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_their_own_code_loads_them(brought):
    load_elsewhere(brought)


@pytest.mark.slow
def test_saved_again_they_carry_the_code_of_this_release(brought, tmp_path):
    """That is how a copy comes to know an argument that transformers has renamed since."""
    AutoModelForCausalLM.from_pretrained(brought).save_pretrained(tmp_path / "again")
    shutil.copy(brought / "expected.safetensors", tmp_path / "again")
    load_elsewhere(tmp_path / "again", "generate")


@pytest.mark.slow
def test_a_push_refreshes_the_code(brought):
    refreshed = add_code(brought)
    assert {"modeling_hsn.py", "heads.py", "cache.py"} <= set(refreshed)
    source = Path(remote_code.__file__).with_name("cache.py")
    assert (brought / "cache.py").read_text() == source.read_text()
    load_elsewhere(brought, "generate")
