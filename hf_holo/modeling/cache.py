"""The cache of recurrent models: a few tensors of constant size per layer, with exact roll-back."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


class _Write(NamedTuple):
    """One update of one state: what it was, how many tokens came, and the state after only the first of them."""

    before: torch.Tensor | None
    tokens: int
    replay: Callable[[int], torch.Tensor]


class RecurrentLayer(CacheLayerMixin):
    """The states of one layer by name, each `[B, ...]`, and the number of tokens seen.

    While `recording`, every update is kept with a function that computes the state after fewer tokens, so that
    [`crop`] can take back any number of tokens fed since the last crop: assisted decoding rejects candidates that way.
    """

    is_compileable = False  # True would make generate() send a 4-D attention mask
    is_sliding = False
    is_croppable = False

    def __init__(self):
        super().__init__()
        self.reset()
        self.recording = False

    def get(self, name: str) -> torch.Tensor | None:
        """The state `name`, or None before the first token."""
        return self.states.get(name)

    def put(self, name: str, state: torch.Tensor, tokens: int, replay: Callable[[int], torch.Tensor]) -> None:
        """Replace the state `name` after `tokens` more tokens; `replay(n)` is the state after the first n of them."""
        if self.recording:
            self.journal.setdefault(name, []).append(_Write(self.states.get(name), tokens, replay))
        self.states[name] = state
        self.is_initialized = True

    def advance(self, tokens: int) -> None:
        """Count tokens, once per forward pass."""
        self.seen += tokens

    def crop(self, length: int) -> None:
        """Keep `length` tokens if it is positive, else drop `-length` (the two conventions of transformers)."""
        drop = -length if length <= 0 else max(self.seen - length, 0)
        if drop:
            self.states = {name: self._rewind(name, drop) for name in self.states}
            self.states = {name: state for name, state in self.states.items() if state is not None}
            self.seen -= drop
        self.journal = {}

    def _rewind(self, name: str, drop: int) -> torch.Tensor | None:
        for write in reversed(self.journal.get(name, [])):
            if drop < write.tokens:
                return write.replay(write.tokens - drop)
            drop -= write.tokens
            if not drop:
                return write.before
        raise ValueError(
            f"crop cannot take back {drop} more tokens of the state {name!r}: call `activate_past_recording()` on the "
            "cache before the tokens are fed, and crop no further back than the last crop"
        )

    def reset(self) -> None:
        self.states: dict[str, torch.Tensor] = {}
        self.journal: dict[str, list[_Write]] = {}
        self.seen = 0
        self.is_initialized = False

    def _select(self, pick: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.states = {name: pick(state) for name, state in self.states.items()}
        self.journal = {}  # rows have moved: what was recorded no longer fits

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._select(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(lambda state: state.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._select(lambda state: state[indices])

    # What transformers asks of every layer; a recurrent one has no keys, no limit and nothing to allocate.
    def update(self, key_states, value_states, *args, **kwargs):
        raise NotImplementedError("a recurrent layer keeps states, not keys and values: use put()")

    def lazy_initialization(self, *args, **kwargs) -> None: ...

    def offload(self) -> None: ...

    def prefetch(self) -> None: ...

    def get_seq_length(self, *args) -> int:
        return self.seen

    def get_mask_sizes(self, query: int | torch.Tensor) -> tuple[int, int]:
        return self.seen + (query if isinstance(query, int) else query.shape[0]), 0

    def get_max_cache_shape(self) -> int:  # transformers 4.57
        return -1

    def get_max_length(self) -> int:  # transformers 5
        return -1


class RecurrentCache(Cache):
    """`past_key_values` of a recurrent model: one [`RecurrentLayer`] per hidden layer.

    Args:
        config: a model config with `num_hidden_layers`.
    """

    def __init__(self, config):
        super().__init__(layers=[RecurrentLayer() for _ in range(config.num_hidden_layers)])

    def activate_past_recording(self) -> None:
        """Record updates from now on, so that `crop` can take tokens back."""
        for layer in self.layers:
            layer.recording = True

    def advance(self, tokens: int) -> None:
        for layer in self.layers:
            layer.advance(tokens)

    @property
    def is_empty(self) -> bool:
        return not self.layers[0].states

    def __iter__(self):
        return iter(tuple(layer.states.values()) for layer in self.layers)
