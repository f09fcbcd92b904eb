"""Losses: of language models, without [tokens × vocabulary] values in one piece, of classifiers, and of pairs."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .embeddings import check_ids
from .layers import at_least_float32
from .recording import has_values

CLASSES = "the classes, num_labels ="  # of what a label of a classification head is one
IGNORED = -100  # the label of a token without a loss, as in transformers
SCORES_AT_ONCE = 2**24  # values of one piece of the loss: 64 MiB in float32
TokenLosses = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def check_labels(
    labels: torch.Tensor, size: int, among: str = "the vocabulary of", ignore_index: int = IGNORED
) -> None:
    """[`check_ids`] of labels, of which `ignore_index` may be one."""
    check_ids("labels", labels.masked_fill(labels == ignore_index, 0), size, among)


def check_label_shape(labels: torch.Tensor, *shapes: tuple[int, ...], name: str = "labels") -> None:
    """Raise ValueError unless the labels are of one of these shapes: others would be counted against wrong outputs."""
    if tuple(labels.shape) not in shapes:
        raise ValueError(f"{name}: shape {tuple(labels.shape)}; give {' or '.join(map(str, dict.fromkeys(shapes)))}")


def true_rows(mask: torch.Tensor) -> torch.Tensor:
    """Indices of the True ones of a mask `[N]`; of all where their number cannot be known."""
    return mask.nonzero()[:, 0] if has_values(mask) else torch.arange(len(mask), device=mask.device)


def dense_token_losses(head: nn.Module) -> TokenLosses:
    """The losses of a head that is called for its scores `[..., V]`, as [`CompressedEmbedding.token_losses`]."""

    def token_losses(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        scores = head(hidden)
        return F.cross_entropy(scores.to(at_least_float32(scores.dtype)), labels, reduction="none")

    return token_losses


def language_loss(
    token_losses: TokenLosses,
    scores_per_token: int,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    shift: bool,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = IGNORED,
    shift_labels: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor:
    """Cross entropy of a language model in pieces of tokens, computed again in the backward pass.

    Args:
        token_losses: nats of labels `[N]` after hidden states `[N, D]`; it is never called with `ignore_index`.
        scores_per_token: how many values it holds for a token; a piece holds at most `SCORES_AT_ONCE`.
        hidden: `[B, T, D]`.
        labels: `[B, T]`, `ignore_index` where no loss is wanted.
        shift: whether a token predicts the next label, else its own.
        num_items_in_batch: what to divide the sum by; default: the number of labels that count.
        shift_labels: labels that are shifted already, `[B, T]`; they take the place of `labels`.
        kwargs: what else Trainer says; it changes nothing.

    Returns:
        The loss, a scalar.
    """
    if shift:
        labels = F.pad(labels[:, 1:], (0, 1), value=ignore_index) if shift_labels is None else shift_labels
    labels = labels.flatten().to(hidden.device)
    rows = true_rows(labels != ignore_index)
    hidden, labels = hidden.flatten(0, 1)[rows], labels[rows]
    counted = labels != ignore_index
    labels = labels.where(counted, 0)
    tokens = max(1, SCORES_AT_ONCE // scores_per_token)
    pieces = zip(hidden.split(tokens), labels.split(tokens), strict=True)
    losses = [checkpoint(token_losses, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]
    total = torch.cat(losses).where(counted, 0).sum()
    return total / (counted.sum() if num_items_in_batch is None else num_items_in_batch)


def language_loss_naive(
    logits: torch.Tensor, labels: torch.Tensor, shift: bool, num_items_in_batch: int | None = None
) -> torch.Tensor:
    """The same from the scores of all tokens `[B, T, V]`."""
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction=reduction)
    return loss / (num_items_in_batch or 1)


def classification_loss(
    model: Any,
    logits: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    **of_loss: Any,
) -> torch.Tensor:
    """The loss of whole texts, pictures or sounds by the loss function of `model`.

    Args:
        model: has `config`, `num_labels` and transformers' `loss_function`.
        logits: `[B, num_labels]`.
        labels: `[B]` classes, or `[B]` / `[B, num_labels]` numbers, by `config.problem_type`.
        num_items_in_batch: of a batch that is taken in pieces; default: those that are here.
        of_loss: what else Trainer tells the loss.

    Raises:
        ValueError: a class that does not exist; labels of another shape.
    """
    rows, width = logits.shape
    kind = model.config.problem_type
    numbers = labels.is_floating_point() or width == 1  # so transformers guesses, at the first labels of a model
    classes = not numbers if kind is None else kind == "single_label_classification"
    check_label_shape(labels, *([(rows,), (rows, 1)] if classes or width == 1 else [(rows, width)]))
    if classes:
        check_labels(labels, model.num_labels, CLASSES)
        of_loss["num_items_in_batch"] = num_items_in_batch
    loss = model.loss_function(labels=labels, pooled_logits=logits, config=model.config, **of_loss)
    if num_items_in_batch is None or "num_items_in_batch" in of_loss:
        return loss
    # transformers takes the mean of squares or of binary losses over this batch, whatever it is one of
    return loss * (labels.numel() / num_items_in_batch)


def token_classification_loss(model: Any, logits: torch.Tensor, labels: torch.Tensor, **of_loss: Any) -> torch.Tensor:
    """The loss of tokens or frames by the loss function of `model`.

    Args:
        model: has `config` and transformers' `loss_function`.
        logits: `[B, T, num_labels]`.
        labels: `[B, T]` classes, `IGNORED` where no loss is wanted; [`check_labels`] has seen them.
        of_loss: what else Trainer tells the loss.

    Raises:
        ValueError: labels of another shape.
    """
    check_label_shape(labels, tuple(logits.shape[:2]))
    return model.loss_function(logits, labels, model.config, **of_loss)


def contrastive_loss(logits: torch.Tensor, paired: torch.Tensor) -> torch.Tensor:
    """Cross entropy of finding the partner among all partners, the mean of both directions.

    Args:
        logits: `[N, N]`; row i and column i belong together.
        paired: `[N]` bool; where it is False row or column i is missing, and is nobody's partner.

    Returns:
        A scalar, 0 if there is no pair.
    """
    logits = logits.masked_fill(~(paired[:, None] & paired), torch.finfo(logits.dtype).min)
    own = torch.arange(len(logits), device=logits.device).where(paired, IGNORED)
    both = sum(F.cross_entropy(scores, own, ignore_index=IGNORED, reduction="sum") for scores in (logits, logits.T))
    return both / (2 * paired.sum().clamp_min(1))


def contrastive_loss_naive(logits: torch.Tensor, paired: torch.Tensor) -> torch.Tensor:
    """Twin of [`contrastive_loss`], one pair at a time."""
    rows = paired.nonzero()[:, 0].tolist()
    losses = [(logits[i, rows].logsumexp(0) + logits[rows, i].logsumexp(0)) / 2 - logits[i, i] for i in rows]
    return torch.stack(losses).mean() if losses else logits.sum() * 0
