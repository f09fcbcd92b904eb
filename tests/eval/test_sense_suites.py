"""The suites vision, audio and multimodal: what they count is what the models say, by the names of the classes."""

import csv
import io
import json

import datasets
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from small_labelled import labelled_folders, scenes_table
from transformers import AutoProcessor, ViTConfig, ViTForImageClassification, pipeline

from hf_holo import (
    HoloError,
    ResonanceAudioConfig,
    ResonanceAudioForAudioClassification,
    ResonanceFeatureExtractor,
    ResonanceImageProcessor,
    ResonanceMultimodalConfig,
    ResonanceMultimodalForSequenceClassification,
    ResonanceProcessor,
    ResonanceVisionConfig,
    ResonanceVisionForImageClassification,
    evaluate,
)
from hf_holo.data.tokenizers import byte_tokenizer
from hf_holo.eval.suites import audio, classifying, vision
from hf_holo.eval.suites.models import load

NAMES = {"id2label": {0: "first", 1: "second"}, "label2id": {"first": 0, "second": 1}}
SMALL = {"batch_size": 5, "repeats": 1}


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    monkeypatch.setattr(vision, "SIDES", (16, 32))
    monkeypatch.setattr(audio, "SECONDS", (1, 2))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return labelled_folders(tmp_path_factory.mktemp("data"))


def sees(**options):
    torch.manual_seed(0)
    sizes = {"hidden_sizes": [8, 8], "depths": [1, 1], "filter_reaches": 2, "image_size": 8}
    model = ResonanceVisionForImageClassification(ResonanceVisionConfig(**{**sizes, **NAMES, **options}))
    return model.eval(), ResonanceImageProcessor(size={"height": 8, "width": 8})


def hears(**options):
    torch.manual_seed(1)
    config = ResonanceAudioConfig(hidden_size=16, num_hidden_layers=1, sampling_rate=8000, num_mel_bins=12, **NAMES)
    model = ResonanceAudioForAudioClassification(config)
    return model.eval(), ResonanceFeatureExtractor(sampling_rate=8000)


def rows(folder, suite: str, table: str) -> list[dict]:
    return json.loads((folder / f"{suite}.json").read_text())["tables"].get(table, [])


def test_pictures_are_counted_as_the_pipeline_sees_them(folders, tmp_path):
    model, processor = sees()
    model.save_pretrained(tmp_path / "mine")
    processor.save_pretrained(tmp_path / "mine")
    report = evaluate(str(tmp_path / "mine"), "vision", tmp_path / "out", eval_file=str(folders["image"]), **SMALL)
    table = datasets.load_dataset("parquet", data_files=str(folders["image"] / "test.parquet"), split="train")
    classify = pipeline("image-classification", model=str(tmp_path / "mine"))
    answers = [classify(picture)[0]["label"] for picture in table.cast_column("image", datasets.Image())["image"]]
    labels = [("first", "second")[number] for number in table["label"]]
    (row,) = rows(tmp_path / "out", "vision", "classes")
    assert row["examples"] == 12, "the split that is held out, and nothing else"
    assert row["accuracy"] == sum(a == b for a, b in zip(answers, labels, strict=True)) / 12
    counted = {(r["class"], r["taken_for"]): r["examples"] for r in rows(tmp_path / "out", "vision", "confusion")}
    pairs = list(zip(labels, answers, strict=True))
    assert counted == {pair: pairs.count(pair) for pair in set(pairs)}
    unchanged, *changed = rows(tmp_path / "out", "vision", "conditions")
    assert unchanged["accuracy"] == row["accuracy"] and len(changed) == len(vision.CONDITIONS) - 1
    times = rows(tmp_path / "out", "vision", "speed")
    assert [r["side"] for r in times] == list(vision.SIDES) and all(r["ms"] > 0 for r in times)
    assert f"{row['accuracy']:.1%}" in report.read_text()
    for name in ("confusion_0", "vision_conditions", "vision_speed"):
        assert f"({name}.png)" in report.read_text() and Image.open(tmp_path / "out" / f"{name}.png").size[0] > 300
    assert (tmp_path / "out" / "vision_conditions.csv").exists()


@pytest.mark.slow
def test_classes_are_compared_by_their_names(folders, tmp_path):
    swapped = {"id2label": {0: "second", 1: "first"}, "label2id": {"second": 0, "first": 1}}
    found = []
    for number, options in enumerate((NAMES, swapped, {"id2label": {0: "LABEL_0", 1: "LABEL_1"}})):
        out = tmp_path / str(number)
        evaluate([sees(**options)], "vision", out, eval_file=str(folders["image"]), **SMALL)
        found.append(rows(out, "vision", "classes")[0]["accuracy"])
    assert found[0] == pytest.approx(1 - found[1]) and found[0] == found[2]
    strange = {"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}}
    with pytest.raises(HoloError, match="does not know the class 'first' of the data; it knows cat, dog"):
        evaluate([sees(**strange)], "vision", tmp_path / "no", eval_file=str(folders["image"]), **SMALL)


@pytest.mark.slow
def test_a_model_of_transformers_of_one_size(folders, tmp_path):
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        **NAMES,
    )
    vit, (_, processor) = ViTForImageClassification(config), sees()
    models = [(vit, processor), sees()]
    evaluate(models, "vision", tmp_path, eval_file=str(folders["image"]), limit=7, **SMALL)
    assert [row["examples"] for row in rows(tmp_path, "vision", "classes")] == [7, 7]
    times = [row for row in rows(tmp_path, "vision", "speed") if row["model"] == "ViTForImageClassification"]
    assert all(row["ms"] is None and "size" in row["reason"] for row in times)
    assert "not taken" in (tmp_path / "report.md").read_text()


def test_changed_pictures_are_changed_and_the_same_each_time(folders):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 7, 3)).astype(np.uint8))
    for name, change in vision.CONDITIONS.items():
        if change is None:
            continue
        once, again = (change(image, np.random.default_rng(3)) for _ in range(2))
        assert once.size == image.size and once.mode == image.mode, name
        assert once.tobytes() == again.tobytes() != image.tobytes(), name
    noise = np.asarray(vision.noisy(Image.new("L", (64, 64), 128), np.random.default_rng(0), 0.1)) / 255
    assert noise.std() == pytest.approx(0.1, rel=0.05)


@pytest.mark.slow
def test_sounds_are_counted_as_the_pipeline_hears_them(folders, tmp_path):
    model, extractor = hears()
    model.save_pretrained(tmp_path / "mine")
    extractor.save_pretrained(tmp_path / "mine")
    evaluate(str(tmp_path / "mine"), "audio", tmp_path / "out", eval_file=str(folders["audio"]), **SMALL)
    table = datasets.load_dataset("parquet", data_files=str(folders["audio"] / "test.parquet"), split="train")
    classify = pipeline("audio-classification", model=str(tmp_path / "mine"))
    files = table.cast_column("audio", datasets.Audio(decode=False))["audio"]
    answers = [classify(soundfile.read(io.BytesIO(f["bytes"]), dtype="float32")[0])[0]["label"] for f in files]
    right = sum(a == ("first", "second")[b] for a, b in zip(answers, table["label"], strict=True))
    (row,) = rows(tmp_path / "out", "audio", "classes")
    assert row["accuracy"] == right / 12
    names = [r["condition"] for r in rows(tmp_path / "out", "audio", "conditions")]
    assert names[0] == classifying.UNCHANGED and len(names) == 5
    assert [r["seconds"] for r in rows(tmp_path / "out", "audio", "speed")] == [1, 2]


def test_every_choice_of_senses(tmp_path):
    table = scenes_table(tmp_path / "scenes.parquet")
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = ResonanceMultimodalConfig(
        text_config={"vocab_size": len(tokenizer), "hidden_size": 8, "num_hidden_layers": 1},
        vision_config={"hidden_sizes": [8, 8], "depths": [1, 1], "filter_reaches": 2, "image_size": 8},
        audio_config={"hidden_size": 8, "num_hidden_layers": 1, "sampling_rate": 8000, "num_mel_bins": 8},
        hidden_size=16,
        id2label={0: "day", 1: "night"},
        label2id={"day": 0, "night": 1},
    )
    model = ResonanceMultimodalForSequenceClassification(config).eval()
    processor = ResonanceProcessor(
        image_processor=ResonanceImageProcessor(size={"height": 8, "width": 8}),
        tokenizer=tokenizer,
        feature_extractor=ResonanceFeatureExtractor(sampling_rate=8000),
    )
    model.save_pretrained(tmp_path / "mine")
    processor.save_pretrained(tmp_path / "mine")
    assert load(str(tmp_path / "mine")).sense == "multimodal"
    evaluate(str(tmp_path / "mine"), "multimodal", tmp_path / "out", eval_file=str(table), **SMALL)
    senses = rows(tmp_path / "out", "multimodal", "senses")
    assert [row["given"] for row in senses] == ["vision", "audio", "vision + audio"], "some texts are missing"
    assert {row["examples"] for row in senses} == {40}, "a table alone is scored whole"
    with (tmp_path / "out" / "multimodal_senses.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 3
    AutoProcessor.from_pretrained(tmp_path / "mine")


@pytest.mark.parametrize(
    ("suite", "options", "message"),
    [
        ("vision", {}, "eval_file: the suite 'vision' needs a table or a folder of labelled examples"),
        (
            "language",
            {},
            "suite: 'language' is not for 'ResonanceVision.*', whose kind is 'vision'",
        ),
        ("vision", {"eval_file": "nowhere.parquet"}, "eval_file: 'nowhere.parquet': there is no file or folder"),
        ("vision", {"label_column": "colour"}, "has no column 'colour'; name one of"),
    ],
)
def test_bad_arguments_are_refused(folders, tmp_path, suite, options, message):
    data = {"eval_file": str(folders["image"])} if "label_column" in options else {}
    with pytest.raises(HoloError, match=message):
        evaluate([sees()], suite, tmp_path, **data, **options, **SMALL)


def test_a_group_measures_what_the_models_are_for(folders, tmp_path):
    report = evaluate([sees()], "all", tmp_path / "bare", **SMALL).read_text()
    assert "left out: vision: no eval_file" in report and "Language" not in report
    report = evaluate([sees()], "all", tmp_path / "out", eval_file=str(folders["image"]), **SMALL).read_text()
    assert "## Vision" in report and "left out" not in report


def test_a_budget_scores_fewer_examples(folders, tmp_path):
    evaluate([sees()], "vision", tmp_path, budget=0.001, eval_file=str(folders["image"]), **SMALL)
    assert json.loads((tmp_path / "vision.json").read_text())["left_out"]


def test_without_a_processor(folders, tmp_path):
    model, _ = sees()
    with pytest.raises(HoloError, match="has no processor"):
        evaluate([model], "vision", tmp_path, eval_file=str(folders["image"]))
