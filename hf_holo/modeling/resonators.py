"""Resonator banks: causal filters made of damped modes.

A mode is one complex number z that turns and fades, z_t = λ z_{t-1} + u_t with λ = e^{-α + iω}, and a channel reads all
modes of its bank with complex weights: y_t = Σ_k m_k Re(e^{iφ_k} z_{t,k}). Written out that is a convolution with
h[t] = Σ_k m_k e^{-α_k t} cos(ω_k t + φ_k). Sizes in the shape tags: B batch, T tokens, D channels, G banks of W
channels each, K modes, N segments of L tokens. Complex numbers are real vectors `[..., 2K]`, real
parts first.

Sources: state-space models with diagonal complex states (Gu et al., 2022, S4D) for the convolution and the recurrence
of one filter; overlap-add (Oppenheim & Schafer, Discrete-Time Signal Processing), whose tail the modes carry exactly.
"""

import math
from collections.abc import Callable
from functools import partial, reduce

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import BackwardCFunction, FunctionCtx

from .filters import short_causal_conv
from .kept import Kept
from .layers import at_least_float32, faded, init_copy_
from .phases import drift_angles, home_of_float64, turn_halves, turning
from .recording import exporting, levels_to_reach, single_token
from .validation import check_divides, check_frequencies, check_positive

SEGMENT = 512  # tokens handled by one FFT
CHUNK = 64  # tokens handled by one matrix product where there is no FFT
DOCUMENT_CHUNK = 32  # the same where documents meet: around a border every lag is masked by itself
JUMPS, LEVELS = 8, 4  # so an exported bank takes up to 8^4 chunks, 262,144 tokens, in one call
MIN_DAMPING = 1e-5  # a memory of 100,000 tokens: the longest that float32 carries step by step


# ---------------------------------------------------------------------------------------------- one bank, three forms
def resonate(
    u: torch.Tensor,
    damping: torch.Tensor,
    omega: torch.Tensor,
    magnitude: torch.Tensor,
    phase: torch.Tensor,
    state: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    document: torch.Tensor | None = None,
    segment: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Filter every channel with its resonators: by FFT inside segments, by the state of the modes between them.

    Where a graph is recorded, matrix products take the place of the FFT; a single token is one step of the recurrence.

    Args:
        u: `[B, T, D]`, zeros at padding, which comes after the real tokens.
        damping: α `[G, K]`, positive; the D / G channels of a bank share it.
        omega: ω `[K]`, radians a token, float64; gets no gradient.
        magnitude, phase: m and φ `[D, K]`.
        state: `[B, D, 2K]` or None for zeros.
        lengths: `[B]` number of real tokens, after which the state is wanted; default: T.
        document: `[B, T]` document index as for [`interference_scan`]: a new document begins with an empty state.
        segment: tokens handled at once; changes time and memory, not the result. Default: what is fastest.

    Returns:
        y `[B, T, D]` and the state after the last real token `[B, D, 2K]`.
    """
    if single_token(u.shape[1]):
        return resonate_step(u, *step_coefficients(damping, omega, magnitude, phase), state, lengths, document)
    if segment is None:
        segment = DOCUMENT_CHUNK if document is not None else CHUNK if exporting() else SEGMENT
    if not exporting():
        segment = min(segment, u.shape[1])
    length, powers_of = u.shape[1], partial(modal_powers, damping, omega)
    powers = powers_of(torch.arange(segment + 1, device=omega.device))  # [G, 2K, L + 1]
    weights = complex_weights(magnitude, phase)  # [D, 2K]
    u, document = _to_segments(u, document, segment)  # [B, N, L, D] and [B, N, L]
    rows = u.permute(3, 0, 1, 2).contiguous()  # [D, B, N, L]
    y = _convolve(rows, _per_bank(conjugate(weights), powers[..., :-1]), u, document)
    before = None
    if exporting() or state is not None or rows.shape[2] > 1:
        before = _carry(rows, powers, powers_of, state, document)  # [D, B, N, 2K]
        read = _per_bank(conjugate(multiply(weights[:, None, None], before)), powers[..., 1:])  # [D, B, N, L]
        y = y + (read if document is None else read * (document == _carried(document)[..., None]))
    y = y.permute(1, 2, 3, 0).flatten(1, 2)[:, :length]  # [B, T, D]
    return y, _final_state(length, lengths, rows, before, powers, document)


def resonate_naive(
    u: torch.Tensor,
    damping: torch.Tensor,
    omega: torch.Tensor,
    magnitude: torch.Tensor,
    phase: torch.Tensor,
    state: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    document: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Twin of [`resonate`]: the recurrence, token by token, in complex numbers."""
    turn = torch.polar(torch.exp(-damping), omega.to(damping).expand_as(damping))  # λ [G, K]
    turn, weights = _of_channels(turn, magnitude), magnitude * torch.exp(1j * phase)  # both [D, K]
    z = torch.complex(*(u.new_zeros(*u[:, 0].shape, 2 * magnitude.shape[1]) if state is None else state).chunk(2, -1))
    current = torch.zeros(u.shape[0], dtype=torch.long, device=u.device)
    rows, wanted = [], z
    for t in range(u.shape[1]):
        label = current if document is None else document[:, t]
        z = z * (label == current)[:, None, None] * turn + u[:, t, :, None]
        wanted = z if lengths is None else torch.where((lengths > t)[:, None, None], z, wanted)
        current = label
        rows.append((weights * z).real.sum(-1))
    return torch.stack(rows, 1), torch.cat([wanted.real, wanted.imag], -1)


def resonate_step(
    u: torch.Tensor,
    along: torch.Tensor,
    across: torch.Tensor,
    weights: torch.Tensor,
    state: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    document: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[`resonate`] for a single token: one complex multiply-add per mode.

    Args:
        along, across, weights: of [`step_coefficients`].
        others: as for [`resonate`], with T = 1.

    Returns:
        As [`resonate`].
    """
    before = u.new_zeros(u.shape[0], *weights.shape) if state is None else state  # [B, D, 2K]
    kept = before if document is None else before * (document == 0)[..., None].to(before.dtype)
    new = turn_halves(kept, along, across, -1)
    new[..., : weights.shape[1] // 2] += u[:, 0, :, None]
    y = (new * weights).sum(-1)
    if lengths is not None:  # a padded row keeps its state
        new = torch.where((lengths > 0)[:, None, None], new, before)
    return y[:, None], new


def resonate_step_naive(
    u: torch.Tensor,
    along: torch.Tensor,
    across: torch.Tensor,
    weights: torch.Tensor,
    state: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    document: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Twin of [`resonate_step`]: what the real and the imaginary parts of the modes become, one after the other."""
    before = u.new_zeros(u.shape[0], *weights.shape) if state is None else state
    fresh = torch.zeros_like(u[:, 0]) if document is None else (document != 0).to(u.dtype)  # [B, D] or [B, 1]
    real, imaginary = (before * (1 - fresh)[..., None]).chunk(2, -1)
    (keep_real, keep_imaginary), (to_real, to_imaginary) = along.chunk(2, -1), across.chunk(2, -1)
    new_real = real * keep_real + imaginary * to_real + u[:, 0, :, None]
    new = torch.cat([new_real, imaginary * keep_imaginary + real * to_imaginary], -1)
    y = torch.einsum("bdk,dk->bd", new, weights)[:, None]
    fed = torch.ones_like(u[:, 0, 0]) if lengths is None else lengths.to(u.dtype)  # [B]
    return y, new * fed[:, None, None] + before * (1 - fed)[:, None, None]


def step_coefficients(
    damping: torch.Tensor, omega: torch.Tensor, magnitude: torch.Tensor, phase: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a single step takes of a bank, each `[D, 2K]`: λ of every channel for [`turn_halves`], and the weights that
    the channels read the modes with, conjugated."""
    one = torch.ones(1, dtype=torch.long, device=omega.device)
    real, imaginary = modal_powers(damping, omega, one)[..., 0].chunk(2, -1)  # [G, K]
    along, across = (_of_channels(x, magnitude) for x in turning(real, imaginary, -1))
    return along, across, conjugate(complex_weights(magnitude, phase))


def modal_powers(damping: torch.Tensor, omega: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """λ^n of all modes, `[G, 2K, L]`, for damping `[G, K]`, omega `[K]` and whole n ≥ 0, `[L]`.

    The angles are taken in float64, modulo 2π, where `omega` is, see [`home_of_float64`].
    """
    angle = drift_angles(omega[None], steps.to(omega.device))[:, 0].T  # [K, L]
    cos, sin = (x.to(damping.dtype).to(damping.device) for x in (angle.cos(), angle.sin()))
    envelope = faded(-damping[..., None] * steps.to(damping.device))
    return torch.cat([envelope * cos, envelope * sin], 1)


def complex_weights(magnitude: torch.Tensor, phase: torch.Tensor) -> torch.Tensor:
    """w = m e^{iφ}, `[..., K]` to `[..., 2K]`; Re(w z) is the product of its conjugate with z, as real vectors."""
    return torch.cat([magnitude * phase.cos(), magnitude * phase.sin()], -1)


def conjugate(a: torch.Tensor) -> torch.Tensor:
    """Complex conjugate of `[..., 2K]`."""
    real, imaginary = a.chunk(2, -1)
    return torch.cat([real, -imaginary], -1)


def multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Product of complex numbers, both `[..., 2K]`."""
    (a_real, a_imaginary), (b_real, b_imaginary) = a.chunk(2, -1), b.chunk(2, -1)
    return torch.cat([a_real * b_real - a_imaginary * b_imaginary, a_real * b_imaginary + a_imaginary * b_real], -1)


# ---------------------------------------------------------------------------------------------- parts of the fast form
def _to_segments(
    u: torch.Tensor, document: torch.Tensor | None, segment: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[B, T, D] to [B, N, L, D], padded with zeros; [B, T] to [B, N, L], padded with the last document."""
    missing = (segment - u.shape[1] % segment) % segment
    if document is not None:
        more = document[:, -1:].expand(-1, segment)
        document = torch.cat([document, more], 1)[:, : u.shape[1] + missing].unflatten(1, (-1, segment))
    return F.pad(u, (0, 0, 0, missing)).unflatten(1, (-1, segment)), document


def _per_bank(x: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """Every channel times the matrix of its bank: [D, ..., X] and [G, X, Y] to [D, ..., Y]."""
    banks = matrices.shape[0]
    y = x.unflatten(0, (banks, -1)).flatten(1, -2) @ matrices
    return y.view(*x.shape[:-1], -1)


def _carried(document: torch.Tensor) -> torch.Tensor:
    """[B, N, L] to the document [B, N] that the state before every segment belongs to."""
    return F.pad(document[..., -1], (1, 0))[:, :-1]


def _convolve(rows: torch.Tensor, kernel: torch.Tensor, u: torch.Tensor, document: torch.Tensor | None) -> torch.Tensor:
    """One-sided convolution inside every segment, rows [D, B, N, L] with kernel [D, L]; u [B, N, L, D] is rows too."""
    length = kernel.shape[-1]
    if document is not None:
        return _convolve_apart(rows, kernel, u.flatten(0, 1), document.flatten(0, 1))
    if exporting():
        at = torch.arange(length, device=kernel.device)
        lag = at - at[:, None]  # [source, target]
        toeplitz = kernel[:, lag.clamp_min(0)] * (lag >= 0).to(kernel.dtype)  # [D, L, L]
        return (rows.flatten(1, 2) @ toeplitz).view(rows.shape)
    return one_sided(rows, kernel)


def one_sided(rows: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """y[t] = Σ_{s≤t} kernel[t - s] rows[s] in every channel, by FFT: `[D, B, N, L]` and `[D, L]` to `[D, B, N, L]`."""
    if torch.is_grad_enabled():
        return _OneSided.apply(rows, kernel)
    return _through_spectra(*_spectra(rows, kernel), kernel.shape[-1])


def one_sided_naive(rows: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Twin of [`one_sided`]: the sum over s, one lag at a time."""
    length = kernel.shape[-1]
    shifted = (F.pad(rows, (lag, 0))[..., :length] * kernel[:, None, None, lag, None] for lag in range(length))
    return reduce(torch.add, shifted)


def _spectra(rows: torch.Tensor, kernel: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """With room for the whole linear convolution, so that nothing wraps around: [D, B, N, L + 1], [D, 1, 1, L + 1]."""
    room = 2 * kernel.shape[-1]
    return torch.fft.rfft(rows, n=room), torch.fft.rfft(kernel, n=room)[:, None, None]


def _through_spectra(a: torch.Tensor, b: torch.Tensor, length: int) -> torch.Tensor:
    return torch.fft.irfft(a * b, n=2 * length)[..., :length]


class _OneSided(torch.autograd.Function):
    """[`one_sided`] with its gradient written out: it is a convolution too. Autograd would go back through FFTs of
    complex numbers, of twice the length."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
        spectra = _spectra(rows, kernel)
        ctx.save_for_backward(*spectra)
        return _through_spectra(*spectra, kernel.shape[-1])

    @staticmethod
    def backward(ctx: BackwardCFunction, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        saved: tuple[torch.Tensor, ...] = ctx.saved_tensors
        rows, kernel = saved
        length = grad.shape[-1]
        wanted = torch.fft.rfft(grad, n=2 * length)
        d_rows = _through_spectra(wanted, kernel.conj(), length)
        d_kernel = torch.fft.irfft((wanted * rows.conj()).sum((1, 2)), n=2 * length)[:, :length]
        return d_rows, d_kernel


def _convolve_apart(rows: torch.Tensor, kernel: torch.Tensor, u: torch.Tensor, document: torch.Tensor) -> torch.Tensor:
    """[`_convolve`] lag by lag where documents meet in a segment, `u` [B·N, L, D] and `document` [B·N, L]."""
    if exporting():
        y = short_causal_conv(u, kernel, None, document)  # [B·N, L, D]
        return y.permute(2, 0, 1).reshape(rows.shape)
    y = _convolve(rows, kernel, u, None).flatten(1, 2)  # [D, B·N, L]
    mixed = (document[:, 0] != document[:, -1]).nonzero()[:, 0]
    apart = short_causal_conv(u[mixed], kernel, None, document[mixed])
    return y.index_copy(1, mixed, apart.permute(2, 0, 1)).view(rows.shape)


def _carry(
    rows: torch.Tensor,
    powers: torch.Tensor,
    powers_of: Callable[[torch.Tensor], torch.Tensor],
    state: torch.Tensor | None,
    document: torch.Tensor | None,
) -> torch.Tensor:
    """State before every segment, [D, B, N, 2K]."""
    if state is None:
        state = rows.new_zeros(*rows.shape[:2], powers.shape[1])
    else:
        state = state.transpose(0, 1)  # [D, B, 2K]
    if document is not None:
        rows = rows * (document == document[..., -1:])
    written = _per_bank(rows, powers[..., :-1].flip(-1).transpose(-1, -2))  # [D, B, N, 2K]
    carried = None if document is None else _carried(document)
    if exporting():
        return _carry_by_jumps(
            torch.cat([state[:, :, None], written[:, :, :-1]], 2), rows.shape[-1], powers_of, carried
        )
    across = _of_channels(powers[..., -1], rows)[:, None]  # [D, 1, 2K]
    before = [state]
    for n in range(written.shape[2] - 1):
        kept = state
        if document is not None and carried is not None:
            kept = state * (document[:, n, -1] == carried[:, n])[:, None]
        state = multiply(kept, across) + written[:, :, n]
        before.append(state)
    return torch.stack(before, 2)


def _carry_by_jumps(
    sources: torch.Tensor, size: int, powers_of: Callable[[torch.Tensor], torch.Tensor], carried: torch.Tensor | None
) -> torch.Tensor:
    """Twin of the loop in [`_carry`] without a loop over segments of `size` tokens: sums of few, of many, of all.

    Level by level, every segment adds up what itself and the ones before it have gathered, `JUMPS` of them in strides
    that grow `JUMPS` times. Together they reach `JUMPS`^`LEVELS` segments back; a longer text gives NaN.
    """
    at, jumps = (torch.arange(n, device=sources.device) for n in (sources.shape[2], JUMPS))
    for level in range(levels_to_reach(sources.shape[2], JUMPS, LEVELS)):
        # 1. from where: the segment itself and the ones before it, in strides of this level
        steps = JUMPS**level * jumps  # [J]
        source = at[:, None] - steps  # [N, J]
        seen, source = source >= 0, source.clamp_min(0)
        if carried is not None:
            seen = seen & (carried[:, :, None] == carried[:, source])  # [B, N, J]
        # 2. what those have gathered, turned and faded on the way, and 3. the sum
        heard = sources[:, :, source] * seen[..., None].to(sources.dtype)  # [D, B, N, J, 2K]
        turn = _of_channels(powers_of(size * steps).transpose(-1, -2), sources)[:, None, None]  # [D, 1, 1, J, 2K]
        sources = multiply(heard, turn).sum(-2)
    return sources.masked_fill((at >= JUMPS**LEVELS)[:, None], float("nan"))


def _of_channels(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """[G, ...] to [D, ...]: the channels of a bank share it."""
    return x.repeat_interleave(rows.shape[0] // x.shape[0], 0)


def _final_state(
    length: int,
    lengths: torch.Tensor | None,
    rows: torch.Tensor,
    before: torch.Tensor | None,
    powers: torch.Tensor,
    document: torch.Tensor | None,
) -> torch.Tensor:
    """The state `[B, D, 2K]` after `lengths` tokens `[B]`, or after all `length` of them if it is None."""
    if lengths is None and document is None and not exporting():  # all rows end together
        size = length - (rows.shape[2] - 1) * rows.shape[-1]
        state = _per_bank(rows[:, :, -1, :size], powers[..., :size].flip(-1).transpose(-1, -2))  # [D, B, 2K]
        if before is not None:
            state = state + multiply(before[:, :, -1], _of_channels(powers[..., size], rows)[:, None])
        return state.transpose(0, 1).contiguous()
    # 1. where every row ends: the segment, and the token inside it
    size, each = rows.shape[-1], torch.arange(rows.shape[1], device=rows.device)
    last = (torch.full((1,), length, device=rows.device) if lengths is None else lengths) - 1
    segment = last.clamp_min(0) // size
    inside = last - segment * size  # -1 where there is no token

    def pick(x: torch.Tensor) -> torch.Tensor:
        """The segment in which every row ends: [D, B, N, ...] to [D, B, ...], without a copy where it is the last."""
        return x[:, :, -1] if lengths is None else x[:, each, segment]

    # 2. what the tokens of that segment have left by then, those of the last document
    lag = inside[:, None] - torch.arange(size, device=rows.device)  # [B or 1, L]
    seen = lag >= 0
    if document is not None:
        labels = document[each, segment]  # [B, L]
        current = labels[each, inside.clamp_min(0)][:, None]  # [B, 1]
        seen = seen & (labels == current)
        lag = lag.expand(labels.shape)
    fading = powers[..., lag.clamp_min(0)] * seen.to(powers.dtype)  # [G, 2K, B or 1, L]
    inputs = pick(rows).unflatten(0, (powers.shape[0], -1)).transpose(1, 2)  # [G, B, W, L]
    state = (inputs @ fading.permute(0, 2, 3, 1)).transpose(1, 2).flatten(0, 1)  # [D, B, 2K]
    # 3. what the state before the segment has left, if it is of the same document
    if before is not None:
        kept = pick(before)  # [D, B, 2K]
        if document is not None:
            kept = kept * (_carried(document)[each, segment][:, None] == current).to(kept.dtype)
        across = _of_channels(powers[..., inside + 1].transpose(1, 2), rows)  # [D, B or 1, 2K]
        state = state + multiply(kept, across)
    return state.transpose(0, 1).contiguous()


# ---------------------------------------------------------------------------------------------- modules
def positive_damping(raw: torch.Tensor) -> torch.Tensor:
    """Damping per step, above `MIN_DAMPING` for every real number; in at least float32."""
    return MIN_DAMPING + F.softplus(raw.to(at_least_float32(raw.dtype)))


def raw_damping(damping: torch.Tensor) -> torch.Tensor:
    """Inverse of [`positive_damping`]."""
    return (damping - MIN_DAMPING).expm1().log()


class ResonatorBank(nn.Module):
    """Banks of damped modes at fixed frequencies that filter every channel, [`resonate`] with its parameters.

    The frequencies run from `lowest` to `highest`, evenly in the logarithm, after a first mode that does not turn. The
    modes of a bank fade with learned damping, which stays above `MIN_DAMPING` whatever an optimizer does; every channel
    reads them with learned magnitudes and phases.

    Args:
        dim: channels D.
        banks: number of banks G, a divisor of `dim`; channels of one bank share its damping.
        modes: modes K per bank.
        lowest, highest: frequencies in radians a token.

    Raises:
        ValueError: a size is not positive, `banks` does not divide `dim`, or the frequencies are not positive, not in
            order or above π.
    """

    DAMPING = (0.003, 0.5)  # where banks start: a memory of 333 tokens in the first, of 2 in the last

    def __init__(self, dim: int, banks: int, modes: int, lowest: float, highest: float) -> None:
        super().__init__()
        check_positive(dim=dim, banks=banks, modes=modes)
        check_divides("banks", banks, "dim", dim)
        check_frequencies(lowest=lowest, highest=highest)
        self.dim, self.modes, self.lowest, self.highest = dim, modes, lowest, highest
        self.raw_damping = nn.Parameter(torch.empty(banks, modes))
        self.magnitude = nn.Parameter(torch.empty(dim, modes))
        self.phase = nn.Parameter(torch.empty(dim, modes))
        self._coefficients: Kept[tuple[torch.Tensor, ...]] = Kept()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        banks = len(self.raw_damping)
        slow, fast = (math.log(damping) for damping in self.DAMPING)
        damping = torch.linspace(slow, fast, banks).exp()[:, None]  # [G, 1]
        init_copy_(self.raw_damping, raw_damping(damping).expand_as(self.raw_damping))
        # noise of unit variance comes out with unit variance, however long a bank remembers
        largest = (12 * damping / self.modes).sqrt().repeat_interleave(self.dim // banks, 0)  # [D, 1]
        init_copy_(self.magnitude, largest * torch.rand_like(largest.expand(-1, self.modes)))
        nn.init.uniform_(self.phase, 0.0, 2 * math.pi)

    def state_spec(self, name: str) -> dict[str, tuple[int, ...]]:
        return {name: (self.dim, 2 * self.modes)}

    def omega(self, device: torch.device | None = None) -> torch.Tensor:
        """Radians a token `[K]`, in float64: computed when asked for, so that no cast or meta device can spoil them.

        They are on `device` if that has float64, see [`home_of_float64`].
        """
        steps = torch.arange(self.modes - 1, dtype=torch.float64, device=home_of_float64(device))
        steps = steps / max(1, self.modes - 2)
        return F.pad(self.lowest * (self.highest / self.lowest) ** steps, (1, 0))

    def damping(self) -> torch.Tensor:
        """How fast the modes fade, `[G, K]` per token, in at least float32."""
        return positive_damping(self.raw_damping)

    def weights(self) -> torch.Tensor:
        """What every channel reads the modes with, m e^{iφ}: `[D, 2K]` in at least float32."""
        dtype = at_least_float32(self.magnitude.dtype)
        return complex_weights(self.magnitude.to(dtype), self.phase.to(dtype))

    def kernel(self, length: int) -> torch.Tensor:
        """The first `length` taps of the filter of every channel, `[D, length]`."""
        damping = self.damping()
        omega = self.omega(damping.device)
        steps = torch.arange(length, device=omega.device)
        return _per_bank(conjugate(self.weights()), modal_powers(damping, omega, steps))

    def read(self, state: torch.Tensor) -> torch.Tensor:
        """What the channels hear of a state `[B, D, 2K]`: `[B, D]`."""
        return (conjugate(self.weights()) * state).sum(-1)

    def forward(
        self,
        u: torch.Tensor,
        state: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        document: torch.Tensor | None = None,
        delayed: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[`resonate`] with these parameters; `u` `[B, T, D]` is in at least float32. If `delayed`, y is what the
        channels hear of the state before every step."""
        if state is not None and single_token(u.shape[1]):
            along, across, weights = (x.to(u.dtype) for x in self.kept_coefficients())
            y, after = resonate_step(u, along, across, weights, state, lengths, document)
            return (state * weights).sum(-1)[:, None] if delayed else y, after
        magnitude, phase = self.magnitude.to(u.dtype), self.phase.to(u.dtype)
        omega, damping = self.omega(u.device), self.damping().to(u.dtype)
        y, after = resonate(u, damping, omega, magnitude, phase, state, lengths, document)
        return one_step_later(y, None if state is None else self.read(state)) if delayed else y, after

    def kept_coefficients(self) -> tuple[torch.Tensor, ...]:
        """[`step_coefficients`] of this bank in at least float32, computed once for as long as its parameters stay the
        same, see [`Kept`]."""

        def compute() -> tuple[torch.Tensor, ...]:
            dtype = at_least_float32(self.magnitude.dtype)
            weights = self.magnitude.to(dtype), self.phase.to(dtype)
            return step_coefficients(self.damping().to(dtype), self.omega(self.magnitude.device), *weights)

        return self._coefficients.get(compute, (self.raw_damping, self.magnitude, self.phase))


def one_step_later(y: torch.Tensor, first: torch.Tensor | None) -> torch.Tensor:
    """`y` `[B, T, D]` moved on by one step, after `first` `[B, D]` (None: zeros)."""
    return torch.cat([torch.zeros_like(y[:, :1]) if first is None else first[:, None], y[:, :-1]], 1)
