"""Masked language modelling: what is masked in training, what in evaluation, and a text with its gaps filled."""

import zlib
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset
from transformers import DataCollatorForLanguageModeling, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import HoloError
from ..modeling.losses import IGNORED
from .windows import (
    AnyWindows,
    Collator,
    Splits,
    TokenDataset,
    Windows,
    check_length,
    check_windows,
    count_labels,
    document_starts,
    encode,
    window_starts,
)

EVALUATION_SEED = 0  # of no run: all of them are scored on the same masks


class Masking:
    """Hides tokens by the rules of transformers' DataCollatorForLanguageModeling, special tokens never.

    Args:
        tokenizer: with a mask token.
        fraction: share of tokens to hide, in (0, 1).
        only_masks: hidden tokens all become the mask token. Otherwise 80 % do, 10 % become random tokens and 10 % stay
            what they are, so that a model in training cannot trust what it sees either.

    Raises:
        HoloError: `fraction` is out of range.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, fraction: float, only_masks: bool = False) -> None:
        if not 0.0 < fraction < 1.0:
            raise HoloError(f"mlm_probability: {fraction} is not between 0 and 1")
        self.special = torch.tensor(tokenizer.all_special_ids)
        probabilities: dict[str, Any] = {"mask_replace_prob": 1.0, "random_replace_prob": 0.0} if only_masks else {}
        self.rules = DataCollatorForLanguageModeling(tokenizer, mlm_probability=fraction, **probabilities)

    def __call__(self, ids: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What a model sees, and the labels: `[B, T]` ids to `[B, T]` each. At least one token is hidden, if any is no
        special one: a loss over none would not be a number."""
        special = torch.isin(ids, self.special)
        self.rules.generator = torch.Generator().manual_seed(seed)
        while True:
            inputs, labels = self.rules.torch_mask_tokens(ids.clone(), special)
            if special.all() or (labels != IGNORED).any():
                return inputs, labels


class MaskingCollator(Collator):
    """[`Collator`] that masks examples without labels; those of a validation set bring theirs.

    The masks of a batch follow from its tokens and the seed. Each epoch mixes its batches again, so a window is masked
    in another way each time, and a resumed run draws the same masks as one that was never interrupted.
    """

    def __init__(self, masking: Masking, pad_token_id: int, seed: int) -> None:
        super().__init__(pad_token_id)
        self.masking, self.seed = masking, seed

    def __call__(self, examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        if "labels" in examples[0]:
            return super().__call__(examples)
        batch = super().__call__([{**example, "labels": example["input_ids"]} for example in examples])
        seed = zlib.crc32(batch["input_ids"].numpy().tobytes(), self.seed)
        batch["input_ids"], batch["labels"] = self.masking(batch["input_ids"], seed)
        return batch


class MaskedWindows(TokenDataset):
    """Windows with masks that depend on the place of a window alone: a fixed set to score models on.

    Attributes:
        tokens: number of hidden tokens.
    """

    def __init__(self, windows: AnyWindows, masking: Masking) -> None:
        self.examples: list[dict[str, torch.Tensor]] = []
        for number in range(len(windows)):
            inputs, labels = masking(windows[number]["input_ids"][None], EVALUATION_SEED + number)
            self.examples.append({"input_ids": inputs[0], "labels": labels[0]})
        self.tokens = sum(count_labels(example["labels"]) for example in self.examples)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.examples[index]


def masked_splits(
    train: list[str],
    validation: list[str],
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    stride: int | None = None,
    apart: bool = False,
    fraction: float = 0.15,
) -> Splits:
    """Windows for masked language modelling; those of the validation set are masked once and for all.

    Args:
        apart: whether every document is cut into windows of its own. Otherwise they continue from one into the next.
        fraction: share of tokens that is hidden.
        others: as in [`text_splits`].

    Raises:
        HoloError: there is too little text, or a size is out of range.
    """
    stride = check_windows(block_size, stride)
    masking = Masking(tokenizer, fraction, only_masks=True)

    def encoded(texts: list[str]) -> list[np.ndarray]:
        return [encode(tokenizer, documents) for documents in ([[text] for text in texts] if apart else [texts])]

    train_ids, validation_ids = encoded(train), encoded(validation)
    if not apart:
        check_length(train_ids[0], validation_ids[0], block_size)
    starts = document_starts if apart else window_starts
    windows = [Windows(ids, block_size, starts(len(ids), block_size, stride)) for ids in train_ids]
    held_out = [Windows(ids, block_size, range(0, len(ids), block_size)) for ids in validation_ids]
    scored = MaskedWindows(ConcatDataset(held_out), masking)
    train_tokens, prompt = sum(map(len, train_ids)), tokenizer.decode(scored[0]["input_ids"])
    return Splits(ConcatDataset(windows), scored, train_tokens, scored.tokens, None, prompt)


@torch.no_grad()
def fill(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor) -> torch.Tensor:
    """Token ids `[T]` with the most likely plain token in place of every mask, all of them filled in one pass."""
    gaps = ids == tokenizer.mask_token_id
    scores = model.eval()(ids[None].to(model.device)).logits[0, gaps].cpu()  # [gaps, V]
    scores[:, tokenizer.all_special_ids] = -torch.inf
    return ids.masked_scatter(gaps, scores.argmax(-1))


def filled_sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: torch.Tensor,
    labels: torch.Tensor | None = None,
) -> str:
    """A masked text `[T]` as the model sees it, as the model fills it and, if the labels are known, as it is."""
    filled = fill(model, tokenizer, input_ids)
    parts = {"masked": input_ids, "filled": filled}
    if labels is not None:
        gaps = labels != IGNORED
        parts[f"in the file ({(filled == labels)[gaps].sum()} of {gaps.sum()} right)"] = input_ids.where(~gaps, labels)
    return "\n".join(f"----- {title}:\n{tokenizer.decode(part)}\n" for title, part in parts.items())
