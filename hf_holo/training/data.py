"""Training data: text packed into windows, and instructions with the loss on the response only."""

import sysconfig
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Dataset
from transformers import PreTrainedTokenizerBase

from ..errors import HoloError

IGNORED = -100  # the label that transformers' losses leave out
TABLE_FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".py")
RESPONSE_MARK = "### Response:\n"
NOT_WRITTEN = ("encodings", "pydoc_data", "_sysconfigdata")  # tables that programs have made
TESTS = ("test", "tests", "idle_test")


def python_help() -> list[str]:
    """The help topics of the running Python: about 460,000 characters of English prose that need no download."""
    topics = import_module("pydoc_data.topics").topics
    return ["\n\n".join(topics[name] for name in sorted(topics))]


def stdlib_sources() -> dict[str, str]:
    """The source of the running Python's standard library: `"email/charset.py"` to its text, in the order of names.

    Only what can be imported and what people have written: no tests, no installed packages, no tables that programs
    have made, no empty files.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    sources = ((name, _source_text(root / name)) for name in names if _is_library(name))
    return {name: text for name, text in sources if text}


def _is_library(name: str) -> bool:
    *folders, module = name.removesuffix(".py").split("/")
    importable = all(part.isidentifier() for part in (*folders, module))  # "site-packages" and its like are not
    return importable and not set(folders) & set(TESTS) and not name.startswith(NOT_WRITTEN)


@cache  # ten megabytes that are asked for again and again
def _source_text(path: Path) -> str:
    with tokenize.open(path) as file:  # in the encoding that the file declares
        return file.read()


def python_stdlib() -> list[str]:
    """The files of [`stdlib_sources`]: about ten million characters of code that need no download."""
    return list(stdlib_sources().values())


BUILT_IN_TEXTS = {"python-help": python_help, "python-stdlib": python_stdlib}


# Reading ------------------------------------------------------------------------------------------------------------


def read_documents(
    train_file: str | None = None,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    text_column: str = "text",
) -> list[str]:
    """Read texts from a file or folder, or from a built-in or Hub dataset.

    Text files are read as they are, one document each; tables (parquet, JSON, JSON lines, CSV) give one document per
    row. A folder gives all its text files and tables, in the order of their names.

    Raises:
        HoloError: nothing is named, nothing is there, nothing is in it, it is not UTF-8, or the column is missing.
    """
    if dataset_name in BUILT_IN_TEXTS:
        documents = BUILT_IN_TEXTS[dataset_name]()
    elif dataset_name:
        documents = _column(_read_hub(dataset_name, dataset_config_name), text_column, dataset_name)
    else:
        documents = [text for file in _files(train_file) for text in _read_texts(file, text_column)]
    documents = [text for text in documents if text]
    if not any(text.strip() for text in documents):
        raise HoloError(f"{_source(train_file, dataset_name)} holds no text")
    return documents


def read_records(
    train_file: str | None = None, dataset_name: str | None = None, dataset_config_name: str | None = None
) -> list[dict[str, str]]:
    """Read instruction data in the Alpaca format: rows with `instruction`, `output` and, where there is one, `input`.

    Raises:
        HoloError: nothing is there, or a column is missing.
    """
    source = _source(train_file, dataset_name)
    if dataset_name:
        tables = [_read_hub(dataset_name, dataset_config_name)]
    else:
        tables = [_read_table(file) for file in _files(train_file) if file.suffix in TABLE_FORMATS]
    records = [row for table in tables for row in table]
    if not records:
        raise HoloError(f"{source} holds no instruction data; a parquet, JSON or JSON-lines file is wanted")
    needed = ("instruction", "output")
    missing = [name for name in needed if name not in records[0]]
    if missing:
        raise HoloError(f"{source} has no column {', '.join(missing)}; the Alpaca format is wanted")
    for number, record in enumerate(records):
        if not all(isinstance(record[name], str) for name in needed):
            raise HoloError(f"{source}: record {number} has no text as its {' or its '.join(needed)}: {record}"[:300])
    return records


def _source(train_file: str | None, dataset_name: str | None) -> str:
    return f"dataset_name: {dataset_name!r}" if dataset_name else f"train_file: {train_file!r}"


def _files(train_file: str | None) -> list[Path]:
    if not train_file:
        raise HoloError("train_file: name a text file, a folder, a parquet or JSON file, or give --dataset_name")
    path = Path(train_file)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise HoloError(f"train_file: there is no file or folder {train_file!r}")
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in {*TEXT_SUFFIXES, *TABLE_FORMATS})
    if not files:
        suffixes = " ".join([*TEXT_SUFFIXES, *TABLE_FORMATS])
        raise HoloError(f"train_file: the folder {train_file!r} holds no file with one of the suffixes {suffixes}")
    return files


def _read_texts(file: Path, text_column: str) -> list[str]:
    if file.suffix in TABLE_FORMATS:
        return _column(_read_table(file), text_column, str(file))
    try:
        return [file.read_bytes().decode("utf-8")]  # bytes, so that line ends stay as they are
    except UnicodeDecodeError as error:
        raise HoloError(
            f"train_file: {str(file)!r} is not UTF-8 text (byte {error.start} is {error.object[error.start]:#04x}); "
            "convert it to UTF-8"
        ) from None


def _read_table(file: Path):
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        return load_dataset(TABLE_FORMATS[file.suffix], data_files=str(file), split="train")
    except (DatasetGenerationError, ValueError, StopIteration) as error:
        reason = str(error.__cause__ or error).partition("\n")[0]
        raise HoloError(f"train_file: {str(file)!r} is no valid {TABLE_FORMATS[file.suffix]} file: {reason}") from None


def _read_hub(name: str, config: str | None):
    from datasets import load_dataset

    try:
        return load_dataset(name, config, split="train")
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise HoloError(
            f"dataset_name: cannot load {name!r}: {reason}; built-in: {', '.join(BUILT_IN_TEXTS)}"
        ) from None


def _column(table, text_column: str, source: str) -> list[str | None]:
    if text_column not in table.column_names:
        raise HoloError(f"text_column: {source!r} has no column {text_column!r}, only {', '.join(table.column_names)}")
    texts = table[text_column][:]
    wrong = next((text for text in texts if not isinstance(text, str | None)), None)
    if wrong is not None:
        raise HoloError(
            f"text_column: {text_column!r} of {source!r} holds {type(wrong).__name__}, where text is wanted"
        )
    return texts


# Text ---------------------------------------------------------------------------------------------------------------


def split_documents(documents: list[str], fraction: float) -> tuple[list[str], list[str]]:
    """Cut off the last `fraction` of the characters for validation; the cut may go through a document."""
    if not 0.0 < fraction < 1.0:
        raise HoloError(f"validation_fraction: {fraction} is not between 0 and 1")
    left = int((1.0 - fraction) * sum(map(len, documents)))
    train, validation = [], []
    for text in documents:
        train.append(text[:left])
        validation.append(text[left:])
        left = max(left - len(text), 0)
    return [text for text in train if text], [text for text in validation if text]


def hold_out_documents(documents: list[str], fraction: float) -> tuple[list[str], list[str]]:
    """Hold out whole documents, drawn with a fixed seed, until they make up `fraction` of the characters.

    Raises:
        HoloError: `fraction` is out of range, or one of the two parts would be empty.
    """
    if not 0.0 < fraction < 1.0:
        raise HoloError(f"validation_fraction: {fraction} is not between 0 and 1")
    order = np.random.default_rng(0).permutation(len(documents))
    before = np.cumsum([0, *(len(documents[i]) for i in order)])  # characters ahead of every document
    held_out = set(order[before[:-1] < fraction * before[-1]].tolist())
    if len(held_out) == len(documents):
        raise HoloError(
            f"validation_fraction: {fraction} of {len(documents)} whole documents leaves none to train on; "
            "give more documents, or documents: joined"
        )
    parts: tuple[list[str], list[str]] = ([], [])
    for number, text in enumerate(documents):
        parts[number in held_out].append(text)
    return parts


def encode(tokenizer: PreTrainedTokenizerBase, documents: Iterable[str]) -> np.ndarray:
    """Token ids of the documents as one `[N]` int32 array, with the end token (if there is one) between documents."""
    parts: list[list[int]] = []
    for number, text in enumerate(documents):
        if number and tokenizer.eos_token_id is not None:
            parts.append([tokenizer.eos_token_id])
        parts.extend(_token_ids(tokenizer, list(_pieces(text))))
    return np.fromiter(chain.from_iterable(parts), dtype=np.int32)


def _pieces(text: str, size: int = 1 << 16) -> Iterator[str]:
    """Cut a long text behind line ends, so that the tokenizer's memory stays small."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + size) + 1 or len(text)
        yield text[start:end]
        start = end


def _token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    # split_special_tokens: what looks like a special token inside the text is text.
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, split_special_tokens=True).input_ids


class Windows(Dataset):
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
    """Windows in which every id but the first is to be predicted from those ahead of it."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = super().__getitem__(index)["input_ids"]
        labels = window.clone()
        labels[0] = IGNORED  # nothing precedes it; transformers 4 would count it as a target all the same
        return {"input_ids": window, "labels": labels}


def window_starts(length: int, block_size: int, stride: int) -> range:
    """Where full windows start in a text of `length` ids; the ids behind the last one are left over.

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


# Instructions -------------------------------------------------------------------------------------------------------


def alpaca_prompt(record: dict[str, str]) -> str:
    """The text in front of the response. `input` may be missing or empty."""
    parts = ["### Instruction:\n" + record["instruction"]]
    if record.get("input"):
        parts.append("### Input:\n" + record["input"])
    return "\n\n".join([*parts, RESPONSE_MARK])


class Responses(Dataset):
    """Prompt and response of each record, with labels on the response and its end token only.

    Responses are cut at `block_size` tokens; records whose prompt leaves no room for a response are left out.
    """

    def __init__(self, records: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, block_size: int) -> None:
        if tokenizer.eos_token_id is None:
            raise HoloError("tokenizer: it has no end-of-sequence token, which ends a response")
        self.rows: list[tuple[list[int], list[int]]] = []
        self.records: list[dict[str, str]] = []
        self.characters = 0  # in all scored responses together
        for record in records:
            prompt, response = _token_ids(tokenizer, [alpaca_prompt(record), record["output"]])
            response = [*response, tokenizer.eos_token_id][: max(block_size - len(prompt), 0)]
            if response:
                self.rows.append((prompt, response))
                self.records.append(record)
                self.characters += len(tokenizer.decode(response, skip_special_tokens=True))
        if not self.rows:
            raise HoloError(f"block_size: no prompt among {len(records)} records is shorter than {block_size} tokens")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        prompt, response = self.rows[index]
        return {
            "input_ids": torch.tensor(prompt + response),
            "labels": torch.tensor([IGNORED] * len(prompt) + response),
        }


# Both ---------------------------------------------------------------------------------------------------------------


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
            batch["attention_mask"] = (torch.arange(lengths.max()) < lengths[:, None]).long()  # [B, T]
        return batch


@dataclass
class Splits:
    """What a run trains on and what it is scored on.

    Attributes:
        train, validation: datasets of `input_ids` and `labels`.
        tokens: number of validation tokens that are scored.
        characters: number of characters that they stand for; None: they stand for no whole text.
        prompt: text to start a sample from.
    """

    train: Dataset
    validation: Dataset
    tokens: int
    characters: int | None
    prompt: str


def text_splits(
    train: list[str],
    validation: list[str],
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    stride: int | None = None,
) -> Splits:
    """Pack texts into windows that go on from one document into the next.

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
    """Cut every document into windows of its own. End tokens stand ahead of it and behind it, so that a model learns
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
        sum(len(ids) - 1 for ids in validation_ids),
        sum(map(len, validation)),
        prompt=tokenizer.decode(validation_ids[0][1:-1][:32]),
    )


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


def instruction_splits(
    records: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, block_size: int, fraction: float
) -> Splits:
    """Hold out a `fraction` of the records, drawn with a fixed seed: such data is often sorted by task.

    Raises:
        HoloError: one of the two parts would be empty.
    """
    held_out = round(len(records) * fraction)
    if not 0 < held_out < len(records):
        raise HoloError(f"validation_fraction: {fraction} of {len(records)} records leaves one part empty")
    order = np.random.default_rng(0).permutation(len(records))
    train = Responses([records[i] for i in order[held_out:]], tokenizer, block_size)
    validation = Responses([records[i] for i in order[:held_out]], tokenizer, block_size)
    tokens = sum(len(response) for _, response in validation.rows)
    return Splits(train, validation, tokens, validation.characters, prompt=alpaca_prompt(validation.records[0]))
