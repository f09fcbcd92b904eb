"""The cache of recurrent models: a few tensors of constant size per layer, with exact roll-back."""

import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import BaseModelOutputWithPast

from .state_file import SavedStates, read_states, write_states

# What transformers calls that which a model continues from: an argument of forward and a field of its output. Renamed
# in 5.24; our models take both names in every release, and give it under the release's own.
CACHE_NAMES = ("past_key_values", "cache")
CACHE_NAME = CACHE_NAMES["cache" in BaseModelOutputWithPast.__dataclass_fields__]

CROP_NAMES_WHAT_STAYS = "max_length" in inspect.signature(Cache.crop).parameters  # not what goes, as since 5.0
SEEN = "tokens seen"
PADDING = "padding"  # how many pads every row was fed, [B], next to the states of the first layer

AnyCache = TypeVar("AnyCache", bound=Cache)


def given_cache(past_key_values: AnyCache | None, cache: AnyCache | None) -> AnyCache | None:
    """What a caller continues from, by whichever name it came.

    By both names, `cache` is the one, as in transformers, unless it is empty: PEFT's prefix tuning gives its prefix by
    the old name at every step, along with the cache of generate(), which has no tokens at the first.
    """
    if cache is None or (past_key_values is not None and not cache.get_seq_length()):
        return past_key_values
    return cache


class _Write(NamedTuple):
    """One update of one state: what it was, how many tokens came, and the state after only the first of them."""

    before: torch.Tensor | None
    tokens: int
    replay: Callable[[int], torch.Tensor] | None


class RecurrentLayer(CacheLayerMixin):
    """The states of one layer by name, each `[B, ...]`, and the number of tokens seen.

    While `recording`, every update is kept with a function that computes the state after fewer tokens, so that
    [`crop`] can take back any number of tokens fed since the last crop: assisted decoding rejects candidates that way.
    """

    is_compileable = False  # True would make generate() send a 4-D attention mask
    is_sliding = False
    states: dict[str, torch.Tensor]
    journal: dict[str, list[_Write]]
    seen: int

    def __init__(self) -> None:
        super().__init__()
        self.reset()
        self.recording = False

    @property
    def is_croppable(self) -> bool:
        """Whether [`crop`] can take tokens back from now on: transformers asks before it speculates."""
        return self.recording

    def get(self, name: str) -> torch.Tensor | None:
        """The state `name`, or None before the first token."""
        return self.states.get(name)

    def put(
        self, name: str, state: torch.Tensor, tokens: int = 1, replay: Callable[[int], torch.Tensor] | None = None
    ) -> None:
        """Replace the state `name` after `tokens` more tokens; `replay(n)` is the state after the first n of them, for
        which a single token has no use."""
        if self.recording:
            self.journal.setdefault(name, []).append(_Write(self.states.get(name), tokens, replay))
        self.states[name] = state
        self.is_initialized = True

    def advance(self, tokens: int) -> None:
        """Count tokens, once per forward pass."""
        self.seen += tokens

    def crop(self, length: int) -> None:
        """Keep `length` tokens if it is positive, else drop `-length` (the two conventions of transformers); 0 keeps
        none up to transformers 4.57, and drops none since 5.0."""
        keeps = length > 0 or (length == 0 and CROP_NAMES_WHAT_STAYS)
        drop = max(self.seen - length, 0) if keeps else -length
        if drop and drop == self.seen:
            self.reset()
        elif drop:
            states = {name: self._rewind(name, drop) for name in self.states}
            self.states = {name: state for name, state in states.items() if state is not None}
            self.seen -= drop
        self.journal = {}

    def _rewind(self, name: str, drop: int) -> torch.Tensor | None:
        for write in reversed(self.journal.get(name, [])):
            if drop < write.tokens and write.replay is not None:
                return write.replay(write.tokens - drop)
            drop -= write.tokens
            if not drop:
                return write.before
        raise ValueError(
            f"crop cannot take back {drop} more tokens of the state {name!r}: call `activate_past_recording()` on the "
            "cache before the tokens are fed, and crop no further back than the last crop"
        )

    def reset(self) -> None:
        self.states = {}
        self.journal = {}
        self.seen = 0
        self.is_initialized = False

    def as_rows(self) -> dict[str, torch.Tensor]:
        """The states by name, each `[B, ...]`, and as `SEEN` the number of tokens seen, `[B]`."""
        rows = next((len(state) for state in self.states.values()), 0)
        return {**self.states, SEEN: torch.full((rows,), self.seen)}

    def fill(self, rows: dict[str, torch.Tensor]) -> None:
        """Take over what [`as_rows`] has given, or states alone."""
        self.states = {name: state for name, state in rows.items() if name != SEEN}
        seen = rows.get(SEEN)
        self.seen = int(seen[0]) if seen is not None and len(seen) else 0
        self.is_initialized = bool(self.states)

    def keep(self, pick: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace every state by what `pick` makes of it."""
        self.states = {name: pick(state) for name, state in self.states.items()}
        self.journal = {}  # rows have moved: what was recorded no longer fits

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.keep(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.keep(lambda state: state.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.keep(lambda state: state[indices])

    # What transformers asks of every layer; a recurrent one has no keys, no limit and nothing to allocate.
    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> NoReturn:
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


def _joined(name: str, states: list[torch.Tensor | None]) -> torch.Tensor:
    """States `[B_i, ...]` of one name as `[ΣB, ...]`."""
    given = [x for x in states if x is not None]
    if len(given) < len(states) or len({x.shape[1:] for x in given}) > 1:
        raise ValueError(
            f"caches: the states {name!r} differ in shape, as the keys of attention do after texts of different "
            "lengths; stack caches that have seen equally many tokens"
        )
    return torch.cat(given)


class RecurrentCache(Cache):
    """What a recurrent model continues from (`past_key_values` or `cache`): one [`RecurrentLayer`] per hidden layer.

    Args:
        config: a model config with `num_hidden_layers`, or what iterating over a cache gives.
    """

    layers: list[RecurrentLayer]  # type: ignore[assignment]  # transformers declares the base class
    can_recompute = False  # whether a block may read and write it a second time, and no harm comes of it

    def __init__(self, config: PretrainedConfig | Iterable[dict[str, torch.Tensor]]) -> None:
        if hasattr(config, "num_hidden_layers"):
            super().__init__(layers=[RecurrentLayer() for _ in range(config.num_hidden_layers)])
            return
        given = list(config)  # see __iter__
        super().__init__(layers=[RecurrentLayer() for _ in given])
        for layer, states in zip(self.layers, given, strict=True):
            layer.fill(states)

    def activate_past_recording(self) -> None:
        """Record updates from now on, so that `crop` can take tokens back."""
        for layer in self.layers:
            layer.recording = True

    def stop_recording(self) -> None:
        """Forget what was recorded, and record no more."""
        for layer in self.layers:
            layer.recording = False
            layer.journal = {}

    def detach_(self) -> "RecurrentCache":
        """Cut the gradients here: between the pieces of truncated backpropagation through time. In place."""
        for layer in self.layers:
            layer.keep(torch.Tensor.detach)
        return self

    def copy(self) -> "RecurrentCache":
        """A branch: states of its own, which can be continued apart from these."""
        return RecurrentCache({name: x.clone() for name, x in states.items()} for states in self)

    @classmethod
    def stack(cls, caches: Sequence["RecurrentCache"]) -> "RecurrentCache":
        """The rows of several caches in one, which counts the tokens of the longest: the others are as if they had been
        padded on the left, and what continues them needs the attention mask that says so.

        Raises:
            ValueError: there are none, or their layers or states differ, as those of attention do by their length.
        """
        if len({len(cache.layers) for cache in caches}) != 1 or any(cache.is_empty for cache in caches):
            raise ValueError("caches: give at least one, each of the same model and after at least one token")
        seen = max(cache.get_seq_length() for cache in caches)
        layers: list[dict[str, torch.Tensor]] = []
        for rows in zip(*([layer.as_rows() for layer in cache.layers] for cache in caches), strict=True):
            for states in rows:
                if PADDING in states:
                    states[PADDING] = states[PADDING] + seen - states[SEEN].to(states[PADDING].device)
                states[SEEN] = torch.full_like(states[SEEN], seen)
            layers.append({name: _joined(name, [states.get(name) for states in rows]) for name in rows[0]})
        return cls(layers)

    def save(self, path: str | os.PathLike, model: PreTrainedModel) -> None:
        """Write the states to a file in the format safetensors, complete or not at all.

        Args:
            path: the file; its folder must exist.
            model: that has read the text: the file carries a fingerprint of its config and weights.

        Raises:
            OSError: the file cannot be written.
        """
        layers = [layer.states for layer in self.layers]
        write_states(path, model, layers, self.get_seq_length())

    @classmethod
    def load(cls, path: str | os.PathLike, model: PreTrainedModel) -> "RecurrentCache":
        """What [`save`] has written, on the device of `model`.

        Raises:
            OSError: the file does not exist, or is damaged.
            ValueError: it is something else, or was saved by a model with another config or other weights.
        """
        return cls.restored(read_states(path, model))

    @classmethod
    def restored(cls, saved: SavedStates) -> "RecurrentCache":
        """The cache whose states a file held."""
        cache = cls(saved.layers)
        cache.advance(saved.tokens)
        return cache

    def advance(self, tokens: int) -> None:
        for layer in self.layers:
            layer.advance(tokens)

    @property
    def is_empty(self) -> bool:
        return not self.layers[0].states

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """The states of every layer by name, with the number of tokens seen by every row: nn.DataParallel takes a cache
        apart so, joins the rows of all devices, and makes a cache of them by `RecurrentCache(layers)`."""
        return (layer.as_rows() for layer in self.layers)
