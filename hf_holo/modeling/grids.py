"""Filters over the grid of a picture's patches, in magnitude and phase.

A filter is given by its response at F × F frequencies. That fixes a kernel of F × F lags, and with it the response at
every other frequency: the trigonometric interpolation between the given ones. So one filter serves grids of all sizes.

What is outside of the grid counts as zero: the filter is linear, not circular. A circular one would join the left
border to the right, and, as its period is the size of the batch, padding would change what it computes.

Every fast operation `f` stands next to a naive twin `f_naive`; the tests compare values and gradients in float64. Sizes
in the shape tags: B batch, H × W the grid, D channels, R reach, F = 2R + 1, N × M the transform.
"""

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .layers import at_least_float32, init_copy_
from .recording import exporting, fixed_table

DENSE_CELLS = 256  # the largest grid that is filtered by one matrix a channel: up to there it is faster than FFTs ...
CELLS_PER_ROW = 32  # ... if there are so many rows in the batch that making the matrices pays: a row for each 32 cells


def grid_kernel(magnitude: torch.Tensor, phase: torch.Tensor) -> torch.Tensor:
    """The kernel whose response is magnitude · e^{i phase}: an inverse real FFT in two dimensions, as matrix products.

    Args:
        magnitude, phase: `[D, F, R + 1]`, F frequencies of the rows (from 0 on, the negative ones last) by the R + 1 of
            the columns that are not negative.

    Returns:
        Kernels `[D, F, F]` for the lags -R to R.
    """
    from_real, from_imaginary = (torch.from_numpy(t).to(magnitude) for t in _kernel_tables(int(magnitude.shape[1])))
    real, imaginary = magnitude * phase.cos(), magnitude * phase.sin()
    kernel = real.flatten(1) @ from_real + imaginary.flatten(1) @ from_imaginary  # [D, F²]
    return kernel.unflatten(1, (magnitude.shape[1], magnitude.shape[1]))


def grid_kernel_naive(magnitude: torch.Tensor, phase: torch.Tensor) -> torch.Tensor:
    """Twin of [`grid_kernel`]: torch's inverse FFT, with lag 0 moved to the middle."""
    side = magnitude.shape[1]
    kernel = torch.fft.irfft2(torch.complex(magnitude * phase.cos(), magnitude * phase.sin()), s=(side, side))
    return kernel.roll((side // 2, side // 2), (1, 2))


@fixed_table
def _kernel_tables(side: int) -> tuple[np.ndarray, np.ndarray]:
    """From the real and from the imaginary parts [F (R + 1)] of a response to the F² taps of its kernel."""
    reach = side // 2
    lags, rows, columns = np.arange(-reach, reach + 1), np.arange(side), np.arange(reach + 1)
    turns = rows[:, None, None, None] * lags[:, None] + columns[:, None, None] * lags
    angle = 2 * np.pi / side * turns.reshape(side * (reach + 1), side * side)
    weight = np.tile(np.where(columns == 0, 1.0, 2.0), side)[:, None] / side**2  # a column stands for its negative, too
    return weight * np.cos(angle), -weight * np.sin(angle)


def grid_filter(x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Filter every channel of a grid: y[i, j] = Σ_{p, q} kernel[R + p, R + q] x[i - p, j - q], with zeros outside.

    Small grids in large batches are multiplied by one matrix for each channel, others go through FFTs in
    O(HW log HW). Recorded graphs hold the transforms as real matrix products.

    Args:
        x: `[B, H, W, D]`.
        kernel: `[D, F, F]` for the lags -R to R.

    Returns:
        `[B, H, W, D]`.
    """
    if exporting():
        return grid_filter_by_products(x, kernel)
    dense = x.shape[1] * x.shape[2] <= min(DENSE_CELLS, CELLS_PER_ROW * x.shape[0])
    return grid_filter_dense(x, kernel) if dense else grid_filter_by_ffts(x, kernel)


def grid_filter_naive(x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Twin of [`grid_filter`] and of its three forms: one shifted multiply-add for every lag."""
    height, width, reach = x.shape[1], x.shape[2], kernel.shape[-1] // 2
    padded = F.pad(x, (0, 0, reach, reach, reach, reach))
    y = torch.zeros_like(x)
    for p in range(-reach, reach + 1):
        for q in range(-reach, reach + 1):
            shifted = padded[:, reach - p : reach - p + height, reach - q : reach - q + width]
            y = y + kernel[:, reach + p, reach + q] * shifted
    return y


def grid_filter_dense(x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """[`grid_filter`] as one product [HW, HW] · [HW, B] a channel: O(H² W²), and fast where that is small."""
    height, width = x.shape[1:3]
    taps = _resize_lags(_resize_lags(kernel, height, 1), width, 2).flip(1, 2)  # [D, 2H - 1, 2W - 1]
    windows = taps.unfold(1, height, 1).unfold(2, width, 1).flip(1, 2)  # [D, H, W, H, W]: out and in
    matrix = windows.reshape(-1, height * width, height * width)
    y = x.flatten(1, 2).permute(2, 0, 1) @ matrix.mT  # [D, B, HW]
    return y.permute(1, 2, 0).unflatten(1, (height, width))


def _resize_lags(kernel: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    """The lags -(size - 1) to size - 1 along `dim`: no others join two cells of `size`. What is missing is zero."""
    reach, needed = kernel.shape[dim] // 2, size - 1
    if needed <= reach:
        return kernel.narrow(dim, reach - needed, 2 * needed + 1)
    more = needed - reach
    return F.pad(kernel, [0, 0] * (kernel.dim() - 1 - dim) + [more, more])


def grid_filter_by_ffts(x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """[`grid_filter`] as rfft2, multiply, irfft2, with so many zeros that nothing comes around."""
    height, width, reach = x.shape[1], x.shape[2], kernel.shape[-1] // 2
    size = fast_length(max(height, reach + 1) + reach), fast_length(max(width, reach + 1) + reach)
    around = F.pad(kernel, (0, size[1] - kernel.shape[2], 0, size[0] - kernel.shape[1]))
    response = torch.fft.rfft2(around.roll((-reach, -reach), (1, 2)))  # [D, N, M // 2 + 1]
    spectrum = torch.fft.rfft2(x.permute(0, 3, 1, 2), s=size)  # [B, D, N, M // 2 + 1]
    y = torch.fft.irfft2(spectrum * response, s=size)[..., :height, :width]
    return y.permute(0, 2, 3, 1)


@functools.cache
def fast_length(least: int) -> int:
    """The smallest length from `least` on whose only prime factors are 2, 3 and 5: what FFTs are fast at."""
    twos, threes, fives = (range(math.ceil(math.log(least, base)) + 1) for base in (2, 3, 5))
    smooth = (2**a * 3**b * 5**c for a in twos for b in threes for c in fives)
    return min(length for length in smooth if length >= least)


def grid_filter_by_products(x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """[`grid_filter`] as in [`grid_filter_by_ffts`], with discrete Fourier transforms as real matrix products in
    O(HW (H + W)) and without a branch on a size: what is recorded in graphs."""
    height, width, reach = x.shape[1], x.shape[2], kernel.shape[-1] // 2
    rows, columns = height + 2 * reach, width + 2 * reach  # N and M: no shorter than the kernel
    i, j, n, v = (torch.arange(end, device=x.device) for end in (height, width, rows, columns // 2 + 1))
    lags = torch.arange(-reach, reach + 1, device=x.device)

    # 1. columns to M // 2 + 1 =: V frequencies, then rows to N, of the grid and of the kernel
    real, imaginary = (part.transpose(1, 2) for part in _turned(x, None, v, j, columns, -1))  # [B, V, H, D]
    real, imaginary = _turned(real, imaginary, n, i, rows, -1)  # [B, V, N, D]
    taps = kernel.permute(1, 2, 0)[None]  # [1, F, F, D]
    gain, turn = (part.transpose(1, 2) for part in _turned(taps, None, v, lags, columns, -1))  # [1, V, F, D]
    gain, turn = _turned(gain, turn, n, lags, rows, -1)  # [1, V, N, D]
    # 2. multiply
    real, imaginary = real * gain - imaginary * turn, real * turn + imaginary * gain
    # 3. rows and columns back; every column frequency but 0 and M / 2 stands for its negative, too
    real, imaginary = (part.transpose(1, 2) for part in _turned(real, imaginary, i, n, rows, 1))  # [B, H, V, D]
    single = ((v == 0) | (2 * v == columns)).to(x.dtype)
    weight = (2 - single)[:, None] / (rows * columns)
    return _turned(real * weight, imaginary * weight, j, v, columns, 1)[0]


def _turned(
    real: torch.Tensor, imaginary: torch.Tensor | None, out: torch.Tensor, into: torch.Tensor, length: int, sign: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ_b e^{sign 2πi out[a] into[b] / length} x[..., b, D]: real and imaginary part `[..., A, D]` from those
    `[..., B, D]`, the second of which may be None for zeros."""
    angle = (out[:, None] * into % length).to(real.dtype) / length * (sign * 2 * math.pi)
    cosine, sine = angle.cos(), angle.sin()
    if imaginary is None:
        return cosine @ real, sine @ real
    return cosine @ real - sine @ imaginary, sine @ real + cosine @ imaginary


class GridFilter(nn.Module):
    """A learned linear filter of every channel over the grid of patches, in magnitude and phase.

    It starts as random kernels of unit size that fade with the distance, because near patches say most. A masked patch
    must be zero when it comes in, and what comes out there means nothing.

    Args:
        dim: channels D.
        reach: patches R that it hears in each direction; the response is given at 2R + 1 frequencies of each direction.
    """

    def __init__(self, dim: int, reach: int) -> None:
        super().__init__()
        self.reach = reach
        self.magnitude = nn.Parameter(torch.empty(dim, 2 * reach + 1, reach + 1))
        self.phase = nn.Parameter(torch.empty(dim, 2 * reach + 1, reach + 1))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        exact = at_least_float32(self.phase.dtype)  # there is no FFT in bfloat16
        lags = torch.arange(-self.reach, self.reach + 1, device=self.phase.device, dtype=exact)
        window = torch.exp(-0.5 * (lags / (0.5 + 0.25 * self.reach)) ** 2)
        side = len(lags)
        noise = torch.randn(len(self.phase), side, side, device=self.phase.device, dtype=exact)
        kernel = noise * window[:, None] * window
        kernel = kernel / kernel.square().sum((1, 2), keepdim=True).sqrt()
        response = torch.fft.rfft2(kernel.roll((-self.reach, -self.reach), (1, 2)))
        init_copy_(self.magnitude, response.abs())
        init_copy_(self.phase, response.angle())

    def kernel(self) -> torch.Tensor:
        """The taps `[D, F, F]` for the lags -R to R."""
        return grid_kernel(self.magnitude, self.phase)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, H, W, D]`, zeros at masked patches, to `[B, H, W, D]`."""
        dtype = at_least_float32(x.dtype)
        with torch.autocast(x.device.type, enabled=False):  # half precision would make another filter
            return grid_filter(x.to(dtype), self.kernel().to(dtype)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{len(self.magnitude)}, reach={self.reach}"
