"""Log-mel frames: the matrix products against the FFT, bands that none misses, and what loudness does."""

import math

import numpy as np
import pytest
import torch
from small_sounds import tones

from hf_holo.modeling import spectrogram
from hf_holo.modeling.spectrogram import FLOOR, log_mel, log_mel_naive, mel_table

SETTINGS = [(200, 80, 8000, 40, 20.0, 4000.0), (400, 160, 16000, 80, 0.0, 8000.0), (90, 90, 4000, 12, 100.0, 1500.0)]


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_fast_form_is_the_naive_one_in_values_and_gradients(settings):
    frame, hop = settings[:2]
    for samples in (frame, frame + hop - 1, frame + 7 * hop + 3):
        x = tones(2, samples).requires_grad_()
        fast, naive = log_mel(x, *settings), log_mel_naive(x, *settings)
        assert fast.shape == (2, (samples - frame) // hop + 1, settings[3])
        torch.testing.assert_close(fast, naive, rtol=1e-10, atol=1e-10)
        weight = torch.randn_like(fast)
        gradients = [torch.autograd.grad((y * weight).sum(), x)[0] for y in (fast, naive)]
        torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-8)


def test_pieces_of_a_long_recording_change_nothing(monkeypatch):
    x, settings = tones(2, 80 * 50), SETTINGS[0]
    whole = log_mel(x, *settings)
    monkeypatch.setattr(spectrogram, "FRAMES_AT_ONCE", 7)
    torch.testing.assert_close(log_mel(x, *settings), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("settings", SETTINGS)
def test_every_band_hears_something_and_a_tone_is_loudest_in_its_own(settings):
    frame, _, rate, bands, lowest, highest = settings
    weights = mel_table(frame, rate, bands, lowest, highest)
    np.testing.assert_allclose(weights.sum(0), 1.0)
    hertz = np.arange(len(weights)) * rate / (2 * (len(weights) - 1))
    center = (weights * hertz[:, None]).sum(0)
    assert (np.diff(center) > 0).all()
    for band in (bands // 2, bands - 2):
        tone = torch.sin(2 * math.pi * center[band] / rate * torch.arange(4 * frame, dtype=torch.float64))[None]
        assert abs(int(log_mel(tone, *settings)[0, 1].argmax()) - band) <= 1


def test_white_noise_has_its_variance_in_every_band_and_silence_is_the_floor():
    noise = 0.1 * torch.randn(1, 400_000, dtype=torch.float64)
    power = log_mel(noise, *SETTINGS[0]).exp().mean(1)
    torch.testing.assert_close(power, torch.full_like(power, 0.01), rtol=0.1, atol=0.0)
    silence = log_mel(torch.zeros(1, 1000), *SETTINGS[0])
    torch.testing.assert_close(silence, torch.full_like(silence, math.log(FLOOR)))
