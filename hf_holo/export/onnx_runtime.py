"""Generation on ONNX Runtime, for graphs whose state is whatever it is. Needs the extra `onnx`."""

import re
from typing import Any, NoReturn

import torch
from transformers import GenerationConfig, PretrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

try:
    from onnxruntime import InferenceSession
    from onnxruntime.transformers.io_binding_helper import TypeHelper
    from optimum.onnxruntime import ORTModelForCausalLM
except ImportError as error:
    raise ImportError("HoloORTModelForCausalLM needs the extra `onnx` (and with it transformers 4.57)") from error

from ..errors import HoloError
from ..modeling.arguments import check_arguments
from ..modeling.cache import RecurrentCache, given_cache
from .graph import State, positions
from .onnx_config import register

register()  # for `from_pretrained(..., export=True)`

NOT_IN_A_GRAPH = ("seq_idx", "labels", "inputs_embeds", "output_attentions", "output_hidden_states")


def _cannot_replay(tokens: int) -> NoReturn:
    raise NotImplementedError("an exported graph cannot take tokens back")


class HoloORTModelForCausalLM(ORTModelForCausalLM):
    """An exported causal language model that generates as in PyTorch: greedy, sampling, beams, left padding.

    Made by `from_pretrained(folder)` from what `optimum-cli export onnx` or `hf-holo export` has written, or, with
    `export=True`, from a checkpoint. Optimum's own class takes every cache for keys and values of attention; this one
    reads the states off the inputs of the graph, of any family. Called with a piece of a text and the
    `past_key_values` of the pieces before, it continues.
    """

    _is_stateful = True  # a graph cannot take tokens back: transformers refuses assisted decoding

    def __init__(
        self,
        *,
        config: PretrainedConfig | None = None,
        session: InferenceSession | None = None,
        use_io_binding: bool | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs: Any,
    ) -> None:
        # past the parent's, which computes the shapes of keys and values
        super(ORTModelForCausalLM, self).__init__(config=config, session=session, use_io_binding=False, **kwargs)
        self.generation_config = generation_config
        self.states = [state for name in self.input_names if (state := self._state(name)) is not None]
        self.can_use_cache = bool(self.states)

    def _state(self, name: str) -> State | None:
        """The state that an input of the graph is, None if it is not a state."""
        match = re.fullmatch(r"past_key_values\.(\d+)\.(\w+)", name)
        if match is None:
            return None
        shape = tuple(size if isinstance(size, int) else None for size in self.input_shapes[name][1:])
        return State(int(match[1]), match[2], shape, TypeHelper.ort_type_to_torch_type(self.input_dtypes[name]))

    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: RecurrentCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_dict: bool | None = None,
        cache: RecurrentCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """
        Args:
            input_ids: `[B, T]`.
            attention_mask: `[B, T]` or, after earlier pieces, `[B, S]` for all tokens so far; 0 at padding.
            past_key_values, cache: what to continue from, updated in place; two names of one argument.
            use_cache: whether to return it; default: if the graph has a state.
            logits_to_keep: give the logits of this many last tokens, or of these; default: all.
            return_dict: False for a tuple.
            kwargs: what a graph has no use for, such as `cache_position`.

        Returns:
            Logits `[B, T, vocab_size]`, and the state to continue from.

        Raises:
            TypeError: an unknown argument.
            HoloError: a graph cannot do what is asked for: documents side by side in a row, a loss, inner states.
        """
        if asked := [name for name in NOT_IN_A_GRAPH if kwargs.get(name) is not None and kwargs[name] is not False]:
            raise HoloError(f"{', '.join(asked)}: an exported graph cannot take or give it; leave it out")
        told = {name: value for name, value in kwargs.items() if name not in (*NOT_IN_A_GRAPH, "position_ids")}
        check_arguments(self, told, kwargs.get("position_ids") is not None)
        cache = given_cache(past_key_values, cache)
        if cache is None and self.states:
            cache = RecurrentCache(self.config)
        tokens, seen = input_ids.shape[1], 0 if cache is None else cache.get_seq_length()
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        missing = max(0, seen + tokens - mask.shape[1])
        feed = {"input_ids": input_ids, "attention_mask": torch.nn.functional.pad(mask, (missing, 0), value=1)}
        if "position_ids" in self.input_names:
            given = kwargs.get("position_ids")
            feed["position_ids"] = positions(feed["attention_mask"], tokens) if given is None else given
        elif _packed(kwargs.get("position_ids"), feed["attention_mask"]):
            raise HoloError("position_ids: an exported graph reads one document in a row; give each its own row")
        layers = [] if cache is None else cache.layers
        for state in self.states:
            held = layers[state.layer].get(state.name)
            feed[state.input_name] = state.zeros(len(input_ids)) if held is None else held
        outputs = self._prepare_onnx_outputs(True, self.session.run(None, self._prepare_onnx_inputs(True, feed)))
        for state in self.states:
            layers[state.layer].put(state.name, outputs[state.output_name], tokens, _cannot_replay)
        if cache is not None:
            cache.advance(tokens)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = outputs["logits"][:, kept]
        output = CausalLMOutputWithPast(None, logits, None if use_cache is False else cache)
        return output.to_tuple() if return_dict is False else output

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if self.states and generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = RecurrentCache(self.config)

    @staticmethod
    def _reorder_cache(past_key_values: RecurrentCache, beam_idx: torch.LongTensor) -> RecurrentCache:
        past_key_values.reorder_cache(beam_idx)
        return past_key_values


def _packed(position_ids: torch.Tensor | None, mask: torch.Tensor) -> bool:
    """Whether a token after another one has position 0, which begins a document."""
    if position_ids is None:
        return False
    begins = (position_ids == 0) & mask[:, -position_ids.shape[1] :].bool()
    return bool((begins & (mask.cumsum(1)[:, -position_ids.shape[1] :] > 1)).any())
