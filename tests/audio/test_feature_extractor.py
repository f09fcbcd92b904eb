"""The feature extractor: padding and masks, what integers mean, and recordings that it refuses by name."""

import numpy as np
import pytest
import torch

from hf_holo.modeling.processing_resonance_audio import ResonanceFeatureExtractor

EXTRACTOR = ResonanceFeatureExtractor(8000)


def test_recordings_are_padded_on_the_right_with_a_mask():
    batch = EXTRACTOR([np.full(5, 0.5), torch.full((3,), 0.25), [0.1] * 4], sampling_rate=8000, return_tensors="pt")
    assert batch["input_values"].dtype == torch.float32
    assert batch["input_values"][1].tolist() == [0.25, 0.25, 0.25, 0, 0]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]
    assert EXTRACTOR(np.zeros(7, np.float32), return_tensors="np")["input_values"].shape == (1, 7)
    longer = EXTRACTOR([np.zeros(7), np.zeros(30)], padding="max_length", max_length=20, truncation=True)
    assert [len(row) for row in longer["input_values"]] == [20, 20]


def test_integers_are_brought_to_one_and_floats_are_taken_as_they_are():
    for kind in (np.int16, np.int32):
        extremes = np.array([np.iinfo(kind).min, 0, np.iinfo(kind).max], kind)
        np.testing.assert_allclose(EXTRACTOR(extremes)["input_values"][0], [-1, 0, 1], atol=1e-4)
    np.testing.assert_array_equal(EXTRACTOR(np.array([3.0, -2.0]))["input_values"][0], [3.0, -2.0])


def test_normalization_is_by_recording_and_bears_silence():
    extractor = ResonanceFeatureExtractor(8000, do_normalize=True)
    loud, silent = extractor([5 + 3 * np.random.randn(1000), np.zeros(10)])["input_values"]
    assert abs(loud[:1000].mean()) < 1e-5 and abs(loud[:1000].std() - 1) < 1e-3
    assert not silent.any()


@pytest.mark.parametrize(
    ("recordings", "options", "message"),
    [
        (np.zeros(9), {"sampling_rate": 16000}, "sampling_rate: 16000.*8000 hertz"),
        ([np.zeros(9), np.zeros(0)], {}, "recording 1 is empty"),
        ([], {}, "empty list"),
        (np.zeros((9, 2)), {}, r"shape \(9, 2\).*one channel"),
        ([np.zeros(9), np.zeros((2, 9))], {}, r"recording 1 has the shape \(2, 9\)"),
        ([np.zeros(9), np.array([0, np.nan, 0])], {}, "recording 1 is nan at sample 1"),
        (np.array([0, 0, -np.inf]), {}, "recording 0 is -inf at sample 2"),
        (np.zeros(9, np.uint8), {}, "uint8"),
        ([1, 2, 3], {}, "int64"),
    ],
)
def test_what_cannot_be_heard_is_refused(recordings, options, message):
    with pytest.raises(ValueError, match=message):
        EXTRACTOR(recordings, **options)


@pytest.mark.parametrize("arguments", [{"sampling_rate": 0}, {"feature_size": 2}, {"padding_side": "left"}])
def test_arguments_are_checked(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        ResonanceFeatureExtractor(**arguments)


def test_saved_and_loaded(tmp_path):
    ResonanceFeatureExtractor(11_025, do_normalize=True).save_pretrained(tmp_path)
    again = ResonanceFeatureExtractor.from_pretrained(tmp_path)
    assert (again.sampling_rate, again.do_normalize, again.return_attention_mask) == (11_025, True, True)
