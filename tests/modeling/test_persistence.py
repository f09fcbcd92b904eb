"""Saving and loading beyond what the conformance kit asks of every family."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
)

from hf_holo import HsnForCausalLM, HsnForSequenceClassification


def test_a_head_goes_on_a_pretrained_body(tiny_model, tmp_path):
    """A classifier from a language model's checkpoint: the body's weights are its, the new head starts small."""
    model = tiny_model("bundle", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    classifier, report = HsnForSequenceClassification.from_pretrained(tmp_path, num_labels=3, output_loading_info=True)
    assert report["missing_keys"] and all("model." not in key for key in report["missing_keys"])
    body = classifier.base_model.state_dict()
    for name, tensor in model.base_model.state_dict().items():
        torch.testing.assert_close(body[name], tensor, rtol=0, atol=0, msg=name)


@pytest.mark.slow
def test_a_fresh_process_loads_through_auto_classes(tiny_model, random_ids, tmp_path):
    model, ids = tiny_model("bundle", dtype=torch.float32), random_ids(1, 9)
    model.save_pretrained(tmp_path)
    code = (
        "import sys, torch, hf_holo\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "print(model(input_ids=torch.tensor([[int(i) for i in sys.argv[2].split()]])).logits.sum().item())\n"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path), " ".join(map(str, ids[0].tolist()))]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    assert float(result.stdout) == pytest.approx(model(input_ids=ids).logits.sum().item(), rel=1e-4)


def test_the_auto_classes_build_from_a_bare_configuration():
    config = AutoConfig.for_model("hsn", vocab_size=97, hidden_size=32, num_hidden_layers=2)
    model = AutoModelForCausalLM.from_config(config)
    assert type(model) is HsnForCausalLM
    assert model(input_ids=torch.arange(97)[None]).logits.shape == (1, 97, 97)


def test_a_configuration_of_a_newer_format_is_refused(tiny_config, tmp_path):
    config = tiny_config()
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    stored["format_version"] = 999
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"999.*hf[-_]holo"):
        AutoConfig.from_pretrained(tmp_path)
