"""Binding by circular convolution, and unbinding by correlation, each next to its naive twin.

Source: holographic reduced representations (Plate, 1995).
"""

import functools

import numpy as np
import torch

from .layers import at_least_float32
from .recording import exporting, fixed_table


def bind(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Holographic binding: circular convolution along the last dimension, a ⊛ b.

    Args:
        a, b: `[..., D]`, broadcast against each other.

    Returns:
        `[..., D]` with c[n] = Σ_m a[m] b[(n - m) mod D], computed in at least float32.
    """
    return _through_spectra(a, b, 1)


def bind_naive(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Twin of [`bind`]: the sum over m, one shift at a time."""
    return functools.reduce(torch.add, (a[..., m, None] * b.roll(m, -1) for m in range(a.shape[-1])))


def unbind(c: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Inverse of [`bind`] up to crosstalk: circular correlation of `c` with the key `b`, both `[..., D]`.

    Exact when every frequency of `b` has magnitude one (a unitary key).
    """
    return _through_spectra(c, b, -1)


def unbind_naive(c: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Twin of [`unbind`]: out[n] = Σ_m c[(n + m) mod D] b[m]."""
    return functools.reduce(torch.add, (b[..., m, None] * c.roll(-m, -1) for m in range(c.shape[-1])))


def _through_spectra(a: torch.Tensor, b: torch.Tensor, sign: int) -> torch.Tensor:
    """[`bind`] (sign 1) and [`unbind`] (-1). No FFT takes half precision, whose values are computed in float32."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    a, b = (x.to(at_least_float32(dtype)) for x in (a, b))
    if exporting():
        return _bind_by_product(a, b, sign).to(dtype)
    spectrum = torch.fft.rfft(b) if sign == 1 else torch.fft.rfft(b).conj()
    return torch.fft.irfft(torch.fft.rfft(a) * spectrum, n=a.shape[-1]).to(dtype)


def _bind_by_product(a: torch.Tensor, b: torch.Tensor, sign: int) -> torch.Tensor:
    """[`bind`] (sign 1) and [`unbind`] (-1) without an FFT: the Fourier transforms are products with fixed matrices."""
    to_spectrum, from_spectrum = (torch.from_numpy(table).to(a) for table in _dft_tables(int(a.shape[-1])))
    (a_real, a_imaginary), (b_real, b_imaginary) = ((x @ to_spectrum).chunk(2, -1) for x in (a, b))
    b_imaginary = sign * b_imaginary
    real, imaginary = a_real * b_real - a_imaginary * b_imaginary, a_real * b_imaginary + a_imaginary * b_real
    return torch.cat([real, imaginary], -1) @ from_spectrum


@fixed_table
def _dft_tables(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers to real and imaginary parts of their spectrum, [n, 2R], and back, [2R, n], with R = n // 2 + 1."""
    frequency, at = np.arange(n // 2 + 1), np.arange(n)
    angle = 2 * np.pi / n * (at[:, None] * frequency % n)
    weight = np.where((frequency == 0) | (2 * frequency == n), 1.0, 2.0)[:, None] / n  # both halves of a spectrum
    to_spectrum = np.concatenate([np.cos(angle), -np.sin(angle)], 1)
    return to_spectrum, np.concatenate([weight * np.cos(angle).T, -weight * np.sin(angle).T])


def bind_phasors(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Holographic binding in the frequency domain: the product of complex numbers that are stored as real vectors.

    It is [`bind`] of the vectors whose spectra these are, without their parts that do not turn.

    Args:
        a, b: `[..., 2P]`, real parts first, broadcast against each other.

    Returns:
        `[..., 2P]`. Products with zeros are zeros, those with unit phasors turn.
    """
    (a_real, a_imaginary), (b_real, b_imaginary) = a.chunk(2, -1), b.chunk(2, -1)
    return torch.cat([a_real * b_real - a_imaginary * b_imaginary, a_real * b_imaginary + a_imaginary * b_real], -1)


def bind_phasors_naive(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Twin of [`bind_phasors`], in complex numbers."""
    product = torch.complex(*a.chunk(2, -1)) * torch.complex(*b.chunk(2, -1))
    return torch.cat([product.real, product.imag], -1)
