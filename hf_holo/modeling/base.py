"""Base classes shared by the families: the backbone and the heads, in the way of transformers."""

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import GenerationMode
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)

from .cache import RecurrentCache
from .layers import TokenLayout, at_least_float32, make_norm
from .loading import check_finite, check_memory, check_offloaded, clear_errors, within_memory
from .ops import exporting
from .remote import auto_map, card_writers, with_code
from .vocabulary import (
    IGNORED,
    CompressedEmbedding,
    check_ids,
    check_labels,
    dense_token_losses,
    language_loss,
    make_embedding,
)

CLASSES = "the classes, num_labels ="  # of what a label of a classification head is one
LOGITS_WITH_A_LOSS = 2**28  # numbers, 1 GiB in float32: the most that a model gives unasked beside a loss


class RecurrentPreTrainedModel(PreTrainedModel):
    """What all models share: initialisation, the facts that others derive from, and transformers' flags.

    A family sets `config_class`, `block_class` and `capabilities` on its subclass. One that keeps a state of constant
    size defines the classmethod `state_spec(config)` as well: for every layer, the name and the shape (without the
    batch) of every state. Allocation, export and the checks are derived from it.
    """

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _is_stateful = False  # the cache can take tokens back, so assisted decoding works
    _supports_sdpa = True

    capabilities: frozenset[str] = frozenset()
    block_class: type[nn.Module]
    direction: bool | None = None  # the `causal` that a head needs; None: it works with both

    def __init__(self, config):
        if self.direction is not None and config.causal is None:
            config = copy.deepcopy(config)
            config.causal = self.direction
        if self.direction is not None and config.causal != self.direction:
            raise ValueError(
                f"{type(self).__name__} needs causal={self.direction} in the config, got causal={config.causal}"
            )
        super().__init__(config)

    @classmethod
    def can_generate(cls) -> bool:
        return issubclass(cls, GenerationMixin)

    @classmethod
    def capabilities_of(cls, config) -> frozenset[str]:
        """The capabilities that hold for this config; a family overrides it where an option takes one away."""
        return cls.capabilities

    def count_parameters(self, trainable_only: bool = False) -> int:
        """Number of parameters, a tied matrix counted once."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not trainable_only)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """As in transformers, for compressed vocabularies too; see [`CompressedEmbedding.resize`]."""
        embedding = self.get_input_embeddings()
        if not isinstance(embedding, CompressedEmbedding):
            return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        size = embedding.num_embeddings if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            size += -size % pad_to_multiple_of
        if size != embedding.num_embeddings:
            embedding.resize(size, mean_resizing)
            self.config.vocab_size = size
        return embedding

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *args,
        use_safetensors: bool | None = None,
        **kwargs,
    ) -> PreTrainedModel | tuple[PreTrainedModel, dict[str, Any]]:
        """As in transformers, with a few differences: pickles are read with `use_safetensors=False` only, errors name
        the checkpoint, and what does not fit into memory or is not finite is refused.

        Raises:
            OSError: there are no weights in the format safetensors, or a file is cut off.
            RuntimeError: weights have other shapes than the config asks for.
            ValueError: weights are NaN or infinite, the config is out of range, it describes more weights than this
                machine has memory for and there is no `device_map`, or a `device_map` leaves on the disk what
                transformers 4.57 does not read from there.
        """
        name, safe = pretrained_model_name_or_path, use_safetensors is not False
        with clear_errors(name), within_memory(kwargs.get("device_map") is None):
            loaded = super().from_pretrained(name, *args, use_safetensors=safe, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        check_finite(model, name)
        check_offloaded(model, name)
        return loaded

    def save_pretrained(
        self, save_directory: str | os.PathLike, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """As in transformers, with two things beside the weights: the code, so that the folder loads with
        `trust_remote_code=True` where this package is not installed, through the Auto class of every head; and, if the
        folder has no README.md yet, a model card made from the facts."""
        card = Path(save_directory, "README.md")
        self._card_before = card.read_bytes() if card.is_file() else None
        with with_code(type(self)) as possible:
            if possible:
                self.config.auto_map = auto_map(type(self))
            super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        for write in card_writers if is_main_process and not card.exists() else ():
            write(save_directory)

    def _upload_modified_files(
        self, working_dir: str | os.PathLike, repo_id: str, files_timestamps: dict[str, float], *args, **kwargs
    ) -> Any:
        """Where `push_to_hub` and `save_pretrained(push_to_hub=True)` meet. By now transformers has put a README.md
        beside the weights: the repository's or, if it has none, a form to be filled in. In its place comes what was
        there before, or a card made from the facts."""
        for write in card_writers:
            if not write(working_dir, repo_id, kwargs.get("token"), self._card_before):
                files_timestamps = {**files_timestamps, "README.md": float("inf")}  # stays here
        return super()._upload_modified_files(working_dir, repo_id, files_timestamps, *args, **kwargs)

    def _initialize_weights(self, module: nn.Module, *args) -> None:
        """Without the shortcut of transformers 5 for code of other packages: it passes over every module that has no
        parameters of its own, and with it over those that start the parameters of their children."""
        super()._initialize_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.7 * module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            nn.init.ones_(module.weight)
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()


class Backbone(RecurrentPreTrainedModel):
    """Embeddings, blocks and a last norm.

    A subclass says what its blocks are called with ([`prepare`]) and what it continues from ([`new_cache`]).
    """

    _auto_class = "AutoModel"

    def __init__(self, config):
        super().__init__(config)
        config = self.config
        check_memory(lambda: nn.ModuleList([make_embedding(config), self.make_blocks(config)]))
        self.embed_tokens = make_embedding(config)
        self.train_head(False)
        self.layers = self.make_blocks(config)
        self.norm = make_norm(config)
        self.gradient_checkpointing = False
        self.post_init()

    def make_blocks(self, config) -> nn.ModuleList:
        """New blocks, one for each layer."""
        return nn.ModuleList([self.block_class(config, index) for index in range(config.num_hidden_layers)])

    def train_head(self, mode: bool) -> None:
        """Whether the numbers train that a compressed vocabulary keeps for its head alone."""
        if isinstance(self.embed_tokens, CompressedEmbedding):
            for parameter in self.embed_tokens.head_parameters():
                parameter.requires_grad_(mode)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value

    def new_cache(self) -> Cache:
        """The cache of a text that begins."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it continues from")

    def prepare(
        self,
        x: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        seq_idx: torch.Tensor | None,
        cache: Cache | None,
    ) -> tuple[torch.Tensor, dict[str, Any], torch.Tensor | None]:
        """The embeddings as the blocks take them `[B, T, D]`, further arguments of the blocks, and where every token
        has gone `[B, T]`, None if none has moved."""
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
        **kwargs,
    ) -> BaseModelOutputWithPast | tuple:
        """
        Args:
            input_ids: `[B, T]`; or `inputs_embeds` `[B, T, D]`.
            attention_mask: `[B, T]` or, with a cache, `[B, S]` for all tokens so far; 0 at padding, anywhere.
            position_ids: `[B, T]`; what they mean is the family's, see its `prepare`.
            seq_idx: `[B, T]` document index; a change begins a new document.
            past_key_values: what to continue from, updated in place.

        Raises:
            ValueError: neither or both of `input_ids` and `inputs_embeds`; no tokens; ids outside the vocabulary; a
                cache of another kind.
        """
        x = self._embed(input_ids, inputs_embeds)
        cache = self._cache(past_key_values, use_cache)
        x, arguments, order = self.prepare(x, attention_mask, position_ids, seq_idx, cache)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden_states = self.run_blocks(x, cache, output_hidden_states, **arguments)
        if order is not None:
            restore = order[..., None].expand_as(x)
            hidden_states = [h.gather(1, restore) for h in hidden_states]
        output = BaseModelOutputWithPast(
            last_hidden_state=hidden_states[-1],
            past_key_values=cache,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
        )
        return output if wants_dict(self.config, return_dict) else output.to_tuple()

    def run_blocks(self, x: torch.Tensor, cache: Cache | None, keep_all: bool, **arguments) -> list[torch.Tensor]:
        """The hidden states behind the last norm, `[B, T, D]`, after those ahead of every block if `keep_all`."""
        hidden_states = []
        for block in self.layers:
            if keep_all:
                hidden_states.append(x)
            x = block(x, past_key_values=cache, **arguments)
        return [*hidden_states, self.norm(x)]

    def _embed(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        name, given = ("input_ids", input_ids) if inputs_embeds is None else ("inputs_embeds", inputs_embeds)
        if not exporting() and 0 in given.shape:
            raise ValueError(f"{name} of shape {tuple(given.shape)} holds no tokens; give at least one row of one")
        if inputs_embeds is not None:
            return inputs_embeds
        check_ids("input_ids", input_ids, self.embed_tokens.num_embeddings)
        return self.embed_tokens(input_ids)

    def _cache(self, past_key_values: Cache | None, use_cache: bool | None) -> Cache | None:
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if not use_cache or not self.config.is_causal or (self.training and self.gradient_checkpointing):
            return None
        return self.new_cache() if past_key_values is None else past_key_values


class RecurrentBackbone(Backbone):
    """A backbone whose blocks keep a state. They are called as `block(x, layout=..., past_key_values=...)`."""

    def new_cache(self) -> RecurrentCache:
        return RecurrentCache(self.config)

    def prepare(self, x, attention_mask, position_ids, seq_idx, cache):
        """Padding moves to the end. A 0 in `position_ids` at a real token begins a new document, other positions mean
        nothing; `seq_idx` wins over them."""
        if cache is not None and not isinstance(cache, RecurrentCache):
            raise ValueError(
                f"past_key_values is a {type(cache).__name__}; a recurrent model continues from the RecurrentCache "
                "that it returned, or from RecurrentCache(config)"
            )
        layout, order = arrange(x, attention_mask, position_ids, seq_idx, cache)
        if order is not None:
            x = torch.zeros_like(x).scatter(1, order[..., None].expand_as(x), x)
        if cache is not None:
            cache.advance(layout.length)
        return x, {"layout": layout}, order


def arrange(
    x: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    cache: RecurrentCache | None,
) -> tuple[TokenLayout, torch.Tensor | None]:
    """Find padding and documents, and where every token goes so that the real ones stand in front.

    Returns:
        The layout after the move, and the new position of every token `[B, T]`, None if none moves.
    """
    length = x.shape[1]
    layout, order = TokenLayout(length), None
    if attention_mask is not None:
        valid = attention_mask[:, -length:].bool()
        if exporting() or not bool(valid.all()):
            real = valid.long().cumsum(1)  # ONNX sums no booleans
            layout.lengths = real[:, -1]
            behind = layout.lengths[:, None] + (~valid).long().cumsum(1) - 1
            order = torch.where(valid, real - 1, behind)
            layout.valid = torch.arange(length, device=x.device) < layout.lengths[:, None]
    if seq_idx is not None:
        starts = _changes(_reorder(seq_idx, order, layout), layout, cache)
    elif position_ids is not None:
        starts = _reorder(position_ids, order, layout) == 0
    else:
        return layout, order
    if layout.valid is not None:
        starts = starts & layout.valid
    fresh = cache is None or cache.is_empty  # then the first document needs no reset
    if exporting() or bool(starts[:, 1:].any()) or (bool(starts.any()) and not fresh):
        layout.document = starts.long().cumsum(1)
    return layout, order


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


class _Head(RecurrentPreTrainedModel):
    """A backbone as `self.model`, and the accessors that transformers expects around it."""

    backbone_class: type[RecurrentBackbone]

    def __init__(self, config):
        super().__init__(config)
        self.model = self.backbone_class(self.config)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value


class _LMHead(_Head):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        if isinstance(self.model.embed_tokens, CompressedEmbedding):  # it is its own head, and nothing is to be tied
            self.lm_head = self._tied_weights_keys = None
            self.model.train_head(True)
        else:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def predict(
        self, hidden: torch.Tensor, labels: torch.Tensor | None, kept: slice | torch.Tensor | None = None, **kwargs
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The loss of `[B, T]` labels, if there are any, and the logits at the kept positions `[B, k, vocab_size]`.

        A family whose config offers an `embedding_strategy` may have a large vocabulary. In training, and where there
        would be more than `LOGITS_WITH_A_LOSS` logits, it computes the loss in pieces and gives no logits but those
        that `kept` asks for; it is None for all.

        Raises:
            ValueError: labels that are neither tokens nor to be ignored.
        """
        if labels is not None:
            check_labels(labels, self.config.vocab_size, ignore_index=kwargs.get("ignore_index", IGNORED))
        in_pieces = labels is not None and self._too_many_logits(labels)
        loss = self._loss_in_pieces(hidden, labels, **kwargs) if in_pieces else None
        if in_pieces and kept is None:
            return loss, None
        score = self.model.embed_tokens.logits if self.lm_head is None else self.lm_head
        logits = score(hidden if kept is None else hidden[:, kept])
        if labels is not None and not in_pieces:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return loss, logits

    def _too_many_logits(self, labels: torch.Tensor) -> bool:
        if getattr(self.config, "embedding_strategy", None) is None:
            return False
        return self.training or labels.numel() * self.model.embed_tokens.num_embeddings > LOGITS_WITH_A_LOSS

    def _loss_in_pieces(self, hidden: torch.Tensor, labels: torch.Tensor, **kwargs) -> torch.Tensor:
        embedding = self.model.embed_tokens
        if self.lm_head is None:
            scorer = embedding.token_losses, embedding.scores_per_token
        else:
            scorer = dense_token_losses(self.lm_head), embedding.num_embeddings
        return language_loss(*scorer, hidden, labels, shift=self.direction, **kwargs)


class CausalLMHead(_LMHead, GenerationMixin):
    """Backbone with a language-modelling head that generates."""

    _auto_class = "AutoModelForCausalLM"
    direction = True

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        seq_idx: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: RecurrentCache | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast | tuple:
        """
        Args:
            labels: `[B, T]`, -100 where no loss is wanted; shifted inside.
            logits_to_keep: compute logits for the last n positions only (0: all), or for the given positions.
            others: as in [`RecurrentBackbone.forward`].

        Returns:
            Logits `[B, T, vocab_size]`, loss, and the state to continue from.
        """
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            seq_idx=seq_idx,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        kept = logits_to_keep
        if isinstance(logits_to_keep, int):
            kept = slice(-logits_to_keep, None) if logits_to_keep else None
        loss, logits = self.predict(output.last_hidden_state, labels, kept, **kwargs)
        result = CausalLMOutputWithPast(loss, logits, output.past_key_values, output.hidden_states)
        return result if wants_dict(self.config, return_dict) else result.to_tuple()


class RecurrentForCausalLM(CausalLMHead):
    """The head of a model that generates from a state of constant size."""

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, *args, **kwargs):
        if model_kwargs.get("past_key_values") is None:
            if generation_config.use_cache is False:
                return
            model_kwargs["past_key_values"] = RecurrentCache(self.config)
        rejects = generation_mode == GenerationMode.ASSISTED_GENERATION
        if rejects or getattr(generation_config, "is_assistant", False):
            model_kwargs["past_key_values"].activate_past_recording()


class MaskedLMHead(_LMHead):
    """Bidirectional backbone that fills masked tokens."""

    _auto_class = "AutoModelForMaskedLM"
    direction = False

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        seq_idx: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> MaskedLMOutput | tuple:
        """Logits `[B, T, vocab_size]`; `labels` `[B, T]`, -100 where no loss is wanted, not shifted."""
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            seq_idx=seq_idx,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        loss, logits = self.predict(output.last_hidden_state, labels, **kwargs)
        result = MaskedLMOutput(loss, logits, output.hidden_states)
        return result if wants_dict(self.config, return_dict) else result.to_tuple()


class _ClassificationHead(_Head):
    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class SequenceClassificationHead(_ClassificationHead):
    """Class scores of the whole text: from its last real token if causal, else from the mean over its tokens."""

    _auto_class = "AutoModelForSequenceClassification"

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: RecurrentCache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> SequenceClassifierOutputWithPast | tuple:
        """
        Args:
            attention_mask: `[B, T]`; if it is not given and the config has a `pad_token_id`, pads are found by it.
            labels: `[B]` classes, or `[B]` / `[B, num_labels]` numbers, by `config.problem_type`.

        Returns:
            Logits `[B, num_labels]`.

        Raises:
            ValueError: a class that there is none of.
        """
        pad = self.config.pad_token_id
        if attention_mask is None and input_ids is not None and pad is not None:
            attention_mask = (input_ids != pad).long()
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.score(self.dropout(self._pool(output.last_hidden_state, attention_mask)))
        loss = None
        if labels is not None:
            numbers = labels.is_floating_point() or self.num_labels == 1
            if self.config.problem_type in (None, "single_label_classification") and not numbers:
                check_labels(labels, self.num_labels, CLASSES)
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **kwargs)
        result = SequenceClassifierOutputWithPast(loss, logits, output.past_key_values, output.hidden_states)
        return result if wants_dict(self.config, return_dict) else result.to_tuple()

    def _pool(self, hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """[B, T, D] to [B, D]."""
        if attention_mask is None:
            attention_mask = torch.ones(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        # bfloat16 counts no further than 256
        valid = attention_mask[:, -hidden.shape[1] :].to(at_least_float32(hidden.dtype))
        if not self.config.is_causal:
            return ((hidden * valid[..., None]).sum(1) / valid.sum(1, keepdim=True).clamp_min(1)).to(hidden.dtype)
        last = (valid * torch.arange(1, hidden.shape[1] + 1, device=hidden.device)).argmax(1)
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), last]


class TokenClassificationHead(_ClassificationHead):
    """Class scores of every token."""

    _auto_class = "AutoModelForTokenClassification"

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        seq_idx: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> TokenClassifierOutput | tuple:
        """Logits `[B, T, num_labels]`; `labels` `[B, T]`, -100 where no loss is wanted, ValueError for others."""
        if labels is not None:
            check_labels(labels, self.num_labels, CLASSES)
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            seq_idx=seq_idx,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.score(self.dropout(output.last_hidden_state))
        loss = self.loss_function(logits, labels, self.config) if labels is not None else None
        result = TokenClassifierOutput(loss, logits, output.hidden_states)
        return result if wants_dict(self.config, return_dict) else result.to_tuple()


def wants_dict(config, return_dict: bool | None) -> bool:
    return config.return_dict if return_dict is None else return_dict


FamilyPreTrainedModel = RecurrentPreTrainedModel
