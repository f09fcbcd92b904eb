"""The processor that joins a tokenizer, an image processor and a feature extractor."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoProcessor, AutoTokenizer

from hf_holo.modeling.processing_resonance_multimodal import ResonanceProcessor

TEXTS = ["an even number", "below five"]
OTHER_MAJOR = Path(__file__).resolve().parents[2]
LOAD = """
import json, sys
import numpy as np
import hf_holo
from transformers import AutoProcessor

processor = AutoProcessor.from_pretrained(sys.argv[1])
processor.save_pretrained(sys.argv[2])
given = {"text": "an even number", "audio": np.linspace(-1, 1, 50), "images": np.full((9, 8, 3), 90, np.uint8)}
given = {name: given[name] for name in sys.argv[3:]}
print("OUT" + json.dumps({name: np.asarray(x).tolist() for name, x in processor(**given, return_tensors="np").items()}))
"""


@pytest.fixture
def pictures() -> list[Image.Image]:
    return [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]


@pytest.fixture
def sounds() -> list[np.ndarray]:
    return [np.linspace(-1, 1, 400, dtype=np.float32), np.linspace(1, -1, 300, dtype=np.float32)]


def test_it_gives_what_a_model_takes(processor, pictures, sounds, make):
    batch = processor(images=pictures, text=TEXTS, audio=sounds, sampling_rate=8000, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values", "input_values", "audio_attention_mask"}
    assert set(batch) < set(processor.model_input_names)
    assert batch["audio_attention_mask"].sum(1).tolist() == [400, 300]
    assert batch["attention_mask"].sum(1).tolist() == [14, 10]
    expected = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], expected)
    assert make("classifier")(**batch).logits.shape == (2, 3)


def test_none_is_the_place_of_what_is_missing(processor, pictures, sounds):
    batch = processor(
        images=[None, pictures[1]], text=[TEXTS[0], None], audio=sounds, sampling_rate=8000, return_tensors="pt"
    )
    assert batch["modality_mask"].tolist() == [[True, False, True], [False, True, True]]
    assert not batch["pixel_values"][0].any() and not batch["input_ids"][1].any()
    expected = processor.image_processor(pictures[1:], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"][1:], expected)
    assert batch["input_ids"][0].tolist() == processor.tokenizer(TEXTS[0])["input_ids"]


def test_what_all_lack_is_left_out(processor, pictures):
    batch = processor(images=pictures, text=[None, None], return_tensors="pt")
    assert "input_ids" not in batch
    assert batch["modality_mask"].tolist() == [[False, True, False]] * 2


@pytest.mark.parametrize("shape", [(16, 16, 3), (2, 16, 16, 3)])
def test_single_examples_and_arrays(processor, shape):
    batch = processor(images=np.zeros(shape, np.uint8), return_tensors="np")
    assert isinstance(batch["pixel_values"], np.ndarray) and len(batch["pixel_values"]) == (2 if len(shape) == 4 else 1)
    assert processor(text="even", audio=[0.0, 0.5, 0.25])["input_values"].tolist() == [[0.0, 0.5, 0.25]]


def test_what_is_wrong_is_named(processor, pictures, sounds):
    two = ResonanceProcessor(processor.tokenizer, processor.image_processor)
    wrong = [
        (processor, {}, "give at least one of text, images, audio"),
        (two, {"audio": sounds}, "audio: this processor has no feature_extractor; it has tokenizer, image_processor"),
        (processor, {"text": TEXTS, "audio": sounds[:1]}, "numbers of examples differ: text has 2, audio has 1"),
        (processor, {"text": [None, "even"], "images": [None, pictures[0]]}, r"the examples \[0\] have nothing at all"),
        (processor, {"audio": sounds, "sampling_rate": 16000}, "sampling_rate=16000"),
        (processor, {"text": []}, "empty list"),
    ]
    for chosen, arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            chosen(**arguments)
    with pytest.raises(TypeError, match="video"):
        processor(video=pictures)
    with pytest.raises(TypeError, match="image_processor is a HoloTokenizer; give a BaseImageProcessor"):
        ResonanceProcessor(processor.tokenizer, processor.tokenizer)
    with pytest.raises(ValueError, match="only tokenizer is given; two are needed"):
        ResonanceProcessor(processor.tokenizer)


@pytest.mark.parametrize("left_out", [None, "tokenizer", "image_processor", "feature_extractor"])
def test_saved_and_loaded_it_is_the_same(processor, pictures, sounds, left_out, tmp_path):
    parts = {name: getattr(processor, name) for name in processor.attributes if name != left_out}
    kept = ResonanceProcessor(**parts)
    kept.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is ResonanceProcessor and loaded.attributes == kept.attributes
    assert loaded.to_dict() == kept.to_dict()
    assert "processor_class" in repr(loaded)
    given = {
        "tokenizer": {"text": TEXTS},
        "image_processor": {"images": pictures},
        "feature_extractor": {"audio": sounds},
    }
    arguments = {key: value for part in parts for key, value in given[part].items()}
    for name, expected in kept(**arguments).items():
        np.testing.assert_array_equal(loaded(**arguments)[name], expected)
    for auto, part in ((AutoTokenizer, "tokenizer"), (AutoImageProcessor, "image_processor")):
        if part in parts:
            assert type(auto.from_pretrained(tmp_path)) is type(parts[part])
    if "feature_extractor" in parts:
        assert AutoFeatureExtractor.from_pretrained(tmp_path).sampling_rate == 8000
    assert not list(tmp_path.glob("*.unfinished"))


def test_its_code_goes_with_it(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["auto_map"]["AutoProcessor"] == "processing_resonance_multimodal.ResonanceProcessor"
    assert (tmp_path / "processing_resonance_multimodal.py").is_file()


def test_it_can_be_sent_to_another_process(processor):
    again = pickle.loads(pickle.dumps(processor))
    assert again(text=TEXTS)["input_ids"].tolist() == processor(text=TEXTS)["input_ids"].tolist()


@pytest.mark.slow
def test_what_one_major_of_transformers_saves_the_other_loads(processor, tmp_path):
    """And back: what the other saves is loaded here."""
    root = Path(__file__).resolve().parents[2]
    here = Path(sys.executable)
    name = ".venv" if ".venv-5x" in here.parts else ".venv-5x"
    other = here.parents[2] / name / "bin" / "python"
    if not other.exists():
        pytest.skip(f"needs the other major of transformers, in {name}")
    for left_out, names in ((None, ["text", "images", "audio"]), ("tokenizer", ["images", "audio"])):
        parts = {part: getattr(processor, part) for part in processor.attributes if part != left_out}
        ResonanceProcessor(**parts).save_pretrained(tmp_path / "here")
        command = [other, "-c", LOAD, tmp_path / "here", tmp_path / "there", *names]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=root, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        there = json.loads(done.stdout.partition("OUT")[2])
        given = {"text": "an even number", "audio": np.linspace(-1, 1, 50), "images": np.full((9, 8, 3), 90, np.uint8)}
        loaded = AutoProcessor.from_pretrained(tmp_path / "there")
        for key, expected in loaded(**{name: given[name] for name in names}).items():
            np.testing.assert_allclose(there[key], expected, rtol=1e-6)
