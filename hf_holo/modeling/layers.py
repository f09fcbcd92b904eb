"""Small layers and helpers that the families share: channel mixes, norms, how weights start, precision of states."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig


class LiteChannelMix(nn.Module):
    """Factorized channel mixing, dim → rank → dim with GELU and a learned scale (HoloSpectralNet).

    Args:
        dim: channels D.
        rank: inner width.
    """

    def __init__(self, dim: int, rank: int) -> None:
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

    def __init__(self, dim: int, intermediate: int) -> None:
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


def make_channel_mix(config: PretrainedConfig) -> LiteChannelMix | GatedChannelMix:
    """The channel mix that `config.channel_mix` names: `[..., D]` to `[..., D]`."""
    if config.channel_mix == "gated":
        return GatedChannelMix(config.hidden_size, config.intermediate_size)
    return LiteChannelMix(config.hidden_size, config.rank)


def init_residual_(depth: int, *projections: nn.Linear) -> None:
    """Start the last projections of a block so that the residual stream keeps its size over `depth` blocks."""
    for projection in projections:
        init_normal_(projection.weight, std=0.7 * projection.in_features**-0.5 / math.sqrt(2 * depth))


def make_norm(config: PretrainedConfig) -> nn.Module:
    """The normalisation that `config.norm_type` names, without bias: `[..., D]` to `[..., D]`."""
    if config.norm_type == "rms":
        return nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=False)


def scaled_to_unit(x: torch.Tensor, eps: float) -> torch.Tensor:
    """`x` `[..., D]` over the root of its mean square. In the plain operations: `F.rms_norm` takes more of them."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def faded(exponent: torch.Tensor) -> torch.Tensor:
    """e^exponent, and 0 where that is far below rounding: numbers near the least there is slow down all that they meet,
    their own exponential twenty-five times."""
    least = 0.5 * math.log(torch.finfo(exponent.dtype).tiny)
    return exponent.clamp_min(least).exp() * (exponent > least)


def mean_of_real(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """`[B, T, D]` to the mean `[B, D]` over the places where the mask `[B, T]` is 1, zeros where there is none; without
    a mask over all."""
    if mask is None:
        return x.mean(1)
    real = mask.to(at_least_float32(x.dtype))  # bfloat16 counts no further than 256
    return ((x * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp_min(1)).to(x.dtype)


def same_numbers(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states and phases: float32, or float64 in a float64 model."""
    return torch.promote_types(dtype, torch.float32)


@torch.no_grad()
def init_copy_(parameter: torch.Tensor, values: torch.Tensor) -> None:
    """Fill a parameter, unless transformers has marked it as loaded from a checkpoint."""
    if not getattr(parameter, "_is_hf_initialized", False):
        parameter.copy_(values)


def init_normal_(parameter: torch.Tensor, std: float) -> None:
    """As `nn.init.normal_`, unless transformers has marked the parameter as loaded from a checkpoint: a module that
    starts those of its children, too, is met where any one of them is new."""
    if not getattr(parameter, "_is_hf_initialized", False):
        nn.init.normal_(parameter, std=std)
