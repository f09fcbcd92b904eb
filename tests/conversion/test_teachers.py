"""Teachers that need something more: code of their own, or a generation config that transformers would not save."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

from hf_holo import HoloError, HoloSurgeryConfig, apply_surgery
from hf_holo.cli import main
from hf_holo.conversion.sources import make_saveable

SIZES = {"vocab_size": 80, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.randint(5, 80, (2, 12), generator=torch.Generator().manual_seed(1))
HARMONIC = ["--method", "harmonic", "--harmonics", "8"]
CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OddConfig(LlamaConfig):
    model_type = "odd_llama"

class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = -2 * output.logits
        return output
"""
ODD = {"model_type": "odd_llama", "architectures": ["OddForCausalLM"]}
ODD["auto_map"] = {"AutoConfig": "modeling_odd.OddConfig", "AutoModelForCausalLM": "modeling_odd.OddForCausalLM"}


@pytest.fixture
def teacher(tmp_path) -> Path:
    torch.manual_seed(0)
    folder = tmp_path / "teacher"
    LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.15)).save_pretrained(folder)
    return folder


def change(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@torch.no_grad()
def test_code_of_the_teachers_own(teacher, tmp_path, capsys):
    (teacher / "modeling_odd.py").write_text(CODE)
    change(teacher / "config.json", **ODD)
    out = tmp_path / "out"
    assert main(["convert", str(teacher), str(out), *HARMONIC]) == 2
    assert "give --trust_remote_code to run it" in capsys.readouterr().err and not out.exists()
    assert main(["convert", str(teacher), str(out), *HARMONIC, "--trust_remote_code"]) == 0
    model = AutoModelForCausalLM.from_pretrained(teacher, trust_remote_code=True).eval()
    apply_surgery(model, HoloSurgeryConfig(harmonics=8))
    student = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True).eval()
    torch.testing.assert_close(student(input_ids=IDS).logits, model(input_ids=IDS).logits)
    card = (out / "README.md").read_text()
    assert f'from_pretrained("{out.name}", trust_remote_code=True)' in card and "hf_holo must be installed" in card


def test_options_without_effect_do_not_stop_a_conversion(teacher, tmp_path):
    change(teacher / "generation_config.json", temperature=0.9, top_p=0.6, max_new_tokens=7)
    with pytest.warns(UserWarning, match=r"generation_config sets temperature, top_p, which has no effect"):
        assert main(["convert", str(teacher), str(tmp_path / "out"), *HARMONIC]) == 0
    generation = AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config
    assert generation.max_new_tokens == 7 and generation.temperature == GenerationConfig().temperature


@pytest.mark.filterwarnings("error")
def test_a_config_that_samples_stays():
    config = GenerationConfig(do_sample=True, temperature=0.9)
    make_saveable(config)
    make_saveable(None)
    assert config.temperature == 0.9


def test_a_config_that_cannot_be_saved_at_all_is_refused():
    config = GenerationConfig(temperature=0.9)
    config.num_return_sequences = 3  # without sampling or beams
    with pytest.raises(HoloError, match=r"its generation_config cannot be saved again: .*3"):
        make_saveable(config)
