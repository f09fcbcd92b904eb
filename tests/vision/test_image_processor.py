"""The image processor: every kind of picture to the same pixels, and clear refusals."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from hf_holo import ResonanceVisionConfig, ResonanceVisionForImageClassification
from hf_holo.modeling.processing_resonance_vision import ResonanceImageProcessor

RGB = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
GREY = RGB[..., 0]


def pixels(image, processor=None, **options):
    """[C, H, W] from 0 to 1: what one picture becomes without normalisation."""
    processor = processor or ResonanceImageProcessor(image_mean=0, image_std=1)
    return processor(image, return_tensors="pt", **options)["pixel_values"][0]


def expected(array):
    """[C, H, W] of an array [H, W] or [H, W, 3] whose white is 255."""
    array = np.stack([array] * 3, -1) if array.ndim == 2 else array
    return torch.from_numpy(array / 255).permute(2, 0, 1).float()


def with_orientation(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(RGB).save(file, "png", exif=exif)
    return Image.open(file)


@pytest.mark.parametrize(
    ("image", "wanted"),
    [
        (Image.fromarray(RGB), RGB),
        (RGB, RGB),
        (RGB.transpose(2, 0, 1), RGB),
        (torch.from_numpy(RGB).permute(2, 0, 1), RGB),
        (RGB.astype(np.int64), RGB),
        (RGB.astype(np.float64) / 255, RGB),
        (RGB.astype(np.uint16) * 257, RGB),
        (Image.fromarray(GREY), GREY),
        (GREY, GREY),
        (GREY[..., None], GREY),
        (Image.fromarray(GREY.astype(np.uint16) * 257), GREY),
        (Image.fromarray(GREY.astype(np.int32) * 257), GREY),
        (Image.fromarray(GREY.astype(np.float32) / 255), GREY),
        (Image.fromarray(GREY > 99), np.where(GREY > 99, 255, 0)),
        (GREY > 99, np.where(GREY > 99, 255, 0)),
        (with_orientation(6), np.rot90(RGB, -1)),
        (with_orientation(3), np.rot90(RGB, 2)),
    ],
    ids=lambda value: getattr(value, "mode", None),
)
def test_every_kind_of_picture_becomes_the_same_pixels(image, wanted):
    torch.testing.assert_close(pixels(image), expected(wanted), rtol=0, atol=1e-4)


def test_palettes_become_colours():
    colours = Image.fromarray(RGB // 128 * 255)
    palette = colours.convert("P", palette=Image.Palette.ADAPTIVE, colors=8)
    torch.testing.assert_close(pixels(palette), expected(np.asarray(colours)))


def test_transparent_pixels_show_the_background():
    opacity = np.zeros((6, 9, 1), dtype=np.uint8)
    opacity[:3] = 255
    image = Image.fromarray(np.concatenate([RGB, opacity], 2))
    for background in (0.0, 1.0):
        got = pixels(image, ResonanceImageProcessor(image_mean=0, image_std=1, background=background))
        torch.testing.assert_close(got[:, :3], expected(RGB)[:, :3])
        assert (got[:, 3:] == background).all()
    palette = Image.fromarray(GREY % 4).convert("P")
    palette.info["transparency"] = 0
    assert (pixels(palette)[:, torch.from_numpy(GREY % 4 == 0)] == 1).all()


def test_colours_become_grey_as_in_pillow():
    grey = pixels(RGB, ResonanceImageProcessor(num_channels=1, image_mean=0, image_std=1))
    assert grey.shape == (1, 6, 9)
    torch.testing.assert_close(grey, expected(np.asarray(Image.fromarray(RGB).convert("L")))[:1], rtol=0, atol=3e-3)


@pytest.mark.parametrize(
    ("size", "shape"),
    [
        (12, (12, 12)),
        ({"height": 3, "width": 7}, (3, 7)),
        ({"shortest_edge": 12}, (12, 18)),
        ({"longest_edge": 18}, (12, 18)),
        (None, (6, 9)),
    ],
)
def test_pictures_are_resized(size, shape):
    for processor, options in ((ResonanceImageProcessor(size), {}), (ResonanceImageProcessor(), {"size": size})):
        assert pixels(RGB, processor, **options).shape == (3, *shape)
    wanted = np.asarray(Image.fromarray(RGB).resize(shape[::-1], Image.Resampling.BILINEAR))
    torch.testing.assert_close(pixels(RGB, size=size), expected(wanted), rtol=0, atol=6e-3)


def test_unequal_sizes_are_padded_and_masked():
    processor = ResonanceImageProcessor()
    batch = processor([RGB, GREY[:4, :5]], return_tensors="pt")
    assert batch["pixel_values"].shape == (2, 3, 6, 9)
    assert batch["pixel_mask"].sum((1, 2)).tolist() == [54, 20] and batch["pixel_mask"][1, :4, :5].all()
    torch.testing.assert_close(batch["pixel_values"][1, :, :4, :5], pixels(GREY[:4, :5], processor))
    assert not batch["pixel_values"][1, :, 4:].any()
    assert set(processor([RGB, RGB])) == {"pixel_values"}
    assert processor(np.stack([RGB, RGB]), return_tensors="np")["pixel_values"].shape == (2, 3, 6, 9)


def test_normalisation_by_channel():
    got = pixels(RGB, ResonanceImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[1, 2, 4]))
    mean, std = torch.tensor([[[0.1]], [[0.2]], [[0.3]]]), torch.tensor([[[1.0]], [[2.0]], [[4.0]]])
    torch.testing.assert_close(got, (expected(RGB) - mean) / std)


def test_the_channels_are_asked_for_where_the_shape_does_not_tell():
    image = np.zeros((3, 8, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="say input_data_format"):
        pixels(image)
    assert pixels(image, input_data_format="channels_first").shape == (3, 8, 3)
    assert pixels(image, input_data_format="channels_last").shape == (3, 3, 8)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ([], "the list is empty"),
        ([RGB, np.zeros((6, 9, 5), np.uint8)], r"images\[1\]: an array of shape \(6, 9, 5\) has not 1 to 4 channels"),
        (np.full((6, 9), np.nan), "NaN or infinite"),
        (np.zeros((0, 9, 3), np.uint8), "has no pixels"),
        (np.zeros(9, np.uint8), r"\[H, W, C\]"),
        (np.full((6, 9), 200.0), "values from 200 to 200 in an array of float64; they must be from 0 to 1"),
        (np.full((6, 9), -1), "values from -1"),
        (np.zeros((3, 9), np.uint8), "9 × 3 pixels are less than one patch of 4 × 4"),
        ("cat.png", "the text 'cat.png' is not a picture"),
        (None, "a NoneType is not a picture"),
        (np.array([["a", "b"]]), "is not a picture"),
    ],
)
def test_what_is_no_picture_is_refused(image, message):
    with pytest.raises(ValueError, match=message):
        ResonanceImageProcessor(patch_size=4)(image)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_channels": 4}, "num_channels: 4"),
        ({"size": {"height": 4}}, "give a number of pixels, or name height and width"),
        ({"size": 0}, r"size\['height'\]: 0"),
        ({"image_std": 0}, "is not positive"),
        ({"image_mean": [0.5]}, "one for each of num_channels=3"),
        ({"background": 255}, "from 0"),
        ({"resample": 9}, "resample: 9"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ResonanceImageProcessor(**arguments)
    with pytest.raises(TypeError, match="colour"):
        ResonanceImageProcessor()(RGB, colour=True)


def test_saved_and_loaded(tmp_path):
    processor = ResonanceImageProcessor({"shortest_edge": 12}, num_channels=1, image_mean=0.1, patch_size=2)
    processor.save_pretrained(tmp_path)
    loaded = ResonanceImageProcessor.from_pretrained(tmp_path)
    torch.testing.assert_close(pixels(RGB, loaded), pixels(RGB, processor), rtol=0, atol=0)
    assert loaded.patch_size == 2


def test_the_pipeline_takes_paths_and_pictures(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "picture.png")
    config = ResonanceVisionConfig(
        hidden_sizes=[8], depths=[1], filter_reaches=2, id2label={0: "cat", 1: "dog", 2: "elk"}
    )
    model = ResonanceVisionForImageClassification(config).eval()
    classify = pipeline("image-classification", model=model, image_processor=ResonanceImageProcessor(patch_size=2))
    from_path, from_picture = classify([str(tmp_path / "picture.png"), Image.fromarray(RGB)])
    assert from_path == from_picture and {answer["label"] for answer in from_path} == {"cat", "dog", "elk"}
    np.testing.assert_allclose(sum(answer["score"] for answer in from_path), 1, rtol=1e-5)
