"""A text that a model has read, as an object and as a file: read once, continued many times.

    prefix = Prefix.read(model, input_ids)                      # [1, 100_000], in segments
    prefix.save("report.prefix")
    prefix = Prefix.load("report.prefix", model)                # in milliseconds
    model.generate(**prefix.followed_by(question), max_new_tokens=50)

It works for every causal model whose cache is a [`RecurrentCache`] or transformers' `DynamicCache`. After the first the
file has the same size for every text, but for the tokens; after the second it grows with the text.
"""

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from .errors import HoloError
from .modeling.cache import CACHE_NAME, RecurrentCache
from .modeling.state_file import SavedStates, read_states, write_states

SEGMENT = 4096  # tokens that are read at once: bounds the memory, and changes no result
KEYS_AND_VALUES = {"keys", "values"}


@dataclass(frozen=True, eq=False)
class Prefix:
    """Tokens, and what a model continues from after them. Nothing changes it: what continues it gets a copy.

    Args:
        model: that has read the text.
        input_ids: `[B, T]`.
        attention_mask: `[B, T]`, 0 at padding.
        cache: after all tokens but the last, as `generate` leaves it: that one is read with what follows, so that there
            is always a token to continue from. None: nothing is read yet.
        notes: texts that are saved along.
    """

    model: PreTrainedModel
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    cache: Cache | None
    notes: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(
        cls, model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> "Prefix":
        """Let `model` read `input_ids` `[B, T]`, from the start of a text, with 0 in `attention_mask` at padding."""
        return cls.empty(model, len(input_ids)).extended(input_ids, attention_mask)

    @classmethod
    def empty(cls, model: PreTrainedModel, rows: int = 1) -> "Prefix":
        """Before the first token."""
        nothing = torch.zeros(rows, 0, dtype=torch.long, device=model.device)
        return cls(model, nothing, nothing, None)

    @torch.no_grad()
    def extended(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> "Prefix":
        """This prefix and `input_ids` `[B, t]` after it, read by the model in segments, all but the last token.

        Raises:
            HoloError: the model returns nothing to continue from.
        """
        ids, mask = self._joined(input_ids, attention_mask)
        cache = _copied(self.cache)
        padded, last = not bool(mask.all()), ids.shape[1] - 1
        positions = (mask.cumsum(1) - 1).clamp_min(0)  # as generate() counts them
        for start in range(0 if cache is None else cache.get_seq_length(), last, SEGMENT):
            stop = min(start + SEGMENT, last)
            where = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]} if padded else {}
            output = self.model.base_model(
                input_ids=ids[:, start:stop], **where, **{CACHE_NAME: cache}, use_cache=True, return_dict=True
            )
            cache = output.get(CACHE_NAME)
            if cache is None:
                kind = type(self.model).__name__
                raise HoloError(f"model: {kind} returns no cache to continue from; give a causal one")
        return Prefix(self.model, ids, mask, cache, self.notes)

    def followed_by(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> dict[str, Any]:
        """What `model.generate` takes to continue after `input_ids` `[B, t]`, or `[1, t]` for all rows: all tokens, the
        mask, and a copy of the cache, which spares reading the first T of them."""
        ids, mask = self._joined(input_ids, attention_mask)
        inputs = {"input_ids": ids, "attention_mask": mask}
        return inputs if self.cache is None else {**inputs, CACHE_NAME: _copied(self.cache)}

    def repeat(self, rows: int) -> "Prefix":
        """Every row `rows` times in a row: questions to one text as a batch, or several samples."""
        cache = _copied(self.cache)
        if cache is not None:
            cache.batch_repeat_interleave(rows)
        ids, mask = (x.repeat_interleave(rows, 0) for x in (self.input_ids, self.attention_mask))
        return Prefix(self.model, ids, mask, cache, self.notes)

    @classmethod
    def stack(cls, prefixes: Sequence["Prefix"]) -> "Prefix":
        """The rows of several prefixes of one model in one; shorter ones are as if they were padded on the left.

        Raises:
            ValueError: there are none, one is empty, or layers of attention between recurrent ones have read texts of
                different lengths.
        """
        if not prefixes or any(prefix.cache is None for prefix in prefixes):
            raise ValueError("prefixes: give at least one, each of at least two tokens")
        longest = max(prefix.input_ids.shape[1] for prefix in prefixes)
        ids, masks = (
            torch.cat([_padded(getattr(prefix, name), longest, 1) for prefix in prefixes])
            for name in ("input_ids", "attention_mask")
        )
        return cls(prefixes[0].model, ids, masks, _stacked([prefix.cache for prefix in prefixes]))

    def save(self, path: str | os.PathLike) -> None:
        """Write tokens, cache and notes to a file in the format safetensors, complete or not at all.

        Raises:
            HoloError: the cache is of another kind.
            OSError: the file cannot be written.
        """
        tensors = {"input_ids": self.input_ids.int(), "attention_mask": self.attention_mask.to(torch.uint8)}
        seen = 0 if self.cache is None else self.cache.get_seq_length()
        write_states(path, self.model, _states(self.cache), seen, tensors, self.notes)

    @classmethod
    def load(cls, path: str | os.PathLike, model: PreTrainedModel) -> "Prefix":
        """What [`save`] has written, on the device of `model`.

        Raises:
            OSError: the file does not exist, or is damaged.
            ValueError: it is something else, holds no tokens, or was saved by a model of another config or with other
                weights.
        """
        saved = read_states(path, model)
        if "input_ids" not in saved.tensors:
            raise ValueError(f"path: {str(path)!r} holds a state without its tokens; give one of Prefix.save")
        ids, mask = (saved.tensors[name].long() for name in ("input_ids", "attention_mask"))
        return cls(model, ids, mask, _restored(saved), saved.notes)

    def _joined(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and mask `[B, T + t]`."""
        rows, device = len(self.input_ids), self.model.device
        ids = input_ids.to(device).expand(rows, -1)
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask.to(ids).expand(rows, -1)
        return torch.cat([self.input_ids, ids], 1), torch.cat([self.attention_mask, mask], 1)


def _copied(cache: Cache | None) -> Cache | None:
    return cache.copy() if isinstance(cache, RecurrentCache) else copy.deepcopy(cache)


def _states(cache: Cache | None) -> list[dict[str, torch.Tensor]]:
    """The states of every layer by name."""
    if isinstance(cache, RecurrentCache):
        return [layer.states for layer in cache.layers]
    if cache is None:
        return []
    if not all(type(layer) is DynamicLayer for layer in cache.layers):
        raise HoloError(f"prefix: {type(cache).__name__} cannot be kept; a RecurrentCache or a plain DynamicCache can")
    layers: list[Any] = cache.layers
    return [{"keys": layer.keys, "values": layer.values} for layer in layers]


def _restored(saved: SavedStates) -> Cache | None:
    """The cache whose [`_states`] were saved."""
    if not saved.layers:
        return None
    if any(set(layer) != KEYS_AND_VALUES for layer in saved.layers):
        return RecurrentCache.restored(saved)
    cache = DynamicCache()
    for index, layer in enumerate(saved.layers):
        cache.update(layer["keys"], layer["values"], index)
    return cache


def _stacked(caches: Sequence[Cache | None]) -> Cache:
    """The rows of several caches in one; those of shorter texts with zeros in front."""
    recurrent = [cache for cache in caches if isinstance(cache, RecurrentCache)]
    if len(recurrent) == len(caches):
        return RecurrentCache.stack(recurrent)
    joined = DynamicCache()
    for index, rows in enumerate(zip(*map(_states, caches), strict=True)):
        length = max(row["keys"].shape[2] for row in rows)
        keys, values = (torch.cat([_padded(row[name], length, 2) for row in rows]) for name in ("keys", "values"))
        joined.update(keys, values, index)
    return joined


def _padded(x: torch.Tensor, length: int, dim: int) -> torch.Tensor:
    """`x` with zeros in front, so that the dimension `dim` has `length`."""
    return F.pad(x, (0, 0) * (x.dim() - 1 - dim) + (length - x.shape[dim], 0))
