"""Softmax attention for hybrids: over the whole text, with keys that grow, and over a window, with a constant state.

Every fast operation `f` stands next to a naive twin `f_naive`; the tests compare values and gradients in float64. Sizes
in the shape tags: B batch, T tokens, H key heads, G query heads per key head, V head width, W window, C tokens in a
block, N blocks.

Sources: rotary positions (Su et al., 2021); attention over a sliding window, in blocks (Beltagy et al., 2020,
Longformer), whose keys are a buffer of constant size in decoding (Jiang et al., 2023, Mistral 7B).
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from .cache import RecurrentLayer
from .configuration_hsn import HsnConfig
from .layers import at_least_float32, init_residual_
from .layout import TokenLayout
from .phases import RotaryEmbedding, home_of_float64, rotate_pairs
from .recording import exporting, single_token

BLOCK = 128  # queries handled by one masked product; on a CPU core no other of 16 to 256 is faster for long windows
RECORDED_BLOCK = 32  # in an exported graph, where a single token takes as long as a block
FILL = -2  # label of what fills blocks up, which nothing else sees
WINDOW_BASE = 10000.0  # of the rotary positions in a window, where the config names none


class AttentionMixer(nn.Module):
    """Softmax attention for hybrids. Without `rotary_base` it has no positions: the layers around it know the order.

    With it, queries and keys are turned as in Llama, by the number of real tokens before them; padding has no position.
    Keys and values live in the same cache as the states of the other layers, and grow with the text.

    Args:
        config: an [`HsnConfig`].
    """

    def __init__(self, config: HsnConfig) -> None:
        super().__init__()
        dim, self.heads, self.key_heads = config.hidden_size, config.num_heads, config.num_key_heads
        self.causal, self.head_dim = config.is_causal, config.head_dim
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, self.key_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(dim, self.key_heads * self.head_dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)
        base = config.rotary_base
        self.rotary = None if base is None else RotaryEmbedding(self.head_dim, base=base)

    def init_residual_(self, depth: int) -> None:
        """Start what writes to the residual stream for a model of `depth` blocks, see [`init_residual_`]."""
        init_residual_(depth, self.out_proj)

    def state_spec(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the states of constant size, without the batch: none, for keys and values grow."""
        return {}

    def forward(
        self, x: torch.Tensor, layout: TokenLayout | None = None, cache: RecurrentLayer | None = None
    ) -> torch.Tensor:
        """`[B, T, D]` to `[B, T, D]`; continues from `cache` and updates it, if given."""
        layout = TokenLayout(x.shape[1]) if layout is None else layout
        q, k, v = (self._heads(projection(x)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        if self.rotary is not None:
            angles = self.rotary.angles(self._positions(layout, cache, x.device))[:, None]  # [B, 1, T, V/2]
            q, k = rotate_pairs(q, angles), rotate_pairs(k, angles)
        labels = self._labels(x, layout, cache)
        query_labels = labels
        if cache is not None:
            k, v = self._append("keys", k, 2, cache), self._append("values", v, 2, cache)
            labels = self._append("labels", labels, 1, cache)
        y = _attend(q, k, v, self._mask(query_labels, labels))
        return self.out_proj(y.transpose(1, 2).flatten(2))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, H·V] to [B, H, T, V]."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _labels(self, x: torch.Tensor, layout: TokenLayout, cache: RecurrentLayer | None) -> torch.Tensor:
        """Document of every token `[B, T]`, counted on from the cached ones; -1 at padding."""
        labels = _documents(x, layout)
        past = cache.get("labels") if cache is not None else None
        if past is not None:
            labels = labels + F.pad(past, (1, 0)).amax(1, keepdim=True)  # at least 0: a past of padding has none
        return labels if layout.valid is None else labels.masked_fill(~layout.valid, -1)

    def _positions(self, layout: TokenLayout, cache: RecurrentLayer | None, device: torch.device) -> torch.Tensor:
        """How many real tokens come before every token, `[B, T]` (`[1, T]` without a past)."""
        past = cache.get("labels") if cache is not None else None
        if past is None:
            return torch.arange(layout.length, device=home_of_float64(device))[None]
        return torch.arange(layout.length, device=device) + (past >= 0).sum(1, keepdim=True)

    def _append(self, name: str, new: torch.Tensor, dim: int, cache: RecurrentLayer) -> torch.Tensor:
        past, tokens = cache.get(name), new.shape[dim]
        whole = new if past is None else torch.cat([past, new], dim)
        kept = whole.shape[dim] - tokens
        cache.put(name, whole, tokens, lambda n: whole.narrow(dim, 0, kept + n))
        return whole

    def _mask(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Which key a query sees, `[B, 1, T, S]`: those of its document, and if causal not the later ones."""
        seen = queries[:, :, None] == keys[:, None]
        if self.causal:
            new, total = queries.shape[1], keys.shape[1]
            at = torch.arange(total, device=keys.device)
            seen = seen & (at <= at[total - new :, None])
        return seen[:, None]


class WindowMixer(AttentionMixer):
    """Softmax attention over the last W real tokens of a document, the present one included.

    Its state has a constant size: keys and values of the last W - 1 real tokens of every row, in their order up to the
    last slot, and which of the slots hold one. The keys are stored as they are and turned where they are read, by their
    distance from the first slot, so that no position grows with the text. A bidirectional mixer sees W - 1 tokens on
    each side and keeps nothing.

    Args:
        config: an [`HsnConfig`]. Without a `rotary_base` the base is 10,000.
    """

    rotary: RotaryEmbedding

    def __init__(self, config: HsnConfig) -> None:
        super().__init__(config)
        self.window = config.window
        self.rotary = RotaryEmbedding(self.head_dim, base=config.rotary_base or WINDOW_BASE)

    def state_spec(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the states, without the batch; zeros are the window of a text that begins."""
        slots = (self.key_heads, self.window - 1, self.head_dim)
        return {"keys": slots, "values": slots, "valid": slots[1:2]} if self.causal else {}

    def forward(
        self, x: torch.Tensor, layout: TokenLayout | None = None, cache: RecurrentLayer | None = None
    ) -> torch.Tensor:
        """`[B, T, D]` to `[B, T, D]`; continues from `cache` and updates it, if given."""
        layout = TokenLayout(x.shape[1]) if layout is None else layout
        before = self._window(cache)
        q = self._heads(self.q_proj(x))
        if cache is not None and before is not None and single_token(layout.length):
            y = self._step(x, q, layout, cache, before)
        else:
            y = self._read(x, q, layout, cache, before)
        return self.out_proj(y.transpose(1, 2).flatten(2))

    def _window(self, cache: RecurrentLayer | None) -> list[torch.Tensor] | None:
        """The states in the order of [`state_spec`], None before the first token."""
        states = [] if cache is None else [cache.get(name) for name in self.state_spec()]
        return [state for state in states if state is not None] or None

    def _read(
        self,
        x: torch.Tensor,
        q: torch.Tensor,
        layout: TokenLayout,
        cache: RecurrentLayer | None,
        before: list[torch.Tensor] | None,
    ) -> torch.Tensor:
        """What queries [B, H·G, T, V] read of the window and of the tokens up to each of them: [B, H·G, T, V]."""
        k, v, labels = self.k_proj(x), self.v_proj(x), _documents(x, layout)  # [B, T, H·V] twice, [B, T]
        if layout.valid is not None:
            labels = labels.masked_fill(~layout.valid, -1)
        past = 0
        if cache is not None:
            past = self.window - 1
            k, v, labels = self._continue(k, v, labels, before)
            for name, tokens in (("keys", k), ("values", v), ("valid", None)):
                replay = partial(self._last, tokens, labels, layout, at_least_float32(x.dtype))
                cache.put(name, replay(layout.length), layout.length, replay)
        k, v = self._heads(k), self._heads(v)
        q, k = self._turn(q, k, past, layout)
        return window_attention(q, k, v, labels, self.window, past, self.causal)

    def _step(
        self, x: torch.Tensor, q: torch.Tensor, layout: TokenLayout, cache: RecurrentLayer, before: list[torch.Tensor]
    ) -> torch.Tensor:
        """[`_read`] for a single token that continues from the states `before`: its keys are those of the window."""
        keys, values, valid = (layout.before(state) for state in before)
        k = torch.cat([keys, self._heads(self.k_proj(x)).to(keys.dtype)], 2)  # [B, H, W, V]
        v = torch.cat([values, self._heads(self.v_proj(x)).to(values.dtype)], 2)
        seen = F.pad(valid, (0, 1), value=1.0)  # [B, W]
        after = {"keys": k[:, :, 1:], "values": v[:, :, 1:], "valid": seen[:, 1:]}
        for (name, new), state in zip(after.items(), before, strict=True):
            cache.put(name, layout.after(new.contiguous(), state))
        q, k = self._turn(q, k.to(q.dtype), self.window - 1, layout)
        return _attend(q, k, v.to(q.dtype), seen[:, None, None] > 0)

    def _continue(
        self, k: torch.Tensor, v: torch.Tensor, labels: torch.Tensor, before: list[torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys and values [B, T, H·V] and labels [B, T], after those of the window: W - 1 more of each."""
        if before is None:
            keys = values = k.new_zeros(k.shape[0], self.window - 1, k.shape[2])
            valid = keys[..., 0]
        else:
            keys, values = (state.transpose(1, 2).flatten(2) for state in before[:2])
            valid = before[2]
        k, v = torch.cat([keys.to(k.dtype), k], 1), torch.cat([values.to(v.dtype), v], 1)
        return k, v, torch.cat([valid.long() - 1, labels], 1)

    def _last(
        self, tokens: torch.Tensor | None, labels: torch.Tensor, layout: TokenLayout, dtype: torch.dtype, count: int
    ) -> torch.Tensor:
        """A state after the first `count` tokens: the last real ones of `tokens` [B, W - 1 + T, H·V], which begin with
        the window, as [B, H, W - 1, V], with zeros for those of other documents than the last; without `tokens`,
        which slots hold one, [B, W - 1]."""
        layout = layout.first(count)
        document = 0 if layout.document is None else layout.document[:, -1:]
        held = layout.last_real(labels[..., None], self.window - 1)[..., 0] == document
        if tokens is None:
            return held.to(dtype)
        last = layout.last_real(tokens, self.window - 1) * held[..., None]
        return self._heads(last.to(dtype)).contiguous()

    def _turn(
        self, q: torch.Tensor, k: torch.Tensor, past: int, layout: TokenLayout
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries [B, H·G, T, V] and keys [B, H, past + T, V], turned by their distance from the first key."""
        if layout.angles is None:
            positions = torch.arange(past + layout.length, device=home_of_float64(q.device))
            layout.angles = self.rotary.angles(positions)  # [past + T, V/2]
        return rotate_pairs(q, layout.angles[past:]), rotate_pairs(k, layout.angles)


def _documents(x: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """Document of every token [B, T], 0 for the one that continues."""
    if layout.document is not None:
        return layout.document
    return torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Queries [B, H·G, T, V] of keys and values [B, H, S, V], of which they see what a mask says: [B, H·G, T, V]."""
    groups = int(q.shape[1]) // int(k.shape[1])  # the same in every call, also where a graph is recorded
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


# ---------------------------------------------------------------------------------------------- windows
def window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    labels: torch.Tensor,
    window: int,
    past: int = 0,
    causal: bool = True,
) -> torch.Tensor:
    """Softmax attention of every token to those fewer than W tokens away, in blocks: in time O(T · W).

    Args:
        q: `[B, H·G, T, V]`; G neighbouring query heads read one key head.
        k, v: `[B, H, P + T, V]`: of the P tokens before the queries, and of their own.
        labels: `[B, P + T]` what is read together: a query sees keys of its own label, such as the number of its
            document, and -1 for padding.
        window: W.
        past: P, at most W - 1.
        causal: whether later tokens are hidden.

    Returns:
        `[B, H·G, T, V]`.
    """
    length = q.shape[2]
    block = min(window, RECORDED_BLOCK if exporting() else BLOCK)
    if not exporting() and length <= block:
        return _attend(q, k, v, _within(labels[:, past:], labels, window, past, causal)[:, None])
    # 1. blocks of queries [B, N, C, ...], the last one filled up
    missing = (block - length % block) % block
    queries = F.pad(q, (0, 0, 0, missing)).unflatten(2, (-1, block)).transpose(1, 2)  # [B, N, H·G, C, V]
    query_labels = F.pad(labels[:, past:], (0, missing), value=FILL).unflatten(1, (-1, block))
    # 2. the keys that a block reaches: its own, of whole blocks before it and, unless causal, after it
    reach = -(-(window - 1) // block)
    front, back = reach * block - past, missing + (0 if causal else reach * block)
    blocks = reach + 1 if causal else 2 * reach + 1
    k, v = (_overlapping(F.pad(x, (0, 0, front, back)).transpose(1, 2), block, blocks) for x in (k, v))
    key_labels = _overlapping(F.pad(labels, (front, back), value=FILL), block, blocks)  # [B, N, blocks · C]
    # 3. every block is a row of its own
    seen = _within(query_labels.flatten(0, 1), key_labels.flatten(0, 1), window, reach * block, causal)
    k, v = (x.flatten(0, 1).transpose(1, 2) for x in (k, v))  # [B · N, H, blocks · C, V]
    y = _attend(queries.flatten(0, 1), k, v, seen[:, None])  # [B · N, H·G, C, V]
    return y.unflatten(0, (q.shape[0], -1)).transpose(1, 2).flatten(2, 3)[:, :, :length]


def window_attention_naive(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    labels: torch.Tensor,
    window: int,
    past: int = 0,
    causal: bool = True,
) -> torch.Tensor:
    """Twin of [`window_attention`]: attention to the whole text, of which most is masked."""
    groups, at = q.shape[1] // k.shape[1], torch.arange(k.shape[2], device=k.device)
    away = at[past:, None] - at  # [T, P + T]
    near = (away < window) & (away >= 0) if causal else away.abs() < window
    seen = near & (labels[:, past:, None] == labels[:, None])
    scores = q @ k.repeat_interleave(groups, 1).mT * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
    return weights @ v.repeat_interleave(groups, 1)


def _within(queries: torch.Tensor, keys: torch.Tensor, window: int, before: int, causal: bool) -> torch.Tensor:
    """Which keys of labels [R, S] queries of labels [R, C] see, of which the first stands at the key `before`:
    [R, C, S]. All see themselves."""
    at = torch.arange(keys.shape[1], device=keys.device)
    away = torch.arange(before, before + queries.shape[1], device=keys.device)[:, None] - at  # [C, S]
    near = (away < window) & (away > (-1 if causal else -window))
    return near & (queries[:, :, None] == keys[:, None])


def _overlapping(x: torch.Tensor, block: int, blocks: int) -> torch.Tensor:
    """[B, N · C, ...] to every run of neighbouring blocks of it, [B, N - blocks + 1, blocks · C, ...]."""
    x = x.unflatten(1, (-1, block))
    runs = x.shape[1] - blocks + 1
    return torch.cat([x[:, first : first + runs] for first in range(blocks)], 2)
