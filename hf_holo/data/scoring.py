"""One held-out loss for all commands: nats per token, each token counted once whatever the batch size."""

from collections.abc import Mapping
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from ..distributed.processes import is_main, share_of, summed
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
    shared: bool = False,
) -> float:
    """Mean loss over all labels of the windows, in nats per token; arguments as of [`summed_over`].

    `hf-holo train` computes the same from what Trainer gathers (`hf_holo.eval.metrics.LanguageScores`): both sum
    [`summed_scores`] in float64.
    """
    nats, tokens, _ = summed_over(model, windows, batch_size, pad_token_id, shift, description, shared)
    return (nats / tokens).item()


@torch.no_grad()
def summed_over(
    model: nn.Module,
    windows: Dataset[Mapping[str, torch.Tensor]],
    batch_size: int = 1,
    pad_token_id: int = 0,
    shift: bool = True,
    description: str = "scoring",
    shared: bool = False,
) -> torch.Tensor:
    """Nats, tokens and right first guesses `[3]` over all labels of the windows, in float64.

    Args:
        model: with logits `[B, T, V]`; it is left in evaluation mode.
        windows: of `input_ids` and `labels`, as this package cuts them.
        batch_size: windows at a time.
        pad_token_id: fills up shorter windows.
        shift: whether a label belongs to the logits of the position before, as for causal models.
        description: of the progress bar.
        shared: all processes of the run are here with the same model and windows, and each takes a part of them.
    """
    if shared:
        windows = Subset(windows, share_of(len(windows)))  # type: ignore[arg-type]  # torch declares no length
    device = next(model.parameters()).device
    model.eval()
    totals = torch.zeros(3, dtype=torch.float64)
    loader = DataLoader(windows, batch_size, collate_fn=Collator(pad_token_id))
    for batch in tqdm(loader, desc=description, unit="batch", leave=False, disable=shared and not is_main()):
        batch = {name: value.to(device) for name, value in batch.items()}
        labels = batch.pop("labels")
        totals += summed_scores(model(**batch).logits, labels, shift).double().sum(0).cpu()
    return summed(totals) if shared else totals


def aligned(logits: Array | tuple[Array, ...], labels: Array, shift: bool) -> tuple[Array, Array]:
    """Logits and the labels that they are to predict; `shift`: those of the next position."""
    logits = only_logits(logits)
    return (logits[:, :-1], labels[:, 1:]) if shift else (logits, labels)


def summed_losses(
    logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor, shift: bool = True
) -> torch.Tensor:
    """Loss of each row and the number of tokens it is summed over: `[B, T, V], [B, T] -> [B, 2]`."""
    logits, targets = aligned(logits, labels, shift)
    return torch.stack([_losses(logits, targets).sum(1), (targets != IGNORED).sum(1)], dim=1)


@torch.no_grad()
def summed_by_position(
    model: nn.Module, windows: Dataset[Mapping[str, torch.Tensor]], batch_size: int = 1, pad_token_id: int = 0
) -> torch.Tensor:
    """Nats and number of predictions at every position of the windows, over all of them: `[T, 2]`, in float64.

    Row t is what was predicted from t tokens of its window, so row 0 is empty; arguments as of [`summed_over`].
    """
    device = next(model.parameters()).device
    model.eval()
    totals = torch.zeros(0, 2, dtype=torch.float64)
    for batch in DataLoader(windows, batch_size, collate_fn=Collator(pad_token_id)):
        labels = batch.pop("labels").to(device)
        inputs = {name: value.to(device) for name, value in batch.items()}
        logits, targets = aligned(model(**inputs).logits, labels, shift=True)
        nats, wanted = _losses(logits, targets).double(), (targets != IGNORED).double()
        found = torch.stack([nats, wanted], -1).sum(0).cpu()  # [T - 1, 2]
        totals = F.pad(totals, (0, 0, 0, max(0, 1 + len(found) - len(totals))))
        totals[1 : 1 + len(found)] += found
    return totals


def _losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Nats of every target, 0 where none is wanted: `[B, T, V], [B, T] -> [B, T]`."""
    return F.cross_entropy(logits.float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")


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
