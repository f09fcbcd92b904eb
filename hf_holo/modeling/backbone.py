"""The body of a model: embeddings, blocks and a last norm. The heads build on it."""

from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from .arguments import check_arguments, check_mask, check_per_token
from .cache import RecurrentCache, RecurrentLayer, given_cache
from .checkpoint import check_memory
from .embeddings import CompressedEmbedding, check_ids, num_embeddings
from .layers import make_norm
from .layout import arrange
from .pretrained import FamilyPreTrainedModel
from .recording import exporting
from .vocabulary import make_embedding


class BlockStack(FamilyPreTrainedModel):
    """Blocks and a last norm, and what they continue from.

    A subclass says what it continues from ([`new_cache`], [`check_cache`]).
    """

    layers: nn.ModuleList
    norm: nn.Module
    gradient_checkpointing: bool

    def make_blocks(self, config: PretrainedConfig) -> nn.ModuleList:
        """New blocks, one for each layer."""
        return nn.ModuleList([self.block_class(config, index) for index in range(config.num_hidden_layers)])

    def new_cache(self) -> Cache:
        """The cache of a text that begins."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it continues from")

    def check_cache(self, cache: Cache, rows: int | None = None) -> None:
        """Raise ValueError if this is not a cache that the model continues from, with so many texts."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it continues from")

    def run_blocks(self, x: torch.Tensor, cache: Cache | None, keep_all: bool, **arguments) -> list[torch.Tensor]:
        """The hidden states after the last norm, `[B, T, D]`; with `keep_all`, first those that enter each block."""
        hidden_states = []
        for block in self.layers[: self.config.num_hidden_layers]:  # fewer while they draft (assistant_early_exit)
            if keep_all:
                hidden_states.append(x)
            # by position: under gradient checkpointing transformers takes a cache away that comes by name
            x = block(x, *arguments.values(), cache)
        return [*hidden_states, self.norm(x)]

    def _cache(self, given: Cache | None, use_cache: bool | None, rows: int | None = None) -> Cache | None:
        """What to continue from and to update: what is given, or something new where the state is wanted.

        Args:
            rows: how many texts are fed.
        """
        checkpoints = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if given is not None:
            if not self.config.is_causal:
                raise ValueError("past_key_values: a bidirectional model continues from nothing; leave it out")
            if checkpoints and not getattr(given, "can_recompute", False):
                raise ValueError(
                    "past_key_values: gradient checkpointing computes every block twice, and would update the cache "
                    "twice; turn one of the two off"
                )
            self.check_cache(given, rows)
            return given
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        return self.new_cache() if use_cache and self.config.is_causal and not checkpoints else None


class RecurrentStack(BlockStack):
    """Blocks that keep a state. They are called as `block(x, layout, cache)`."""

    def new_cache(self) -> RecurrentCache:
        return RecurrentCache(self.config)

    def check_cache(self, cache: Cache, rows: int | None = None) -> None:
        if not isinstance(cache, RecurrentCache):
            raise ValueError(
                f"past_key_values: a {type(cache).__name__}; a recurrent model continues from the RecurrentCache "
                "that it returned, or from RecurrentCache(config)"
            )
        if exporting():
            return
        if len(cache.layers) not in (len(self.layers), self.config.num_hidden_layers):
            raise ValueError(
                f"past_key_values: a cache of {len(cache.layers)} layers; this {type(self).__name__} has "
                f"{len(self.layers)}, and continues from its own states only"
            )
        for index, (layer, spec) in enumerate(zip(cache.layers, self._state_shapes(), strict=False)):
            self._check_states(index, layer, spec)
            if rows is not None:
                check_cache_rows(rows, *layer.states.values())

    def _state_shapes(self) -> list[dict[str, tuple[int, ...]]]:
        """Names and shapes of the states of every layer, found once."""
        kept: list[dict[str, tuple[int, ...]]] | None = vars(self).get("_known_shapes")
        if kept is None or 0 < len(kept) < self.config.num_hidden_layers:  # fewer while they draft
            spec: Any = getattr(type(self), "state_spec", lambda config: [])(self.config)
            kept = vars(self)["_known_shapes"] = [
                {name: tuple(shape) for name, shape in layer.items()} for layer in spec
            ]
        return kept

    def _check_states(self, index: int, layer: RecurrentLayer, spec: dict[str, tuple[int, ...]]) -> None:
        """Raise ValueError if a layer that has read something keeps other states than `spec` says."""
        states = layer.states if layer.seen else {}
        for name, shape in spec.items() if states else ():
            given = tuple(states[name].shape[1:]) if name in states else None
            if given != shape:
                found = "is missing" if given is None else f"has the shape {given}"
                raise ValueError(
                    f"past_key_values: in layer {index} the state {name!r} {found}; "
                    f"{type(self).__name__} keeps {shape}, and continues from its own states only"
                )


class Backbone(BlockStack):
    """Embeddings, blocks and a last norm.

    A subclass says what its blocks are called with ([`prepare`]).
    """

    _auto_class = "AutoModel"

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        config = self.config
        check_memory(lambda: nn.ModuleList([make_embedding(config), self.make_blocks(config)]))
        self.embed_tokens = make_embedding(config)
        self.train_head(False)
        self.layers = self.make_blocks(config)
        self.norm = make_norm(config)
        self.gradient_checkpointing = False
        self.post_init()

    def train_head(self, mode: bool) -> None:
        """Whether the values train that a compressed vocabulary keeps for its head alone."""
        if isinstance(self.embed_tokens, CompressedEmbedding):
            for parameter in self.embed_tokens.head_parameters():
                parameter.requires_grad_(mode)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value

    def prepare(
        self,
        x: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        seq_idx: torch.Tensor | None,
        cache: Cache | None,
    ) -> tuple[torch.Tensor, dict[str, Any], torch.Tensor | None]:
        """The embeddings as the blocks take them `[B, T, D]`, further arguments of the blocks in their order, and where
        every token has gone `[B, T]`, None if none has moved."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its blocks are called with")

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        seq_idx: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """
        Args:
            input_ids: `[B, T]`; or `inputs_embeds` `[B, T, D]`.
            attention_mask: `[B, T]` or, with a cache, `[B, S]` for all tokens so far; 0 at padding, anywhere.
            position_ids: `[B, T]`, or one row for all; what they mean is the family's, see its `prepare`.
            seq_idx: `[B, T]` document index, or one row for all; a change begins a new document.
            past_key_values, cache: what to continue from, updated in place, also in training (then cut the gradients
                between pieces by `RecurrentCache.detach_`). Two names of one argument: transformers' before and since
                5.24.
            kwargs: what transformers passes to every model and this one has no use for; see [`check_arguments`].

        Raises:
            TypeError: an unknown argument.
            ValueError: neither or both of `input_ids` and `inputs_embeds`, or of another shape; no tokens; ids outside
                the vocabulary; a cache of another kind, of another model or for other rows, or with gradient
                checkpointing; positions, documents or a mask of another shape; a mask that calls padding what the cache
                holds as real tokens.
        """
        check_arguments(self, kwargs, position_ids is not None or seq_idx is not None)
        x = self._embed(input_ids, inputs_embeds)
        rows, length = x.shape[:2]
        cache = self._cache(given_cache(past_key_values, cache), use_cache, rows)
        check_mask(attention_mask, rows, length, 0 if cache is None else cache.get_seq_length())
        check_per_token(rows, length, position_ids=position_ids, seq_idx=seq_idx)
        x, arguments, order = self.prepare(x, attention_mask, position_ids, seq_idx, cache)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden_states = self.run_blocks(x, cache, output_hidden_states, **arguments)
        if order is not None:
            restore = order[..., None].expand_as(x)
            hidden_states = [h.gather(1, restore) for h in hidden_states]
        kept = tuple(hidden_states) if output_hidden_states else None
        # it asks for a FloatTensor, a class that tensors are no longer of
        output = BaseModelOutputWithPast(hidden_states[-1], cache, kept)  # type: ignore[arg-type]
        return output if wants_dict(self.config, return_dict) else output.to_tuple()

    def _embed(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        if input_ids is not None and inputs_embeds is None:
            _check_tokens("input_ids", input_ids, "[batch, tokens]")
            check_ids("input_ids", input_ids, num_embeddings(self.embed_tokens))
            return self.embed_tokens(input_ids)
        if inputs_embeds is not None and input_ids is None:
            _check_tokens("inputs_embeds", inputs_embeds, "[batch, tokens, channels]")
            return inputs_embeds
        raise ValueError("give exactly one of input_ids and inputs_embeds")


class RecurrentBackbone(RecurrentStack, Backbone):
    """A backbone whose blocks keep a state."""

    def prepare(  # type: ignore[override]  # check_cache has refused all others
        self,
        x: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        seq_idx: torch.Tensor | None,
        cache: RecurrentCache | None,
    ) -> tuple[torch.Tensor, dict[str, Any], torch.Tensor | None]:
        """Padding moves to the end. A 0 in `position_ids` at a real token begins a new document, other positions mean
        nothing; `seq_idx` wins over them."""
        layout, order = arrange(x, attention_mask, position_ids, seq_idx, cache)
        if order is not None:
            x = torch.zeros_like(x).scatter(1, order[..., None].expand_as(x), x)
        if cache is not None:
            cache.advance(layout.length)
        return x, {"layout": layout}, order


def check_cache_rows(rows: int, *states: torch.Tensor) -> None:
    """Raise ValueError unless every tensor of a cache has as many rows as there are texts."""
    for state in states:
        if state.shape[0] != rows:
            raise ValueError(
                f"past_key_values: a cache of {state.shape[0]} rows for {rows} texts; its rows are repeated by "
                "batch_repeat_interleave and chosen by batch_select_indices"
            )


def _check_tokens(name: str, given: torch.Tensor, form: str) -> None:
    if given.dim() != form.count(",") + 1:
        raise ValueError(f"{name}: shape {tuple(given.shape)}; give {form}")
    if not exporting() and 0 in given.shape:
        raise ValueError(f"{name}: shape {tuple(given.shape)} has no tokens; give at least one row of one")


def wants_dict(config: PretrainedConfig, return_dict: bool | None) -> bool:
    return config.return_dict if return_dict is None else return_dict
