"""How the features of several modalities become one vector: by binding, by superposition, or side by side.

With binding, the features of a modality become phasors, are bound to the role of that modality, and are superposed with
every pair and the triple of them bound together: Π(1 + b_m) - 1. A missing modality is the zero vector, the factor 1,
and adds exactly nothing. Roles and superposition: Plate (1995, 2003). Features of modalities bound with each other:
multimodal compact bilinear pooling (Fukui et al., 2016). Sizes in the shape tags: B batch, M modalities, D
`hidden_size`, P = D / 2 phasors, F width of the fused vector.
"""

from collections.abc import Mapping
from itertools import combinations

import torch
from torch import nn

from .binding import bind_phasors
from .configuration_resonance_multimodal import ResonanceMultimodalConfig
from .layers import at_least_float32
from .phases import rotate_pairs

REMEMBERED = 100  # batches over which the mean of features runs


def superpose_products(parts: list[torch.Tensor]) -> torch.Tensor:
    """Every part, and every set of them bound together, superposed: Π(1 + b_m) - 1.

    Args:
        parts: `[B, 2P]` each, complex numbers with the real parts first; zeros add nothing.

    Returns:
        `[B, 2P]`, for two parts a + b + ab.
    """
    total = parts[0]
    for part in parts[1:]:
        total = total + part + bind_phasors(total, part)
    return total


def superpose_products_naive(parts: list[torch.Tensor]) -> torch.Tensor:
    """Twin of [`superpose_products`]: the sum over all sets of parts, each bound in complex numbers."""
    numbers = [torch.complex(*part.chunk(2, -1)) for part in parts]
    sets = [chosen for size in range(1, len(parts) + 1) for chosen in combinations(numbers, size)]
    total = torch.stack([torch.stack(chosen).prod(0) for chosen in sets]).sum(0)
    return torch.cat([total.real, total.imag], -1)


class Centre(nn.Module):
    """Takes the running mean off the features of an encoder, so that what is left tells examples apart.

    What all examples have in common may be hundreds of times as strong as that by which they differ: the mean over the
    patches of a picture is mostly background. Products of such features hardly vary, and learn nothing for long. The
    mean is that of the examples so far in training, older ones fading (as the centre of DINO; Caron et al., 2021), and
    stays as it is in evaluation, where no example sees another.

    Args:
        size: width of the features.
    """

    mean: torch.Tensor
    batches: torch.Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("batches", torch.zeros(()))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.mean)
        nn.init.zeros_(self.batches)

    @torch.no_grad()
    def update(self, x: torch.Tensor, present: torch.Tensor) -> None:
        """Take the examples of a batch that are present into account, `[B, size]` and `[B]`."""
        share = present.to(x.dtype)[:, None]
        mean = (x * share).sum(0) / share.sum().clamp_min(1)
        self.batches += present.any()
        weight = (1 / self.batches.clamp(1, REMEMBERED)) * present.any()  # all batches alike, as long as there are few
        self.mean += weight.to(self.mean.dtype) * (mean.to(self.mean.dtype) - self.mean)

    def forward(self, x: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """`[B, size]` and `[B]` to `[B, size]`."""
        if self.training:
            self.update(x.detach().where(present[:, None], 0), present)
        return x - self.mean.to(x.dtype)


class Fusion(nn.Module):
    """One vector from the features of all modalities that are present, in the way that `config.fusion` names.

    Args:
        config: a [`ResonanceMultimodalConfig`].
    """

    def __init__(self, config: ResonanceMultimodalConfig) -> None:
        super().__init__()
        self.kind, self.modalities, self.norm_eps = config.fusion, config.modalities, config.norm_eps
        sizes = {name: getattr(config, f"{name}_config").hidden_size for name in self.modalities}
        self.centres = nn.ModuleDict({name: Centre(size) for name, size in sizes.items()})
        self.projections = nn.ModuleDict({name: nn.Linear(size, config.hidden_size) for name, size in sizes.items()})
        self.roles = None  # phases in radians, of each modality
        if self.kind == "binding":
            self.roles = nn.Parameter(torch.empty(len(sizes), config.hidden_size // 2))

    def reset_parameters(self) -> None:
        if self.roles is not None:
            nn.init.uniform_(self.roles, -torch.pi, torch.pi)

    def features(self, name: str, pooled: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """The phasors of a modality: of mean power one, in at least float32, and zeros where it is missing.

        `[B, width]` and `[B]` to `[B, D]`. Their lengths are free: a phasor of no length says nothing about an
        example.
        """
        projected = self.projections[name](self.centres[name](pooled, present))
        projected = projected.to(at_least_float32(projected.dtype))
        power = projected.square().mean(-1, keepdim=True) * 2  # a phasor is two numbers
        return (projected * torch.rsqrt(power + self.norm_eps)).where(present[:, None], 0.0)

    def forward(self, features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Features `[B, D]` of at least one modality, by name, to the fused vector `[B, F]`."""
        if self.kind == "concatenation":
            missing = torch.zeros_like(next(iter(features.values())))
            return torch.cat([features.get(name, missing) for name in self.modalities], -1)
        if self.roles is None:
            return torch.stack([*features.values()]).sum(0)
        return superpose_products([rotate_pairs(x, self.role(name)) for name, x in features.items()])

    def role(self, name: str) -> torch.Tensor:
        """The phases `[P]` to which a modality is bound."""
        assert self.roles is not None
        return self.roles[self.modalities.index(name)]

    def unbind(self, fused: torch.Tensor, name: str) -> torch.Tensor:
        """`[..., F]` to `[..., D]`, see [`ResonanceMultimodalModel.unbind`]."""
        if name not in self.modalities:
            raise ValueError(f"modality: {name!r} is unknown; this model has {', '.join(self.modalities)}")
        if self.kind == "concatenation":
            return fused.chunk(len(self.modalities), -1)[self.modalities.index(name)]
        if self.roles is None:
            raise ValueError("fusion: 'superposition' binds to no role by which a modality could be read back")
        return rotate_pairs(fused, -self.role(name))


def drop_modalities(present: torch.Tensor, probability: float) -> torch.Tensor:
    """Take each modality of each example away at random, but never the last: `[B, M]` bool to `[B, M]`."""
    chance = torch.rand(present.shape, device=present.device).masked_fill(~present, -1.0)
    luckiest = chance == chance.amax(1, keepdim=True)
    return present & ((chance >= probability) | luckiest)
