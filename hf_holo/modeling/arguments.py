"""What forward is called with: an argument that is not understood is never swallowed.

transformers and its clients pass some arguments to every model, whether it has a use for them or not. Those that ask
nothing of these models pass; all others raise, as they would without `**kwargs`.
"""

import difflib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from .recording import exporting, has_values

LOSS_ARGUMENTS = ("num_items_in_batch", "ignore_index", "shift_labels")  # what Trainer and users tell the loss
BORDERS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")  # of documents, for flash attention


class Spare(NamedTuple):
    """An argument that these models have no use for: with which values it passes, and why no others do."""

    passes: Callable[[Any], bool]
    reason: str


def _unset(value: Any) -> bool:
    return value is None or value is False


SPARE = {
    "cache_position": Spare(lambda value: True, ""),  # the cache counts its tokens itself
    "tokenizer": Spare(lambda value: True, ""),  # generate() finds stop_strings by it, and hands it on to every model
    "output_attentions": Spare(_unset, "these models give no attention weights"),
    "output_router_logits": Spare(_unset, "these models have no routers"),
    "use_cache": Spare(_unset, "this model continues from nothing"),
    "inputs_embeds": Spare(_unset, "this model takes no embeddings in the place of its inputs"),
    "output_hidden_states": Spare(_unset, "this model gives no hidden states, but its encoders do"),
    "token_type_ids": Spare(lambda ids: ids is None or not bool(ids.any()), "these models know no segments"),
}


def check_arguments(model: nn.Module, given: dict[str, Any], borders_known: bool = False) -> dict[str, Any]:
    """Refuse what `forward` of this model was given and does not understand.

    Args:
        model: names the error, and what it does take.
        given: the arguments that its `forward` does not name.
        borders_known: whether `position_ids` or `seq_idx` tell the documents of a row apart, so that `cu_seq_lens_q`
            and its like, which a collator may pass as well, say nothing new.

    Returns:
        Those for the loss.

    Raises:
        TypeError: an argument that is unknown; the message names it, and the one that is nearest.
        ValueError: an argument of transformers that asks for what these models do not have.
    """
    for name, value in given.items():
        if name in LOSS_ARGUMENTS:
            continue
        if name in SPARE:
            if not SPARE[name].passes(value):
                raise ValueError(f"{name}: {SPARE[name].reason}, so {type(model).__name__} cannot honour it")
        elif name in BORDERS:
            if value is not None and not borders_known:
                raise ValueError(f"{name}: give position_ids or seq_idx, by which these models tell documents apart")
        else:
            raise TypeError(_unknown(model, name))
    return {name: value for name, value in given.items() if name in LOSS_ARGUMENTS}


def _unknown(model: nn.Module, name: str) -> str:
    known = [key for key in inspect.signature(type(model).forward).parameters if key not in ("self", "kwargs")]
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; it takes {', '.join(known)}"
    return f"{type(model).__name__}.forward() got an unexpected argument {name!r}{hint}"


def check_mask(mask: torch.Tensor | None, rows: int, tokens: int, seen: int) -> None:
    """Refuse an `attention_mask` that is not one row of 0 and 1 for every text.

    Args:
        mask: `[B, T]`, or `[B, S]` for all tokens so far; a single row holds for all texts.
        rows: B.
        tokens: T, those that are fed.
        seen: how many the cache has seen; S = seen + T.

    Raises:
        ValueError: another shape, or values that are added to scores.
    """
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        given = f"shape {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else f"a {type(mask).__name__}"
        raise ValueError(
            f"attention_mask: {given}; give [batch, tokens] with 1 at real tokens and 0 at padding;"
            " which token sees which is the model's own, and documents are told apart by position_ids or seq_idx"
        )
    if exporting():
        return
    if mask.shape[1] not in (tokens, seen + tokens):
        or_all = f", or {seen + tokens} with those in the cache" if seen else ""
        raise ValueError(
            f"attention_mask: shape {tuple(mask.shape)}; {tokens} columns are needed for {tokens} tokens{or_all}"
        )
    _check_rows("attention_mask", mask, rows)
    if mask.is_floating_point() and has_values(mask) and bool((mask < 0).any()):
        raise ValueError(
            "attention_mask: it has values below 0, as masks that are added to scores; give 1 at real tokens and 0 at "
            "padding"
        )


def check_per_token(rows: int, tokens: int, **given: torch.Tensor | None) -> None:
    """Refuse what says something of every token (by its name) unless it is `[rows, tokens]`, or one row for all.

    Raises:
        ValueError: another shape.
    """
    if exporting():
        return
    for name, value in given.items():
        if value is None:
            continue
        if value.dim() != 2 or value.shape[1] != tokens:
            raise ValueError(f"{name}: shape {tuple(value.shape)}; give [batch, tokens], {tokens} columns here")
        _check_rows(name, value, rows)


def _check_rows(name: str, value: torch.Tensor, rows: int) -> None:
    if value.shape[0] not in (1, rows):
        raise ValueError(f"{name}: shape {tuple(value.shape)}; the batch has {rows} rows: give as many, or one for all")
