"""Phases: how they drift with the position, the real features that they give, and how a state is turned.

Sizes in the shape tags: B batch, T tokens, H heads, P phases, F = 2P real features, V value width.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import BackwardCFunction, FunctionCtx

from .recording import exporting

WITH_FLOAT64 = ("cpu", "cuda", "xpu")  # Apple's MPS, for one, has none


def home_of_float64(device: torch.device | None) -> torch.device:
    """Where values in float64 are computed for a device: there, or on the CPU where it has none."""
    return device if device is not None and device.type in WITH_FLOAT64 else torch.device("cpu")


def drift_angles(omega: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Phase drift ω·t modulo 2π, taken in float64 so that it stays exact at any length.

    Args:
        omega: `[H, P]` radians a token, on a device that has float64, see [`home_of_float64`].
        tokens: integer counts `[...]`, on the same device.

    Returns:
        `[..., H, P]` in the dtype of `omega`.
    """
    turns = tokens.double()[..., None, None] * (omega.double() / (2 * math.pi))
    return ((turns - turns.floor()) * (2 * math.pi)).to(omega.dtype)


def whole_turns(steps: torch.Tensor, fractions: Sequence[int]) -> torch.Tensor:
    """Angles that are drawn to whole multiples of 1/n of a turn, smoothly: steps x of it become x - sin(2πx)/2π, and
    that again, four times in all.

    An error ε of a step becomes about (2π)² ε³/6, and shrinks as fast each time: what a model has learned roughly, it
    computes almost exactly, so that sums over thousands of tokens hold. The gradient is that of the curve after two
    times, which is less flat about whole steps: a model leaves a wrong one the more easily.

    Args:
        steps: `[..., H]`, in steps of 1/n of a turn.
        fractions: n of every head.

    Returns:
        Radians, in the shape of `steps`.
    """
    gentle = gentle_turns(steps, fractions)
    exact = gentle_turns(_drawn_to_whole(_drawn_to_whole(steps.detach())), fractions)
    return gentle + (exact - gentle).detach()


def gentle_turns(steps: torch.Tensor, fractions: Sequence[int]) -> torch.Tensor:
    """The curve that [`whole_turns`] has the gradient of: drawn to whole steps two times."""
    circle = torch.tensor([2 * math.pi / n for n in fractions], dtype=steps.dtype, device=steps.device)
    return _drawn_to_whole(_drawn_to_whole(steps)) * circle


def _drawn_to_whole(x: torch.Tensor) -> torch.Tensor:
    return x - (2 * math.pi * x).sin() / (2 * math.pi)


def summed_turns(turn: torch.Tensor) -> torch.Tensor:
    """How far all tokens up to each have turned a state, modulo 2π; summed in float64, see [`home_of_float64`].

    Args:
        turn: `[B, T, H]` radians.

    Returns:
        `[B, T, H]`, in [0, 2π).
    """
    total = turn.to(home_of_float64(turn.device)).double().cumsum(1)
    total = total - (total / (2 * math.pi)).detach().floor() * (2 * math.pi)
    return total.to(turn.dtype).to(turn.device)


def summed_turns_naive(turn: torch.Tensor) -> torch.Tensor:
    """Twin of [`summed_turns`]: one token after another, brought back into the circle each time."""
    total, rows = torch.zeros_like(turn[:, 0], dtype=torch.float64), []
    for t in range(turn.shape[1]):
        total = (total + turn[:, t]) % (2 * math.pi)
        rows.append(total)
    return torch.stack(rows, 1).to(turn.dtype)


def phase_features(theta: torch.Tensor, drift: torch.Tensor) -> torch.Tensor:
    """Real features of phasors, [cos, sin] of (theta + drift), heads first.

    Args:
        theta: `[B, T, H, P]`.
        drift: `[T, H, P]`, fixed (gets no gradient).

    Returns:
        `[B, H, T, 2P]`. The product of two such features is Σ_p cos(θ_p - θ'_p): interference.
    """
    recorded = torch.is_grad_enabled() and not exporting()
    return (_PhaseFeatures.apply if recorded else phase_features_naive)(theta, drift)


def phase_features_naive(theta: torch.Tensor, drift: torch.Tensor) -> torch.Tensor:
    """Twin of [`phase_features`], by autograd."""
    angle = (theta + drift).transpose(1, 2)
    return torch.cat([angle.cos(), angle.sin()], -1)


class _PhaseFeatures(torch.autograd.Function):
    """Autograd would take every cosine and sine twice; the features are their own derivatives."""

    @staticmethod
    def forward(ctx: FunctionCtx, theta: torch.Tensor, drift: torch.Tensor) -> torch.Tensor:
        features = phase_features_naive(theta, drift)  # cosines written in strides would take longer
        ctx.save_for_backward(features)
        return features

    @staticmethod
    def backward(ctx: BackwardCFunction, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (features,) = ctx.saved_tensors
        cos, sin = features.chunk(2, -1)
        d_cos, d_sin = grad.chunk(2, -1)
        return torch.addcmul(d_sin * cos, d_cos, sin, value=-1).transpose(1, 2), None


def rotate_state(state: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Multiply the phasors of a state by e^{-i angle}.

    Args:
        state: `[B, H, 2P, V]`, cosine rows above sine rows.
        angle: `[B, H, P]` or broadcastable, on any device.
    """
    cos, sin = (x[..., None].to(state.dtype).to(state.device) for x in (angle.cos(), angle.sin()))
    real, imaginary = state.chunk(2, -2)
    return torch.cat([real * cos + imaginary * sin, imaginary * cos - real * sin], -2)


def turn_halves(x: torch.Tensor, along: torch.Tensor, across: torch.Tensor, dim: int) -> torch.Tensor:
    """Multiply complex numbers, whose real parts are the first half of a dimension, by fixed ones, in three operations.

    Args:
        x: `[..., 2P, ...]`.
        along, across: the fixed numbers, from [`turning`].
        dim: the dimension.

    Returns:
        The shape of `x`.
    """
    return torch.addcmul(x * along, x.roll(along.shape[dim] // 2, dim), across)


def turn_halves_naive(x: torch.Tensor, along: torch.Tensor, across: torch.Tensor, dim: int) -> torch.Tensor:
    """Twin of [`turn_halves`]: one half, and then the other."""
    (real, imaginary), (keep, turn) = x.chunk(2, dim), zip(along.chunk(2, dim), across.chunk(2, dim), strict=True)
    return torch.cat([real * keep[0] + imaginary * keep[1], imaginary * turn[0] + real * turn[1]], dim)


def turning(real: torch.Tensor, imaginary: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Complex numbers `[..., P, ...]` as [`turn_halves`] takes them, two of `[..., 2P, ...]`: what a half is multiplied
    by, and what the other half is."""
    return torch.cat([real, real], dim), torch.cat([-imaginary, imaginary], dim)


def rotate_pairs(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (i, i + V/2) of queries or keys by an angle, as Llama does.

    Args:
        x: `[..., V]`.
        angle: `[..., V/2]` or broadcastable, on any device.
    """
    cos, sin = (turn.to(x.dtype).to(x.device) for turn in (angle.cos(), angle.sin()))
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class PhaseDrift(nn.Module):
    """Fixed drift of phases with the position, without parameters or buffers.

    The frequencies fall from 1 radian a token to 1/base, evenly in the logarithm; neighbouring heads interleave.

    Args:
        heads: key heads H.
        phases: phases P per head.
        base: ratio of the fastest to the slowest frequency.
        drifting: phases per head that drift, the first ones; the others stand still. None: all.
    """

    def __init__(self, heads: int, phases: int, base: float = 1000.0, drifting: int | None = None) -> None:
        super().__init__()
        self.heads, self.phases, self.base = heads, phases, base
        self.drifting = phases if drifting is None else drifting

    def omega(self, device: torch.device | None = None) -> torch.Tensor:
        """Radians a token `[H, P]`, in float64: computed when asked for, so that no cast or meta device can spoil them.

        They are on `device` if that has float64, see [`home_of_float64`].
        """
        count, standing = self.heads * self.drifting, self.phases - self.drifting
        exponent = torch.arange(count, dtype=torch.float64, device=home_of_float64(device)) / max(1, count)
        drifting = torch.exp(-math.log(self.base) * exponent).view(self.drifting, self.heads).T
        return F.pad(drifting, (0, standing)) if standing else drifting

    def angles(self, tokens: torch.Tensor) -> torch.Tensor:
        """Drift over `tokens` `[...]` tokens, modulo 2π: `[..., H, P]`, float64, where `omega(tokens.device)` is."""
        omega = self.omega(tokens.device)
        return drift_angles(omega, tokens.to(omega.device))

    def turn(self, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What takes a state `[B, H, 2P, V]` over one token, for [`turn_halves`]: `[H, 2P, 1]` twice."""
        angle = self.angles(torch.ones((), dtype=torch.long, device=home_of_float64(state.device)))[..., None]
        along, across = turning(angle.cos(), -angle.sin(), -2)
        return along.to(state.dtype).to(state.device), across.to(state.dtype).to(state.device)

    def forward(self, length: int, device: torch.device | None = None) -> torch.Tensor:
        """Drift at the positions 0 to `length` - 1: `[T, H, P]`, float64, where `omega(device)` is."""
        return self.angles(torch.arange(length, device=home_of_float64(device)))


class RotaryEmbedding(PhaseDrift):
    """Rotary positions (Su et al., 2021) without parameters or buffers: channels i and i + D/2 turn as a pair.

    Args:
        dim: channels D, an even number.
        base: the pairs turn by 1 radian a token down to 1/base.

    Raises:
        ValueError: `dim` is odd.
    """

    def __init__(self, dim: int, *, base: float = 10000.0) -> None:
        if dim % 2:
            raise ValueError(f"dim: {dim} is not even")
        super().__init__(1, dim // 2, base)

    def angles(self, positions: torch.Tensor) -> torch.Tensor:
        """Angles of the pairs at whole `positions` `[...]`, modulo 2π: `[..., D/2]`, see [`PhaseDrift.angles`]."""
        return super().angles(positions)[..., 0, :]

    def forward(  # type: ignore[override]  # it has the frequencies of a drift, and another use
        self, x: torch.Tensor, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Turn `x` `[..., T, D]` by its positions `[T]` or `[..., T]` (default: from 0 on), to the same shape."""
        if positions is None:
            positions = torch.arange(x.shape[-2], device=home_of_float64(x.device))
        return rotate_pairs(x, self.angles(positions))
