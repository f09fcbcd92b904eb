"""One window cutter for all commands: texts become token ids, and these the windows to train on and to be scored on."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset
from transformers import PreTrainedTokenizerBase

from ..errors import HoloError
from ..modeling.losses import IGNORED


def encode(tokenizer: PreTrainedTokenizerBase, documents: Iterable[str]) -> np.ndarray:
    """Token ids of the documents as one `[N]` int32 array, with the end token (if there is one) between documents."""
    parts: list[list[int]] = []
    for number, text in enumerate(documents):
        if number and tokenizer.eos_token_id is not None:
            parts.append([tokenizer.eos_token_id])
        if text:  # a tokenizer refuses to read nothing
            parts.extend(token_ids(tokenizer, list(_pieces(text))))
    return np.fromiter(chain.from_iterable(parts), dtype=np.int32)


def _pieces(text: str, size: int = 1 << 16) -> Iterator[str]:
    """Cut a long text after line ends, so that the tokenizer's memory stays small."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + size) + 1 or len(text)
        yield text[start:end]
        start = end


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    # split_special_tokens: what looks like a special token inside the text is text.
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, split_special_tokens=True).input_ids


class TokenDataset(Dataset[dict[str, torch.Tensor]]):
    """A dataset that knows its length: torch declares none."""

    def __len__(self) -> int:
        raise NotImplementedError(f"{type(self).__name__} does not say how many examples it has")


AnyWindows = TokenDataset | ConcatDataset | Subset


class Windows(TokenDataset):
    """Windows of `block_size` token ids.

    Args:
        ids: `[N]` token ids.
        block_size: length of a window; the last one may be shorter.
        starts: where the windows start.
    """

    def __init__(self, ids: np.ndarray, block_size: int, starts: Sequence[int]) -> None:
        self.ids, self.block_size, self.starts = ids, block_size, starts

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = self.starts[index]
        return {"input_ids": torch.from_numpy(self.ids[start : start + self.block_size].astype(np.int64))}


class CausalWindows(Windows):
    """Windows in which every id but the first is to be predicted from those before it."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = super().__getitem__(index)["input_ids"]
        labels = window.clone()
        labels[0] = IGNORED  # nothing precedes it; transformers 4 would count it as a target all the same
        return {"input_ids": window, "labels": labels}


def window_starts(length: int, block_size: int, stride: int) -> range:
    """Where full windows start in a text of `length` ids; the ids after the last one are left over.

    `stride == block_size` packs the text without overlap. A smaller stride shows every token `block_size / stride`
    times per epoch, each time at another place of its window, which regularises better than repeating the same
    windows, and leaves order, seed and resume to Trainer's sampler.
    """
    return range(0, length - block_size + 1, stride)


def document_starts(length: int, block_size: int, stride: int) -> list[int]:
    """The same for a text that no window may leave: one more window covers its end, and a short text is a window."""
    last = max(length - block_size, 0)
    return sorted({*window_starts(length, block_size, stride), last})


def training_windows(ids: np.ndarray, block_size: int, stride: int) -> CausalWindows:
    """Windows of one long text, see [`window_starts`]."""
    return CausalWindows(ids, block_size, window_starts(len(ids), block_size, stride))


def scoring_windows(ids: np.ndarray, block_size: int) -> CausalWindows:
    """Windows in which every id but the very first is predicted exactly once: neighbours share one id."""
    return CausalWindows(ids, block_size, range(0, len(ids) - 1, block_size - 1))


class SlidingWindows(CausalWindows):
    """Windows that overlap, in which every id but the very first is predicted exactly once, from at least
    `block_size - stride` ids before it wherever the text has them.

    Args:
        ids: `[N]` token ids.
        block_size: length of a window; the last one may be shorter.
        stride: ids that a window predicts, all but the first.
    """

    def __init__(self, ids: np.ndarray, block_size: int, stride: int) -> None:
        self.stride = check_windows(block_size, stride)
        last = max(0, len(ids) - block_size + stride - 1) // stride
        super().__init__(ids, block_size, range(0, last * stride + 1, stride))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = super().__getitem__(index)
        if index:
            window["labels"][: self.block_size - self.stride] = IGNORED  # those before have been predicted
        return window


def evenly(windows: AnyWindows, count: int) -> AnyWindows:
    """`count` windows at equal distances over all of them; all if there are fewer, or for 0.

    Raises:
        HoloError: `count` is negative.
    """
    if count < 0:
        raise HoloError(f"eval_windows: {count} is negative; a number of windows, or 0 for all")
    total = len(windows)
    return Subset(windows, [i * total // count for i in range(count)]) if 0 < count < total else windows


def fingerprint(windows: AnyWindows) -> str:
    """SHA-256 of the tokens of all windows: equal for equal windows."""
    digest = hashlib.sha256()
    for i in range(len(windows)):
        digest.update(windows[i]["input_ids"].numpy().tobytes())
    return digest.hexdigest()


@dataclass
class Collator:
    """Stack examples; pad shorter ones on the right, with a mask only where there is padding."""

    pad_token_id: int

    def __call__(self, examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        pad = torch.nn.utils.rnn.pad_sequence
        batch = {
            "input_ids": pad([e["input_ids"] for e in examples], batch_first=True, padding_value=self.pad_token_id),
            "labels": pad([e["labels"] for e in examples], batch_first=True, padding_value=IGNORED),
        }
        if lengths.min() < lengths.max():
            batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()  # [B, T]
        return batch


@dataclass
class Splits:
    """What a run trains on and what it is scored on.

    Attributes:
        train, validation: datasets of `input_ids` and `labels`.
        train_tokens: number of tokens to learn from, each counted once.
        tokens: number of validation tokens that are scored.
        characters: number of characters that they stand for; None: they stand for no whole text.
        prompt: text to start a sample from.
        documents: number of documents or records that all of it comes from.
    """

    train: AnyWindows
    validation: AnyWindows
    train_tokens: int
    tokens: int
    characters: int | None
    prompt: str
    documents: int = 0

    def scored_on(self, eval_windows: int) -> "Splits":
        """The same, scored on this many windows at equal distances; 0: on all."""
        validation = evenly(self.validation, eval_windows)
        if validation is self.validation:
            return self
        labels = (validation[i]["labels"] for i in range(len(validation)))
        return replace(self, validation=validation, tokens=sum(map(count_labels, labels)), characters=None)


def text_splits(
    train: list[str],
    validation: list[str],
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    stride: int | None = None,
) -> Splits:
    """Pack texts into windows that continue from one document into the next.

    Raises:
        HoloError: the training text is shorter than one window, or a size is out of range.
    """
    stride = check_windows(block_size, stride)
    train_ids, validation_ids = encode(tokenizer, train), encode(tokenizer, validation)
    check_length(train_ids, validation_ids, block_size)
    characters = sum(map(len, validation)) - len(tokenizer.decode(validation_ids[:1]))
    return Splits(
        training_windows(train_ids, block_size, stride),
        scoring_windows(validation_ids, block_size),
        len(train_ids),
        len(validation_ids) - 1,
        characters,
        prompt=tokenizer.decode(validation_ids[:32]),
    )


def document_splits(
    train: list[str],
    validation: list[str],
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    stride: int | None = None,
) -> Splits:
    """Cut every document into windows of its own. End tokens come before it and after it, so that a model learns
    how one begins and where it ends.

    Raises:
        HoloError: the tokenizer has no end token, or a size is out of range.
    """
    stride = check_windows(block_size, stride)
    end = tokenizer.eos_token_id
    if end is None:
        raise HoloError("documents: to keep them apart, the tokenizer needs an end-of-sequence token")

    def encoded(texts: list[str]) -> list[np.ndarray]:
        return [np.concatenate([[end], encode(tokenizer, [text]), [end]]).astype(np.int32) for text in texts]

    train_ids, validation_ids = encoded(train), encoded(validation)
    return Splits(
        ConcatDataset([CausalWindows(i, block_size, document_starts(len(i), block_size, stride)) for i in train_ids]),
        ConcatDataset([scoring_windows(ids, block_size) for ids in validation_ids]),
        sum(map(len, train_ids)),
        sum(len(ids) - 1 for ids in validation_ids),
        sum(map(len, validation)),
        prompt=tokenizer.decode(validation_ids[0][1:-1][:32]),
    )


def count_labels(labels: torch.Tensor) -> int:
    """How many of these labels `[T]` are tokens to predict."""
    return int((labels != IGNORED).sum())


def check_windows(block_size: int, stride: int | None) -> int:
    """The distance between windows, by default their length.

    Raises:
        HoloError: a size is out of range.
    """
    if block_size < 2:
        raise HoloError(f"block_size: {block_size} is too small; at least 2 tokens")
    stride = block_size if stride is None else stride
    if not 1 <= stride <= block_size:
        raise HoloError(f"stride: {stride} is not between 1 and block_size = {block_size}")
    return stride


def check_length(train_ids: np.ndarray, validation_ids: np.ndarray, block_size: int) -> None:
    """Raise HoloError unless there is a window to train on and a token to predict."""
    if len(train_ids) < block_size:
        raise HoloError(
            f"block_size: the training text has {len(train_ids)} tokens, fewer than one block of {block_size}; "
            "give more text or a smaller block_size"
        )
    if len(validation_ids) < 2:
        raise HoloError("validation_fraction: fewer than two tokens are left for validation; give more text")
