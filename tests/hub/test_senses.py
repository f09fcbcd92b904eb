"""Models that see, hear or have several senses, with their processors: saved, loaded elsewhere, adapted, described."""

import json

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import save_file
from small_models import new_model

from hf_holo import get_architecture, preset_model
from hf_holo.cli import main
from hf_holo.data.processors import new_processor
from hf_holo.data.tokenizers import character_tokenizer
from hf_holo.eval.conformance.subject import is_output

HEADS = {
    "resonance_vision": "AutoModelForImageClassification",
    "resonance_audio": "AutoModelForAudioClassification",
    "resonance_multimodal": "AutoModelForSequenceClassification",
}
PROCESSORS = ("AutoImageProcessor", "AutoFeatureExtractor", "AutoProcessor")
SINGLE = [family for family in HEADS if family != "resonance_multimodal"]  # whose code goes along with it, too
FAMILIES = pytest.mark.parametrize("family", HEADS)

LOAD = """
import sys
from pathlib import Path
import numpy as np, torch, transformers
from safetensors.torch import load_file

folder, auto_class, auto_processor = sys.argv[1:]
random = np.random.default_rng(0)
picture, sound = random.integers(0, 255, (20, 16, 3), dtype=np.uint8), random.standard_normal(2000).astype(np.float32)
raw = {
    "AutoImageProcessor": {"images": [picture]},
    "AutoFeatureExtractor": {"raw_speech": [sound]},
    "AutoProcessor": {"images": [picture], "audio": [sound], "text": ["a text"]},
}[auto_processor]
for source in (Path(folder), Path(folder) / "again"):
    processor = getattr(transformers, auto_processor).from_pretrained(source, trust_remote_code=True)
    model = getattr(transformers, auto_class).from_pretrained(source, trust_remote_code=True).eval()
    with torch.no_grad():
        logits = model(**processor(**raw, return_tensors="pt")).logits
    same = torch.allclose(logits, load_file(Path(folder) / "expected")["logits"], rtol=0, atol=1e-6)
    print(type(model).__module__.partition(".")[0], type(processor).__module__.partition(".")[0], same)
    model.save_pretrained(Path(folder) / "again")
    processor.save_pretrained(Path(folder) / "again")
"""


def processor_of(family: str, config):
    """The name of its Auto class, and one that fits the config."""
    (auto,) = [name for name in PROCESSORS if name in get_architecture(family).preprocessors]
    if auto != "AutoProcessor":
        return auto, new_processor(auto, config)
    return auto, get_architecture(family).processor(
        tokenizer=character_tokenizer(["a text"]),
        image_processor=new_processor("AutoImageProcessor", config.vision_config),
        feature_extractor=new_processor("AutoFeatureExtractor", config.audio_config),
    )


def raw_inputs(auto: str) -> dict:
    random = np.random.default_rng(0)
    picture, sound = (
        random.integers(0, 255, (20, 16, 3), dtype=np.uint8),
        random.standard_normal(2000).astype(np.float32),
    )
    return {
        "AutoImageProcessor": {"images": [picture]},
        "AutoFeatureExtractor": {"raw_speech": [sound]},
        "AutoProcessor": {"images": [picture], "audio": [sound], "text": ["a text"]},
    }[auto]


@pytest.fixture
def saved(tmp_path, family):
    """A saved model with its processor, the name of the Auto class of that, and what it says."""
    model = new_model(family, HEADS[family])
    auto, processor = processor_of(family, model.config)
    with torch.no_grad():
        logits = model(**processor(**raw_inputs(auto), return_tensors="pt")).logits
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    save_file({"logits": logits}, tmp_path / "model" / "expected")
    return tmp_path / "model", auto


@pytest.mark.slow
@pytest.mark.parametrize("family", ["resonance_multimodal", *SINGLE])
@pytest.mark.feature("Hub", "code and processor go along", family="{family}")
@pytest.mark.timeout(900)
def test_it_loads_where_hf_holo_is_missing(saved, elsewhere, family):
    folder, auto = saved
    lines = elsewhere(LOAD, folder, HEADS[family], auto).splitlines()
    assert lines == ["transformers_modules transformers_modules True"] * 2


@FAMILIES
def test_a_push_sends_the_processor_and_a_card(saved, family, capsys):
    folder, auto = saved
    (folder / "expected").unlink()
    assert main(["push", str(folder), "me/tiny", "--dry-run"]) == 0
    listed = capsys.readouterr().out
    name = "processor_config.json" if auto == "AutoProcessor" else "preprocessor_config.json"
    assert all(word in listed for word in (name, f"processing_{family}.py", f"modeling_{family}.py", "README.md"))
    card = (folder / "README.md").read_text()
    assert f"{auto}.from_pretrained(" in card and "It predicts no tokens" in card and "| classes | " in card


@FAMILIES
@pytest.mark.feature("PEFT", "LoRA without target_modules", family="{family}")
@pytest.mark.parametrize("kind", [LoraConfig, IA3Config])
def test_adapters_need_no_target_modules(family, kind):
    model = new_model(family, HEADS[family])
    blocks = {name for name, layer in model.named_modules() if name.endswith("_proj") and hasattr(layer, "weight")}
    adapted = get_peft_model(model, kind())
    reached = {name for name, _ in adapted.named_modules() if name.endswith("_proj.base_layer")}
    assert reached and (kind is IA3Config or len(reached) == len(blocks)), (len(reached), len(blocks))
    auto, processor = processor_of(family, model.config)
    output = adapted.train()(**processor(**raw_inputs(auto), return_tensors="pt"))
    sum(x.square().sum() for x in output.values() if is_output(x)).backward()
    assert all(p.grad is not None for n, p in adapted.named_parameters() if p.requires_grad)


@pytest.mark.slow
def test_lists_and_costs(capsys):
    assert main(["list", "--json"]) == 0
    rows = {row["preset"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(HEADS) <= {row["family"] for row in rows.values()}
    tiny = rows["resonance-vision-tiny"]
    assert (tiny["vocab_size"], tiny["embedding_parameters"]) == (None, 0)
    assert tiny["parameters"] == preset_model("resonance-vision-tiny").num_parameters()
    assert main(["list"]) == 0 and "resonance-audio-tiny" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["resonance-vision-tiny", "resonance-audio-tiny", "resonance-multimodal-tiny"])
def test_the_costs_of_a_preset(preset, capsys):
    lengths = [] if "multimodal" in preset else ["--lengths", *(("32", "64") if "vision" in preset else ("1", "2"))]
    assert main(["info", preset, "--json", *lengths]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["parameters"] == preset_model(preset).num_parameters()
    costs = record["costs"]
    assert all(
        c["flops"] > 0 and c["training_bytes"] > c["inference_bytes"] > record["parameter_bytes"] / 2 for c in costs
    )
    if lengths:
        assert costs[1]["flops"] > 1.5 * costs[0]["flops"]
    assert main(["info", preset, *lengths]) == 0 and costs[0]["size"].split()[0] in capsys.readouterr().out
