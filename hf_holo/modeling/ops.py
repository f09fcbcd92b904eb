"""Pure functions on tensors: binding, causal filters, phase features and the interference scan.

Every fast operation `f` stands beside a naive twin `f_naive` that says in a loop what `f` means; the tests compare
values and gradients in float64. Sizes in the shape tags: B batch, T tokens, D channels, H key heads, G query heads per
key head, P phases, F = 2P real features, V value width, C tokens in a chunk, N chunks, K taps.

Sources: holographic reduced representations (Plate, 1995); the chunked form of linear attention with decay (Sun et
al., 2023, RetNet; Yang et al., 2024, GLA); the delta rule in chunks (Yang et al., 2024, DeltaNet); minimum phase from
the folded cepstrum (Oppenheim & Schafer, Discrete-Time Signal Processing).
"""

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

CHUNK = 32  # tokens handled by one masked product; the quickest of 32, 64 and 128 on two CPU cores
DOUBLINGS = 12  # so an exported cancelling scan takes up to 2^12 chunks, 131,072 tokens, in one call


def exporting() -> bool:
    """True while a graph is recorded, where no branch or loop may depend on a shape."""
    return torch.jit.is_tracing() or torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export()


def has_values(x: torch.Tensor) -> bool:
    """Whether the numbers of a tensor can be looked at: not while a graph is recorded, nor in one without data."""
    return not exporting() and type(x) is torch.Tensor


def fixed_table(function: Callable) -> Callable:
    """Computes what depends on sizes alone once, also where a graph is recorded: torch.compile reads the numbers. It
    would turn NumPy's operations into its own, which fails under a default device."""
    return functools.lru_cache(torch.compiler.assume_constant_result(function))


def single_token(length: int) -> bool:
    """Whether a call holds one token and may be told so: a compiler knows, a trace would take it for all lengths."""
    return not (torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()) and length == 1


# ---------------------------------------------------------------------------------------------- binding
def bind(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Holographic binding: circular convolution along the last dimension, a ⊛ b.

    Args:
        a, b: `[..., D]`, broadcast against each other.

    Returns:
        `[..., D]` with c[n] = Σ_m a[m] b[(n - m) mod D].
    """
    if exporting():
        return _bind_by_product(a, b, 1)
    return torch.fft.irfft(torch.fft.rfft(a) * torch.fft.rfft(b), n=a.shape[-1])


def bind_naive(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Twin of [`bind`]: the sum over m, one shift at a time."""
    return sum(a[..., m, None] * b.roll(m, -1) for m in range(a.shape[-1]))


def unbind(c: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Inverse of [`bind`] up to crosstalk: circular correlation of `c` with the key `b`, both `[..., D]`.

    Exact when every frequency of `b` has magnitude one (a unitary key).
    """
    if exporting():
        return _bind_by_product(c, b, -1)
    return torch.fft.irfft(torch.fft.rfft(c) * torch.fft.rfft(b).conj(), n=c.shape[-1])


def unbind_naive(c: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Twin of [`unbind`]: out[n] = Σ_m c[(n + m) mod D] b[m]."""
    return sum(b[..., m, None] * c.roll(-m, -1) for m in range(c.shape[-1]))


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


# ---------------------------------------------------------------------------------------------- causal filters
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

    Args:
        gate_logits: `[..., R + 1]`, as for [`minimum_phase_kernel`].
        taps: length K of the kernel.

    Returns:
        Kernels `[..., K]` for the lags -((K - 1) // 2) to K // 2.
    """
    _, from_real, _ = _minimum_phase_tables(int(gate_logits.shape[-1]) - 1, taps // 2 + 1)
    right = gate_logits.sigmoid() @ torch.from_numpy(from_real).to(gate_logits)  # lags 0 to K // 2
    return torch.cat([right[..., 1 : (taps - 1) // 2 + 1].flip(-1), right], -1)


def zero_phase_kernel_naive(gate_logits: torch.Tensor, taps: int) -> torch.Tensor:
    """Twin of [`zero_phase_kernel`]: the inverse FFT of the gate, its wrapped negative lags in front."""
    symmetric = torch.fft.irfft(gate_logits.sigmoid(), n=2 * (gate_logits.shape[-1] - 1))
    return symmetric.roll((taps - 1) // 2, -1)[..., :taps]


def interpolate_gate(logits: torch.Tensor, bins: int) -> torch.Tensor:
    """Linear interpolation along the last dimension, `[..., R]` to `[..., bins]`, ends kept: a smooth gate."""
    return logits @ torch.from_numpy(_interpolation_table(int(logits.shape[-1]), bins)).to(logits)


@fixed_table
def _interpolation_table(points: int, bins: int) -> np.ndarray:
    distance = np.abs(np.linspace(0, points - 1, bins) - np.arange(points)[:, None])
    return np.maximum(0.0, 1.0 - distance)


def causal_conv(x: torch.Tensor, kernel: torch.Tensor, state: torch.Tensor | None = None) -> torch.Tensor:
    """One-sided convolution by FFT, O(T log T), for long kernels: y[t] = Σ_j kernel[j] x[t - j].

    Args:
        x: `[B, T, D]`.
        kernel: `[D, K]`, tap 0 first.
        state: `[B, K - 1, D]`, the inputs before `x` (default: zeros).

    Returns:
        `[B, T, D]`.
    """
    taps = kernel.shape[-1]
    history = x.new_zeros(x.shape[0], taps - 1, x.shape[2]) if state is None else state
    padded = torch.cat([history, x], 1)  # [B, K - 1 + T, D]
    n = padded.shape[1] + taps - 1  # room for the whole linear convolution: nothing wraps around
    spectrum = torch.fft.rfft(padded, n=n, dim=1) * torch.fft.rfft(kernel.mT, n=n, dim=0)
    return torch.fft.irfft(spectrum, n=n, dim=1)[:, taps - 1 : taps - 1 + x.shape[1]]


def causal_conv_naive(x: torch.Tensor, kernel: torch.Tensor, state: torch.Tensor | None = None) -> torch.Tensor:
    """Twin of [`causal_conv`]: one tap of one token at a time."""
    taps = kernel.shape[-1]
    history = x.new_zeros(x.shape[0], taps - 1, x.shape[2]) if state is None else state
    padded = torch.cat([history, x], 1)
    rows = [sum(kernel[:, j] * padded[:, taps - 1 + t - j] for j in range(taps)) for t in range(x.shape[1])]
    return torch.stack(rows, 1)


def short_causal_conv(
    x: torch.Tensor, kernel: torch.Tensor, state: torch.Tensor | None = None, document: torch.Tensor | None = None
) -> torch.Tensor:
    """[`causal_conv`] for a handful of taps: one shifted multiply-add per tap.

    Args:
        x: `[B, T, D]`.
        kernel: `[D, K]`.
        state: `[B, K - 1, D]` or None for zeros.
        document: `[B, T]` document index of every token, 0 for the document that `state` belongs to (default: all
            0); a token does not see the inputs of another document.
    """
    taps = int(kernel.shape[-1])
    if state is None:
        padded = F.pad(x, (0, 0, taps - 1, 0))
    else:
        padded = torch.cat([state.to(x.dtype), x], 1)
    if document is None and not exporting():
        return _ShortConv.apply(padded, kernel)
    labels = None if document is None else F.pad(document, (taps - 1, 0))
    length = x.shape[1]
    out = x * kernel[:, 0]
    for j in range(1, taps):
        window = slice(taps - 1 - j, taps - 1 - j + length)
        tap = padded[:, window] * kernel[:, j]
        out = out + (tap if labels is None else tap * (labels[:, window] == document)[..., None])
    return out


def short_causal_conv_naive(
    x: torch.Tensor, kernel: torch.Tensor, state: torch.Tensor | None = None, document: torch.Tensor | None = None
) -> torch.Tensor:
    """Twin of [`short_causal_conv`]: one tap of one token at a time, if its input belongs to the token's document."""
    if document is None:
        return causal_conv_naive(x, kernel, state)
    before = kernel.shape[-1] - 1
    history = x.new_zeros(x.shape[0], before, x.shape[2]) if state is None else state.to(x.dtype)
    padded, labels = torch.cat([history, x], 1), F.pad(document, (before, 0))
    rows = []
    for t in range(x.shape[1]):
        taps = ((kernel[:, j], before + t - j) for j in range(before + 1))
        rows.append(sum(tap * padded[:, at] * (labels[:, at] == document[:, t])[:, None] for tap, at in taps))
    return torch.stack(rows, 1)


class _ShortConv(torch.autograd.Function):
    """[B, K - 1 + T, D] and [D, K] to [B, T, D]. Written out because autograd would keep and sum K copies."""

    @staticmethod
    def forward(ctx, padded, kernel):
        ctx.save_for_backward(padded, kernel)
        taps = kernel.shape[-1]
        length = padded.shape[1] - taps + 1
        out = padded[:, taps - 1 :] * kernel[:, 0]
        for j in range(1, taps):
            out.addcmul_(padded[:, taps - 1 - j : taps - 1 - j + length], kernel[:, j])
        return out

    @staticmethod
    def backward(ctx, grad):
        padded, kernel = ctx.saved_tensors
        taps, length = kernel.shape[-1], grad.shape[1]
        d_padded = torch.zeros_like(padded)
        d_kernel = torch.empty_like(kernel)
        for j in range(taps):
            window = slice(taps - 1 - j, taps - 1 - j + length)
            d_padded[:, window].addcmul_(grad, kernel[:, j])
            d_kernel[:, j] = (grad * padded[:, window]).sum((0, 1))
        return d_padded, d_kernel


# ---------------------------------------------------------------------------------------------- phases
def drift_angles(omega: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Phase drift ω·t modulo 2π, taken in float64 so that it stays exact at any length.

    Args:
        omega: `[H, P]` radians a token.
        tokens: integer counts `[...]`.

    Returns:
        `[..., H, P]` in the dtype of `omega`.
    """
    turns = tokens.double()[..., None, None] * (omega.double() / (2 * math.pi))
    return ((turns - turns.floor()) * (2 * math.pi)).to(omega.dtype)


def phase_features(theta: torch.Tensor, drift: torch.Tensor) -> torch.Tensor:
    """Real features of phasors, [cos, sin] of (theta + drift), heads first.

    Args:
        theta: `[B, T, H, P]`.
        drift: `[T, H, P]`, fixed (gets no gradient).

    Returns:
        `[B, H, T, 2P]`. The product of two such features is Σ_p cos(θ_p - θ'_p): interference.
    """
    return (phase_features_naive if exporting() else _PhaseFeatures.apply)(theta, drift)


def phase_features_naive(theta: torch.Tensor, drift: torch.Tensor) -> torch.Tensor:
    """Twin of [`phase_features`], by autograd."""
    angle = (theta + drift).transpose(1, 2)
    return torch.cat([angle.cos(), angle.sin()], -1)


class _PhaseFeatures(torch.autograd.Function):
    """Autograd would take every cosine and sine twice; the features are their own derivatives."""

    @staticmethod
    def forward(ctx, theta, drift):
        angle = (theta + drift).transpose(1, 2)
        features = angle.new_empty(*angle.shape[:-1], 2 * angle.shape[-1])
        cos, sin = features.chunk(2, -1)
        torch.cos(angle, out=cos)  # written in place: one pass less than joining them
        torch.sin(angle, out=sin)
        ctx.save_for_backward(features)
        return features

    @staticmethod
    def backward(ctx, grad):
        (features,) = ctx.saved_tensors
        cos, sin = features.chunk(2, -1)
        d_cos, d_sin = grad.chunk(2, -1)
        return torch.addcmul(d_sin * cos, d_cos, sin, value=-1).transpose(1, 2), None


def rotate_state(state: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Multiply the phasors of a state by e^{-i angle}.

    Args:
        state: `[B, H, 2P, V]`, cosine rows above sine rows.
        angle: `[B, H, P]` or broadcastable.
    """
    cos, sin = angle.cos()[..., None].to(state.dtype), angle.sin()[..., None].to(state.dtype)
    real, imaginary = state.chunk(2, -2)
    return torch.cat([real * cos + imaginary * sin, imaginary * cos - real * sin], -2)


def rotate_pairs(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (i, i + V/2) of queries or keys by an angle, as Llama does.

    Args:
        x: `[..., V]`.
        angle: `[..., V/2]` or broadcastable.
    """
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


# ---------------------------------------------------------------------------------------------- interference scan
def interference_scan(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    log_write: torch.Tensor,
    state: torch.Tensor | None = None,
    document: torch.Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bundle key-value pairs into a decaying state and read it, in chunks of matrix products.

    M_t = λ_t M_{t-1} + w_t k_t ⊗ v_t and y_t = q_t M_t, where log λ = `log_decay` and log w = `log_write`.

    Args:
        q: `[B, H·G, T, F]`; G neighbouring query heads read one key head.
        k: `[B, H, T, F]`.
        v: `[B, H, T, V]`.
        log_decay, log_write: `[B, H, T]`; a padded token has 0 and -inf.
        state: `[B, H, F, V]` or None for zeros.
        document: `[B, T]` document index that starts at 0 for the document of `state` and rises by at least one where
            a new document begins; a new document begins with an empty state. None: one document.
        chunk: tokens handled by one masked product; changes the time, not the result.

    Returns:
        y `[B, H·G, T, V]` and the state after the last token `[B, H, F, V]`.
    """
    length, heads, groups = q.shape[2], k.shape[1], q.shape[1] // k.shape[1]
    if not exporting() or single_token(length):
        chunk = min(chunk, length)
    q = _to_chunks(q, chunk).unflatten(1, (heads, groups)).transpose(2, 3).flatten(3, 4)  # [B, H, N, G·C, F]
    k, v = _to_chunks(k, chunk), _to_chunks(v, chunk)
    log_decay = _to_chunks(log_decay[..., None], chunk)[..., 0]
    log_write = _to_chunks(log_write[..., None], chunk, fill=float("-inf"))[..., 0]
    if document is not None:
        document = _to_chunks(document[:, None, :, None], chunk, fill=None)[..., 0]  # [B, 1, N, C]
    if state is None:
        state = k.new_zeros(k.shape[0], heads, k.shape[-1], v.shape[-1])
    run = _chunked_scan if exporting() else _ChunkedScan.apply
    y, state = run(q, k, v, log_decay, log_write, state, document)
    y = y.unflatten(3, (groups, chunk)).transpose(2, 3).flatten(1, 2).flatten(2, 3)  # [B, H·G, N·C, V]
    return y[:, :, :length], state


def interference_scan_naive(q, k, v, log_decay, log_write, state=None, document=None):
    """Twin of [`interference_scan`]: the recurrence, token by token."""

    def write(t: int, state: torch.Tensor) -> torch.Tensor:
        return log_write[:, :, t, None, None].exp() * k[:, :, t, :, None] * v[:, :, t, None, :]

    return _recurrence(q, k, v, log_decay, write, state, document)


def _recurrence(q, k, v, log_decay, write, state, document):
    """The loop of the naive twins: forget at a border of documents, decay, add `write(t, state)`, read."""
    if state is None:
        state = k.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1])
    current = torch.zeros(k.shape[0], dtype=torch.long, device=k.device)
    rows = []
    for t in range(k.shape[2]):
        if document is not None:
            state = state * (document[:, t] == current).to(state.dtype)[:, None, None, None]
            current = document[:, t]
        state = state * log_decay[:, :, t, None, None].exp()
        state = state + write(t, state)
        rows.append(q[:, :, t, None] @ state.repeat_interleave(q.shape[1] // k.shape[1], 1))
    return torch.cat(rows, 2), state


def _to_chunks(x: torch.Tensor, chunk: int, fill: float | None = 0.0) -> torch.Tensor:
    """[B, H, T, X] to [B, H, N, C, X]; the last chunk is padded with `fill` (None: with the last token)."""
    missing = (chunk - x.shape[2] % chunk) % chunk
    if exporting() or missing:
        if fill is None:
            last = x[:, :, -1:]
            x = torch.cat([x, last.expand(-1, -1, chunk, -1)], 2)[:, :, : x.shape[2] + missing]
        else:
            x = F.pad(x, (0, 0, 0, missing), value=fill)
    return x.reshape(*x.shape[:2], -1, chunk, x.shape[-1])


def _decays(log_decay, log_write, document):
    """Weights inside a chunk, from its start, to its end and across it: [..., C, C], [..., C], [..., C], [...]."""
    total = log_decay.cumsum(-1)  # [B, H, N, C]
    source = total - log_write
    chunk = total.shape[-1]
    # a future token has weight exp(-inf) = 0; the mask is applied to the logarithm, where nothing can overflow
    future = torch.ones(chunk, chunk, dtype=torch.bool, device=total.device).triu(1)
    hidden = future
    if document is not None:
        before = F.pad(document[..., -1], (1, 0))[..., :-1, None]  # the document that the carried state belongs to
        hidden = future | (document[..., :, None] != document[..., None, :])
    between = (total[..., :, None] - source[..., None, :]).masked_fill(hidden, float("-inf")).exp()
    from_start, to_end, across = total.exp(), (total[..., -1:] - source).exp(), total[..., -1].exp()
    if document is not None:
        from_start = from_start * (document == before)
        to_end = to_end * (document == document[..., -1:])
        across = across * (document[..., -1] == before[..., 0])
    return between, from_start, to_end, across


def _carry(written, across, state):
    """State before every chunk, and after the last: [B, H, N, F, V] and [B, H, F, V]."""
    if exporting():
        return _carry_by_product(written, across, state)
    before = torch.empty_like(written)
    for n in range(written.shape[2]):
        before[:, :, n] = state
        state = torch.addcmul(written[:, :, n], state, across[:, :, n, None, None])
    return before, state


def _carry_by_product(written, across, state):
    """Twin of the loop in [`_carry`] as one masked product over chunks: quadratic in their number, but loop-free."""
    total = across.clamp_min(1e-30).log().cumsum(-1)  # [B, H, N]
    chunks = total.shape[-1]
    future = torch.ones(chunks, chunks, dtype=torch.bool, device=total.device).triu(1)
    between = (total[..., :, None] - total[..., None, :]).masked_fill(future, float("-inf")).exp()
    after = between @ written.flatten(3) + total.exp()[..., None] * state.flatten(2)[:, :, None]
    after = after.unflatten(-1, written.shape[3:])
    return torch.cat([state[:, :, None], after], 2)[:, :, :-1], after[:, :, -1]


def _spread(weights: torch.Tensor, rows: int) -> torch.Tensor:
    """[..., C, X] weights to [..., G·C, X]: the query heads of a group share them."""
    groups = rows // weights.shape[-2]
    return weights if groups == 1 else weights.repeat(*[1] * (weights.dim() - 2), groups, 1)


def _chunked_scan(q, k, v, log_decay, log_write, state, document):
    """q [B, H, N, G·C, F], k [B, H, N, C, F] and v [B, H, N, C, V] to y [B, H, N, G·C, V] and the last state."""
    return _chunked_scan_parts(q, k, v, log_decay, log_write, state, document)[:2]


def _chunked_scan_parts(q, k, v, log_decay, log_write, state, document):
    between, from_start, to_end, across = _decays(log_decay, log_write, document)
    rows = q.shape[-2]
    between, from_start, to_end = _spread(between, rows), _spread(from_start[..., None], rows), to_end[..., None]
    scores = (q @ k.mT) * between
    written = (k * to_end).mT @ v
    before, final = _carry(written, across, state)
    y = scores @ v + (q * from_start) @ before
    return y, final, (scores, between, from_start, to_end, across, before)


class _ChunkedScan(torch.autograd.Function):
    """[`_chunked_scan`] with its gradient written out.

    The decays enter only as e^{±total} beside q and k, so their gradients are row sums of q·dq and k·dk, and no
    [C, C] tensor has to be differentiated (the identity of GLA, Yang et al., 2024, section 4.3).
    """

    @staticmethod
    def forward(ctx, q, k, v, log_decay, log_write, state, document):
        y, final, parts = _chunked_scan_parts(q, k, v, log_decay, log_write, state, document)
        ctx.save_for_backward(q, k, v, final, *parts)
        return y, final

    @staticmethod
    def backward(ctx, dy, d_final):
        q, k, v, final, scores, between, from_start, to_end, across, before = ctx.saved_tensors
        d_final = torch.zeros_like(final) if d_final is None else d_final
        dy = dy.contiguous()
        d_before = (q * from_start).mT @ dy
        d_written, d_state = _carry_backward(d_before, across, d_final)
        d_scores = (dy @ v.mT).mul_(between)
        dq = d_scores @ k + (dy @ before.mT) * from_start
        dk = d_scores.mT @ q + (v @ d_written.mT) * to_end
        dv = scores.mT @ dy + (k * to_end) @ d_written
        d_write = (k * dk).sum(-1)  # [B, H, N, C]
        d_total = (q * dq).sum(-1).unflatten(-1, (-1, k.shape[-2])).sum(-2) - d_write
        d_total[:, :, -1, -1] += (final * d_final).sum((-1, -2))
        d_decay = d_total.flatten(2).flip(-1).cumsum(-1).flip(-1).view_as(d_total)
        return dq, dk, dv, d_decay, d_write, d_state, None


def _carry_backward(d_before, across, d_final):
    """Gradients with respect to what every chunk wrote and to the first state, from the last chunk to the first."""
    d_written = torch.empty_like(d_before)
    d_state = d_final
    for n in reversed(range(d_before.shape[2])):
        d_written[:, :, n] = d_state
        d_state = torch.addcmul(d_before[:, :, n], d_state, across[:, :, n, None, None])
    return d_written, d_state


def cancelling_scan(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    strength: torch.Tensor,
    state: torch.Tensor | None = None,
    document: torch.Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[`interference_scan`] that subtracts what a key already recalls before it writes (the delta rule).

    M_t = λ_t M_{t-1} + β_t k_t ⊗ (v_t - λ_t k_t M_{t-1}) and y_t = q_t M_t, for keys of unit norm.

    Args:
        strength: β `[B, H, T]` in [0, 1]; a padded token has 0.
        others: as for [`interference_scan`].

    Returns:
        y `[B, H·G, T, V]` and the state after the last token `[B, H, F, V]`.
    """
    length, heads, groups = q.shape[2], k.shape[1], q.shape[1] // k.shape[1]
    if not exporting() or single_token(length):
        chunk = min(chunk, length)
    q = _to_chunks(q, chunk).unflatten(1, (heads, groups))  # [B, H, G, N, C, F]
    k, v, strength = (_to_chunks(x, chunk) for x in (k, v, strength[..., None]))
    log_decay = _to_chunks(log_decay[..., None], chunk)[..., 0]
    if document is not None:
        document = _to_chunks(document[:, None, :, None], chunk, fill=None)[..., 0]
    between, from_start, to_end, across = _decays(log_decay, torch.zeros_like(log_decay), document)
    earlier = (strength * (k @ k.mT) * between).tril(-1)  # how much of a write a later key takes back
    wanted = torch.cat([strength * v, strength * from_start[..., None] * k], -1)
    if exporting():
        solved = _unit_lower_inverse(earlier, chunk) @ wanted
    else:  # (1 + earlier)^-1 wanted
        solved = torch.linalg.solve_triangular(earlier, wanted, upper=False, unitriangular=True)
    fresh, recalled = solved.split([v.shape[-1], k.shape[-1]], -1)
    inside = (q @ k.mT[:, :, None]) * between[:, :, None]
    read, leave = q * from_start[:, :, None, :, :, None], (k * to_end[..., None]).mT
    if state is None:
        state = k.new_zeros(k.shape[0], heads, k.shape[-1], v.shape[-1])
    if exporting():
        before, state = _compose_chunks(across, leave, fresh, recalled, state)
        written = fresh - recalled @ before  # [B, H, N, C, V]
        y = read @ before[:, :, None] + inside @ written[:, :, None]
        return y.flatten(3, 4).flatten(1, 2)[:, :, :length], state
    rows = []
    for n in range(k.shape[2]):
        written = fresh[:, :, n] - recalled[:, :, n] @ state  # [B, H, C, V]
        rows.append(read[:, :, :, n] @ state[:, :, None] + inside[:, :, :, n] @ written[:, :, None])
        state = state * across[:, :, n, None, None] + leave[:, :, n] @ written
    y = torch.cat(rows, 3).flatten(1, 2)  # [B, H·G, N·C, V]
    return y[:, :, :length], state


def _unit_lower_inverse(lower: torch.Tensor, size: int) -> torch.Tensor:
    """(1 + lower)^-1 for strictly lower triangular `[..., C, C]`: inverses of blocks, joined to ever larger ones.

    As stable as substitution, row by row, but in log C products. C = `size` is a power of two.
    """
    inverse = torch.from_numpy(_identity(size)).to(lower)
    for joined in _joined_blocks(size):
        inverse = inverse - inverse @ (lower * torch.from_numpy(joined).to(lower)) @ inverse
    return inverse


@fixed_table
def _identity(size: int) -> np.ndarray:
    return np.eye(size)


@fixed_table
def _joined_blocks(size: int) -> tuple[np.ndarray, ...]:
    """For blocks of 1, 2, 4, ... rows, where a `[C, C]` matrix couples the second of two neighbours to the first."""
    blocks = [np.arange(size) >> level for level in range(size.bit_length() - 1)]
    return tuple((block[:, None] % 2 == 1) & (block == block[:, None] - 1) for block in blocks)


def _compose_chunks(across, leave, fresh, recalled, state):
    """Twin of the loop in [`cancelling_scan`]: the state before every chunk [B, H, N, F, V], and after the last.

    A chunk takes the state M to (λ - K R) M + K W, and two of those in a row are another one. So `DOUBLINGS` steps,
    each of which joins every chunk with the ones before it, reach 2^DOUBLINGS chunks back; a longer text gives NaN.
    """
    identity = torch.from_numpy(_identity(int(leave.shape[-2]))).to(state)
    turn = across[..., None, None] * identity - leave @ recalled  # [B, H, N, F, F]
    shift = leave @ fresh  # [B, H, N, F, V]
    number = torch.arange(shift.shape[2], device=shift.device)  # of every chunk
    for level in range(DOUBLINGS):
        at = number - 2**level
        joined, at = (at >= 0)[:, None, None], at.clamp_min(0)
        shift = shift + (turn @ shift.index_select(2, at)).masked_fill(~joined, 0.0)
        turn = torch.where(joined, turn @ turn.index_select(2, at), turn)
    after = turn @ state[:, :, None] + shift
    after = after.masked_fill((number >= 2**DOUBLINGS)[:, None, None], float("nan"))
    return torch.cat([state[:, :, None], after], 2)[:, :, :-1], after[:, :, -1]


def cancelling_scan_naive(q, k, v, log_decay, strength, state=None, document=None):
    """Twin of [`cancelling_scan`]: the recurrence, token by token."""

    def write(t: int, state: torch.Tensor) -> torch.Tensor:
        surprise = v[:, :, t, None] - k[:, :, t, None] @ state  # [B, H, 1, V]
        return strength[:, :, t, None, None] * k[:, :, t, :, None] * surprise

    return _recurrence(q, k, v, log_decay, write, state, document)
