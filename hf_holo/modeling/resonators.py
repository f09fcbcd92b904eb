"""Resonator banks: causal filters made of damped modes, and the context of past chunks that is built on them.

A mode is one complex number z that turns and fades, z_t = λ z_{t-1} + u_t with λ = e^{-α + iω}, and a channel reads all
modes of its bank with complex weights: y_t = Σ_k m_k Re(e^{iφ_k} z_{t,k}). Written out that is a convolution with
h[t] = Σ_k m_k e^{-α_k t} cos(ω_k t + φ_k). Sizes in the shape tags: B batch, T tokens, D channels, G banks of W
channels each, K modes, N segments of L tokens, S chunks of a row. Complex numbers are real vectors `[..., 2K]`, real
parts first.

Sources: state-space models with diagonal complex states (Gu et al., 2022, S4D) for the convolution and the recurrence
of one filter; overlap-add (Oppenheim & Schafer, Discrete-Time Signal Processing), whose tail the modes carry exactly.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from .cache import RecurrentLayer
from .filters import short_causal_conv
from .layers import at_least_float32, init_copy_
from .layout import TokenLayout
from .phases import drift_angles, home_of_float64
from .recording import exporting, single_token
from .scans import interference_scan
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
        return resonate_step(u, damping, omega, magnitude, phase, state, lengths, document)
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
    """Twin of [`resonate`]: the recurrence, token by token."""
    if state is None:
        state = u.new_zeros(u.shape[0], u.shape[2], 2 * magnitude.shape[1])
    current = torch.zeros(u.shape[0], dtype=torch.long, device=u.device)
    rows, wanted = [], state
    for t in range(u.shape[1]):
        label = current if document is None else document[:, t]
        y, state = resonate_step(
            u[:, t, None], damping, omega, magnitude, phase, state, None, (label - current)[:, None]
        )
        wanted = state if lengths is None else torch.where((lengths > t)[:, None, None], state, wanted)
        current = label
        rows.append(y)
    return torch.cat(rows, 1), wanted


def resonate_step(
    u: torch.Tensor,
    damping: torch.Tensor,
    omega: torch.Tensor,
    magnitude: torch.Tensor,
    phase: torch.Tensor,
    state: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    document: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[`resonate`] for a single token: one complex multiply-add per mode. Shapes as there, with T = 1."""
    banks, modes = damping.shape
    step = modal_powers(damping, omega, torch.ones(1, dtype=torch.long, device=omega.device))[..., 0]  # [G, 2K]
    new = F.pad(u[:, 0, :, None].expand(-1, -1, modes), (0, modes))  # [B, D, 2K], real
    if state is not None:
        kept = state if document is None else state * (document == 0)[..., None].to(state.dtype)
        new = new + multiply(kept, step.repeat_interleave(u.shape[2] // banks, 0))
    y = (new * conjugate(complex_weights(magnitude, phase))).sum(-1)
    if lengths is not None:  # a padded row keeps its state
        before = torch.zeros_like(new) if state is None else state
        new = torch.where((lengths > 0)[:, None, None], new, before)
    return y[:, None], new


def modal_powers(damping: torch.Tensor, omega: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """λ^n of all modes, `[G, 2K, L]`, for damping `[G, K]`, omega `[K]` and whole n ≥ 0, `[L]`.

    The angles are taken in float64, modulo 2π, where `omega` is, see [`home_of_float64`].
    """
    angle = drift_angles(omega[None], steps.to(omega.device))[:, 0].T  # [K, L]
    cos, sin = (x.to(damping.dtype).to(damping.device) for x in (angle.cos(), angle.sin()))
    envelope = torch.exp(-damping[..., None] * steps.to(damping.device))
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
    room = 2 * length  # for the whole linear convolution: nothing wraps around
    spectrum = torch.fft.rfft(rows, n=room) * torch.fft.rfft(kernel, n=room)[:, None, None]
    return torch.fft.irfft(spectrum, n=room)[..., :length]


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
    written = _per_bank(rows, powers[..., :-1].flip(-1).mT)  # [D, B, N, 2K]
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
    for level in range(LEVELS):
        # 1. from where: the segment itself and the ones before it, in strides of this level
        steps = JUMPS**level * jumps  # [J]
        source = at[:, None] - steps  # [N, J]
        seen, source = source >= 0, source.clamp_min(0)
        if carried is not None:
            seen = seen & (carried[:, :, None] == carried[:, source])  # [B, N, J]
        # 2. what those have gathered, turned and faded on the way, and 3. the sum
        heard = sources[:, :, source] * seen[..., None].to(sources.dtype)  # [D, B, N, J, 2K]
        turn = _of_channels(powers_of(size * steps).mT, sources)[:, None, None]  # [D, 1, 1, J, 2K]
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
        magnitude, phase = self.magnitude.to(u.dtype), self.phase.to(u.dtype)
        omega, damping = self.omega(u.device), self.damping().to(u.dtype)
        y, after = resonate(u, damping, omega, magnitude, phase, state, lengths, document)
        return _one_step_later(y, None if state is None else self.read(state)) if delayed else y, after


class FadingSum(nn.Module):
    """y_t = λ y_{t-1} + u_t in every channel: one mode that does not turn, heard as it is. A bank for [`ChunkContext`].

    Args:
        dim: channels D.
    """

    DAMPING = 0.001  # where it starts: a memory of 1,000 steps

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.raw_damping = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init_copy_(self.raw_damping, raw_damping(torch.full_like(self.raw_damping, self.DAMPING)))

    def state_spec(self, name: str) -> dict[str, tuple[int, ...]]:
        return {name: (1, self.dim)}

    def read(self, state: torch.Tensor) -> torch.Tensor:
        """The sum that a state `[B, 1, D]` holds: `[B, D]`."""
        return state[:, 0]

    def forward(
        self,
        u: torch.Tensor,
        state: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        document: torch.Tensor | None = None,
        delayed: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As [`ResonatorBank.forward`]: y `[B, T, D]` and the state after `lengths` steps, `[B, 1, D]`."""
        ones = u.new_ones(u.shape[0], 1, u.shape[1])  # [B, H, T] with one head, whose keys and queries are 1
        real = ones if lengths is None else (torch.arange(u.shape[1], device=u.device) < lengths[:, None])[:, None]
        decay = -positive_damping(self.raw_damping).to(u.dtype) * real
        write = torch.zeros_like(ones).masked_fill(real == 0, float("-inf"))
        before = None if state is None else state[:, :, None]  # [B, H, F, D] with one feature
        y, after = interference_scan(ones[..., None], ones[..., None], u[:, None], decay, write, before, document)
        y = y[:, 0]
        return _one_step_later(y, None if state is None else self.read(state)) if delayed else y, after[:, :, 0]


def _one_step_later(y: torch.Tensor, first: torch.Tensor | None) -> torch.Tensor:
    """`y` `[B, T, D]` moved on by one step, after `first` `[B, D]` (None: zeros)."""
    return torch.cat([torch.zeros_like(y[:, :1]) if first is None else first[:, None], y[:, :-1]], 1)


class ChunkContext(nn.Module):
    """Hierarchical context: a coarse bank over the means of past chunks, which every later token hears.

    Chunks count the real tokens of a document, however the text is padded or cut; a token hears the chunks that were
    complete before its own began.

    Args:
        chunk_length: tokens of a chunk.
        bank: the coarse bank, whose steps are chunks: a [`ResonatorBank`] or a [`FadingSum`].
        name: of its state in the cache.

    Raises:
        ValueError: `chunk_length` is not a positive integer.
    """

    bank: ResonatorBank | FadingSum

    def __init__(self, chunk_length: int, bank: ResonatorBank | FadingSum, name: str = "context") -> None:
        super().__init__()
        check_positive(chunk_length=chunk_length)
        self.chunk_length, self.bank, self.name = chunk_length, bank, name

    def state_spec(self) -> dict[str, tuple[int, ...]]:
        return {f"{self.name}_chunk": (self.bank.dim + 1,)} | self.bank.state_spec(self.name)

    def forward(self, u: torch.Tensor, layout: TokenLayout, cache: RecurrentLayer | None = None) -> torch.Tensor:
        """`[B, T, D]`, zeros at padding, to `[B, T, D]`; continues from `cache` and updates it, if given."""
        names = tuple(self.state_spec())
        before = [None if cache is None else cache.get(name) for name in names]
        context, states = self._scan(u, layout, *before)
        if cache is not None:
            for index, name in enumerate(names):

                def replay(tokens: int, index: int = index) -> torch.Tensor:
                    return self._scan(u[:, :tokens], layout.first(tokens), *before)[1][index]

                cache.put(name, states[index], layout.length, replay)
        return context

    def _scan(
        self, u: torch.Tensor, layout: TokenLayout, running: torch.Tensor | None, coarse: torch.Tensor | None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """What every token hears [B, T, D]; the sum and the number of the tokens in the last chunk [B, D + 1], zeros
        if it is complete; and the coarse state of the complete ones [B, D, 2K]."""
        # 1. inside chunks: sum and number of the tokens of each, those that an earlier call has left included
        ones = u.new_ones(u.shape[:2]) if layout.valid is None else layout.valid.to(u.dtype)
        chunk = self._chunks(ones.long(), layout.document, None if running is None else running[:, -1])  # [B, T]
        sums = u.new_zeros(u.shape[0], self._most(chunk, layout), u.shape[2] + 1)
        sums = sums.scatter_add(1, chunk[..., None].expand(-1, -1, sums.shape[2]), torch.cat([u, ones[..., None]], -1))
        if running is not None:
            sums = torch.cat([sums[:, :1] + running[:, None], sums[:, 1:]], 1)
        document = None  # of every chunk, [B, S]
        if layout.document is not None:
            document = torch.zeros_like(sums[..., 0], dtype=torch.long).scatter(1, chunk, layout.document)
            document = document.cummax(1).values
        # 2. chunks that are complete: all before the last, and that too if it is full
        last = chunk[:, -1:]
        complete = sums[..., -1].gather(1, last) > self.chunk_length - 0.5
        done = last + complete  # [B, 1]
        means = sums[..., :-1] / self.chunk_length
        # 3. carry: the coarse bank over their means, and 4. read: what the tokens of every chunk hear of it [B, S, D];
        #    in one call, around which weights may come from the CPU or the disk
        heard, state = self.bank(means, coarse, done[:, 0], document, delayed=True)
        if document is not None:
            earlier = F.pad(document, (1, 0))
            heard = heard * (document == earlier[:, :-1])[..., None]
            state = state * (document.gather(1, last) == earlier.gather(1, done))[..., None]
        # 5. what the next call continues from
        running = sums.gather(1, last[..., None].expand(-1, -1, sums.shape[2]))[:, 0] * ~complete
        return heard.gather(1, chunk[..., None].expand(-1, -1, u.shape[2])), (running, state)

    def _chunks(self, ones: torch.Tensor, document: torch.Tensor | None, begun: torch.Tensor | None) -> torch.Tensor:
        """The chunk of every token, counted from the one that continues: [B, T], from real tokens `ones` [B, T] and the
        number of tokens in the chunk that continues [B]. A new document begins a new chunk."""
        position = ones.cumsum(1) - 1  # in the document
        starts = torch.zeros_like(ones, dtype=torch.bool)
        if document is not None:
            starts = document != F.pad(document, (1, 0))[:, :-1]
            position = position - torch.where(starts, position, 0).cummax(1).values
        position = position.clamp_min(0)
        if begun is not None:
            more = begun.round().long()[:, None]
            position = position + (more if document is None else more * (document == 0))
        number = position // self.chunk_length
        return (starts | (number != F.pad(number, (1, 0))[:, :-1])).long().cumsum(1)

    def _most(self, chunk: torch.Tensor, layout: TokenLayout) -> int:
        """A number of chunks that is enough for every row."""
        if not exporting():
            return int(chunk.max()) + 1
        return layout.length + 1 if layout.document is not None else layout.length // self.chunk_length + 2
