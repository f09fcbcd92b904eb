"""`hf-holo train` on pictures, sounds and several senses: what it learns, writes, resumes to the bit and refuses."""

import csv
import io
import json
import shlex
import shutil

import datasets
import pytest
import soundfile
import torch
from PIL import Image
from small_labelled import labelled_folders, scenes_table
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoProcessor, pipeline

from hf_holo.data.scenes import load_scenes
from hf_holo.data.senses import load_digits
from hf_holo.errors import HoloError
from hf_holo.training.arguments import parse
from hf_holo.training.train import main, train

from .test_resume import same_weights

COMMON = (
    "--max_steps 6 --eval_steps 3 --save_steps 3 --logging_steps 1 --per_device_train_batch_size 6 --warmup_steps 1 "
    "--eval_strategy steps --save_strategy steps --use_cpu --disable_tqdm true --ema_decay 0.5"
)
TINY = {
    "cifar10": "--model hidden_sizes=[8,8] depths=[1,1] filter_reaches=2 image_size=8",
    "spoken-digits": "--model hidden_size=16 num_hidden_layers=1 num_mel_bins=12",
}
LEARNS = "--max_steps 30 --eval_steps 30 --ema_decay 0 --augment none"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folders = labelled_folders(tmp_path_factory.mktemp("data"))
    return {"cifar10": folders["image"], "spoken-digits": folders["audio"]}


@pytest.fixture
def tiny_run(data, tmp_path):
    def run(recipe, *flags, folder="run"):
        words = shlex.split(f"{recipe} {TINY[recipe]} {COMMON}")
        return train(parse([*words, "--train_file", str(data[recipe]), "--output_dir", str(tmp_path / folder), *flags]))

    return run


@pytest.mark.parametrize("recipe", [pytest.param(r, marks=[pytest.mark.slow] * (r == "cifar10")) for r in TINY])
def test_a_run_writes_all_it_promises(tiny_run, data, tmp_path, recipe, capsys):
    tiny_run(recipe, *shlex.split(LEARNS))
    folder = tmp_path / "run"
    said = capsys.readouterr().out
    assert "28 examples to learn from, 12 held-out ones are scored" in said and "2 classes known" in said

    predictions = list(csv.DictReader((folder / "predictions.csv").open()))
    confusion = list(csv.DictReader((folder / "confusion.csv").open()))
    right = sum(int(row["right"]) for row in predictions)
    assert len(predictions) == 12 and right >= 11, "it learns nothing"
    assert sum(int(row[row["class"]]) for row in confusion) == right
    assert f"{right / 12:.1%} right, F1 " in said
    last = list(csv.DictReader((folder / "metrics.csv").open()))[-1]
    assert float(last["validation_accuracy"]) == pytest.approx(right / 12) and "validation_perplexity" not in last
    for name in ("loss", "confusion", "predictions"):
        assert Image.open(folder / f"{name}.png").size[0] > 300
    config = json.loads((folder / "config.json").read_text())
    assert config["id2label"] == {"0": "first", "1": "second"}
    assert "first" in (folder / "README.md").read_text()

    table = datasets.load_dataset("parquet", data_files=str(data[recipe] / "test.parquet"), split="train")
    if recipe == "cifar10":
        classify = pipeline("image-classification", model=str(folder))
        pictures = table.cast_column("image", datasets.Image())["image"]
        answers = [classify(picture)[0]["label"] for picture in pictures]
    else:
        classify = pipeline("audio-classification", model=str(folder))
        sounds = table.cast_column("audio", datasets.Audio(decode=False))["audio"]
        answers = [classify(soundfile.read(io.BytesIO(s["bytes"]), dtype="float32")[0])[0]["label"] for s in sounds]
    assert answers == [row["prediction"] for row in predictions]


@pytest.mark.slow
@pytest.mark.feature("training", "resuming to the bit", family=["resonance_vision", "resonance_audio"])
@pytest.mark.parametrize("recipe", TINY)
def test_resuming_is_exact(tiny_run, tmp_path, recipe):
    """With augmentation, in the middle of the second epoch."""
    flags = ["--save_steps", "2", "--max_steps", "8", "--save_total_limit", "9"]
    tiny_run(recipe, *flags, folder="whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-6", tmp_path / "part" / "checkpoint-6")
    tiny_run(recipe, *flags, "--resume_from_checkpoint", folder="part")
    assert same_weights(tmp_path / "whole", tmp_path / "part")
    for name in ("metrics.csv", "predictions.csv", "confusion.csv"):
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "part" / name).read_text()


@pytest.mark.slow
def test_augmentation_is_for_training_only(tiny_run):
    names = {"plain": ["none"], "changed": ["erase", "crop"]}
    plain, changed = (
        tiny_run("cifar10", "--max_steps", "1", "--augment", *some, folder=folder) for folder, some in names.items()
    )
    one, other = (trainer.get_eval_dataloader().collate_fn for trainer in (plain, changed))
    examples = [plain.eval_dataset[n] for n in range(6)]
    assert torch.equal(one(examples)["pixel_values"], other(examples)["pixel_values"])
    examples = [plain.train_dataset[n] for n in range(6)]
    assert not torch.equal(one(examples)["pixel_values"], other(examples)["pixel_values"])


@pytest.mark.slow
def test_a_trained_model_learns_other_classes(tiny_run, data, tmp_path):
    """Its head is a new one then."""
    tiny_run("cifar10", folder="first")
    table = datasets.load_dataset("parquet", data_files=str(data["cifar10"] / "train.parquet"), split="train")
    table = table.cast_column("image", datasets.Image(decode=False)).remove_columns("label")
    table.add_column("label", ["a", "b", "c", "b"] * 7).to_parquet(tmp_path / "three.parquet")
    words = f"--model_name_or_path {tmp_path}/first --train_file {tmp_path}/three.parquet --output_dir {tmp_path}/next"
    trainer = train(parse(shlex.split(f"cifar10 {COMMON} {words}")))
    assert trainer.model.config.id2label == {0: "a", 1: "b", 2: "c"} and trainer.model.config.hidden_sizes == [8, 8]


@pytest.mark.slow
def test_processors_fit_the_model(tiny_run, tmp_path):
    tiny_run("cifar10", "--model", "hidden_sizes=[8]", "depths=[1]", "filter_reaches=2", "num_channels=1")
    assert AutoImageProcessor.from_pretrained(tmp_path / "run").num_channels == 1
    tiny_run("spoken-digits", "--hold_out", "speaker=bob", folder="audio")
    assert AutoFeatureExtractor.from_pretrained(tmp_path / "audio").sampling_rate == 8000
    assert len(list(csv.DictReader((tmp_path / "audio" / "predictions.csv").open()))) == 20


def test_a_damaged_picture_is_named_before_anything_is_done(data, tmp_path):
    shutil.copytree(data["cifar10"], tmp_path / "data")
    table = datasets.load_dataset("parquet", data_files=str(tmp_path / "data" / "train.parquet"), split="train")
    rows = table.cast_column("image", datasets.Image(decode=False)).to_list()
    rows[17]["image"]["bytes"] = rows[17]["image"]["bytes"][:60]
    damaged = datasets.Dataset.from_list(
        rows, features=table.cast_column("image", datasets.Image(decode=False)).features
    )
    damaged.to_parquet(tmp_path / "data" / "train.parquet")
    with pytest.raises(HoloError, match=r"row 17 of column 'image' cannot be read"):
        main(["cifar10", "--train_file", str(tmp_path / "data"), "--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


BAD = {
    "task": ("--task causal", "task: 'resonance_vision' has no model for the task 'causal', only for 'image-class"),
    "augmentation": ("--augment shift", "unknown augmentation 'shift'"),
    "hold_out": ("--hold_out speaker", "hold_out: 'speaker' is not of the form COLUMN=VALUE"),
    "classes": ("--model num_labels=7", "num_labels=7, but the data has 2 classes"),
    "channels": ("--model num_channels=2", "num_channels"),
    "value": ("--model colours=3", "model: the config of resonance-vision-tiny has no value 'colours'"),
}


@pytest.mark.parametrize(("flags", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_refused(data, tmp_path, flags, message):
    words = f"cifar10 --train_file {data['cifar10']} --output_dir {tmp_path}/run {flags}"
    with pytest.raises(ValueError, match=message):
        main(shlex.split(words))
    assert not (tmp_path / "run").exists()


# Several senses -----------------------------------------------------------------------------------------------------

SMALL = {
    "text_config": {"hidden_size": 8, "num_hidden_layers": 1},
    "vision_config": {"image_size": 8, "patch_size": 4, "hidden_sizes": [8], "depths": [1], "filter_reaches": 1},
    "audio_config": {"hidden_size": 8, "num_hidden_layers": 1, "sampling_rate": 8000, "num_mel_bins": 8},
    "hidden_size": 16,
}


def several(**parts) -> list[str]:
    """`--model` for a tiny model of several senses."""
    return ["--model", *(f"{name}={json.dumps(value)}" for name, value in (SMALL | parts).items())]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return scenes_table(tmp_path_factory.mktemp("scenes") / "scenes.parquet")


@pytest.mark.feature("training", "hf-holo train", family="resonance_multimodal")
@pytest.mark.slow
def test_a_table_of_several_senses(scenes, tmp_path, capsys):
    words = "--preset resonance-multimodal-tiny --task multimodal-classification --optimizer adamw"
    flags = f"{words} {COMMON} --max_steps 12 --eval_steps 6 --validation_fraction 0.25 --train_file {scenes}"
    train(parse([*shlex.split(flags), "--output_dir", str(tmp_path / "run"), *several()]))
    said = capsys.readouterr().out
    assert "30 examples to learn from, 10 held-out ones are scored" in said
    given = [row["given"] for row in csv.DictReader((tmp_path / "run" / "senses.csv").open())]
    assert given == ["vision", "audio", "vision + audio"], "texts are missing"
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["id2label"] == {"0": "day", "1": "night"}
    processor = AutoProcessor.from_pretrained(tmp_path / "run")
    assert len(processor.tokenizer) == config["text_config"]["vocab_size"]


@pytest.mark.feature("training", "resuming to the bit", family="resonance_multimodal")
@pytest.mark.slow
def test_resuming_several_senses_is_exact(scenes, tmp_path):
    words = "--preset resonance-multimodal-tiny --task multimodal-classification --augment crop gain"
    often = f"--save_steps 2 --save_total_limit 9 --train_file {scenes}"
    flags = [*shlex.split(f"{words} {COMMON} {often}"), *several()]
    train(parse([*flags, "--output_dir", str(tmp_path / "whole")]))
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "part" / "checkpoint-4")
    train(parse([*flags, "--output_dir", str(tmp_path / "part"), "--resume_from_checkpoint"]))
    assert same_weights(tmp_path / "whole", tmp_path / "part")


@pytest.mark.parametrize("question", ["digit", pytest.param("sum", marks=pytest.mark.slow)])
def test_digits_of_three_senses(shared_data, tmp_path, question, monkeypatch):
    from hf_holo.training import senses

    def few(*arguments, **options):
        return load_digits(*arguments, **options, train_size=60, validation_size=20)

    monkeypatch.setattr(senses, "load_digits", few)
    parts = several() if question == "digit" else several(text_config=None)
    flags = f"digits-of-three-senses --image_data {shared_data}/mnist --audio_data {shared_data}/fsdd {COMMON}"
    words = [*shlex.split(flags), "--question", question, "--output_dir", str(tmp_path / "run"), *parts]
    trainer = train(parse(words))
    rows = list(csv.DictReader((tmp_path / "run" / "senses.csv").open()))
    assert len(rows) == (7 if question == "digit" else 3)
    assert trainer.model.config.num_labels == 10
    assert Image.open(tmp_path / "run" / "predictions.png").size[0] > 300


def test_a_row_without_anything_is_named(tmp_path):
    rows = {"image": [None] * 4, "text": ["a", "b", None, "a"], "label": ["x", "y", "x", "y"]}
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image(decode=False))
    table.to_parquet(tmp_path / "t.parquet")
    with pytest.raises(HoloError, match="row 2 has neither vision, nor text"):
        load_scenes(str(tmp_path / "t.parquet"), validation_fraction=0.5).checked()
