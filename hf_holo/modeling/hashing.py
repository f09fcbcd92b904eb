"""The embedding in hashed buckets: a few shared rows for each token, signed and weighted, and its tied head."""

import functools
import math
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import BackwardCFunction, FunctionCtx

from .checkpoint import physical_memory
from .embeddings import CompressedEmbedding
from .layers import at_least_float32
from .recording import exporting, has_values

Array = TypeVar("Array", torch.Tensor, np.ndarray)

PRIME = 2**31 + 11  # the smallest above every id


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
    ) -> None:
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
            raise ValueError(f"num_embeddings: {num_embeddings} is not between the buckets, {least}, and 2^31 = {most}")
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

    Both directions are bags of rows that are contiguous in memory, many times faster than indexing.

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
    """[`gather_scores`] of `[N, R]`. torch's own backward of a bag sorts all indices; here they are sorted already."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        scores: torch.Tensor,
        weight: torch.Tensor,
        index: torch.Tensor,
        users: torch.Tensor,
        starts: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(scores, weight, index, users, starts)
        return _bags(scores.T, weight, index).T.contiguous()

    @staticmethod
    def backward(ctx: BackwardCFunction, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved: tuple[torch.Tensor, ...] = ctx.saved_tensors
        scores, weight, index, users, starts = saved
        gradient = gradient.T.contiguous()  # [V, N]
        by_user = weight.flatten().index_select(0, users)
        to_scores = F.embedding_bag(users // index.shape[1], gradient, starts, mode="sum", per_sample_weights=by_user)
        to_weight = None
        if ctx.needs_input_grad[1]:  # type: ignore[misc]  # torch declares a tuple of one
            with torch.enable_grad():
                weight = weight.detach().requires_grad_()
                (to_weight,) = torch.autograd.grad(_bags(scores.detach().T, weight, index), weight, gradient)
        return to_scores.T, to_weight, None, None, None


def _bags(rows: torch.Tensor, weight: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return F.embedding_bag(index, rows.contiguous(), mode="sum", per_sample_weights=weight)


def hash_codes(ids: Array, hashes: int, buckets: int) -> tuple[Array, Array]:
    """Rows and signs of tokens: K polynomials of second degree modulo a prime above 2^31 (Carter & Wegman, 1979).

    Three coefficients make any three tokens independent, and the arithmetic fits into int64 for every id.

    Args:
        ids: integers `[...]` from 0 to 2^31, a tensor or an array.
        hashes: number of hash functions K.
        buckets: rows of each.

    Returns:
        Rows from 0 to K · buckets - 1, those of hash function k after those of k - 1, and signs ±1: `[..., K]` each.
    """
    xp: Any = np if isinstance(ids, np.ndarray) else torch
    ids = ids.astype(np.int64) if isinstance(ids, np.ndarray) else ids.long()
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

    index: np.ndarray  # type: ignore[assignment]  # in place of the method of tuples
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
            f"vocab_size: {tokens}; the head of a hashed vocabulary needs the codes of all tokens, which take "
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
