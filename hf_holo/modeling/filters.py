"""Filters over the tokens: kernels with a given magnitude response, short convolutions, and the spectral gate.

Every fast operation `f` stands next to a naive twin `f_naive`; the tests compare values and gradients in float64. Sizes
in the shape tags: B batch, T tokens, D channels, K taps.

Source: minimum phase from the folded cepstrum (Oppenheim & Schafer, Discrete-Time Signal Processing).
"""

import math
from functools import partial, reduce

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import BackwardCFunction, FunctionCtx

from .cache import RecurrentLayer
from .kept import Kept
from .layers import at_least_float32
from .layout import TokenLayout
from .recording import exporting, fixed_table, full_precision, single_token


@fixed_table
def _minimum_phase_tables(intervals: int, taps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log-magnitude to phase [R + 1, R + 1], and to taps from real and imaginary part, [R + 1, K] each."""
    n = 2 * intervals
    weight = np.full(intervals + 1, 2.0)  # an rfft holds the frequencies between 0 and π once, for two of them
    weight[[0, -1]] = 1.0
    frequency = 2 * np.pi / n * np.arange(intervals + 1)
    quefrency = np.arange(1, intervals)
    cepstrum = weight[:, None] * np.cos(frequency[:, None] * quefrency) / n
    phase = -2 * cepstrum @ np.sin(quefrency[:, None] * frequency)
    angle = frequency[:, None] * np.arange(taps)
    return phase, weight[:, None] * np.cos(angle) / n, -weight[:, None] * np.sin(angle) / n


def minimum_phase_kernel(gate_logits: torch.Tensor, taps: int) -> torch.Tensor:
    """The causal filter of least delay whose magnitude response is σ(gate_logits).

    Folding the real cepstrum of the log-magnitude onto positive quefrencies gives the phase that belongs to it; the
    spectrum is then cut to `taps`. The smoother the gate, the smaller the error of the cut; a flat gate gives a pure
    gain. Real matrix products only, so that it exports.

    Args:
        gate_logits: `[..., R + 1]`, the gate at R + 1 evenly spaced frequencies from 0 to π.
        taps: length of the kernel, at most 2R.

    Returns:
        Kernels `[..., taps]`.
    """
    log_magnitude = F.logsigmoid(gate_logits)
    to_phase, from_real, from_imaginary = (
        torch.from_numpy(table).to(log_magnitude)
        for table in _minimum_phase_tables(int(gate_logits.shape[-1]) - 1, taps)
    )
    magnitude, phase = log_magnitude.exp(), log_magnitude @ to_phase
    return (magnitude * phase.cos()) @ from_real + (magnitude * phase.sin()) @ from_imaginary


def minimum_phase_kernel_naive(gate_logits: torch.Tensor, taps: int) -> torch.Tensor:
    """Twin of [`minimum_phase_kernel`]: explicit sums for the cepstrum, its phase, and the way back to the taps."""
    log_magnitude = F.logsigmoid(gate_logits)
    intervals = log_magnitude.shape[-1] - 1
    frequency = math.pi / intervals * torch.arange(intervals + 1).to(log_magnitude)
    weight = torch.full_like(frequency, 2.0)  # every frequency between 0 and π stands for two
    weight[0] = weight[-1] = 1.0
    phase = torch.zeros_like(log_magnitude)
    for m in range(1, intervals):
        cepstrum = (log_magnitude * weight * torch.cos(frequency * m)).sum(-1, keepdim=True) / (2 * intervals)
        phase = phase - 2 * cepstrum * torch.sin(frequency * m)  # folded onto positive quefrencies
    spectrum = torch.polar(log_magnitude.exp(), phase)
    turns = (torch.polar(weight, frequency * t) for t in range(taps))
    return torch.stack([(spectrum * turn).real.sum(-1) for turn in turns], -1) / (2 * intervals)


def zero_phase_kernel(gate_logits: torch.Tensor, taps: int) -> torch.Tensor:
    """The symmetric filter whose magnitude response is σ(gate_logits): for bidirectional models.

    It hears `taps` // 2 tokens on both sides. So an even number means one tap more, for a filter that is symmetric
    about a token has an odd number of them.

    Args:
        gate_logits: `[..., R + 1]`, as for [`minimum_phase_kernel`].
        taps: K.

    Returns:
        Kernels `[..., 2 (K // 2) + 1]` for the lags -(K // 2) to K // 2.
    """
    _, from_real, _ = _minimum_phase_tables(int(gate_logits.shape[-1]) - 1, taps // 2 + 1)
    right = gate_logits.sigmoid() @ torch.from_numpy(from_real).to(gate_logits)  # lags 0 to K // 2
    return torch.cat([right[..., 1:].flip(-1), right], -1)


def zero_phase_kernel_naive(gate_logits: torch.Tensor, taps: int) -> torch.Tensor:
    """Twin of [`zero_phase_kernel`]: the inverse FFT of the gate, its wrapped negative lags in front."""
    symmetric = torch.fft.irfft(gate_logits.sigmoid(), n=2 * (gate_logits.shape[-1] - 1))
    return symmetric.roll(taps // 2, -1)[..., : 2 * (taps // 2) + 1]


def interpolate_gate(logits: torch.Tensor, bins: int) -> torch.Tensor:
    """Linear interpolation along the last dimension, `[..., R]` to `[..., bins]`, ends kept: a smooth gate."""
    return logits @ torch.from_numpy(_interpolation_table(int(logits.shape[-1]), bins)).to(logits)


@fixed_table
def _interpolation_table(points: int, bins: int) -> np.ndarray:
    distance = np.abs(np.linspace(0, points - 1, bins) - np.arange(points)[:, None])
    return np.maximum(0.0, 1.0 - distance)


def short_causal_conv(
    x: torch.Tensor, kernel: torch.Tensor, state: torch.Tensor | None = None, document: torch.Tensor | None = None
) -> torch.Tensor:
    """One-sided convolution with a handful of taps, one shifted multiply-add each: y[t] = Σ_j kernel[j] x[t - j].

    Args:
        x: `[B, T, D]`.
        kernel: `[D, K]`, tap 0 first.
        state: `[B, K - 1, D]`, the inputs before `x`, or None for zeros.
        document: `[B, T]` document index of every token, 0 for the document that `state` belongs to (default: all
            0); a token does not see the inputs of another document.

    Returns:
        `[B, T, D]`.
    """
    taps = int(kernel.shape[-1])
    if state is None:
        padded = F.pad(x, (0, 0, taps - 1, 0))
    else:
        padded = torch.cat([state.to(x.dtype), x], 1)
    if document is None and not exporting():
        return (_ShortConv.apply if torch.is_grad_enabled() else _short_conv)(padded, kernel)
    labels = None if document is None else F.pad(document, (taps - 1, 0))
    length = x.shape[1]
    out = x * kernel[:, 0]
    for j in range(1, taps):
        window = slice(taps - 1 - j, taps - 1 - j + length)
        tap = padded[:, window] * kernel[:, j]
        if document is not None and labels is not None:
            tap = tap * (labels[:, window] == document)[..., None]
        out = out + tap
    return out


def short_causal_conv_naive(
    x: torch.Tensor, kernel: torch.Tensor, state: torch.Tensor | None = None, document: torch.Tensor | None = None
) -> torch.Tensor:
    """Twin of [`short_causal_conv`]: one tap of one token at a time, if its input belongs to the token's document."""
    if document is None:
        document = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)
    before = kernel.shape[-1] - 1
    history = x.new_zeros(x.shape[0], before, x.shape[2]) if state is None else state.to(x.dtype)
    padded, labels = torch.cat([history, x], 1), F.pad(document, (before, 0))
    rows = []
    for t in range(x.shape[1]):
        taps = ((kernel[:, j], before + t - j) for j in range(before + 1))
        heard = (tap * padded[:, at] * (labels[:, at] == document[:, t])[:, None] for tap, at in taps)
        rows.append(reduce(torch.add, heard))
    return torch.stack(rows, 1)


def short_causal_conv_step(
    x: torch.Tensor, taps: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """[`short_causal_conv`] for a single token.

    Args:
        x: `[B, 1, D]`.
        taps: `[K, D]`, the kernel from its last tap to its first.
        state: `[B, K - 1, D]`, the inputs before `x`.

    Returns:
        `[B, 1, D]`, and the inputs before the next token `[B, K - 1, D]`.
    """
    inputs = torch.cat([state.to(x.dtype), x], 1)  # [B, K, D]
    return (inputs * taps).sum(1, keepdim=True), inputs[:, 1:].contiguous()


def short_causal_conv_step_naive(
    x: torch.Tensor, taps: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Twin of [`short_causal_conv_step`]: the convolution's, of one token."""
    inputs = torch.cat([state.to(x.dtype), x], 1)
    return short_causal_conv_naive(x, taps.flip(0).T, state), inputs[:, 1:]


def _short_conv(padded: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """[B, K - 1 + T, D] and [D, K] to [B, T, D], in one piece of memory."""
    taps = kernel.shape[-1]
    length = padded.shape[1] - taps + 1
    out = padded[:, taps - 1 :] * kernel[:, 0]
    for j in range(1, taps):
        out.addcmul_(padded[:, taps - 1 - j : taps - 1 - j + length], kernel[:, j])
    return out


class _ShortConv(torch.autograd.Function):
    """[B, K - 1 + T, D] and [D, K] to [B, T, D]. Written out because autograd would keep and sum K copies."""

    @staticmethod
    def forward(ctx: FunctionCtx, padded: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(padded, kernel)
        return _short_conv(padded, kernel)

    @staticmethod
    def backward(ctx: BackwardCFunction, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        saved: tuple[torch.Tensor, ...] = ctx.saved_tensors
        padded, kernel = saved
        taps, length = kernel.shape[-1], grad.shape[1]
        d_padded = torch.zeros_like(padded)
        d_kernel = torch.empty_like(kernel)
        for j in range(taps):
            window = slice(taps - 1 - j, taps - 1 - j + length)
            d_padded[:, window].addcmul_(grad, kernel[:, j])
            d_kernel[:, j] = (grad * padded[:, window]).sum((0, 1))
        return d_padded, d_kernel


class SpectralGate(nn.Module):
    """A learned magnitude response per channel, σ(logits) times a learned scale, as a short filter over the tokens.

    A causal model uses the minimum-phase filter of that response: causal, and of all causal ones the one with the
    least delay. A bidirectional model uses the zero-phase filter, which is symmetric.

    Args:
        dim: channels D.
        taps: length K of the kernel in tokens; the gate is set at K // 2 + 1 frequencies from 0 to π. Zero phase has
            K // 2 tokens on both sides, so that an even K gives K + 1 taps.
        causal: minimum phase (True) or zero phase (False).
        name: name of its state in the cache, the last K - 1 inputs.
        delayed: share of the channels, the last ones, that a causal gate delays by one token. A delay leaves the
            magnitude response as it is; with it the projections that follow tell a token from its predecessor, which
            minimum phase alone cannot (measured: 0.01 nats on tinyshakespeare after 300 steps).
    """

    RESOLUTION = 4  # frequencies between two that are set: keeps the wrapped-around tail of the kernel small

    def __init__(self, dim: int, taps: int = 16, causal: bool = True, name: str = "gate", delayed: float = 0.0) -> None:
        super().__init__()
        self.taps, self.causal, self.name = taps, causal, name
        self.delayed = int(dim * delayed) if causal and taps > 1 else 0
        self.logits = nn.Parameter(torch.empty(dim, taps // 2 + 1))
        self.scale = nn.Parameter(torch.empty(dim))
        self._kernel: Kept[torch.Tensor] = Kept()
        self._taps: Kept[torch.Tensor] = Kept()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.logits)
        nn.init.constant_(self.scale, 2.0)

    def state_spec(self) -> dict[str, tuple[int, ...]]:
        return {self.name: (self.taps - 1, self.scale.shape[0])} if self.causal and self.taps > 1 else {}

    def kernel(self) -> torch.Tensor:
        """The taps: `[D, K]` for the lags 0 to K - 1 if causal, else `[D, 2 (K // 2) + 1]` for -(K // 2) to K // 2."""
        design = minimum_phase_kernel if self.causal else zero_phase_kernel
        with full_precision(self.logits.device):  # half precision would make another filter
            logits = interpolate_gate(self.logits, self.RESOLUTION * max(1, self.taps - 1) + 1)
            kernel = self.scale[:, None] * design(logits, self.taps)
        if self.delayed:
            prompt, late = kernel.split([kernel.shape[0] - self.delayed, self.delayed])
            kernel = torch.cat([prompt, F.pad(late, (1, 0))[:, :-1]])
        return kernel

    def kept_kernel(self) -> torch.Tensor:
        """[`kernel`], designed once for as long as its parameters stay the same, see [`Kept`]."""
        return self._kernel.get(self.kernel, (self.logits, self.scale), step=False)

    def kept_taps(self) -> torch.Tensor:
        """[`kept_kernel`] of a causal gate as [`short_causal_conv_step`] takes it, `[K, D]`."""
        return self._taps.get(lambda: self.kernel().flip(1).T.contiguous(), (self.logits, self.scale))

    def response(self, bins: int = 65) -> torch.Tensor:
        """True magnitude response of the cut kernel at `bins` even frequencies from 0 to π: `[D, bins]`.

        It differs from scale · σ(logits), interpolated, by what the cut to K taps takes away.
        """
        return torch.fft.rfft(self.kernel(), n=2 * (bins - 1)).abs()

    def forward(
        self, x: torch.Tensor, layout: TokenLayout | None = None, cache: RecurrentLayer | None = None
    ) -> torch.Tensor:
        """`[B, T, D]` to `[B, T, D]`."""
        if x.shape[-1] != len(self.scale):
            raise ValueError(
                f"x: it has {x.shape[-1]} channels, and this gate was made for {len(self.scale)}: call SpectralGate("
                f"{x.shape[-1]}); the length of the text that HoloSpectralNet asks for is not needed, any fits"
            )
        layout = TokenLayout(x.shape[1]) if layout is None else layout
        window = cache.get(self.name) if cache is not None else None
        if cache is not None and window is not None and single_token(x.shape[1]):
            y, new = short_causal_conv_step(x, self.kept_taps().to(x.dtype), layout.before(window))
            cache.put(self.name, layout.after(new.to(window.dtype), window))
            return y
        kernel = self.kept_kernel().to(x.dtype)
        if not self.causal:
            return self._both_sides(layout.mask(x), kernel, layout.document)
        if cache is not None and self.taps > 1:
            history = x.new_zeros(x.shape[0], self.taps - 1, x.shape[2]) if window is None else window.to(x.dtype)
            replay = partial(self._window, torch.cat([history, x], 1), layout)
            cache.put(self.name, replay(x.shape[1]), x.shape[1], replay)
        return short_causal_conv(x, kernel, window, layout.document)

    def _window(self, inputs: torch.Tensor, layout: TokenLayout, tokens: int) -> torch.Tensor:
        """The last K - 1 inputs of the last document, after `tokens` tokens: [B, K - 1, D] in at least float32."""
        layout = layout.first(tokens)
        if layout.document is not None:
            labels = F.pad(layout.document, (self.taps - 1, 0))
            inputs = inputs[:, : labels.shape[1]] * (labels == labels[:, -1:])[..., None].to(inputs.dtype)
        window = layout.last_real(inputs, self.taps - 1)
        return window.to(at_least_float32(window.dtype))

    def _both_sides(self, x: torch.Tensor, kernel: torch.Tensor, document: torch.Tensor | None) -> torch.Tensor:
        length, reach = x.shape[1], self.taps // 2  # tokens that the kernel hears on each side
        if document is None:
            return short_causal_conv(F.pad(x, (0, 0, 0, reach)), kernel)[:, reach:]
        padded, labels = F.pad(x, (0, 0, reach, reach)), F.pad(document, (reach, reach), value=-1)
        out = torch.zeros_like(x)
        for j in range(2 * reach + 1):
            window = slice(2 * reach - j, 2 * reach - j + length)
            same = labels[:, window] == document  # a token sees no token of another document
            out = out + padded[:, window] * kernel[:, j] * same[..., None]
        return out
