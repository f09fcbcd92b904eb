"""A test of a few milliseconds before the first generation of a process: does the cache reach the model?

transformers hands it over by name. A release that renames it would feed every model one token at a time, without a
word; a fine-looking text of nonsense is all that a user would see.
"""

import inspect
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from .recording import exporting
from .versions import REMEDY, in_use

ALLOWED = 1e-3  # difference of logits, relative to their spread, that rounding explains
ALLOWED_ROUNDED = 0.05  # the same in half precision and with quantised weights
_tested: set[type] = set()


def check_decoding(model: PreTrainedModel) -> None:
    """Decode two tokens with a cache and without, once for each class of models.

    A model in training mode (dropout makes its own differences), or whose inputs another package prepares, is left
    alone.

    Raises:
        RuntimeError: the logits differ; the message names the versions and the remedy.
    """
    kind = type(model)
    if kind in _tested or model.training or exporting() or "prepare_inputs_for_generation" in vars(model):
        return
    _tested.add(kind)  # before: the test generates, too
    try:
        try:
            ids, decoded = _decoded(model)
        except (TypeError, ValueError) as error:
            _read_whole(model, _start(model))  # what fails here too has to do with something else
            raise RuntimeError(_message(kind, f"decoding with a cache fails: {error}")) from error
        if _difference(decoded, _read_whole(model, ids)) > _allowed(model):  # NaN says nothing
            raise RuntimeError(_message(kind, "decoding with a cache differs from decoding without one"))
    except Exception:
        _tested.discard(kind)
        raise


def _start(model: PreTrainedModel) -> torch.Tensor:
    """Two tokens `[1, 2]`."""
    return torch.arange(2, device=model.device)[None] % model.config.vocab_size


def _decoded(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Two tokens and the first that `generate` adds `[1, 3]`, and the logits of the second `[1, V]`."""
    ids = _start(model)
    greedy: dict[str, Any] = {
        "max_new_tokens": 2,
        "min_new_tokens": 2,
        "do_sample": False,
        "num_beams": 1,
        "pad_token_id": 0,
    }
    config = GenerationConfig(use_cache=True, output_logits=True, return_dict_in_generate=True, **greedy)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "generation_config": config}
    if "use_model_defaults" in inspect.signature(GenerationMixin.generate).parameters:
        options["use_model_defaults"] = False  # transformers 4.57 would sample if the model's own config says so
    output: Any = GenerationMixin.generate(model, ids, **options)  # type: ignore[arg-type]  # it is one as well
    return output.sequences[:, :3], output.logits[-1]


@torch.no_grad()
def _read_whole(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The logits `[1, V]` after these tokens, read at once and without a cache."""
    return model(input_ids=ids, use_cache=False, return_dict=True).logits[:, -1]


def _difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    got, expected = got.double(), expected.double()
    return ((got - expected).norm() / (expected - expected.mean()).norm()).item()


def _allowed(model: PreTrainedModel) -> float:
    exact = model.dtype in (torch.float32, torch.float64) and getattr(model, "hf_quantizer", None) is None
    return ALLOWED if exact else ALLOWED_ROUNDED


def _message(kind: type, what: str) -> str:
    return f"{kind.__name__}: {what}: {in_use()} do not fit together; {REMEDY}"
