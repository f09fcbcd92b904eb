"""The heads: what a backbone predicts, for every family alike, in the way of transformers."""

import functools
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig
from transformers.cache_utils import Cache
from transformers.generation import GenerationMode
from transformers.modeling_outputs import (
    CausalLMOutputWithPast,
    MaskedLMOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .arguments import check_arguments
from .backbone import Backbone, wants_dict
from .cache import CACHE_NAME, CACHE_NAMES, RecurrentCache, given_cache
from .embeddings import CompressedEmbedding, num_embeddings
from .layers import at_least_float32, mean_of_real
from .losses import (
    CLASSES,
    IGNORED,
    check_label_shape,
    check_labels,
    classification_loss,
    dense_token_losses,
    language_loss,
    token_classification_loss,
)
from .pretrained import FamilyPreTrainedModel
from .self_test import check_decoding

# What is ignored below as arg-type: transformers' outputs ask for a FloatTensor, which no Tensor is to a type checker.
LOGITS_WITH_A_LOSS = 2**28  # values, 1 GiB in float32: the most that a model gives unasked along with a loss


class _Head(FamilyPreTrainedModel):
    """A backbone as `self.model`, and the accessors that transformers expects around it."""

    backbone_class: type[Backbone]

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.model = self.backbone_class(self.config)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value


class _LMHead(_Head):
    _tied_weights_keys: dict[str, str] | None = {  # type: ignore[assignment]  # transformers declares None
        "lm_head.weight": "model.embed_tokens.weight"
    }
    lm_head: nn.Module | None

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        if isinstance(self.model.embed_tokens, CompressedEmbedding):  # it is its own head, and nothing is to be tied
            self.lm_head, self._tied_weights_keys = None, None
            self.model.train_head(True)
        else:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module | None:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module | None) -> None:
        self.lm_head = value

    def predict(
        self, hidden: torch.Tensor, labels: torch.Tensor | None, kept: slice | torch.Tensor | None = None, **kwargs
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The loss of `[B, T]` or `[B, k]` labels, if there are any, and the logits at the kept positions
        `[B, k, vocab_size]`.

        A family whose config offers an `embedding_strategy` may have a large vocabulary. In training, and where there
        would be more than `LOGITS_WITH_A_LOSS` logits, it computes the loss in pieces and gives no logits but those
        that `kept` asks for; it is None for all.

        Raises:
            ValueError: labels that are neither tokens nor to be ignored, or of another shape.
        """
        asked = hidden if kept is None else hidden[:, kept]  # [B, k, D]
        score = self.model.embed_tokens.logits if self.lm_head is None else self.lm_head
        if labels is None:
            return None, score(asked)
        labelled = self._labelled(labels, hidden, asked, **kwargs)
        if self._too_many_logits(labels):
            return self._loss_in_pieces(labelled, labels, **kwargs), None if kept is None else score(asked)
        logits = score(asked)
        of_labels = logits if labelled is asked else score(labelled)
        return self.loss_function(logits=of_labels, labels=labels, vocab_size=self.config.vocab_size, **kwargs), logits

    def _labelled(
        self,
        labels: torch.Tensor,
        hidden: torch.Tensor,
        asked: torch.Tensor,
        shift_labels: torch.Tensor | None = None,
        ignore_index: int = IGNORED,
        **kwargs,
    ) -> torch.Tensor:
        """Which of `hidden` and `asked` the labels belong to; ValueError if neither."""
        check_labels(labels, self.config.vocab_size, ignore_index=ignore_index)
        name, counted = ("labels", labels) if shift_labels is None else ("shift_labels", shift_labels)
        check_label_shape(counted, *(tuple(x.shape[:2]) for x in (hidden, asked)), name=name)
        return asked if counted.shape == asked.shape[:2] else hidden

    def _too_many_logits(self, labels: torch.Tensor) -> bool:
        if getattr(self.config, "embedding_strategy", None) is None:
            return False
        return self.training or labels.numel() * num_embeddings(self.model.embed_tokens) > LOGITS_WITH_A_LOSS

    def _loss_in_pieces(self, hidden: torch.Tensor, labels: torch.Tensor, **kwargs) -> torch.Tensor:
        embedding = self.model.embed_tokens
        if self.lm_head is None:
            losses, scores = embedding.token_losses, embedding.scores_per_token
        else:
            losses, scores = dense_token_losses(self.lm_head), num_embeddings(embedding)
        return language_loss(losses, scores, hidden, labels, shift=bool(self.needs_causal), **kwargs)


class CausalLMHead(_LMHead, GenerationMixin):  # type: ignore[misc]  # both declare generation_config
    """Backbone with a language-modelling head that generates."""

    _auto_class = "AutoModelForCausalLM"
    needs_causal = True

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        # Trainer shifts the labels of label smoothing for the classes named here; this one may be a copy of the code,
        # or a user's subclass
        name = type(self).__name__
        if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
            taken = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
            MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[f"{config.model_type}:{name}" if taken else config.model_type] = name

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        seq_idx: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """
        Args:
            labels: `[B, T]`, or of the positions to keep alone; -100 where no loss is wanted; shifted inside.
            logits_to_keep: compute logits for the last n positions only (0: all), or for the given positions.
            kwargs: what the loss is told (`num_items_in_batch`, `ignore_index`, `shift_labels`).
            others: as in [`Backbone.forward`], errors too.

        Returns:
            Logits `[B, T, vocab_size]`, loss, and the state to continue from.
        """
        of_loss = check_arguments(self, kwargs, position_ids is not None or seq_idx is not None)
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            seq_idx=seq_idx,
            inputs_embeds=inputs_embeds,
            past_key_values=given_cache(past_key_values, cache),
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        kept: slice | torch.Tensor | None
        if isinstance(logits_to_keep, int):
            kept = slice(-logits_to_keep, None) if logits_to_keep else None
        else:
            kept = logits_to_keep
        loss, logits = self.predict(output.last_hidden_state, labels, kept, **of_loss)
        cache = output.get(CACHE_NAME)
        result = CausalLMOutputWithPast(loss, logits, cache, output.hidden_states)  # type: ignore[arg-type]
        return result if wants_dict(self.config, return_dict) else result.to_tuple()

    @functools.wraps(GenerationMixin.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]  # it takes the same
        check_decoding(self)
        if getattr(kwargs.get("generation_config"), "is_assistant", False):  # called again and again with its cache
            ids = kwargs.get("input_ids")
            if kwargs.get("attention_mask") is None and ids is not None:
                # transformers 5.24 leaves out a mask of ones, and would then take a pad that the model has said for one
                kwargs["attention_mask"] = torch.ones_like(ids)
            return super().generate(*args, **kwargs)
        caches = [kwargs.get(name) for name in CACHE_NAMES]
        _check_something_new(args[0] if args else kwargs.get("inputs", kwargs.get("input_ids")), given_cache(*caches))
        try:
            output = super().generate(*args, **kwargs)
            caches.append(getattr(output, CACHE_NAME, None))
        finally:  # speculative decoding has turned it on; on it would keep every token from now on
            for cache in caches:
                if isinstance(cache, RecurrentCache):
                    cache.stop_recording()
        return output

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)  # transformers reads what arguments it takes
    def prepare_inputs_for_generation(  # type: ignore[override]  # it takes the same
        self, input_ids: Any, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """As in transformers; what a given cache has seen is not fed again, which speculative decoding does since 5."""
        cache = given_cache(*(kwargs.get(name) for name in CACHE_NAMES))
        new = 0 if cache is None else input_ids.shape[1] - cache.get_seq_length()
        if new > 0 and kwargs.get("next_sequence_length", new) is None and kwargs.get("inputs_embeds") is None:
            kwargs["next_sequence_length"] = new
        return super().prepare_inputs_for_generation(input_ids, *args, **kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: transformers' continuous batching pages the keys and values of its own attention."""
        raise NotImplementedError(
            f"generate_batch: {type(self).__name__} has no paged attention, which continuous batching needs; give "
            "generate() a batch that is padded on the left"
        )

    init_continuous_batching = continuous_batching_context_manager = generate_batch


def _check_something_new(ids: torch.Tensor | None, cache: Cache | None) -> None:
    """Raise ValueError if generate() is given no token that the cache has not seen."""
    seen = 0 if cache is None else cache.get_seq_length()
    if ids is not None and seen and ids.shape[1] <= seen:
        raise ValueError(
            f"input_ids: {ids.shape[1]} tokens, and the cache has seen {seen}; generate() takes the whole text, what "
            "the cache has seen included, and at least one token more"
        )


class RecurrentForCausalLM(CausalLMHead):
    """The head of a model that generates from a state of constant size."""

    def _prepare_cache_for_generation(  # type: ignore[override]  # it takes the same
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        cache: Any = given_cache(*(model_kwargs.pop(name, None) for name in CACHE_NAMES))
        if cache is not None:
            cache._is_user_defined = True  # so that generate() leaves it as the text is
        elif generation_config.use_cache is False:
            return
        else:
            cache = RecurrentCache(self.config)
        model_kwargs[CACHE_NAME] = cache
        rejects = generation_mode == GenerationMode.ASSISTED_GENERATION
        if rejects or getattr(generation_config, "is_assistant", False):
            self.model.check_cache(cache)
            cache.activate_past_recording()


class MaskedLMHead(_LMHead):
    """Bidirectional backbone that fills masked tokens."""

    _auto_class = "AutoModelForMaskedLM"
    needs_causal = False

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
        **kwargs: Any,
    ) -> MaskedLMOutput | tuple:
        """Logits `[B, T, vocab_size]`; `labels` `[B, T]`, -100 where no loss is wanted, not shifted. Others and errors
        as in [`Backbone.forward`]."""
        of_loss = check_arguments(self, kwargs, position_ids is not None or seq_idx is not None)
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            seq_idx=seq_idx,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        loss, logits = self.predict(output.last_hidden_state, labels, **of_loss)
        result = MaskedLMOutput(loss, logits, output.hidden_states)  # type: ignore[arg-type]
        return result if wants_dict(self.config, return_dict) else result.to_tuple()


class _ClassificationHead(_Head):
    def __init__(self, config: PretrainedConfig) -> None:
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
        past_key_values: Cache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        position_ids: torch.LongTensor | None = None,
        seq_idx: torch.LongTensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast | tuple:
        """
        Args:
            attention_mask: `[B, T]`; if it is not given and the config has a `pad_token_id`, pads are found by it.
            labels: `[B]` classes, or `[B]` / `[B, num_labels]` numbers, by `config.problem_type`.
            others: as in [`Backbone.forward`], errors too.

        Returns:
            Logits `[B, num_labels]`.

        Raises:
            ValueError: a class that does not exist.
        """
        of_loss = check_arguments(self, kwargs, position_ids is not None or seq_idx is not None)
        pad = self.config.pad_token_id
        if attention_mask is None and input_ids is not None and pad is not None:
            attention_mask = (input_ids != pad).long()
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            seq_idx=seq_idx,
            inputs_embeds=inputs_embeds,
            past_key_values=given_cache(past_key_values, cache),
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.score(self.dropout(self._pool(output.last_hidden_state, attention_mask)))
        loss = None if labels is None else classification_loss(self, logits, labels, **of_loss)
        cache = output.get(CACHE_NAME)
        result = SequenceClassifierOutputWithPast(loss, logits, cache, output.hidden_states)  # type: ignore[arg-type]
        return result if wants_dict(self.config, return_dict) else result.to_tuple()

    def _pool(self, hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """[B, T, D] to [B, D]."""
        if attention_mask is None:
            attention_mask = torch.ones(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        # bfloat16 counts no further than 256
        valid = attention_mask[:, -hidden.shape[1] :].to(at_least_float32(hidden.dtype))
        if not self.config.is_causal:
            return mean_of_real(hidden, valid)
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
        **kwargs: Any,
    ) -> TokenClassifierOutput | tuple:
        """Logits `[B, T, num_labels]`; `labels` `[B, T]`, -100 where no loss is wanted, ValueError for others. The rest
        as in [`Backbone.forward`]."""
        of_loss = check_arguments(self, kwargs, position_ids is not None or seq_idx is not None)
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
        loss = None if labels is None else token_classification_loss(self, logits, labels, **of_loss)
        result = TokenClassifierOutput(loss, logits, output.hidden_states)  # type: ignore[arg-type]
        return result if wants_dict(self.config, return_dict) else result.to_tuple()
