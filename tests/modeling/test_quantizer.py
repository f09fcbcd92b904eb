"""What the quantizer refuses to load."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_holo import HoloSurgeryConfig, apply_surgery


class Bomb:
    """An object whose pickle makes a file when it is read."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.fixture
def converted() -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=61, **sizes))
    apply_surgery(model, HoloSurgeryConfig(harmonics=8))
    return model


@pytest.mark.parametrize("auto_class", [AutoModelForCausalLM, LlamaForCausalLM])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_converted_model_is_not_read_from_a_pickle(converted, tmp_path, auto_class, sharded):
    converted.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    file.unlink()
    name = "pytorch_model-00001-of-00001.bin" if sharded else "pytorch_model.bin"
    if sharded:
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
        (tmp_path / "model" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for content in (weights, {"bomb": Bomb(tmp_path / "went off")}):
        torch.save(content, tmp_path / "model" / name)
        with pytest.raises(OSError, match=rf"{name}: the weights of a converted model must be in safetensors files"):
            auto_class.from_pretrained(tmp_path / "model")
    assert not (tmp_path / "went off").exists()


def test_a_pickle_beside_the_weights_does_no_harm(converted, tmp_path):
    converted.save_pretrained(tmp_path)
    torch.save({"bomb": Bomb(tmp_path / "went off")}, tmp_path / "pytorch_model.bin")
    assert AutoModelForCausalLM.from_pretrained(tmp_path) is not None
    assert not (tmp_path / "went off").exists()


@pytest.mark.skipif(transformers.__version__ >= "5", reason="transformers 5 writes no pickles")
def test_a_converted_model_is_not_saved_as_a_pickle(converted, tmp_path):
    converted.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holo and is not serializable"):
        AutoModelForCausalLM.from_pretrained(tmp_path).save_pretrained(tmp_path / "again", safe_serialization=False)
