"""Where the real tokens and the documents of a batch are: found once per forward pass, read by every layer."""

from dataclasses import dataclass
from typing import Any

import torch

from .cache import PADDING, RecurrentCache
from .recording import exporting


@dataclass
class TokenLayout:
    """Where the real tokens and the documents of a batch are. Computed once per forward pass, read by every layer.

    The real tokens of a row come before its padding (see [`arrange`]), so that position t is the t-th real
    token and no causal layer meets a gap.

    Attributes:
        length: tokens T in a row, padding included.
        valid: `[B, T]`, False at padding; None where every token is real.
        lengths: `[B]` number of real tokens; None where every token is real.
        document: `[B, T]` document index, 0 for the document that the cache holds; None for one document.
        drift: `[T, H, P]` phase drift of every position, filled by the first layer that needs it, since all share it.
        turn: of a single token, how the phases of a state drift until the next one, filled likewise.
        angles: `[P + T, V/2]` rotary angles of a window of P tokens and of those after it, filled likewise.
        apart: the documents as rows of their own, filled by the first layer that learns how a text begins.
        begun: `[B]` where a graph is recorded, whether a row has read real tokens before; None if nothing says so.
    """

    length: int
    valid: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    document: torch.Tensor | None = None
    drift: torch.Tensor | None = None
    turn: tuple[torch.Tensor, torch.Tensor] | None = None
    angles: torch.Tensor | None = None
    apart: Any = None
    begun: torch.Tensor | None = None

    def first(self, tokens: int) -> "TokenLayout":
        """The layout of the first `tokens` positions."""
        cut = (None if x is None else x[:, :tokens] for x in (self.valid, self.document))
        lengths = None if self.lengths is None else self.lengths.clamp(max=tokens)
        drift = None if self.drift is None else self.drift[:tokens]
        valid, document = cut
        return TokenLayout(tokens, valid, lengths, document, drift)

    def slice(self, start: int, stop: int) -> "TokenLayout":
        """The layout of the positions from `start` up to `stop`, continued from the state after those before it."""
        stop = min(stop, self.length)
        valid = None if self.valid is None else self.valid[:, start:stop]
        lengths = None if self.lengths is None else (self.lengths - start).clamp(0, stop - start)
        document = self.document
        if document is not None:
            document = document[:, start:stop] - (document[:, start - 1 : start] if start else 0)
        return TokenLayout(stop - start, valid, lengths, document)

    def reversed(self) -> "TokenLayout":
        """The layout of the rows read from the end: padding first, documents numbered from the end. Every position
        keeps its drift, so that it runs the other way."""
        valid = None if self.valid is None else self.valid.flip(1)
        document = None if self.document is None else self.document[:, -1:] - self.document.flip(1)
        drift = None if self.drift is None else self.drift.flip(0)
        return TokenLayout(self.length, valid, self.lengths, document, drift)

    def last_real(self, x: torch.Tensor, count: int) -> torch.Tensor:
        """The `count` rows of `x` `[B, count + T, D]` that end with the last real token: `[B, count, D]`."""
        if self.lengths is None:
            return x[:, self.length : self.length + count].clone()  # a view would keep all of x alive in the cache
        index = self.lengths[:, None] + torch.arange(count, device=x.device)
        return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))

    def before(self, state: torch.Tensor) -> torch.Tensor:
        """What a single token continues from, given the state `[B, ...]`: nothing where it begins a document."""
        return state if self.document is None else state * _per_row(self.document[:, 0] == 0, state).to(state.dtype)

    def after(self, state: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """The state `[B, ...]` after a single token: as it was where the token is padding."""
        return state if self.valid is None else torch.where(_per_row(self.valid[:, 0], state), state, before)

    def mask(self, x: torch.Tensor) -> torch.Tensor:
        """`x` `[B, T, D]` with zeros at padding."""
        return x if self.valid is None else x * self.valid[..., None].to(x.dtype)


def _per_row(x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """`[B]` to `[B, 1, ...]`, with as many dimensions as the state."""
    return x.view(-1, *[1] * (state.dim() - 1))


def arrange(
    x: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    cache: RecurrentCache | None,
) -> tuple[TokenLayout, torch.Tensor | None]:
    """Find padding and documents, and where every token goes so that the real ones come first.

    Returns:
        The layout after the move, and the new position of every token `[B, T]`, None if none moves.

    Raises:
        ValueError: the mask calls tokens padding that the cache holds as real ones.
    """
    length = x.shape[1]
    layout, order = TokenLayout(length), None
    if not exporting():  # one row may stand for all texts
        seq_idx, position_ids = (None if y is None else y.expand(len(x), -1) for y in (seq_idx, position_ids))
    if attention_mask is not None:
        none_is_padding = not exporting() and bool(attention_mask.all())
        _check_past(attention_mask, length, cache, none_is_padding)
        valid = attention_mask[:, -length:].bool()
        if not none_is_padding and (exporting() or not bool(valid.all())):
            real = valid.long().cumsum(1)  # ONNX sums no booleans
            layout.lengths = real[:, -1]
            if exporting():
                layout.begun = attention_mask.sum(1) > layout.lengths
            after = layout.lengths[:, None] + (~valid).long().cumsum(1) - 1
            order = torch.where(valid, real - 1, after)
            layout.valid = torch.arange(length, device=x.device) < layout.lengths[:, None]
    fresh = cache is None or cache.is_empty  # then the first document needs no reset
    if cache is not None:
        _count_padding(layout, cache, x)
    if seq_idx is not None:
        starts = _changes(_reorder(seq_idx, order, layout), layout, cache)
    elif position_ids is not None:
        starts = _reorder(position_ids, order, layout) == 0
    else:
        return layout, order
    if layout.valid is not None:
        starts = starts & layout.valid
    if exporting() or bool((starts[:, 1:] if fresh else starts).any()):
        layout.document = starts.long().cumsum(1)
    return layout, order


def _check_past(attention_mask: torch.Tensor, length: int, cache: RecurrentCache | None, none_is_padding: bool) -> None:
    """A state cannot give back what it has taken: generate(), for one, feeds padding to rows that have ended."""
    if exporting():  # `seen` is no number then, and a look at it would bind it to that of the example
        return
    seen = 0 if cache is None else cache.get_seq_length()
    held = None if cache is None or not seen else cache.layers[0].get(PADDING)  # None if a caller made the states
    if held is None or attention_mask.shape[1] == length:
        return
    if none_is_padding and not bool(held.any()):
        return
    padding = seen - attention_mask[:, :seen].bool().sum(1)  # [B]
    wrong = padding != held
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"attention_mask: row {row} has {int(padding[row])} pads among the {seen} tokens that the cache has seen, "
            f"which took {int(held[row])} as padding; a state cannot give tokens back. After "
            "rows that ended early, continue each from a cache of its own text, or mask what was fed after the end "
            "when it is fed"
        )


def _count_padding(layout: TokenLayout, cache: RecurrentCache, x: torch.Tensor) -> None:
    """Note how many pads every row has been fed, `[B]`, for [`_check_past`]."""
    held = cache.layers[0].get(PADDING)
    before = torch.zeros(x.shape[0], dtype=torch.long, device=x.device) if held is None else held

    def replay(tokens: int) -> torch.Tensor:
        return before if layout.lengths is None else before + tokens - layout.lengths.clamp(max=tokens)

    cache.layers[0].put(PADDING, replay(layout.length), layout.length, replay)


def _reorder(labels: torch.Tensor, order: torch.Tensor | None, layout: TokenLayout) -> torch.Tensor:
    """`labels` `[B or 1, T]` in the new order of tokens."""
    if order is None:
        return labels
    return torch.zeros_like(order).scatter(1, order, labels.expand_as(order).to(order.dtype))


def _changes(seq_idx: torch.Tensor, layout: TokenLayout, cache: RecurrentCache | None) -> torch.Tensor:
    """True `[B, T]` where `seq_idx` differs from the token before, which the cache remembers across calls."""
    before = cache.layers[0].get("seq_idx") if cache is not None else None  # [B, 1]
    labels = torch.cat([seq_idx[:, :1] if before is None else before, seq_idx], 1)  # [B, 1 + T]
    if cache is not None:

        def replay(tokens: int) -> torch.Tensor:
            return layout.first(tokens).last_real(labels[..., None], 1)[..., 0]

        cache.layers[0].put("seq_idx", replay(layout.length), layout.length, replay)
    return labels[:, 1:] != labels[:, :-1]
