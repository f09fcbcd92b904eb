"""Models that see, hear or have several senses in other formats: the outputs of PyTorch at every size and batch."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("optimum.exporters.onnx")

from optimum.exporters.onnx import main_export

from hf_holo import get_architecture
from hf_holo.cli import main
from hf_holo.data.processors import new_processor
from hf_holo.data.tokenizers import character_tokenizer
from hf_holo.export.formats import SavedModel, load_onnx
from hf_holo.export.graph import Graph, task_of
from hf_holo.export.onnx_config import register

from .conftest import tiny_model

CASES = [
    ("resonance_vision", "AutoModelForImageClassification", "plain"),
    ("resonance_vision", "AutoModelForImageClassification", "no interference"),
    ("resonance_vision", "AutoModel", "grey"),
    ("resonance_audio", "AutoModelForAudioClassification", "plain"),
    ("resonance_audio", "AutoModelForAudioClassification", "causal"),
    ("resonance_audio", "AutoModelForAudioFrameClassification", "masked"),
    ("resonance_multimodal", "AutoModelForSequenceClassification", "plain"),
    ("resonance_multimodal", "AutoModelForSequenceClassification", "vision and audio"),
]
QUICK = CASES[:1]  # pictures
SIZES = [(1, 0), (3, 0), (1, 7), (3, 7), (1, 40), (3, 40)]  # batch, and by how much larger than the config says
PROCESSORS = {"resonance_vision": "AutoImageProcessor", "resonance_audio": "AutoFeatureExtractor"}


def saved(family: str, auto: str, variant: str, folder: Path) -> torch.nn.Module:
    model = tiny_model(family, variant, auto)
    model.save_pretrained(folder)
    if family in PROCESSORS:
        new_processor(PROCESSORS[family], model.config).save_pretrained(folder)
    else:
        config, parts = model.config, {}
        if "text" in config.modalities:
            parts["tokenizer"] = character_tokenizer(["a text"])
        parts["image_processor"] = new_processor("AutoImageProcessor", config.vision_config)
        parts["feature_extractor"] = new_processor("AutoFeatureExtractor", config.audio_config)
        get_architecture(family).processor(**parts).save_pretrained(folder)
    return model


@pytest.mark.feature("export", "onnx", family="{family}")
@pytest.mark.parametrize(
    ("family", "auto", "variant"),
    [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES],
    ids=lambda x: str(x).removeprefix("AutoModel"),
)
def test_onnx_gives_the_outputs_of_pytorch(tmp_path, family, auto, variant):
    model = saved(family, auto, variant, tmp_path / "saved")
    register()
    task = task_of(model.config)
    if getattr(model.config, "modalities", ["text"])[0] == "text":
        main_export(str(tmp_path / "saved"), output=tmp_path / "onnx", task=task, do_validation=False)
        folder = tmp_path / "onnx"
    else:  # for the task text-classification, the plain command of Optimum asks for a tokenizer
        folder = (source := SavedModel(str(tmp_path / "saved"))).onnx_folder
        assert source.task == task
    graph = Graph(task, model.config)
    program = load_onnx(folder / "model.onnx", graph)
    for batch, more in SIZES:
        tensors = list(graph.example(batch, max(more, 1), seed=more).values())
        (expected,), (got,) = graph.call(model, tensors), program(tensors)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_the_example_of_a_graph_varies_in_size():
    architecture = get_architecture("resonance_vision")
    graph = Graph("image-classification", architecture.config(**architecture.variants["plain"]))
    assert graph.input_axes == {"pixel_values": {0: "batch_size", 2: "height", 3: "width"}}
    assert graph.example(2, 10)["pixel_values"].shape == (2, 3, 26, 21)
    architecture = get_architecture("resonance_audio")
    graph = Graph("audio-classification", architecture.config(**architecture.variants["plain"]))
    example = graph.example(2, 10)
    assert example["input_values"].shape == (2, 2000 + 10 * 160)
    assert example["attention_mask"].diff().max() <= 0, "padding comes after a sound"


@pytest.mark.slow
@pytest.mark.feature("export", "optimum's pipelines with onnx", family="{family}")
@pytest.mark.parametrize("family", PROCESSORS)
def test_the_stock_classes_of_optimum_load_it(tmp_path, family):
    from optimum.onnxruntime import ORTModelForAudioClassification, ORTModelForImageClassification
    from transformers import pipeline

    sees = family == "resonance_vision"
    auto = "AutoModelForImageClassification" if sees else "AutoModelForAudioClassification"
    model = saved(family, auto, "plain", tmp_path / "saved")
    register()
    task = task_of(model.config)
    main_export(str(tmp_path / "saved"), output=tmp_path / "onnx", task=task, do_validation=False)
    ort = (ORTModelForImageClassification if sees else ORTModelForAudioClassification).from_pretrained(
        tmp_path / "onnx"
    )
    processor = new_processor(PROCESSORS[family], model.config)
    random = np.random.default_rng(0)
    inputs = [random.integers(0, 255, (20, 30, 3), dtype=np.uint8)] if sees else [random.standard_normal(3000) * 0.1]
    batch = processor(inputs, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(ort(**batch).logits, model(**batch).logits, rtol=0, atol=1e-4)
    part = {"image_processor": processor} if sees else {"feature_extractor": processor}
    if not sees:
        answers = [pipeline(task, model=one, **part)(inputs[0].astype(np.float32)) for one in (ort, model)]
        assert [a["label"] for a in answers[0]] == [a["label"] for a in answers[1]]


@pytest.mark.slow
@pytest.mark.feature("export", "hf-holo export", family="{family}")
@pytest.mark.parametrize(
    "name", ["onnx", *(pytest.param(n, marks=pytest.mark.slow) for n in ("torchscript", "torch-export"))]
)
@pytest.mark.parametrize("family", PROCESSORS)
def test_every_format_is_measured(tmp_path, quick_export, family, name):
    auto = "AutoModelForImageClassification" if family == "resonance_vision" else "AutoModelForAudioClassification"
    saved(family, auto, "plain", tmp_path / "saved")
    assert main(["export", str(tmp_path / "saved"), str(tmp_path / "out"), "--format", name]) == 0
    report = json.loads((tmp_path / "out" / name / "report.json").read_text())
    assert len(report["parity"]) == 2 and max(row["max"] for row in report["parity"]) <= 1e-4
    assert (tmp_path / "out" / name / "preprocessor_config.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("family", PROCESSORS)
def test_the_plain_command_of_optimum(tmp_path, family):
    auto = "AutoModelForImageClassification" if family == "resonance_vision" else "AutoModelForAudioClassification"
    model = saved(family, auto, "plain", tmp_path / "saved")
    command = [Path(sys.executable).with_name("optimum-cli"), "export", "onnx", "--model", tmp_path / "saved"]
    done = subprocess.run(
        [*command, "--task", task_of(model.config), tmp_path / "onnx"], capture_output=True, text=True
    )
    assert done.returncode == 0 and (tmp_path / "onnx" / "model.onnx").is_file(), done.stderr
