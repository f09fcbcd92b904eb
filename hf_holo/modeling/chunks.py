"""Context of past chunks: a coarse bank over their means, and the sum that fades.

Sizes in the shape tags: B batch, T tokens, D channels, K modes of the coarse bank, S chunks of a row.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .cache import RecurrentLayer
from .layers import init_copy_
from .layout import TokenLayout
from .recording import exporting, single_token
from .resonators import ResonatorBank, one_step_later, positive_damping, raw_damping
from .scans import interference_scan
from .validation import check_positive


class FadingSum(nn.Module):
    """y_t = λ y_{t-1} + u_t in every channel: one mode that does not turn, heard as it is. A bank for [`ChunkContext`].

    Args:
        dim: channels D.
    """

    DAMPING = 0.001  # where it starts: a memory of 1,000 steps

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.raw_damping = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init_copy_(self.raw_damping, raw_damping(torch.full_like(self.raw_damping, self.DAMPING)))

    def state_spec(self, name: str) -> dict[str, tuple[int, ...]]:
        return {name: (1, self.dim)}

    def read(self, state: torch.Tensor) -> torch.Tensor:
        """The sum that a state `[B, 1, D]` holds: `[B, D]`."""
        return state[:, 0]

    def forward(
        self,
        u: torch.Tensor,
        state: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        document: torch.Tensor | None = None,
        delayed: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As [`ResonatorBank.forward`]: y `[B, T, D]` and the state after `lengths` steps, `[B, 1, D]`."""
        if state is not None and single_token(u.shape[1]):
            return self._step(u, state, lengths, document, delayed)
        ones = u.new_ones(u.shape[0], 1, u.shape[1])  # [B, H, T] with one head, whose keys and queries are 1
        real = ones if lengths is None else (torch.arange(u.shape[1], device=u.device) < lengths[:, None])[:, None]
        decay = -positive_damping(self.raw_damping).to(u.dtype) * real
        write = torch.zeros_like(ones).masked_fill(real == 0, float("-inf"))
        before = None if state is None else state[:, :, None]  # [B, H, F, D] with one feature
        y, after = interference_scan(ones[..., None], ones[..., None], u[:, None], decay, write, before, document)
        y = y[:, 0]
        return one_step_later(y, None if state is None else self.read(state)) if delayed else y, after[:, :, 0]

    def _step(
        self,
        u: torch.Tensor,
        state: torch.Tensor,
        lengths: torch.Tensor | None,
        document: torch.Tensor | None,
        delayed: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[`forward`] for a single step."""
        kept = state if document is None else state * (document == 0)[..., None].to(state.dtype)
        after = torch.addcmul(u, kept, (-positive_damping(self.raw_damping)).exp().to(u.dtype))
        if lengths is not None:
            after = torch.where((lengths > 0)[:, None, None], after, state)
        return state if delayed else after, after


class ChunkContext(nn.Module):
    """Hierarchical context: a coarse bank over the means of past chunks, which every later token hears.

    Chunks count the real tokens of a document, however the text is padded or cut; a token hears the chunks that were
    complete before its own began.

    Args:
        chunk_length: tokens of a chunk.
        bank: the coarse bank, whose steps are chunks: a [`ResonatorBank`] or a [`FadingSum`].
        name: of its state in the cache.

    Raises:
        ValueError: `chunk_length` is not a positive integer.
    """

    bank: ResonatorBank | FadingSum

    def __init__(self, chunk_length: int, bank: ResonatorBank | FadingSum, name: str = "context") -> None:
        super().__init__()
        check_positive(chunk_length=chunk_length)
        self.chunk_length, self.bank, self.name = chunk_length, bank, name

    def state_spec(self) -> dict[str, tuple[int, ...]]:
        return {f"{self.name}_chunk": (self.bank.dim + 1,)} | self.bank.state_spec(self.name)

    def forward(self, u: torch.Tensor, layout: TokenLayout, cache: RecurrentLayer | None = None) -> torch.Tensor:
        """`[B, T, D]`, zeros at padding, to `[B, T, D]`; continues from `cache` and updates it, if given."""
        names = tuple(self.state_spec())
        running, coarse = (None if cache is None else cache.get(name) for name in names)
        if running is not None and coarse is not None and single_token(layout.length):
            context, states = self._step(u, layout, running, coarse)
        else:
            context, states = self._scan(u, layout, running, coarse)
        if cache is not None:
            for index, name in enumerate(names):

                def replay(tokens: int, index: int = index) -> torch.Tensor:
                    return self._scan(u[:, :tokens], layout.first(tokens), running, coarse)[1][index]

                cache.put(name, states[index], layout.length, replay)
        return context

    def _step(
        self, u: torch.Tensor, layout: TokenLayout, running: torch.Tensor, coarse: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """[`_scan`] for a single token: the chunk that continues gets one more, and if that completes it, the bank its
        mean."""
        running, coarse = layout.before(running), layout.before(coarse)
        one = u.new_ones(u.shape[0], 1) if layout.valid is None else layout.valid.to(u.dtype)  # [B, 1]
        running = running + torch.cat([u[:, 0], one], -1)
        complete = running[:, -1] > self.chunk_length - 0.5  # [B]
        heard, coarse = self.bank(running[:, None, :-1] / self.chunk_length, coarse, complete.long(), delayed=True)
        return heard, (running * ~complete[:, None], coarse)

    def _scan(
        self, u: torch.Tensor, layout: TokenLayout, running: torch.Tensor | None, coarse: torch.Tensor | None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """What every token hears [B, T, D]; the sum and the number of the tokens in the last chunk [B, D + 1], zeros
        if it is complete; and the coarse state of the complete ones [B, D, 2K]."""
        # 1. inside chunks: sum and number of the tokens of each, those that an earlier call has left included
        ones = u.new_ones(u.shape[:2]) if layout.valid is None else layout.valid.to(u.dtype)
        chunk = self._chunks(ones.long(), layout.document, None if running is None else running[:, -1])  # [B, T]
        sums = u.new_zeros(u.shape[0], self._most(chunk, layout), u.shape[2] + 1)
        sums = sums.scatter_add(1, chunk[..., None].expand(-1, -1, sums.shape[2]), torch.cat([u, ones[..., None]], -1))
        if running is not None:
            sums = torch.cat([sums[:, :1] + running[:, None], sums[:, 1:]], 1)
        document = None  # of every chunk, [B, S]
        if layout.document is not None:
            document = torch.zeros_like(sums[..., 0], dtype=torch.long).scatter(1, chunk, layout.document)
            document = document.cummax(1).values
        # 2. chunks that are complete: all before the last, and that too if it is full
        last = chunk[:, -1:]
        complete = sums[..., -1].gather(1, last) > self.chunk_length - 0.5
        done = last + complete  # [B, 1]
        means = sums[..., :-1] / self.chunk_length
        # 3. carry: the coarse bank over their means, and 4. read: what the tokens of every chunk hear of it [B, S, D];
        #    in one call, around which weights may come from the CPU or the disk
        heard, state = self.bank(means, coarse, done[:, 0], document, delayed=True)
        if document is not None:
            earlier = F.pad(document, (1, 0))
            heard = heard * (document == earlier[:, :-1])[..., None]
            state = state * (document.gather(1, last) == earlier.gather(1, done))[..., None]
        # 5. what the next call continues from
        running = sums.gather(1, last[..., None].expand(-1, -1, sums.shape[2]))[:, 0] * ~complete
        return heard.gather(1, chunk[..., None].expand(-1, -1, u.shape[2])), (running, state)

    def _chunks(self, ones: torch.Tensor, document: torch.Tensor | None, begun: torch.Tensor | None) -> torch.Tensor:
        """The chunk of every token, counted from the one that continues: [B, T], from real tokens `ones` [B, T] and the
        number of tokens in the chunk that continues [B]. A new document begins a new chunk."""
        position = ones.cumsum(1) - 1  # in the document
        starts = torch.zeros_like(ones, dtype=torch.bool)
        if document is not None:
            starts = document != F.pad(document, (1, 0))[:, :-1]
            position = position - torch.where(starts, position, 0).cummax(1).values
        position = position.clamp_min(0)
        if begun is not None:
            more = begun.round().long()[:, None]
            position = position + (more if document is None else more * (document == 0))
        number = position // self.chunk_length
        return (starts | (number != F.pad(number, (1, 0))[:, :-1])).long().cumsum(1)

    def _most(self, chunk: torch.Tensor, layout: TokenLayout) -> int:
        """A number of chunks that is enough for every row."""
        if not exporting():
            return int(chunk.max()) + 1
        return layout.length + 1 if layout.document is not None else layout.length // self.chunk_length + 2
