"""One held-out loss for all commands: nats per token, each token counted once whatever the batch size."""

from collections.abc import Mapping
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..modeling.losses import IGNORED
from .windows import Collator

Array = TypeVar("Array", torch.Tensor, np.ndarray)


def held_out_loss(
    model: nn.Module,
    windows: Dataset[Mapping[str, torch.Tensor]],
    batch_size: int = 1,
    pad_token_id: int = 0,
    shift: bool = True,
    description: str = "scoring",
) -> float:
    """Mean loss over all labels of the windows, in nats per token; arguments as of [`summed_over`].

    `hf-holo train` computes the same from what Trainer gathers (`hf_holo.eval.metrics.LanguageScores`): both sum
    [`summed_scores`] in float64.
    """
    nats, tokens, _ = summed_over(model, windows, batch_size, pad_token_id, shift, description)
    return (nats / tokens).item()


@torch.no_grad()
def summed_over(
    model: nn.Module,
    windows: Dataset[Mapping[str, torch.Tensor]],
    batch_size: int = 1,
    pad_token_id: int = 0,
    shift: bool = True,
    description: str = "scoring",
) -> torch.Tensor:
    """Nats, tokens and right first guesses `[3]` over all labels of the windows, in float64.

    Args:
        model: with logits `[B, T, V]`; it is left in evaluation mode.
        windows: of `input_ids` and `labels`, as this package cuts them.
        batch_size: windows at a time.
        pad_token_id: fills up shorter windows.
        shift: whether a label belongs to the logits of the position before, as for causal models.
        description: of the progress bar.
    """
    device = next(model.parameters()).device
    model.eval()
    totals = torch.zeros(3, dtype=torch.float64)
    loader = DataLoader(windows, batch_size, collate_fn=Collator(pad_token_id))
    for batch in tqdm(loader, desc=description, unit="batch", leave=False):
        batch = {name: value.to(device) for name, value in batch.items()}
        labels = batch.pop("labels")
        totals += summed_scores(model(**batch).logits, labels, shift).double().sum(0).cpu()
    return totals


def aligned(logits: Array | tuple[Array, ...], labels: Array, shift: bool) -> tuple[Array, Array]:
    """Logits and the labels that they are to predict; `shift`: those of the next position."""
    logits = only_logits(logits)
    return (logits[:, :-1], labels[:, 1:]) if shift else (logits, labels)


def summed_losses(
    logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor, shift: bool = True
) -> torch.Tensor:
    """Loss of each row and the number of tokens it is summed over: `[B, T, V], [B, T] -> [B, 2]`."""
    logits, targets = aligned(logits, labels, shift)
    losses = F.cross_entropy(logits.float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
    return torch.stack([losses.sum(1), (targets != IGNORED).sum(1)], dim=1)


def summed_scores(
    logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor, shift: bool = True
) -> torch.Tensor:
    """[`summed_losses`], and the number of tokens that were the model's first guess: `[B, 3]`."""
    guesses, targets = aligned(logits, labels, shift)
    hits = (guesses.argmax(-1) == targets).sum(1, keepdim=True)  # an ignored label is not the id of a token
    return torch.cat([summed_losses(logits, labels, shift), hits], dim=1)


def only_logits(output: Array | tuple[Array, ...]) -> Array:
    """The logits, where a model gives more than them."""
    return output[0] if isinstance(output, tuple) else output
