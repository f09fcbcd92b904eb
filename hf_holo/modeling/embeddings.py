"""Embeddings of tokens: the standard one, and what all compressed ones have in common."""

from typing import Any

import torch
from torch import nn

from .recording import has_values


class ScaledEmbedding(nn.Embedding):
    """Embeddings times √D: small values for the tied head, unit variance for the first layer."""

    @property
    def embed_scale(self) -> float:
        """√D, by the name under which PEFT looks for it: what it adds to rows is to be scaled alike."""
        return self.embedding_dim**0.5

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids) * self.embed_scale


class CompressedEmbedding(nn.Module):
    """An embedding of V tokens in fewer than V rows, and the head that is tied to it.

    Args:
        num_embeddings: number of tokens V.
        embedding_dim: width D.
        initializer_range: standard deviation of the values of an embedding at the start.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, initializer_range: float = 0.02) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.initializer_range = initializer_range

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`[...]` ids to `[..., D]`, times √D as in [`ScaledEmbedding`]."""
        return self.rows(input_ids) * self.embedding_dim**0.5

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """What a table of V rows would hold for `ids`: `[...]` to `[..., D]`."""
        raise NotImplementedError

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[..., D]` to scores of all tokens `[..., V]`, of which the softmax gives the probabilities."""
        raise NotImplementedError

    def token_losses(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Nats of every label: `[N, D]` and `[N]` to `[N]`, in at least float32."""
        raise NotImplementedError

    @property
    def scores_per_token(self) -> int:
        """How many scores [`token_losses`] holds for one token."""
        raise NotImplementedError

    def resize(self, num_embeddings: int, from_mean: bool = True) -> None:
        """Add tokens at the end, or take them from there. The scores of the tokens that stay do not change.

        Args:
            num_embeddings: the new number of tokens.
            from_mean: start rows of new tokens at the mean of the rows, else as in a new model.

        Raises:
            ValueError: so few tokens that a table would have to be cut.
        """
        raise NotImplementedError

    def head_parameters(self) -> list[nn.Parameter]:
        """What only the head reads; a model without one leaves it untrained."""
        return []

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


def num_embeddings(embedding: nn.Module) -> int:
    """How many tokens an embedding knows, also within what PEFT has put around it."""
    inner: Any = embedding
    for wrapped in ("base_layer", "original_module"):
        inner = getattr(inner, wrapped, inner)
    return inner.num_embeddings


def check_ids(name: str, ids: torch.Tensor, size: int, among: str = "the vocabulary of") -> None:
    """Raise ValueError if an id is no whole number from 0 to `size` - 1; the latter on the CPU only, elsewhere a look
    would stop the device.

    `among` says in the message what there are `size` of.
    """
    if ids.is_floating_point():
        raise ValueError(f"{name}: {str(ids.dtype).removeprefix('torch.')}; ids are whole numbers")
    if ids.device.type != "cpu" or not has_values(ids) or not ids.numel():
        return
    low, high = (bound.item() for bound in ids.aminmax())
    if low < 0 or high >= size:
        bad = low if low < 0 else high
        raise ValueError(f"{name}: {bad} is outside {among} {size}; ids are 0 to {size - 1}")
