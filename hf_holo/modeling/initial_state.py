"""Where a text begins: a learned state in place of an empty one.

Every mixer with a state of constant size may learn what it remembers when a text begins. That is broadcast over the
batch, cached and continued like any other state, and starts at zero: a model that gets one computes what it did. (A new
model may start with random ones, `state_start`: how far a state is turned shows only where there is something in it.)
Trained alone it is the smallest adapter of a recurrent model (state tuning; Kang et al., "State-offset tuning", 2025).

A document in the middle of a row begins with it, too. The scans know how to begin with nothing, or with one state a
row; so the documents of a batch become rows of their own around the mixer, as sequences do in kernels of variable
length. Sizes in the shape tags: B rows of T tokens, N documents of up to L tokens.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .cache import RecurrentLayer
from .layers import at_least_float32, init_normal_
from .layout import TokenLayout
from .recording import exporting

REMEMBERED = ("memory", "modes", "context")  # the others, the last inputs of filters and counts, begin empty


@dataclass
class Documents:
    """The documents of a batch as rows of their own.

    Attributes:
        row, place: `[B, T]` which of them a token belongs to, and where in it.
        source: `[N]` the row that each comes from.
        continues: `[N]` whether it continues what the cache holds.
        layout: of the documents as rows `[N, L]`.
    """

    row: torch.Tensor
    place: torch.Tensor
    source: torch.Tensor
    continues: torch.Tensor
    layout: TokenLayout

    @classmethod
    def of(cls, layout: TokenLayout, document: torch.Tensor) -> "Documents":
        """Those that `document` `[B, T]` of a layout tells apart."""
        rows, length = document.shape
        # 1. where each begins: at the start of a row, and where the number changes
        begins = document != F.pad(document, (1, 0), value=-1)[:, :-1]
        row = (begins.flatten().cumsum(0) - 1).view(rows, length)
        at = torch.arange(length, device=document.device).expand(rows, -1)
        place = at - torch.where(begins, at, 0).cummax(1).values
        # 2. how long each is, without the padding at the end of its row
        count, longest = int(row[-1, -1]) + 1, int(place.max()) + 1
        real = torch.ones_like(row) if layout.valid is None else layout.valid.long()
        lengths = torch.zeros(count, dtype=torch.long, device=row.device).scatter_add(0, row.flatten(), real.flatten())
        valid = torch.arange(longest, device=row.device) < lengths[:, None]
        # 3. where each comes from
        source = torch.arange(rows, device=row.device)[:, None].expand(-1, length)[begins]
        return cls(row, place, source, document[begins] == 0, TokenLayout(longest, valid, lengths))

    def apart(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, T, D]` to `[N, L, D]`."""
        rows = x.new_zeros(len(self.source), self.layout.length, x.shape[-1])
        return rows.index_put((self.row, self.place), x)

    def together(self, y: torch.Tensor) -> torch.Tensor:
        """`[N, L, D]` to `[B, T, D]`."""
        return y[self.row, self.place]


class InitialState(nn.Module):
    """The state that a text begins with, of one mixer.

    Args:
        spec: names and shapes of the states of the mixer, without the batch; those that are `REMEMBERED` are learned.
        start: standard deviation of the states at the start of training; 0: empty ones.
    """

    def __init__(self, spec: Mapping[str, tuple[int, ...]], start: float = 0.0) -> None:
        super().__init__()
        self.start = start
        for name, shape in spec.items():
            if name in REMEMBERED:
                self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for value in self.parameters():
            if self.start:
                init_normal_(value, std=self.start)
            else:  # no random number is drawn, so that the weights of a seed stay what they are
                nn.init.zeros_(value)

    def rows(self, name: str, count: int) -> torch.Tensor:
        """The state `name` of `count` texts that begin, `[count, ...]` in at least float32."""
        value = self.get_parameter(name)
        return value.to(at_least_float32(value.dtype)).expand(count, *value.shape)

    def run(
        self, mixer: Any, x: torch.Tensor, layout: TokenLayout | None, cache: RecurrentLayer | None
    ) -> torch.Tensor:
        """`mixer(x, layout, cache)` `[B, T, D]`, where every text begins with the learned states of the mixer.

        Args:
            mixer: that names its states (`state_spec`).
            x: `[B, T, D]`.
            layout: of the tokens; None: one text in every row.
            cache: what it continues from, and updates; None: every row begins a text, and nothing is kept.
        """
        layout = TokenLayout(x.shape[1]) if layout is None else layout
        if layout.document is None:
            return mixer(x, layout, self._begun(mixer, x.shape[0], layout, cache))
        if layout.apart is None:
            layout.apart = Documents.of(layout, layout.document)
        documents = layout.apart
        apart = self._begun_apart(mixer, documents, cache)
        y = mixer(documents.apart(x), documents.layout, apart)
        if cache is not None:
            for name in mixer.state_spec().keys() & apart.states.keys():
                last = apart.states[name][documents.row[:, -1]]
                cache.put(name, last, layout.length, _replay(documents, apart, name))
        return documents.together(y)

    def _begun(self, mixer: Any, count: int, layout: TokenLayout, cache: RecurrentLayer | None) -> RecurrentLayer:
        """What the mixer continues from: the cache, with learned states where a row has read nothing yet."""
        cache = RecurrentLayer() if cache is None else cache
        for name in self._learned(mixer):
            state, learned = cache.get(name), self.rows(name, count)
            if state is None:
                cache.states[name] = learned.contiguous()
            elif exporting() and layout.begun is not None:  # a graph is given zeros for a text that begins
                cache.states[name] = torch.where(_per_row(layout.begun, state), state, learned)
        return cache

    def _begun_apart(self, mixer: Any, documents: Documents, cache: RecurrentLayer | None) -> RecurrentLayer:
        """What documents that are rows of their own continue from."""
        apart = RecurrentLayer()
        apart.recording = cache is not None and cache.recording
        for name in mixer.state_spec():
            held = None if cache is None else cache.get(name)
            learned = self.rows(name, len(documents.source)) if name in self._learned(mixer) else None
            if held is None:
                if learned is not None:
                    apart.states[name] = learned.contiguous()
                continue
            held = held[documents.source]
            begins = torch.zeros_like(held) if learned is None else learned.to(held.dtype)
            apart.states[name] = torch.where(_per_row(documents.continues, held), held, begins)
        return apart

    def _learned(self, mixer: Any) -> list[str]:
        return [name for name in mixer.state_spec() if name in self._parameters]


def _replay(documents: Documents, apart: RecurrentLayer, name: str) -> Callable[[int], torch.Tensor]:
    """The state `[B, ...]` after the first tokens of every row, from what the documents have recorded."""

    def replay(tokens: int) -> torch.Tensor:
        at, own = documents.row[:, tokens - 1], documents.place[:, tokens - 1] + 1
        recorded = apart.journal[name][-1].replay
        if recorded is None:  # of documents of one token
            return apart.states[name][at]
        return torch.stack([recorded(count)[row] for row, count in zip(at.tolist(), own.tolist(), strict=True)])

    return replay


def _per_row(x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """`[B]` to `[B, 1, ...]`, with as many dimensions as the state."""
    return x.view(-1, *[1] * (state.dim() - 1))
