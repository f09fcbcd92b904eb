"""Layers shared by the families: where the tokens are, spectral gates, channel mixes, phase drift."""

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from .cache import RecurrentLayer
from .ops import (
    drift_angles,
    exporting,
    interpolate_gate,
    minimum_phase_kernel,
    short_causal_conv,
    zero_phase_kernel,
)


@dataclass
class TokenLayout:
    """Where the real tokens and the documents of a batch are. Computed once per forward pass, read by every layer.

    The real tokens of a row stand in front of its padding (see [`arrange`]), so that position t is the t-th real
    token and no causal layer meets a gap.

    Attributes:
        length: tokens T in a row, padding included.
        valid: `[B, T]`, False at padding; None where every token is real.
        lengths: `[B]` number of real tokens; None where every token is real.
        document: `[B, T]` document index, 0 for the document that the cache holds; None for one document.
        drift: `[T, H, P]` phase drift, filled by the first layer that needs it, since all layers share it.
    """

    length: int
    valid: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    document: torch.Tensor | None = None
    drift: torch.Tensor | None = None

    def first(self, tokens: int) -> "TokenLayout":
        """The layout of the first `tokens` positions."""
        cut = (None if x is None else x[:, :tokens] for x in (self.valid, self.document))
        lengths = None if self.lengths is None else self.lengths.clamp(max=tokens)
        drift = None if self.drift is None else self.drift[:tokens]
        valid, document = cut
        return TokenLayout(tokens, valid, lengths, document, drift)

    def slice(self, start: int, stop: int) -> "TokenLayout":
        """The layout of the positions from `start` up to `stop`, continued from the state behind those before."""
        stop = min(stop, self.length)
        valid = None if self.valid is None else self.valid[:, start:stop]
        lengths = None if self.lengths is None else (self.lengths - start).clamp(0, stop - start)
        document = self.document
        if document is not None:
            document = document[:, start:stop] - (document[:, start - 1 : start] if start else 0)
        return TokenLayout(stop - start, valid, lengths, document)

    def reversed(self) -> "TokenLayout":
        """The layout of the rows read from the end: padding first, documents numbered from the end."""
        valid = None if self.valid is None else self.valid.flip(1)
        document = None if self.document is None else self.document[:, -1:] - self.document.flip(1)
        return TokenLayout(self.length, valid, self.lengths, document, self.drift)

    def last_real(self, x: torch.Tensor, count: int) -> torch.Tensor:
        """The `count` rows of `x` `[B, count + T, D]` that end with the last real token: `[B, count, D]`."""
        if self.lengths is None:
            return x[:, self.length : self.length + count].clone()  # a view would keep all of x alive in the cache
        index = self.lengths[:, None] + torch.arange(count, device=x.device)
        return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))

    def mask(self, x: torch.Tensor) -> torch.Tensor:
        """`x` `[B, T, D]` with zeros at padding."""
        return x if self.valid is None else x * self.valid[..., None].to(x.dtype)


class RotaryEmbedding(nn.Module):
    """Fixed phase drift of holographic keys: rotary positions (Su et al., 2021) without parameters or buffers.

    The frequencies fall from 1 radian a token to 1/base, evenly in the logarithm; neighbouring heads interleave.

    Args:
        heads: key heads H.
        phases: phases P per head.
        base: ratio of the quickest to the slowest frequency.
    """

    def __init__(self, heads: int, phases: int, base: float = 1000.0):
        super().__init__()
        self.heads, self.phases, self.base = heads, phases, base

    def omega(self, device: torch.device | None = None) -> torch.Tensor:
        """Radians a token `[H, P]`, in float64: computed anew, so that no cast or meta device can spoil them."""
        count = self.heads * self.phases
        exponent = torch.arange(count, dtype=torch.float64, device=device) / count
        return torch.exp(-math.log(self.base) * exponent).view(self.phases, self.heads).T

    def angles(self, tokens: torch.Tensor) -> torch.Tensor:
        """Drift over `tokens` `[...]` tokens, modulo 2π: `[..., H, P]`, float64."""
        return drift_angles(self.omega(tokens.device), tokens)

    def forward(self, length: int, device: torch.device | None = None) -> torch.Tensor:
        """Drift at the positions 0 to `length` - 1: `[T, H, P]`, float64."""
        return self.angles(torch.arange(length, device=device))


class SpectralGate(nn.Module):
    """A learned magnitude response per channel, σ(logits) times a learned scale, as a short filter over the tokens.

    A causal model uses the minimum-phase filter of that response: causal, and of all causal ones the one with the
    least delay. A bidirectional model uses the zero-phase filter, which is symmetric.

    Args:
        dim: channels D.
        taps: length K of the kernel in tokens; the gate is set at K // 2 + 1 frequencies from 0 to π.
        causal: minimum phase (True) or zero phase (False).
        name: name of its state in the cache, the last K - 1 inputs.
        delayed: share of the channels, the last ones, that a causal gate delays by one token. A delay leaves the
            magnitude response as it is; with it the projections that follow tell a token from its predecessor, which
            minimum phase alone cannot (measured: 0.01 nats on tinyshakespeare after 300 steps).
    """

    RESOLUTION = 4  # frequencies between two that are set: keeps the wrapped-around tail of the kernel small

    def __init__(self, dim: int, taps: int = 16, causal: bool = True, name: str = "gate", delayed: float = 0.0):
        super().__init__()
        self.taps, self.causal, self.name = taps, causal, name
        self.delayed = int(dim * delayed) if causal and taps > 1 else 0
        self.logits = nn.Parameter(torch.empty(dim, taps // 2 + 1))
        self.scale = nn.Parameter(torch.empty(dim))
        self._kept: tuple[torch.Tensor, ...] | None = None  # logits and scale, and the kernel that they gave
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.logits)
        nn.init.constant_(self.scale, 2.0)

    def state_spec(self) -> dict[str, tuple[int, ...]]:
        return {self.name: (self.taps - 1, self.scale.shape[0])} if self.causal and self.taps > 1 else {}

    def kernel(self) -> torch.Tensor:
        """The taps `[D, K]`: lags 0 to K - 1 if causal, else lags -((K - 1) // 2) to K // 2."""
        design = minimum_phase_kernel if self.causal else zero_phase_kernel
        with torch.autocast(self.logits.device.type, enabled=False):  # half precision would make another filter
            logits = interpolate_gate(self.logits, self.RESOLUTION * max(1, self.taps - 1) + 1)
            kernel = self.scale[:, None] * design(logits, self.taps)
        if self.delayed:
            prompt, late = kernel.split([kernel.shape[0] - self.delayed, self.delayed])
            kernel = torch.cat([prompt, F.pad(late, (1, 0))[:, :-1]])
        return kernel

    def kept_kernel(self) -> torch.Tensor:
        """[`kernel`], designed once for as long as its numbers stay the same: decoding asks for it at every token.

        The numbers themselves are compared, so that nothing which changes them can be missed. Elsewhere than on the CPU
        a look at them would stop the device, and while gradients or a graph are recorded the design is part of it.
        """
        numbers = self.logits, self.scale
        if torch.is_grad_enabled() or exporting() or not all(type(x) is nn.Parameter and x.is_cpu for x in numbers):
            return self.kernel()
        kept = self._kept
        if kept is None or not all(same_numbers(x, y) for x, y in zip(numbers, kept, strict=False)):
            kept = self._kept = (*(x.detach().clone() for x in numbers), self.kernel())
        return kept[-1]

    def response(self, bins: int = 65) -> torch.Tensor:
        """True magnitude response of the cut kernel at `bins` even frequencies from 0 to π: `[D, bins]`.

        It differs from scale · σ(logits), interpolated, by what the cut to K taps takes away.
        """
        return torch.fft.rfft(self.kernel(), n=2 * (bins - 1)).abs()

    def forward(
        self, x: torch.Tensor, layout: TokenLayout | None = None, cache: RecurrentLayer | None = None
    ) -> torch.Tensor:
        """`[B, T, D]` to `[B, T, D]`."""
        layout = TokenLayout(x.shape[1]) if layout is None else layout
        kernel = self.kept_kernel().to(x.dtype)
        if not self.causal:
            return self._both_sides(layout.mask(x), kernel, layout.document)
        window = cache.get(self.name) if cache is not None else None
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
        ahead = (self.taps - 1) // 2  # the future tokens that the kernel reaches
        if document is None:
            return short_causal_conv(F.pad(x, (0, 0, 0, ahead)), kernel)[:, ahead:]
        length, behind = x.shape[1], self.taps // 2
        padded, labels = F.pad(x, (0, 0, behind, ahead)), F.pad(document, (behind, ahead), value=-1)
        out = torch.zeros_like(x)
        for j in range(self.taps):
            window = slice(self.taps - 1 - j, self.taps - 1 - j + length)
            same = labels[:, window] == document  # a token sees no token of another document
            out = out + padded[:, window] * kernel[:, j] * same[..., None]
        return out


class LiteChannelMix(nn.Module):
    """Factorized channel mixing, dim → rank → dim with GELU and a learned scale (HoloSpectralNet).

    Args:
        dim: channels D.
        rank: inner width.
    """

    def __init__(self, dim: int, rank: int):
        super().__init__()
        self.down_proj = nn.Linear(dim, rank, bias=False)
        self.up_proj = nn.Linear(rank, dim, bias=False)
        self.scale = nn.Parameter(torch.ones(dim))

    @property
    def out_proj(self) -> nn.Linear:
        """The projection back to the residual stream."""
        return self.up_proj

    def reset_parameters(self) -> None:
        nn.init.ones_(self.scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, T, D]` to `[B, T, D]`."""
        return self.up_proj(F.gelu(self.down_proj(x))) * self.scale


class GatedChannelMix(nn.Module):
    """SwiGLU (Shazeer, 2020), gate and value in one projection.

    Args:
        dim: channels D.
        intermediate: inner width.
    """

    def __init__(self, dim: int, intermediate: int):
        super().__init__()
        self.gate_up_proj = nn.Linear(dim, 2 * intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, dim, bias=False)

    @property
    def out_proj(self) -> nn.Linear:
        """The projection back to the residual stream."""
        return self.down_proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, T, D]` to `[B, T, D]`."""
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


def make_channel_mix(config) -> nn.Module:
    """The channel mix that `config.channel_mix` names: `[..., D]` to `[..., D]`."""
    if config.channel_mix == "gated":
        return GatedChannelMix(config.hidden_size, config.intermediate_size)
    return LiteChannelMix(config.hidden_size, config.rank)


def init_residual_(depth: int, *projections: nn.Linear) -> None:
    """Start the last projections of a block so that the residual stream keeps its size over `depth` blocks."""
    for projection in projections:
        init_normal_(projection.weight, std=0.7 * projection.in_features**-0.5 / math.sqrt(2 * depth))


def make_norm(config) -> nn.Module:
    """The normalisation that `config.norm_type` names, without bias: `[..., D]` to `[..., D]`."""
    if config.norm_type == "rms":
        return nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=False)


def same_numbers(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states and phases: float32, or float64 in a float64 model."""
    return torch.promote_types(dtype, torch.float32)


@torch.no_grad()
def init_copy_(parameter: nn.Parameter, values: torch.Tensor) -> None:
    """Fill a parameter, unless transformers has marked it as loaded from a checkpoint."""
    if not getattr(parameter, "_is_hf_initialized", False):
        parameter.copy_(values)


def init_normal_(parameter: nn.Parameter, std: float) -> None:
    """As `nn.init.normal_`, unless transformers has marked the parameter as loaded from a checkpoint: a module that
    starts those of its children, too, is met where any one of them is new."""
    if not getattr(parameter, "_is_hf_initialized", False):
        nn.init.normal_(parameter, std=std)
