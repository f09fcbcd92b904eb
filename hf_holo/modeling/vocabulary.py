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
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .configuration_vocabulary import lay_out_vocabulary
from .layers import at_least_float32, init_copy_
from .loading import physical_memory
from .ops import exporting, has_values

IGNORED = -100  # the label of a token without a loss, as in transformers
SCORES_AT_ONCE = 2**24  # numbers of one piece of the loss: 64 MiB in float32
GROUP_PIECES = 8  # in which the groups of a factored vocabulary are scored
PRIME = 2**31 + 11  # the smallest above every id

TokenLosses = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class ScaledEmbedding(nn.Embedding):
    """Embeddings times √D: small numbers for the tied head, unit variance for the first layer."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids) * self.embedding_dim**0.5


class CompressedEmbedding(nn.Module):
    """An embedding of V tokens in fewer than V rows, and the head that is tied to it.

    Args:
        num_embeddings: number of tokens V.
        embedding_dim: width D.
        initializer_range: standard deviation of the numbers of an embedding at the start.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, initializer_range: float = 0.02):
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
    ):
        super().__init__(num_embeddings, embedding_dim, initializer_range)
        self.frequent_tokens = frequent_tokens
        self.grouped_tokens = grouped_tokens
        self.groups = groups
        self.top = nn.Embedding(groups + self.num_embeddings - grouped_tokens, self.embedding_dim)  # dense tokens last
        self.group_bias = nn.Parameter(torch.empty(groups))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Groups start as probable as Zipf's law makes them, beside dense tokens that are all alike."""
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
            raise ValueError(f"num_embeddings={num_embeddings} must be at least {least}: the groups cannot be cut")
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
    ):
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
        log_probs = [  # [..., G, D] at once would be more numbers than the scores where D is above √V
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
    """Clusters of falling width: rare tokens have rows of D/4, D/16, ... numbers and a projection to D.

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
    ):
        frequent, *ends = cutoffs
        sizes = {"frequent_tokens": frequent, "grouped_tokens": ends[-1] - frequent, "groups": len(ends)}
        super().__init__(num_embeddings, embedding_dim, initializer_range, **sizes)
        self._starts = [end - frequent for end in cutoffs]  # places at which the clusters start, and the end of all
        sizes = [end - start for start, end in zip(cutoffs, ends, strict=False)]
        widths = [max(1, self.embedding_dim // shrink**level) for level in range(1, len(cutoffs))]
        self.tables = nn.ModuleList([nn.Embedding(*shape) for shape in zip(sizes, widths, strict=True)])
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


# ---------------------------------------------------------------------------------------------- hashing
class HashEmbedding(CompressedEmbedding):
    r"""Token v is the sum of K rows, one from the buckets of each hash function: Σ_k s_k(v) p_k(v) B_k[h_k(v)].

    The signs s come from the hash as in a count sketch, the importances p are learned (after Svenstrup et al., "Hash
    Embeddings for Efficient Word Representations", 2017): tokens that share buckets still differ. Scores of tokens are
    gathered from those of the buckets, so the head costs D products per bucket and K sums per token. Nothing but the
    importances grows with the vocabulary, and they only up to their option.

    Args:
        num_embeddings, embedding_dim, initializer_range: as in [`CompressedEmbedding`].
        hashes: number of hash functions K.
        buckets: rows of each.
        importances: rows of the table of importances; id v reads row v modulo their number.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        initializer_range: float = 0.02,
        *,
        hashes: int,
        buckets: int,
        importances: int,
    ):
        super().__init__(num_embeddings, embedding_dim, initializer_range)
        self.hashes = hashes
        self.buckets = buckets
        self.tables = nn.Embedding(hashes * buckets, self.embedding_dim)
        self.importance = nn.Parameter(torch.empty(importances, hashes))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.normal_(self.tables.weight, std=self.initializer_range * self.hashes**-0.5)
        nn.init.ones_(self.importance)

    @property
    def scores_per_token(self) -> int:
        return self.num_embeddings + len(self.tables.weight)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        index, sign = hash_codes(ids, self.hashes, self.buckets)  # [..., K]
        weight = sign * F.embedding(ids % len(self.importance), self.importance)
        return (self.tables(index) * weight[..., None]).sum(-2)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._scores(hidden).to(hidden.dtype)

    def logits_naive(self, hidden: torch.Tensor) -> torch.Tensor:
        """The same through a table of V rows."""
        return F.linear(hidden, self.rows(torch.arange(self.num_embeddings, device=hidden.device)))

    def token_losses(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self._scores(hidden), labels, reduction="none")

    def resize(self, num_embeddings: int, from_mean: bool = True) -> None:
        least, most = len(self.tables.weight), 2**31
        if not least <= num_embeddings <= most:
            raise ValueError(
                f"num_embeddings={num_embeddings} must lie between the buckets, {least}, and 2^31 = {most}"
            )
        self.num_embeddings = num_embeddings  # new tokens hash into the tables that are there

    def _scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """Bucket scores, gathered: `[..., V]` in at least float32."""
        buckets = F.linear(hidden, self.tables.weight)  # [..., R] with R = K · buckets
        buckets = buckets.to(at_least_float32(buckets.dtype))
        # While a graph is recorded nothing may be kept: its tensors are not real ones.
        codes = _codes_on if has_values(hidden) else _codes_on.__wrapped__
        index, sign, users, starts = codes(hidden.device, self.num_embeddings, self.hashes, self.buckets)
        times = math.ceil(self.num_embeddings / len(self.importance))
        weight = sign * self.importance.repeat(times, 1)[: self.num_embeddings].to(buckets.dtype)  # [V, K]
        return gather_scores(buckets, weight, index, users, starts)


def gather_scores(
    scores: torch.Tensor, weight: torch.Tensor, index: torch.Tensor, users: torch.Tensor, starts: torch.Tensor
) -> torch.Tensor:
    """Weighted sums of K scores for each of V tokens: y[v] = Σ_k weight[v, k] scores[index[v, k]].

    Both directions are bags of rows that lie together in memory, many times quicker than indexing.

    Args:
        scores: `[..., R]`.
        weight: `[V, K]`.
        index: `[V, K]`, from 0 to R - 1.
        users: `[V · K]`, the places in `index.flatten()` sorted by what stands there.
        starts: `[R]`, where in `users` each of the R begins.

    Returns:
        `[..., V]`.
    """
    if exporting():
        return gather_scores_naive(scores, weight, index)
    return _GatherScores.apply(scores.flatten(0, -2), weight, index, users, starts).unflatten(0, scores.shape[:-1])


def gather_scores_naive(scores: torch.Tensor, weight: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return sum(scores.index_select(-1, rows) * factor for rows, factor in zip(index.T, weight.T, strict=True))


class _GatherScores(torch.autograd.Function):
    """[`gather_scores`] of `[N, R]`. torch's own backward of a bag sorts all indices anew; here they are sorted."""

    @staticmethod
    def forward(ctx, scores, weight, index, users, starts):
        ctx.save_for_backward(scores, weight, index, users, starts)
        return _bags(scores.T, weight, index).T.contiguous()

    @staticmethod
    def backward(ctx, gradient):
        scores, weight, index, users, starts = ctx.saved_tensors
        gradient = gradient.T.contiguous()  # [V, N]
        by_user = weight.flatten().index_select(0, users)
        to_scores = F.embedding_bag(users // index.shape[1], gradient, starts, mode="sum", per_sample_weights=by_user)
        to_weight = None
        if ctx.needs_input_grad[1]:
            with torch.enable_grad():
                weight = weight.detach().requires_grad_()
                (to_weight,) = torch.autograd.grad(_bags(scores.detach().T, weight, index), weight, gradient)
        return to_scores.T, to_weight, None, None, None


def _bags(rows: torch.Tensor, weight: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return F.embedding_bag(index, rows.contiguous(), mode="sum", per_sample_weights=weight)


def hash_codes(ids, hashes: int, buckets: int):
    """Rows and signs of tokens: K polynomials of second degree modulo a prime above 2^31 (Carter & Wegman, 1979).

    Three coefficients make any three tokens independent, and the arithmetic fits into int64 for every id.

    Args:
        ids: integers `[...]` from 0 to 2^31, a tensor or an array.
        hashes: number of hash functions K.
        buckets: rows of each.

    Returns:
        Rows from 0 to K · buckets - 1, those of hash function k after those of k - 1, and signs ±1: `[..., K]` each.
    """
    xp = np if isinstance(ids, np.ndarray) else torch
    ids = ids.astype(np.int64) if xp is np else ids.long()
    rows, signs = [], []
    for k, (a, b, c) in enumerate(_coefficients(hashes)):
        code = ((a * ids + b) % PRIME * ids + c) % PRIME % (2 * buckets)
        rows.append(code // 2 + k * buckets)
        signs.append(1 - 2 * (code % 2))
    return xp.stack(rows, -1), xp.stack(signs, -1)


@functools.lru_cache
def _coefficients(hashes: int) -> list[list[int]]:
    """K times three numbers from 1 to PRIME - 1: raw bits of Philox, the same in every release of numpy."""
    bits = np.random.Philox(key=0).random_raw((hashes, 3))
    return (1 + bits % (PRIME - 1)).astype(int).tolist()


class Codes(NamedTuple):
    """The hash codes of a whole vocabulary: `index` and `sign` `[V, K]`, `users` and `starts` of [`gather_scores`]."""

    index: np.ndarray
    sign: np.ndarray
    users: np.ndarray
    starts: np.ndarray


@functools.lru_cache(maxsize=2)
def _all_codes(tokens: int, hashes: int, buckets: int) -> Codes:
    """[`hash_codes`] of all tokens, kept for the next step of training or generation.

    Raises:
        ValueError: they take more memory than this machine has.
    """
    needed = tokens * (32 * hashes + 16)  # bytes while they are made; 9 · hashes are kept
    memory = None if exporting() else physical_memory()
    if memory is not None and needed > memory:
        raise ValueError(
            f"vocab_size={tokens}: the head of a hashed vocabulary needs the codes of all tokens, which take "
            f"{needed / 2**30:,.0f} GiB, and this machine has {memory / 2**30:,.0f}; a model without a head needs none"
        )
    index, sign = hash_codes(np.arange(tokens), hashes, buckets)
    users = index.ravel().argsort(kind="stable")
    starts = index.ravel()[users].searchsorted(np.arange(hashes * buckets))
    place = np.int32 if users.size <= 2**31 else np.int64
    return Codes(index.astype(np.int32), sign.astype(np.int8), users.astype(place), starts.astype(place))


@functools.lru_cache(maxsize=2)
def _codes_on(device: torch.device, tokens: int, hashes: int, buckets: int) -> list[torch.Tensor]:
    """[`Codes`] as tensors on a device, to which they go once."""
    codes = _all_codes(tokens, hashes, buckets)
    with torch.inference_mode(False):  # a tensor of inference mode could serve no later training
        return [torch.from_numpy(code).to(device) for code in codes]


def collisions(embedding: HashEmbedding) -> dict[str, float | int]:
    """How many tokens of a hashed vocabulary cannot be told apart by their buckets and signs.

    Returns:
        `tokens`; `observed`, tokens that share all K buckets and signs with another one (only their importances tell
        those apart); `expected`, that number for ideal hash functions; `bucket_load`, tokens per bucket.
    """
    tokens, hashes, buckets = embedding.num_embeddings, embedding.hashes, embedding.buckets
    codes = _all_codes(tokens, hashes, buckets)
    keys = np.concatenate([codes.index, codes.sign], 1)
    keys = keys[np.lexsort(keys.T)]
    same = np.concatenate([[False], (keys[1:] == keys[:-1]).all(1), [False]])  # between neighbours
    alone = (tokens - 1) * math.log1p(-((2 * buckets) ** -hashes))  # log-probability that no other token has the code
    return {
        "tokens": tokens,
        "observed": int((same[1:] | same[:-1]).sum()),
        "expected": -tokens * math.expm1(alone),
        "bucket_load": tokens / buckets,
    }


# ---------------------------------------------------------------------------------------------- in a model
EMBEDDINGS = {
    "frequency_compressed": FrequencyCompressedEmbedding,
    "adaptive": AdaptiveEmbedding,
    "hash": HashEmbedding,
}


def make_embedding(config) -> nn.Module:
    """The embedding that `config.embedding_strategy` names, with `config.embedding_options`.

    A config of a family that does not offer the choice has none of the two: its embedding is the standard one.

    Raises:
        ValueError: a compressed vocabulary with `tie_word_embeddings=False`, tables that do not fit, or a
            `pad_token_id` that is no token.
    """
    strategy, options = getattr(config, "embedding_strategy", "standard"), getattr(config, "embedding_options", None)
    strategy, options = lay_out_vocabulary(config.vocab_size, strategy, options)
    if config.pad_token_id is not None and config.pad_token_id >= config.vocab_size:
        raise ValueError(f"pad_token_id={config.pad_token_id} is no token of a vocabulary of {config.vocab_size}")
    if strategy == "standard":
        return ScaledEmbedding(config.vocab_size, config.hidden_size, config.pad_token_id)
    if not config.tie_word_embeddings:
        raise ValueError(
            f"tie_word_embeddings=False does not go with embedding_strategy={strategy!r}, whose head reads the tables "
            "of the embedding; choose True, or embedding_strategy='standard'"
        )
    return EMBEDDINGS[strategy](config.vocab_size, config.hidden_size, config.initializer_range, **options)


def check_ids(name: str, ids: torch.Tensor, size: int, among: str = "the vocabulary of") -> None:
    """Raise ValueError if an id is not from 0 to `size` - 1; on the CPU only, elsewhere a look would stop the device.

    `among` says in the message what there are `size` of.
    """
    if ids.device.type != "cpu" or not has_values(ids) or not ids.numel():
        return
    low, high = ids.min().item(), ids.max().item()
    if low < 0 or high >= size:
        bad = low if low < 0 else high
        raise ValueError(f"{name} holds {bad}, outside {among} {size}: ids must be 0 to {size - 1}")


def check_labels(
    labels: torch.Tensor, size: int, among: str = "the vocabulary of", ignore_index: int = IGNORED
) -> None:
    """[`check_ids`] of labels, of which `ignore_index` may be one."""
    check_ids("labels", labels.masked_fill(labels == ignore_index, 0), size, among)


def true_rows(mask: torch.Tensor) -> torch.Tensor:
    """Indices of the True ones of a mask `[N]`; of all where their number cannot be known."""
    return mask.nonzero()[:, 0] if has_values(mask) else torch.arange(len(mask), device=mask.device)


def dense_token_losses(head: nn.Module) -> TokenLosses:
    """The losses of a head that is called for its scores `[..., V]`, as [`CompressedEmbedding.token_losses`]."""

    def token_losses(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        scores = head(hidden)
        return F.cross_entropy(scores.to(at_least_float32(scores.dtype)), labels, reduction="none")

    return token_losses


def language_loss(
    token_losses: TokenLosses,
    scores_per_token: int,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    shift: bool,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = IGNORED,
    shift_labels: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor:
    """Cross entropy of a language model in pieces of tokens, computed again in the backward pass.

    Args:
        token_losses: nats of labels `[N]` after hidden states `[N, D]`; it is never called with `ignore_index`.
        scores_per_token: how many numbers it holds for a token; a piece holds at most `SCORES_AT_ONCE`.
        hidden: `[B, T, D]`.
        labels: `[B, T]`, `ignore_index` where no loss is wanted.
        shift: whether a token predicts the next label, else its own.
        num_items_in_batch: what to divide the sum by; default: the number of labels that count.
        shift_labels: labels that are shifted already, `[B, T]`; they take the place of `labels`.
        kwargs: what else Trainer says; it changes nothing.

    Returns:
        The loss, a scalar.
    """
    if shift:
        labels = F.pad(labels[:, 1:], (0, 1), value=ignore_index) if shift_labels is None else shift_labels
    labels = labels.flatten().to(hidden.device)
    rows = true_rows(labels != ignore_index)
    hidden, labels = hidden.flatten(0, 1)[rows], labels[rows]
    counted = labels != ignore_index
    labels = labels.where(counted, 0)
    tokens = max(1, SCORES_AT_ONCE // scores_per_token)
    pieces = zip(hidden.split(tokens), labels.split(tokens), strict=True)
    losses = [checkpoint(token_losses, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]
    total = torch.cat(losses).where(counted, 0).sum()
    return total / (counted.sum() if num_items_in_batch is None else num_items_in_batch)


def language_loss_naive(
    logits: torch.Tensor, labels: torch.Tensor, shift: bool, num_items_in_batch: int | None = None
) -> torch.Tensor:
    """The same from the scores of all tokens `[B, T, V]`."""
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction=reduction)
    return loss / (num_items_in_batch or 1)


def vocabulary_parameters(model) -> tuple[int, int]:
    """Parameters of a language model's embedding and head together, and those of one dense table for both."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    modules = [module for module in (embedding, head) if module is not None]
    stored = {parameter for module in modules for parameter in module.parameters()}
    return sum(p.numel() for p in stored), embedding.num_embeddings * embedding.embedding_dim
