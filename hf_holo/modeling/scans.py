"""Scans: a decaying state that tokens write to and read from, in chunks of matrix products.

Every fast operation `f` stands next to a naive twin `f_naive` that says in a loop what `f` means; the tests compare
values and gradients in float64. Sizes in the shape tags: B batch, T tokens, H key heads, G query heads per key head,
P phases, F = 2P real features, V value width, C tokens in a chunk, N chunks.

Sources: the chunked form of linear attention with decay (Sun et al., 2023, RetNet; Yang et al., 2024, GLA); the delta
rule in chunks (Yang et al., 2024, DeltaNet).
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd.function import BackwardCFunction, FunctionCtx

from .kernels import cancelling_by_kernel, fits, interference_by_kernel
from .layers import faded
from .recording import exporting, fixed_table, levels_to_reach, single_token

CHUNK = 32  # tokens handled by one masked product; the fastest of 32, 64 and 128 on two CPU cores
FEW = 16  # chunks whose states are carried by one product instead of a loop
DOUBLINGS = 13  # so an exported scan takes up to 2^13 - 1 chunks, 262,112 tokens, in one call


def interference_scan(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    log_write: torch.Tensor,
    state: torch.Tensor | None = None,
    document: torch.Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bundle key-value pairs into a decaying state and read it, in chunks of matrix products.

    M_t = λ_t M_{t-1} + w_t k_t ⊗ v_t and y_t = q_t M_t, where log λ = `log_decay` and log w = `log_write`.

    Args:
        q: `[B, H·G, T, F]`; G neighbouring query heads read one key head.
        k: `[B, H, T, F]`.
        v: `[B, H, T, V]`.
        log_decay, log_write: `[B, H, T]`; a padded token has 0 and -inf.
        state: `[B, H, F, V]` or None for zeros.
        document: `[B, T]` document index that starts at 0 for the document of `state` and rises by at least one where
            a new document begins; a new document begins with an empty state. None: one document.
        chunk: tokens handled by one masked product; changes the time, not the result.

    Returns:
        y `[B, H·G, T, V]` and the state after the last token `[B, H, F, V]`.
    """
    if fits(q):
        return interference_by_kernel(q, k, v, log_decay, log_write, state, document)
    length, heads, groups = q.shape[2], k.shape[1], q.shape[1] // k.shape[1]
    if not exporting() or single_token(length):
        chunk = min(chunk, length)
    q = _to_chunks(q, chunk).unflatten(1, (heads, groups)).transpose(2, 3).flatten(3, 4)  # [B, H, N, G·C, F]
    k, v = _to_chunks(k, chunk), _to_chunks(v, chunk)
    log_decay = _to_chunks(log_decay[..., None], chunk)[..., 0]
    log_write = _to_chunks(log_write[..., None], chunk, fill=float("-inf"))[..., 0]
    if document is not None:
        document = _to_chunks(document[:, None, :, None], chunk, fill=None)[..., 0]  # [B, 1, N, C]
    if state is None:
        state = k.new_zeros(k.shape[0], heads, k.shape[-1], v.shape[-1])
    run = _ChunkedScan.apply if torch.is_grad_enabled() and not exporting() else _chunked_scan
    y, state = run(q, k, v, log_decay, log_write, state, document)
    y = y.unflatten(3, (groups, chunk)).transpose(2, 3).flatten(1, 2).flatten(2, 3)  # [B, H·G, N·C, V]
    return y[:, :, :length], state


def interference_scan_naive(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    log_write: torch.Tensor,
    state: torch.Tensor | None = None,
    document: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Twin of [`interference_scan`]: the recurrence, token by token."""

    def write(t: int, state: torch.Tensor) -> torch.Tensor:
        return log_write[:, :, t, None, None].exp() * k[:, :, t, :, None] * v[:, :, t, None, :]

    return _recurrence(q, k, v, log_decay, write, state, document)


def interference_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    write: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[`interference_scan`] for a single token: one step of the recurrence.

    Args:
        q: `[B, H·G, F]`.
        k: `[B, H, F]`.
        v: `[B, H, V]`.
        decay, write: λ and w `[B, H]`, not their logarithms.
        state: `[B, H, F, V]`.

    Returns:
        y `[B, H·G, V]` and the state after the token.
    """
    state = torch.addcmul(state * decay[..., None, None], k[..., None], (v * write[..., None])[:, :, None])
    return _read(q, state), state


def interference_step_naive(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    write: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Twin of [`interference_step`]: the scan's, of one token."""
    q, k, v, log_decay, log_write = (x[:, :, None] for x in (q, k, v, decay.log(), write.log()))
    y, state = interference_scan_naive(q, k, v, log_decay, log_write, state)
    return y[:, :, 0], state


def _read(q: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """Queries `[B, H·G, F]` of a state `[B, H, F, V]`: `[B, H·G, V]`."""
    rows, heads, features, width = state.shape
    read = torch.bmm(q.reshape(rows * heads, -1, features), state.reshape(rows * heads, features, width))
    return read.view(rows, -1, width)


def _recurrence(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    write: Callable[[int, torch.Tensor], torch.Tensor],
    state: torch.Tensor | None,
    document: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loop of the naive twins: forget at a border of documents, decay, add `write(t, state)`, read."""
    if state is None:
        state = k.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1])
    current = torch.zeros(k.shape[0], dtype=torch.long, device=k.device)
    rows = []
    for t in range(k.shape[2]):
        if document is not None:
            state = state * (document[:, t] == current).to(state.dtype)[:, None, None, None]
            current = document[:, t]
        state = state * log_decay[:, :, t, None, None].exp()
        state = state + write(t, state)
        rows.append(q[:, :, t, None] @ state.repeat_interleave(q.shape[1] // k.shape[1], 1))
    return torch.cat(rows, 2), state


def _to_chunks(x: torch.Tensor, chunk: int, fill: float | None = 0.0) -> torch.Tensor:
    """[B, H, T, X] to [B, H, N, C, X]; the last chunk is padded with `fill` (None: with the last token)."""
    missing = (chunk - x.shape[2] % chunk) % chunk
    if exporting() or missing:
        if fill is None:
            last = x[:, :, -1:]
            x = torch.cat([x, last.expand(-1, -1, chunk, -1)], 2)[:, :, : x.shape[2] + missing]
        else:
            x = F.pad(x, (0, 0, 0, missing), value=fill)
    return x.reshape(*x.shape[:2], -1, chunk, x.shape[-1])


def _decays(
    log_decay: torch.Tensor, log_write: torch.Tensor, document: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights inside a chunk, from its start, to its end and across it: [..., C, C], [..., C], [..., C], [...]."""
    total = log_decay.cumsum(-1)  # [B, H, N, C]
    source = total - log_write
    chunk = total.shape[-1]
    # a future token has weight exp(-inf) = 0; the mask is applied to the logarithm, where nothing can overflow
    future = torch.ones(chunk, chunk, dtype=torch.bool, device=total.device).triu(1)
    hidden = future
    if document is not None:
        before = F.pad(document[..., -1], (1, 0))[..., :-1, None]  # the document that the carried state belongs to
        hidden = future | (document[..., :, None] != document[..., None, :])
    seen = total.new_zeros(hidden.shape).masked_fill(hidden, float("-inf"))
    between = faded(total[..., :, None] - source[..., None, :] + seen)
    from_start, to_end, across = faded(total), faded(total[..., -1:] - source), faded(total[..., -1])
    if document is not None:
        from_start = from_start * (document == before)
        to_end = to_end * (document == document[..., -1:])
        across = across * (document[..., -1] == before[..., 0])
    return between, from_start, to_end, across


def _carry(written: torch.Tensor, across: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """State before every chunk, and after the last: [B, H, N, F, V] and [B, H, F, V]."""
    if exporting():
        return _compose(across[..., None, None], written, state, torch.mul)
    if written.shape[2] <= FEW:
        kept, sources = (
            _few_carries(across),
            torch.cat([state[:, :, None], written], 2).flatten(3),
        )  # [B, H, 1 + N, F·V]
        before, final = kept[:, :, :-1] @ sources, kept[:, :, -1:] @ sources
        return before.view_as(written), final.view_as(state)
    before = torch.empty_like(written)
    for n in range(written.shape[2]):
        before[:, :, n] = state
        state = torch.addcmul(written[:, :, n], state, across[:, :, n, None, None])
    return before, state


def _few_carries(across: torch.Tensor) -> torch.Tensor:
    """What is left of the first state and of every chunk's writing before each chunk and at the end: [B, H, N] decays
    to [B, H, 1 + N, 1 + N], the product of the decays between. For few chunks one product takes less than a loop."""
    count = across.shape[2]
    ones = across.new_ones(*across.shape[:2], 1 + count, 1 + count)
    # row n of column m has the decay of chunk n - 1 where m < n, so that a column of products has those from m to n
    factors = torch.where(_below(count, across.device), F.pad(across, (1, 0), value=1.0)[..., None], ones)
    return factors.cumprod(2).tril()


def _below(count: int, device: torch.device) -> torch.Tensor:
    """True `[1 + N, 1 + N]` below the diagonal."""
    return torch.ones(1 + count, 1 + count, dtype=torch.bool, device=device).tril(-1)


def _compose(
    turn: torch.Tensor,
    shift: torch.Tensor,
    state: torch.Tensor,
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Twin of the loops over chunks: the state before every chunk [B, H, N, F, V], and after the last [B, H, F, V].

    A chunk takes the state M to `product`(turn, M) + shift, and two of those in a row are another one; the first state
    is a chunk that forgets all and writes it. So `DOUBLINGS` steps, each of which joins every chunk with the ones
    before it, reach all that came before; where they do not, the state is NaN. Only products of decays occur, no
    quotients: nothing can overflow or cancel.
    """
    turn = torch.cat([torch.zeros_like(turn[:, :, :1]), turn], 2)
    shift = torch.cat([state[:, :, None], shift], 2)  # [B, H, 1 + N, F, V]
    number = torch.arange(shift.shape[2], device=shift.device)
    for level in range(levels_to_reach(shift.shape[2], 2, DOUBLINGS)):
        at = (number - 2**level).clamp_min(0)  # joining the first one again changes nothing
        shift = shift + product(turn, shift.index_select(2, at))
        turn = product(turn, turn.index_select(2, at))
    shift = shift.masked_fill((number >= 2**DOUBLINGS)[:, None, None], float("nan"))
    return shift[:, :, :-1], shift[:, :, -1]


def _spread(weights: torch.Tensor, rows: int) -> torch.Tensor:
    """[..., C, X] weights to [..., G·C, X]: the query heads of a group share them."""
    groups = rows // weights.shape[-2]
    return weights if groups == 1 else weights.repeat(*[1] * (weights.dim() - 2), groups, 1)


def _times(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """A new tensor times others; in its own memory where nothing is recorded."""
    return x * weights if exporting() else x.mul_(weights)


def _chunked_scan(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    log_write: torch.Tensor,
    state: torch.Tensor,
    document: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B, H, N, G·C, F], k [B, H, N, C, F] and v [B, H, N, C, V] to y [B, H, N, G·C, V] and the last state."""
    return _chunked_scan_parts(q, k, v, log_decay, log_write, state, document)[:2]


def _chunked_scan_parts(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    log_write: torch.Tensor,
    state: torch.Tensor,
    document: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    between, from_start, to_end, across = _decays(log_decay, log_write, document)
    rows = q.shape[-2]
    between, from_start, to_end = _spread(between, rows), _spread(from_start[..., None], rows), to_end[..., None]
    # 1. inside chunks: what every query hears of the keys before it
    scores = _times(q @ k.mT, between)
    # 2. state of each chunk: what its tokens have written, as it stands at the end
    written = (k * to_end).mT @ v
    # 3. carry: the state before every chunk
    before, final = _carry(written, across, state)
    # 4. read: the chunk itself, and the state before it
    y = torch.baddbmm(_times(q @ before, from_start).flatten(0, 2), scores.flatten(0, 2), v.flatten(0, 2))
    return y.view(*q.shape[:-1], -1), final, (scores, between, from_start, to_end, across, before)


class _ChunkedScan(torch.autograd.Function):
    """[`_chunked_scan`] with its gradient written out.

    The decays enter only as factors e^{±total} of q and k, so their gradients are row sums of q·dq and k·dk, and no
    [C, C] tensor has to be differentiated (the identity of GLA, Yang et al., 2024, section 4.3).
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        log_decay: torch.Tensor,
        log_write: torch.Tensor,
        state: torch.Tensor,
        document: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        y, final, parts = _chunked_scan_parts(q, k, v, log_decay, log_write, state, document)
        ctx.save_for_backward(q, k, v, final, *parts)
        return y, final

    @staticmethod
    def backward(
        ctx: BackwardCFunction, dy: torch.Tensor, d_final: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        saved: tuple[torch.Tensor, ...] = ctx.saved_tensors
        q, k, v, final, scores, between, from_start, to_end, across, before = saved
        d_final = torch.zeros_like(final) if d_final is None else d_final
        dy = dy.contiguous()
        # 4. read, backwards: what every chunk wants of the state before it
        d_before = (q * from_start).mT @ dy
        # 3. carry, from the last chunk to the first: what the later ones want of each
        d_written, d_state = _carry_backward(d_before, across, d_final)
        # 1. and 2. inside chunks and by way of their states: queries, keys and values
        d_scores = (dy @ v.mT).mul_(between)
        dq = d_scores @ k + (dy @ before.mT) * from_start
        dk = d_scores.mT @ q + (v @ d_written.mT) * to_end
        dv = scores.mT @ dy + (k * to_end) @ d_written
        # 5. decays: row sums, and the sum from each token on, for a decay weighs all that is read after it
        d_write = (k * dk).sum(-1)  # [B, H, N, C]
        d_total = (q * dq).sum(-1).unflatten(-1, (-1, k.shape[-2])).sum(-2) - d_write
        d_total[:, :, -1, -1] += (final * d_final).sum((-1, -2))
        d_decay = d_total.flatten(2).flip(-1).cumsum(-1).flip(-1).view_as(d_total)
        return dq, dk, dv, d_decay, d_write, d_state, None


def _carry_backward(
    d_before: torch.Tensor, across: torch.Tensor, d_final: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients with respect to what every chunk wrote and to the first state, from the last chunk to the first."""
    if d_before.shape[2] <= FEW:
        kept, readings = _few_carries(across).mT, torch.cat([d_before, d_final[:, :, None]], 2).flatten(3)
        d_written, d_state = kept[:, :, 1:] @ readings, kept[:, :, :1] @ readings
        return d_written.view_as(d_before), d_state.view_as(d_final)
    d_written = torch.empty_like(d_before)
    d_state = d_final
    for n in reversed(range(d_before.shape[2])):
        d_written[:, :, n] = d_state
        d_state = torch.addcmul(d_before[:, :, n], d_state, across[:, :, n, None, None])
    return d_written, d_state


def cancelling_scan(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    strength: torch.Tensor,
    state: torch.Tensor | None = None,
    document: torch.Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[`interference_scan`] that subtracts what a key already recalls before it writes (the delta rule).

    M_t = λ_t M_{t-1} + β_t k_t ⊗ (v_t - λ_t k_t M_{t-1}) and y_t = q_t M_t, for keys of unit norm.

    Args:
        strength: β `[B, H, T]` in [0, 2]; a padded token has 0. Above 1 what a key recalls is turned round.
        others: as for [`interference_scan`].

    Returns:
        y `[B, H·G, T, V]` and the state after the last token `[B, H, F, V]`.
    """
    if fits(q):
        return cancelling_by_kernel(q, k, v, log_decay, strength, state, document)
    length, heads, groups = q.shape[2], k.shape[1], q.shape[1] // k.shape[1]
    if not exporting() or single_token(length):
        chunk = min(chunk, length)
    q = _to_chunks(q, chunk).unflatten(1, (heads, groups))  # [B, H, G, N, C, F]
    k, v, strength = (_to_chunks(x, chunk) for x in (k, v, strength[..., None]))
    log_decay = _to_chunks(log_decay[..., None], chunk)[..., 0]
    if document is not None:
        document = _to_chunks(document[:, None, :, None], chunk, fill=None)[..., 0]
    between, from_start, to_end, across = _decays(log_decay, torch.zeros_like(log_decay), document)
    # 1. inside chunks: what is written, and what is subtracted because the state M before the chunk recalls it,
    #    so that the tokens write W - R M; each of them depends on the writes before it: (1 + earlier)^-1 wanted
    earlier = (strength * (k @ k.mT) * between).tril(-1)  # how much of a write a later key takes back
    wanted = torch.cat([strength * v, strength * from_start[..., None] * k], -1)
    if exporting():
        solved = _unit_lower_inverse(earlier, chunk) @ wanted
    else:
        solved = torch.linalg.solve_triangular(earlier, wanted, upper=False, unitriangular=True)
    fresh, recalled = solved.split([v.shape[-1], k.shape[-1]], -1)  # W [B, H, N, C, V] and R [B, H, N, C, F]
    inside = (q @ k.mT[:, :, None]) * between[:, :, None]
    # 2. state of each chunk: how its writes stand at the end, K; and how the state before it is read
    read, leave = q * from_start[:, :, None, :, :, None], (k * to_end[..., None]).mT
    if state is None:
        state = k.new_zeros(k.shape[0], heads, k.shape[-1], v.shape[-1])
    # 3. carry, M to λ M + K (W - R M), and 4. read: the state before the chunk, and what the chunk has written
    if exporting():
        before, state = _carry_cancelling(across, leave, fresh, recalled, state)
        written = fresh - recalled @ before  # [B, H, N, C, V]
        y = read @ before[:, :, None] + inside @ written[:, :, None]
        return y.flatten(3, 4).flatten(1, 2)[:, :, :length], state
    rows = []
    for n in range(k.shape[2]):
        written = fresh[:, :, n] - recalled[:, :, n] @ state  # [B, H, C, V]
        rows.append(read[:, :, :, n] @ state[:, :, None] + inside[:, :, :, n] @ written[:, :, None])
        state = state * across[:, :, n, None, None] + leave[:, :, n] @ written
    y = torch.cat(rows, 3).flatten(1, 2)  # [B, H·G, N·C, V]
    return y[:, :, :length], state


def _unit_lower_inverse(lower: torch.Tensor, size: int) -> torch.Tensor:
    """(1 + lower)^-1 for strictly lower triangular `[..., C, C]`: inverses of blocks, joined to ever larger ones.

    As stable as substitution, row by row, but in log C products. C = `size` is a power of two.
    """
    inverse = torch.from_numpy(_identity(size)).to(lower)
    for joined in _joined_blocks(size):
        inverse = inverse - inverse @ (lower * torch.from_numpy(joined).to(lower)) @ inverse
    return inverse


@fixed_table
def _identity(size: int) -> np.ndarray:
    return np.eye(size)


@fixed_table
def _joined_blocks(size: int) -> tuple[np.ndarray, ...]:
    """For blocks of 1, 2, 4, ... rows, where a `[C, C]` matrix couples the second of two neighbours to the first."""
    blocks = [np.arange(size) >> level for level in range(size.bit_length() - 1)]
    return tuple((block[:, None] % 2 == 1) & (block == block[:, None] - 1) for block in blocks)


def _carry_cancelling(
    across: torch.Tensor, leave: torch.Tensor, fresh: torch.Tensor, recalled: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """[`_compose`] for [`cancelling_scan`]: a chunk takes the state M to (λ - K R) M + K W."""
    identity = torch.from_numpy(_identity(int(leave.shape[-2]))).to(state)
    turn = across[..., None, None] * identity - leave @ recalled  # [B, H, N, F, F]
    return _compose(turn, leave @ fresh, state, torch.matmul)


def cancelling_scan_naive(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    strength: torch.Tensor,
    state: torch.Tensor | None = None,
    document: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Twin of [`cancelling_scan`]: the recurrence, token by token."""

    def write(t: int, state: torch.Tensor) -> torch.Tensor:
        surprise = v[:, :, t, None] - k[:, :, t, None] @ state  # [B, H, 1, V]
        return strength[:, :, t, None, None] * k[:, :, t, :, None] * surprise

    return _recurrence(q, k, v, log_decay, write, state, document)


def cancelling_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    strength: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[`cancelling_scan`] for a single token: one step of the recurrence.

    Args:
        strength: β `[B, H]`.
        others: as for [`interference_step`].

    Returns:
        y `[B, H·G, V]` and the state after the token `[B, H, F, V]`.
    """
    state = state * decay[..., None, None]
    surprise = v - (k[:, :, None] @ state)[:, :, 0]  # [B, H, V]
    state = torch.addcmul(state, k[..., None], (surprise * strength[..., None])[:, :, None])
    return _read(q, state), state


def cancelling_step_naive(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    strength: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Twin of [`cancelling_step`]: the scan's, of one token."""
    q, k, v, log_decay, strength = (x[:, :, None] for x in (q, k, v, decay.log(), strength))
    y, state = cancelling_scan_naive(q, k, v, log_decay, strength, state)
    return y[:, :, 0], state
