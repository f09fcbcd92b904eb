"""One reader and one splitter of texts for all commands: files, folders, tables, built-in texts, Hub data sets."""

import sysconfig
import tokenize
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import HoloError

if TYPE_CHECKING:
    from datasets import Dataset  # takes seconds, and most texts need none of it

TABLE_FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".py")
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
    train_file: str | Sequence[str] | None = None,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    text_column: str = "text",
) -> list[str]:
    """Read texts from files or folders, or from a built-in or Hub dataset.

    Text files are read as they are, one document each; tables (parquet, JSON, JSON lines, CSV) give one document per
    row. A folder gives all its text files and tables, in the order of their names.

    Raises:
        HoloError: nothing is named, nothing is there, nothing is in it, it is not UTF-8, or the column is missing.
    """
    if dataset_name in BUILT_IN_TEXTS:
        found: Sequence[str | None] = BUILT_IN_TEXTS[dataset_name]()
    elif dataset_name:
        found = _column(read_hub(dataset_name, dataset_config_name), text_column, dataset_name)
    else:
        found = [text for file in find_files(train_file) for text in _read_texts(file, text_column)]
    documents = [text for text in found if text]
    if not any(text.strip() for text in documents):
        raise HoloError(f"{name_of_source(train_file, dataset_name)} contains no text")
    return documents


def read_named(name: str, text_column: str = "text") -> list[str]:
    """The documents of a file or folder, or of the built-in or Hub dataset of that name."""
    is_file = Path(name).exists() or bool(Path(name).suffix)  # a name with a suffix is a file that is missing
    return read_documents(name, text_column=text_column) if is_file else read_documents(None, name, None, text_column)


def name_of_source(train_file: str | Sequence[str] | None, dataset_name: str | None) -> str:
    """The argument that names the data and its value, to begin a message with."""
    if dataset_name:
        return f"dataset_name: {dataset_name!r}"
    return f"train_file: {', '.join(map(repr, listed(train_file)))}"


def find_files(train_file: str | Sequence[str] | None) -> list[Path]:
    """The files that are named, and those in the folders that are.

    Raises:
        HoloError: nothing is named, it is not there, or a folder holds nothing to read.
    """
    if not train_file:
        raise HoloError("train_file: name a text file, a folder, a parquet or JSON file, or give --dataset_name")
    return [file for name in listed(train_file) for file in _files_at(name)]


def listed(train_file: str | Sequence[str] | None) -> list[str]:
    """One or more names as a list."""
    return [train_file] if isinstance(train_file, str) else list(train_file or [])


def _files_at(name: str) -> list[Path]:
    path = Path(name)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise HoloError(f"train_file: there is no file or folder {name!r}")
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in {*TEXT_SUFFIXES, *TABLE_FORMATS})
    if not files:
        suffixes = " ".join([*TEXT_SUFFIXES, *TABLE_FORMATS])
        raise HoloError(f"train_file: the folder {name!r} contains no file with one of the suffixes {suffixes}")
    return files


def _read_texts(file: Path, text_column: str) -> Sequence[str | None]:
    if file.suffix in TABLE_FORMATS:
        return _column(read_table(file), text_column, str(file))
    try:
        return [file.read_bytes().decode("utf-8")]  # bytes, so that line ends stay as they are
    except UnicodeDecodeError as error:
        raise HoloError(
            f"train_file: {str(file)!r} is not UTF-8 text (byte {error.start} is {error.object[error.start]:#04x}); "
            "convert it to UTF-8"
        ) from None


def read_table(file: Path) -> "Dataset":
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        return load_dataset(TABLE_FORMATS[file.suffix], data_files=str(file), split="train")
    except (DatasetGenerationError, ValueError, StopIteration) as error:
        reason = str(error.__cause__ or error).partition("\n")[0]
        raise HoloError(
            f"train_file: {str(file)!r} is not a valid {TABLE_FORMATS[file.suffix]} file: {reason}"
        ) from None


def read_hub(name: str, config: str | None) -> "Dataset":
    from datasets import load_dataset

    try:
        return load_dataset(name, config, split="train")
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise HoloError(
            f"dataset_name: cannot load {name!r}: {reason}; built-in: {', '.join(BUILT_IN_TEXTS)}"
        ) from None


def _column(table: "Dataset", text_column: str, source: str) -> list[str | None]:
    if text_column not in table.column_names:
        raise HoloError(f"text_column: {source!r} has no column {text_column!r}, only {', '.join(table.column_names)}")
    texts = table[text_column][:]
    wrong = next((text for text in texts if not isinstance(text, str | None)), None)
    if wrong is not None:
        raise HoloError(
            f"text_column: {text_column!r} of {source!r} holds {type(wrong).__name__}, where text is expected"
        )
    return texts


# Splitting ----------------------------------------------------------------------------------------------------------


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
    before = np.cumsum([0, *(len(documents[i]) for i in order)])  # characters before every document
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
