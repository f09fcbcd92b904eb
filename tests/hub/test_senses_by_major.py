"""What one major version of transformers has saved, model and processor, the other loads, with the same outputs."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from hf_holo import get_architecture

sys.path.append(str(Path(__file__).resolve().parents[1] / "fixtures"))
maker = importlib.import_module("make_senses_by_major")


@pytest.mark.feature("Hub", "saved by the other major version of transformers", family="{family}")
@pytest.mark.parametrize("family", maker.CONFIGS)
@pytest.mark.parametrize("major", ["4", "5"])
def test_what_either_major_has_saved_gives_the_same(family, major):
    folder = maker.FOLDER / major / family
    processor = getattr(transformers, maker.AUTO[family]).from_pretrained(folder)
    model = get_architecture(family).main_model.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(**processor(**maker.raw_inputs(family), return_tensors="pt")).logits
    expected = load_file(folder / "expected.safetensors")["logits"]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
