"""Embeddings for large vocabularies, each with its tied output head, and a loss that never holds [tokens × V] at once.

A head owns no table: it reads those of the embedding, so `save_pretrained`, resizing and the optimizer meet every
number once. A compressed embedding is called with ids, gives scores by `logits` and losses by `token_losses`.

| strategy | tables | head |
|---|---|---|
| standard | V rows | V scores |
| frequency_compressed | rows of frequent tokens, two factors of about √V for the rest | p(group) · p(token in group) |
| adaptive | rows of frequent tokens, clusters of falling width for the rest | p(cluster) · p(token in cluster) |
| hash | a few shared buckets for each token, signed and weighted | bucket scores, gathered |
"""

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from .configuration_vocabulary import lay_out_vocabulary
from .embeddings import CompressedEmbedding, ScaledEmbedding
from .hashing import HashEmbedding
from .layers import at_least_float32, init_copy_
from .losses import true_rows

GROUP_PIECES = 8  # in which the groups of a factored vocabulary are scored


# ---------------------------------------------------------------------------------------------- two levels
class TwoLevelEmbedding(CompressedEmbedding):
    """Frequent tokens have rows of their own, the others share those of groups: p(token) = p(group) · p(token | group).

    The ids are laid out as frequent tokens, grouped tokens, tokens that were added later; the first and the last are
    the dense ones. The row of a grouped token is that of its group plus one of its own, which a subclass composes. A
    group is as probable as many tokens, so its score has a bias.

    Args:
        num_embeddings, embedding_dim, initializer_range: as in [`CompressedEmbedding`].
        frequent_tokens: how many of the lowest ids are dense.
        grouped_tokens: how many ids after them are in groups.
        groups: number of groups.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        initializer_range: float = 0.02,
        *,
        frequent_tokens: int,
        grouped_tokens: int,
        groups: int,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, initializer_range)
        self.frequent_tokens = frequent_tokens
        self.grouped_tokens = grouped_tokens
        self.groups = groups
        self.top = nn.Embedding(groups + self.num_embeddings - grouped_tokens, self.embedding_dim)  # dense tokens last
        self.group_bias = nn.Parameter(torch.empty(groups))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Groups start as probable as Zipf's law makes them, next to dense tokens that are all alike."""
        nn.init.normal_(self.top.weight, std=self.initializer_range)
        place = torch.arange(self.grouped_tokens, device=self.group_bias.device)
        frequency = 1 / (self.frequent_tokens + place + 1.0)
        of_group = torch.zeros_like(self.group_bias, dtype=frequency.dtype).index_add(
            0, self._group_of(place), frequency
        )
        of_dense = sum(1 / rank for rank in range(1, self.frequent_tokens + 1)) / self.frequent_tokens
        init_copy_(self.group_bias, (of_group / of_dense).log())

    def head_parameters(self) -> list[nn.Parameter]:
        return [self.group_bias]

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        grouped, place = self._grouped(ids)
        group = self._group_of(place)
        own = self._member_rows(group, place)  # [..., D]
        return self.top(self._top_index(ids, grouped, group)) + own.where(grouped[..., None], 0)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        scores = self._top_scores(hidden)  # [..., G + dense]
        groups, frequent, added = scores.split([self.groups, self.frequent_tokens, self._added_tokens], -1)
        return torch.cat([frequent, self._grouped_logits(hidden, groups), added], -1).to(hidden.dtype)

    def logits_naive(self, hidden: torch.Tensor) -> torch.Tensor:
        """The same through a table of V rows, group by group."""
        plain = F.linear(hidden, self.rows(torch.arange(self.num_embeddings, device=hidden.device)))  # [..., V]
        plain = plain.to(at_least_float32(hidden.dtype)) + self._biases()
        place = torch.arange(self.grouped_tokens, device=hidden.device)
        scores = F.linear(hidden, self.top.weight[: self.groups], self.group_bias)
        for group, score in enumerate(scores.unbind(-1)):
            members = self.frequent_tokens + place[self._group_of(place) == group]
            total = plain[..., members].logsumexp(-1, keepdim=True)
            plain = plain.index_copy(-1, members, plain[..., members] - total + score[..., None])
        return plain.to(hidden.dtype)

    def token_losses(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        grouped, place = self._grouped(labels)
        group = self._group_of(place)
        index = self._top_index(labels, grouped, group)
        first = F.cross_entropy(self._top_scores(hidden), index, reduction="none")  # [N]
        return first + self._member_losses(hidden, group, place, grouped)

    def resize(self, num_embeddings: int, from_mean: bool = True) -> None:
        least = self.frequent_tokens + self.grouped_tokens
        if num_embeddings < least:
            raise ValueError(f"num_embeddings: {num_embeddings} is not at least {least}; the groups cannot be cut")
        old = self.top.weight
        size = self.groups + num_embeddings - self.grouped_tokens
        with torch.no_grad():
            weight = old.new_empty(size, self.embedding_dim).normal_(std=self.initializer_range)
            if from_mean:
                weight[:] = old[self.groups :].mean(0)
            kept = min(size, len(old))
            weight[:kept] = old[:kept]
        self.top = nn.Embedding.from_pretrained(weight, freeze=not old.requires_grad)
        self.num_embeddings = num_embeddings

    @property
    def _added_tokens(self) -> int:
        return self.num_embeddings - self.frequent_tokens - self.grouped_tokens

    def _grouped(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Whether an id is in a group, and its place among those that are; 0 if it is dense."""
        place = ids - self.frequent_tokens
        grouped = (place >= 0) & (place < self.grouped_tokens)
        return grouped, place.where(grouped, 0)

    def _top_index(self, ids: torch.Tensor, grouped: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
        dense = torch.where(ids < self.frequent_tokens, ids, ids - self.grouped_tokens)
        return torch.where(grouped, group, self.groups + dense)

    def _top_scores(self, hidden: torch.Tensor) -> torch.Tensor:
        scores = F.linear(hidden, self.top.weight).to(at_least_float32(hidden.dtype))
        return scores + F.pad(self.group_bias, (0, len(self.top.weight) - self.groups))

    def _biases(self) -> torch.Tensor | float:
        """Scores of the tokens that depend on nothing: `[V]`, or 0 for none."""
        return 0.0

    def _group_of(self, place: torch.Tensor) -> torch.Tensor:
        """The group of the grouped token at `place`."""
        raise NotImplementedError

    def _member_rows(self, group: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """The part of their rows that grouped tokens do not share with their groups: `[..., D]`."""
        raise NotImplementedError

    def _grouped_logits(self, hidden: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
        """Scores of all grouped tokens, from those of their groups `[..., G]`: `[..., grouped_tokens]`."""
        raise NotImplementedError

    def _member_losses(
        self, hidden: torch.Tensor, group: torch.Tensor, place: torch.Tensor, grouped: torch.Tensor
    ) -> torch.Tensor:
        """-log p(token | group) `[N]`, 0 where a token is not `grouped`."""
        raise NotImplementedError


class FrequencyCompressedEmbedding(TwoLevelEmbedding):
    r"""Two factors for rare tokens: token (i, j) has the row a_i + g_i ∘ b_j, with tables a, g, b of about √V rows.

    In the head, p(i) comes from a_i and p(j | i) from the hidden state seen through the gate of the group, h ∘ g_i.
    Plain sums a_i + b_j would make the factors independent. A bias for every token holds how frequent it is.

    Args:
        num_embeddings, embedding_dim, initializer_range: as in [`CompressedEmbedding`].
        frequent_tokens: dense tokens F, the lowest ids.
        groups: number of groups, the values of i.
        group_size: tokens of a group, the values of j.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        initializer_range: float = 0.02,
        *,
        frequent_tokens: int,
        groups: int,
        group_size: int,
    ) -> None:
        sizes = {"frequent_tokens": frequent_tokens, "grouped_tokens": groups * group_size, "groups": groups}
        super().__init__(num_embeddings, embedding_dim, initializer_range, **sizes)
        self.group_size = group_size
        self.gates = nn.Embedding(groups, self.embedding_dim)
        self.members = nn.Embedding(group_size, self.embedding_dim)
        self.bias = nn.Parameter(torch.empty(groups, group_size))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.normal_(self.members.weight, std=self.initializer_range)
        nn.init.normal_(self.gates.weight)
        nn.init.zeros_(self.bias)

    def head_parameters(self) -> list[nn.Parameter]:
        return [*super().head_parameters(), self.bias]

    @property
    def scores_per_token(self) -> int:
        return len(self.top.weight) + self.group_size

    def _biases(self) -> torch.Tensor:
        return F.pad(self.bias.flatten(), (self.frequent_tokens, self._added_tokens))

    def _group_of(self, place: torch.Tensor) -> torch.Tensor:
        return place // self.group_size

    def _member_rows(self, group: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        return self.gates(group) * self.members(place % self.group_size)

    def _grouped_logits(self, hidden: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
        size = math.ceil(self.groups / GROUP_PIECES)
        pieces = [slice(start, start + size) for start in range(0, self.groups, size)]
        log_probs = [  # [..., G, D] at once would be more values than the scores where D is above √V
            self._member_log_probs(hidden[..., None, :] * self.gates.weight[piece], self.bias[piece])
            for piece in pieces
        ]
        return (torch.cat(log_probs, -2) + groups[..., None]).flatten(-2)

    def _member_losses(
        self, hidden: torch.Tensor, group: torch.Tensor, place: torch.Tensor, grouped: torch.Tensor
    ) -> torch.Tensor:
        log_probs = self._member_log_probs(hidden * self.gates(group), F.embedding(group, self.bias))  # [N, S]
        return -log_probs.gather(-1, (place % self.group_size)[:, None])[:, 0].where(grouped, 0)

    def _member_log_probs(self, gated: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """log p(j | i) `[..., S]` from the gated hidden state `[..., D]`."""
        scores = F.linear(gated, self.members.weight)
        return (scores.to(at_least_float32(scores.dtype)) + bias).log_softmax(-1)


class AdaptiveEmbedding(TwoLevelEmbedding):
    """Clusters of falling width: rare tokens have rows of D/4, D/16, ... values and a projection to D.

    After Baevski & Auli, "Adaptive Input Representations for Neural Language Modeling" (2018), tables and projections
    shared between input and output. The row of a cluster in the head is part of the rows of its tokens.

    Args:
        num_embeddings, embedding_dim, initializer_range: as in [`CompressedEmbedding`].
        cutoffs: the ids at which the dense tokens and then each cluster end.
        shrink: the widths of clusters are D / shrink, D / shrink², ..., at least 1.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        initializer_range: float = 0.02,
        *,
        cutoffs: list[int],
        shrink: int = 4,
    ) -> None:
        frequent, *ends = cutoffs
        levels = {"frequent_tokens": frequent, "grouped_tokens": ends[-1] - frequent, "groups": len(ends)}
        super().__init__(num_embeddings, embedding_dim, initializer_range, **levels)
        self._starts = [end - frequent for end in cutoffs]  # places at which the clusters start, and the end of all
        sizes = [end - start for start, end in zip(cutoffs, ends, strict=False)]
        widths = [max(1, self.embedding_dim // shrink**level) for level in range(1, len(cutoffs))]
        # whose members torch's types do not tell
        self.tables: Any = nn.ModuleList([nn.Embedding(*shape) for shape in zip(sizes, widths, strict=True)])
        self.projections = nn.ParameterList([torch.empty(self.embedding_dim, width) for width in widths])
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        for table, projection in zip(self.tables, self.projections, strict=True):
            nn.init.normal_(table.weight, std=self.initializer_range)
            nn.init.normal_(projection, std=projection.shape[1] ** -0.5)

    @property
    def scores_per_token(self) -> int:
        return len(self.top.weight) + max(len(table.weight) for table in self.tables)

    def _group_of(self, place: torch.Tensor) -> torch.Tensor:
        return sum((place >= start).long() for start in self._starts[1:-1]) + torch.zeros_like(place)

    def _member_rows(self, group: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        rows = (
            F.linear(table(self._within(index, place)), projection).where((group == index)[..., None], 0)
            for index, (table, projection) in enumerate(zip(self.tables, self.projections, strict=True))
        )
        return functools.reduce(torch.add, rows)

    def _grouped_logits(self, hidden: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
        clusters = range(self.groups)
        return torch.cat([self._scores(hidden, i).log_softmax(-1) + groups[..., i, None] for i in clusters], -1)

    def _member_losses(
        self, hidden: torch.Tensor, group: torch.Tensor, place: torch.Tensor, grouped: torch.Tensor
    ) -> torch.Tensor:
        total = hidden.new_zeros(len(hidden), dtype=at_least_float32(hidden.dtype))
        for index in range(self.groups):
            chosen = grouped & (group == index)
            rows = true_rows(chosen)  # most tokens are frequent, and the clusters are what costs time
            scores, label = self._scores(hidden[rows], index), self._within(index, place[rows])
            losses = F.cross_entropy(scores, label, reduction="none").where(chosen[rows], 0)
            total = total.index_add(0, rows, losses)
        return total

    def _within(self, index: int, place: torch.Tensor) -> torch.Tensor:
        """Places counted from the start of a cluster; those of other clusters are moved into it."""
        return (place - self._starts[index]).clamp(0, len(self.tables[index].weight) - 1)

    def _scores(self, hidden: torch.Tensor, index: int) -> torch.Tensor:
        """Scores of the tokens of one cluster `[..., size]`."""
        narrow = F.linear(hidden, self.projections[index].T)  # [..., width]
        return F.linear(narrow, self.tables[index].weight).to(at_least_float32(hidden.dtype))


# ---------------------------------------------------------------------------------------------- in a model
EMBEDDINGS = {
    "frequency_compressed": FrequencyCompressedEmbedding,
    "adaptive": AdaptiveEmbedding,
    "hash": HashEmbedding,
}


def make_embedding(config: PretrainedConfig) -> nn.Module:
    """The embedding that `config.embedding_strategy` names, with `config.embedding_options`.

    A config of a family that does not offer the choice has none of the two: its embedding is the standard one.

    Raises:
        ValueError: a compressed vocabulary with `tie_word_embeddings=False`, tables that do not fit, or a
            `pad_token_id` that is not a token.
    """
    strategy, options = getattr(config, "embedding_strategy", "standard"), getattr(config, "embedding_options", None)
    strategy, options = lay_out_vocabulary(config.vocab_size, strategy, options)
    if config.pad_token_id is not None and config.pad_token_id >= config.vocab_size:
        raise ValueError(f"pad_token_id: {config.pad_token_id} is not a token of a vocabulary of {config.vocab_size}")
    if strategy == "standard":
        return ScaledEmbedding(config.vocab_size, config.hidden_size, config.pad_token_id)
    if not config.tie_word_embeddings:
        raise ValueError(
            f"tie_word_embeddings: False does not go with embedding_strategy={strategy!r}, whose head reads the tables "
            "of the embedding; choose True, or embedding_strategy='standard'"
        )
    return EMBEDDINGS[strategy](config.vocab_size, config.hidden_size, config.initializer_range, **options)


def vocabulary_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """Parameters of a language model's embedding and head together, and those of one dense table for both."""
    embedding: Any = model.get_input_embeddings()
    head = model.get_output_embeddings()
    modules = [module for module in (embedding, head) if module is not None]
    stored = {parameter for module in modules for parameter in module.parameters()}
    return sum(p.numel() for p in stored), embedding.num_embeddings * embedding.embedding_dim
