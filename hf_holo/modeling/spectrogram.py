"""From a waveform to log-mel frames, by real matrix products: differentiable, exportable, in bounded memory.

A frame is a windowed stretch of samples. The power of its discrete Fourier transform, collected in triangular bands
that are evenly spaced on the mel scale, is what the ear resolves of it. Sizes in the shape tags: B batch, S samples,
T frames, L samples of a frame, F frequencies, M mel bands.

Sources: Davis and Mermelstein (1980) for the bands; the mel scale is O'Shaughnessy's (1987), 2595 log10(1 + f / 700).
"""

import numpy as np
import torch
import torch.nn.functional as F

from .recording import exporting, fixed_table

FLOOR = 1e-7  # added to the power of every band, where a full-scale sine has about 0.1: silence is log(FLOOR)
FRAMES_AT_ONCE = 4096  # so that ten minutes need no more memory for their spectra than forty seconds


def log_mel(
    samples: torch.Tensor,
    frame_length: int,
    hop_length: int,
    sampling_rate: int,
    bands: int,
    lowest: float,
    highest: float,
) -> torch.Tensor:
    """Logarithm of the power in each mel band of each frame.

    Frames overlap, so the samples are cut into hops; what every hop adds to the spectrum of the frames that contain it
    is one matrix product.

    Args:
        samples: `[B, S]`, S at least `frame_length`.
        frame_length, hop_length: L samples of a frame, and samples from one frame to the next.
        sampling_rate: samples a second.
        bands: number M of mel bands.
        lowest, highest: the limits of the bands in hertz.

    Returns:
        `[B, T, M]` with T = (S - L) // hop_length + 1.
    """
    spectra, to_bands = (
        torch.from_numpy(table).to(samples)
        for table in (
            dft_table(frame_length, hop_length),
            mel_table(frame_length, sampling_rate, bands, lowest, highest),
        )
    )
    parts = int(spectra.shape[0])
    padded = F.pad(samples, (0, parts * hop_length - frame_length))
    hops = padded[:, : padded.shape[1] // hop_length * hop_length].unflatten(
        1, (-1, hop_length)
    )  # [B, T + parts - 1, hop]
    if exporting():
        return _bands_of_hops(hops, spectra, to_bands)
    frames = hops.shape[1] - parts + 1
    starts = range(0, frames, FRAMES_AT_ONCE)
    pieces = [_bands_of_hops(hops[:, n : n + FRAMES_AT_ONCE + parts - 1], spectra, to_bands) for n in starts]
    return torch.cat(pieces, 1)


def log_mel_naive(
    samples: torch.Tensor,
    frame_length: int,
    hop_length: int,
    sampling_rate: int,
    bands: int,
    lowest: float,
    highest: float,
) -> torch.Tensor:
    """Twin of [`log_mel`]: frame by frame, with torch's window and FFT."""
    window = torch.hann_window(frame_length, dtype=samples.dtype, device=samples.device)
    window = window / window.square().sum().sqrt()
    to_bands = torch.from_numpy(mel_table(frame_length, sampling_rate, bands, lowest, highest)).to(samples)
    rows = []
    for start in range(0, samples.shape[1] - frame_length + 1, hop_length):
        frame = samples[:, start : start + frame_length] * window
        power = torch.fft.rfft(frame, n=fft_length(frame_length)).abs().square()  # [B, F]
        rows.append(torch.log(power @ to_bands + FLOOR))
    return torch.stack(rows, 1)


def _bands_of_hops(hops: torch.Tensor, spectra: torch.Tensor, to_bands: torch.Tensor) -> torch.Tensor:
    """[B, T + P - 1, hop], the DFT of the P hops of a frame [P, hop, 2F], and [F, M], to [B, T, M]."""
    parts = int(spectra.shape[0])
    # a negative end, or None at the last part: no size of the input is written into an exported graph
    terms = [hops[:, j : (j - parts + 1) or None] @ spectra[j] for j in range(parts)]  # [B, T, 2F] each
    real, imaginary = torch.stack(terms).sum(0).chunk(2, -1)
    return torch.log((real.square() + imaginary.square()) @ to_bands + FLOOR)


def fft_length(frame_length: int) -> int:
    """Points of the transform of a frame: the next power of two, as is usual; more of them cost nothing but time."""
    return 1 << (frame_length - 1).bit_length()


@fixed_table
def dft_table(frame_length: int, hop_length: int) -> np.ndarray:
    """The Hann window and the transform of a frame in one, hop by hop: [P, hop, 2F], cosines first.

    The window has unit energy, so that white noise of variance 1 has power 1 at every frequency.
    """
    points, at = fft_length(frame_length), np.arange(frame_length)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * at / frame_length)
    window /= np.sqrt((window**2).sum())
    turns = np.outer(at, np.arange(points // 2 + 1)) % points  # exact, however long the frame
    angle = 2 * np.pi / points * turns
    table = window[:, None] * np.concatenate([np.cos(angle), -np.sin(angle)], 1)  # [L, 2F]
    missing = -frame_length % hop_length
    return np.pad(table, ((0, missing), (0, 0))).reshape(-1, hop_length, table.shape[1])


@fixed_table
def mel_table(frame_length: int, sampling_rate: int, bands: int, lowest: float, highest: float) -> np.ndarray:
    """Weights of the frequencies in each band, [F, M]; those of a band sum to 1.

    A band is at least as wide as the distance of two frequencies, so that none is empty.
    """
    points = fft_length(frame_length)
    hertz = np.arange(points // 2 + 1) * sampling_rate / points
    edges = from_mel(np.linspace(to_mel(lowest), to_mel(highest), bands + 2))
    spacing = sampling_rate / points
    rise, fall = (np.maximum(np.diff(edges)[side], spacing) for side in (slice(None, -1), slice(1, None)))
    distance = hertz[:, None] - edges[1:-1]  # [F, M]
    weights = np.maximum(0.0, 1 - np.where(distance < 0, -distance / rise, distance / fall))
    return weights / weights.sum(0)


def to_mel(hertz: float | np.ndarray) -> np.ndarray:
    return 2595 * np.log10(1 + np.asarray(hertz) / 700)


def from_mel(mel: np.ndarray) -> np.ndarray:
    """Inverse of [`to_mel`]."""
    return 700 * (10 ** (mel / 2595) - 1)
