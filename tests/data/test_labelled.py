"""Pictures and sounds as users have them: tables, folders by class, odd formats, damaged files, splits, batches."""

import io

import datasets
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from transformers import ViTImageProcessor, Wav2Vec2FeatureExtractor

from hf_holo.data import audio, images
from hf_holo.data.audio import Sounds, audio_collator, load_audio, with_noise
from hf_holo.data.images import image_collator, load_images
from hf_holo.errors import HoloError

COLOURS = {"blue": (0, 0, 200), "red": (200, 0, 0)}


def picture(colour=(200, 0, 0), size=(12, 8), mode="RGB", format="PNG", **options) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).convert(mode).save(file, format, **options)
    return file.getvalue()


def sound(seconds=0.1, rate=8000, channels=1, frequency=440.0) -> bytes:
    time = np.arange(int(seconds * rate)) / rate
    file = io.BytesIO()
    soundfile.write(file, np.tile(np.sin(2 * np.pi * frequency * time)[:, None], channels), rate, format="WAV")
    return file.getvalue()


def table(path, files, labels, feature, column, **columns):
    rows = {column: [{"bytes": file, "path": None} for file in files], "label": labels, **columns}
    typed = datasets.Dataset.from_dict(rows).cast_column(column, feature)
    if not isinstance(labels[0], str):
        typed = typed.cast_column("label", datasets.ClassLabel(names=["blue", "red"]))
    typed.to_parquet(path)
    return str(path)


@pytest.fixture
def picture_table(tmp_path):
    files = [picture(colour) for colour in COLOURS.values()] * 10
    return table(tmp_path / "train.parquet", files, [0, 1] * 10, datasets.Image(decode=False), "image")


@pytest.fixture
def sound_table(tmp_path):
    files = [sound(0.1 + 0.01 * n, frequency=300.0 + 50 * (n % 2)) for n in range(12)]
    speakers = ["ann", "bob", "cleo"] * 4
    feature = datasets.Audio(decode=False)
    return table(tmp_path / "sounds.parquet", files, [0, 1] * 6, feature, "audio", speaker=speakers)


# Reading ------------------------------------------------------------------------------------------------------------


def test_a_table_is_split_with_the_seed(picture_table):
    splits = load_images(picture_table, validation_fraction=0.25)
    assert (len(splits.train), len(splits.validation)) == (15, 5)
    assert splits.class_names == ["blue", "red"]
    assert sorted([*splits.train.rows, *splits.validation.rows]) == list(range(20))
    again, other = load_images(picture_table, validation_fraction=0.25), load_images(picture_table, seed=1)
    assert list(again.train.rows) == list(splits.train.rows) and list(other.train.rows) != list(splits.train.rows)
    example = splits.train[3]
    assert example["image"].getpixel((0, 0)) == list(COLOURS.values())[example["labels"]]


def test_a_folder_of_tables_holds_out_its_test(tmp_path, picture_table):
    table(tmp_path / "test.parquet", [picture()] * 3, [1] * 3, datasets.Image(decode=False), "image")
    splits = load_images(str(tmp_path))
    assert (len(splits.train), len(splits.validation)) == (20, 3) and set(splits.validation.labels) == {1}


def test_a_folder_of_pictures_by_class(tmp_path):
    for split, count in (("train", 3), ("validation", 1)):
        for name, colour in COLOURS.items():
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                (tmp_path / split / name / f"{number}.png").write_bytes(picture(colour))
    splits = load_images(str(tmp_path))
    assert (len(splits.train), len(splits.validation), splits.class_names) == (6, 2, ["blue", "red"])
    assert all(e["image"].getpixel((1, 1)) == COLOURS[splits.class_names[e["labels"]]] for e in splits.train)


def test_a_folder_of_sounds_by_class(tmp_path):
    for name in ("high", "low"):
        (tmp_path / name).mkdir()
        for number in range(3):
            (tmp_path / name / f"{number}.wav").write_bytes(sound())
    splits = load_audio(str(tmp_path), validation_fraction=0.34)
    assert (len(splits.train), len(splits.validation), splits.class_names) == (4, 2, ["high", "low"])
    assert splits.train[0]["audio"].shape == (800,)


def test_labels_of_text_become_classes(tmp_path):
    file = table(tmp_path / "t.parquet", [picture()] * 4, ["b", "a", "b", "c"], datasets.Image(decode=False), "image")
    splits = load_images(file, validation_fraction=0.25)
    assert splits.class_names == ["a", "b", "c"]
    assert sorted([*splits.train.labels, *splits.validation.labels]) == [0, 1, 1, 2]


def test_one_speaker_is_held_out(sound_table):
    splits = load_audio(sound_table, hold_out={"speaker": "bob"})
    assert set(splits.validation.values("speaker")) == {"bob"} and len(splits.validation) == 4
    assert set(splits.train.values("speaker")) == {"ann", "cleo"}
    with pytest.raises(HoloError, match=r"hold_out: \{'speaker': 'zoe'\} is true of 0 of 12 rows"):
        load_audio(sound_table, hold_out={"speaker": "zoe"})


def test_a_turned_picture_is_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    file = picture(size=(12, 8), format="JPEG", exif=exif)
    path = table(tmp_path / "t.parquet", [file] * 2, [0, 1], datasets.Image(decode=False), "image")
    assert load_images(path, validation_fraction=0.5).train[0]["image"].size == (8, 12)


def test_sounds_are_resampled_and_channels_averaged(tmp_path):
    files = [sound(0.5, 44100, channels=2), sound(0.5, 8000)]
    path = table(tmp_path / "t.parquet", files, [0, 1], datasets.Audio(decode=False), "audio")
    splits = load_audio(path, validation_fraction=0.5, sampling_rate=16000)
    one, other = splits.train[0]["audio"], splits.validation[0]["audio"]
    assert one.shape == other.shape == (8000,) and one.dtype == np.float32
    assert np.abs(one - other)[200:-200].max() < 0.02  # the same sine, but for the ends of the filter


@pytest.mark.parametrize("damage", ["cut off", "no picture", "empty"])
def test_a_damaged_picture_is_named_with_its_row(tmp_path, damage):
    whole = picture(size=(64, 64), format="JPEG")
    bad = {"cut off": whole[: len(whole) // 2], "no picture": b"GIF89a nonsense", "empty": b""}[damage]
    files = [whole] * 7 + [bad] + [whole] * 4
    path = table(tmp_path / "t.parquet", files, [0, 1] * 6, datasets.Image(decode=False), "image")
    with pytest.raises(HoloError, match=r"train_file: '.*t.parquet', train: row 7 of column 'image' cannot be read: ."):
        load_images(path).checked()


@pytest.mark.parametrize("bad", [b"RIFF nonsense", sound(0.0)], ids=["damaged", "without samples"])
def test_a_damaged_sound_is_named_with_its_row(tmp_path, bad):
    path = table(tmp_path / "t.parquet", [sound()] * 3 + [bad], [0, 1, 0, 1], datasets.Audio(decode=False), "audio")
    with pytest.raises(HoloError, match=r"row 3 of column 'audio' cannot be read: ."):
        load_audio(path, validation_fraction=0.5).checked()


def test_a_folder_names_the_damaged_file(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    (tmp_path / "a" / "good.png").write_bytes(picture())
    (tmp_path / "b" / "bad.png").write_bytes(b"nothing")
    with pytest.raises(HoloError, match=r"row 1 \(bad.png\) of column 'image' cannot be read"):
        load_images(str(tmp_path), validation_fraction=0.5).checked()


BAD = {
    "nothing": ({}, "train_file: name a folder, or a parquet"),
    "missing": ({"train_file": "nowhere"}, "there is no file or folder 'nowhere'"),
    "column": ({"image_column": "photo"}, "unknown column of train_file.* 'photo'"),
    "labels": ({"label_column": "kind"}, "has no column 'kind'; name one of image, label with --label_column"),
    "wrong column": ({"image_column": "label"}, "column 'label' holds no images"),
    "share": ({"validation_fraction": 1.5}, "validation_fraction: 1.5 of 20 examples leaves one part empty"),
    "hold out": ({"hold_out": {"speaker": 1}}, "unknown column of .* 'speaker'"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_refused(picture_table, changes, message):
    arguments = {"train_file": picture_table} | changes if changes else {}
    with pytest.raises(HoloError, match=message) as error:
        load_images(**arguments)
    assert "\n" not in str(error.value)


def test_a_row_without_a_label_is_named(tmp_path):
    labels = ["a", "b", None, "a"]
    path = table(tmp_path / "t.parquet", [picture()] * 4, labels, datasets.Image(decode=False), "image")
    with pytest.raises(HoloError, match="row 2 of 4 has no label in 'label'"):
        load_images(path)


def test_a_damaged_table_is_named(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(HoloError, match=r"bad.parquet' cannot be read: ."):
        load_images(str(tmp_path / "bad.parquet"))


# Batches ------------------------------------------------------------------------------------------------------------


def test_pictures_in_a_batch(picture_table):
    examples = load_images(picture_table).train
    collate = image_collator(ViTImageProcessor(size={"height": 8, "width": 8}))
    batch = collate([examples[n] for n in range(5)])
    assert batch["pixel_values"].shape == (5, 3, 8, 8) and batch["labels"].tolist() == list(examples.labels[:5])


def test_sounds_in_a_batch_are_padded(sound_table):
    examples = load_audio(sound_table).train
    collate = audio_collator(
        Wav2Vec2FeatureExtractor(sampling_rate=8000, return_attention_mask=True, do_normalize=False)
    )
    batch = collate([examples[n] for n in range(4)])
    lengths = [len(examples[n]["audio"]) for n in range(4)]
    assert batch["input_values"].shape == (4, max(lengths))
    assert batch["attention_mask"].sum(1).tolist() == lengths
    for row, length in enumerate(lengths):
        assert torch.equal(batch["input_values"][row, :length], torch.from_numpy(examples[row]["audio"]))


def test_augmentation_follows_from_the_rows_and_the_seed(picture_table):
    examples, processor = load_images(picture_table).train, ViTImageProcessor(do_resize=False)
    one, same, other = (image_collator(processor, ["crop", "flip", "erase"], seed) for seed in (0, 0, 1))
    rows = [examples[n] for n in range(6)]
    first = one(rows)["pixel_values"]
    one(rows[::-1])  # what came in between does not matter
    assert torch.equal(first, one(rows)["pixel_values"]) and torch.equal(first, same(rows)["pixel_values"])
    assert not torch.equal(first, other(rows)["pixel_values"])
    assert not torch.equal(first, one(rows[::-1])["pixel_values"].flip(0))


@pytest.mark.parametrize("name", images.AUGMENTATIONS)
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_an_augmented_picture_keeps_its_size_and_mode(name, mode):
    noise = np.random.default_rng(0).integers(0, 255, (16, 24, 3), dtype=np.uint8)
    before = Image.fromarray(noise).convert(mode)
    random, changed = np.random.default_rng(1), []
    for _ in range(8):
        after = images.AUGMENTATIONS[name](before, random)
        assert (after.size, after.mode) == (before.size, before.mode)
        changed.append(after.tobytes() != before.tobytes())
    assert any(changed)


@pytest.mark.parametrize("name", audio.AUGMENTATIONS)
def test_an_augmented_sound_stays_a_sound(name):
    random = np.random.default_rng(1)
    before = random.standard_normal(500).astype(np.float32)
    after = [audio.AUGMENTATIONS[name](before, random) for _ in range(4)]
    assert all(x.dtype == np.float32 and np.isfinite(x).all() and 450 <= len(x) <= 560 for x in after)
    assert any(len(x) != len(before) or not np.array_equal(x, before) for x in after)
    assert len(audio.AUGMENTATIONS[name](before[:1], random)) == 1


def test_a_shift_moves_and_a_noise_has_its_size():
    ramp = np.arange(1.0, 101.0, dtype=np.float32)
    moved = audio.shift(ramp, np.random.default_rng(3))
    kept = moved[moved > 0]
    assert 90 <= len(kept) < 100 and np.all(np.diff(kept) == 1)
    sine = np.sin(np.arange(8000) / 5).astype(np.float32)
    noise = with_noise(sine, 0.0, np.random.default_rng(0)) - sine
    assert np.mean(noise**2) == pytest.approx(np.mean(sine**2), rel=0.05)


def test_unknown_augmentations_are_refused():
    with pytest.raises(HoloError, match="unknown augmentation 'filp': did you mean 'flip'"):
        image_collator(None, ["filp"])


def test_a_selection_keeps_its_rows(sound_table):
    sounds = load_audio(sound_table).train
    some = sounds.select([2, 0])
    assert isinstance(some, Sounds) and list(some.rows) == [sounds.rows[2], sounds.rows[0]]
    assert np.array_equal(some[1]["audio"], sounds[0]["audio"])
