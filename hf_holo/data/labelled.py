"""Labelled examples of one sense: one reader and one splitter for tables, folders of files and Hub data sets.

What is the same for pictures (`images.py`) and sounds (`audio.py`) is here. Files are read through `datasets`, which
leaves them as the bytes that they are; each kind decodes its own.
"""

import copy
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset as TorchDataset
from tqdm.auto import tqdm

from ..errors import HoloError, first_line, unknown
from .documents import TABLE_FORMATS, listed

if TYPE_CHECKING:
    from datasets import Dataset  # takes seconds

VALIDATION_SPLITS = ("validation", "valid", "val", "dev", "test")  # the first that a data set has is scored
LABEL_COLUMNS = ("label", "labels", "class", "target")
Own = TypeVar("Own", bound="Examples")
AnyDataset = TypeVar("AnyDataset", bound=TorchDataset)
AnyLabelled = TypeVar("AnyLabelled", bound="Labelled")
AnyExamples = TypeVar("AnyExamples", bound="Examples")
Augmentation = Callable[[Any, np.random.Generator], Any]  # an example, changed at random


class Examples(TorchDataset):
    """Rows of a table with a class each, which can be split, chosen from and checked.

    Args:
        labels: class of every row of the table `[N]`.
        class_names: names of the classes.
        source: how errors call the data, such as "train_file: 'pictures'".
        rows: which rows of the table these are, in this order; default: all.

    Attributes:
        augment: whether a collator that augments does so to these examples.
    """

    augment = True  # whether a collator may change its examples

    def __init__(
        self, labels: np.ndarray, class_names: Sequence[str], source: str, rows: np.ndarray | None = None
    ) -> None:
        self.class_names, self.source = list(class_names), source
        self.rows = np.arange(len(labels)) if rows is None else rows
        self._labels = labels

    @property
    def labels(self) -> np.ndarray:
        """Classes `[N]`."""
        return self._labels[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def select(self: Own, indices: Sequence[int] | np.ndarray) -> Own:
        """Those of the examples, in this order."""
        return changed(self, rows=self.rows[np.asarray(indices, dtype=int)])

    def check(self: Own) -> Own:
        """Read every file once, so that a damaged one is found before any work is done.

        Returns:
            These examples.

        Raises:
            HoloError: a file is missing, damaged or empty; the message names the row.
        """
        raise NotImplementedError


def changed(examples: AnyDataset, **attributes: Any) -> AnyDataset:
    """The same examples but for these attributes."""
    some = copy.copy(examples)
    vars(some).update(attributes)
    return some


class Labelled(Examples):
    """Labelled files of one sense. An example is a mapping with `row`, `labels` and what the sense calls its own.

    Args:
        table: rows of `datasets` whose column `column` holds undecoded files, `{"bytes": ..., "path": ...}`.
        column: its name.
        others: as for [`Examples`].

    Attributes:
        feature: how `datasets` calls the type of the column.
        key: the name of what is decoded, in an example.
    """

    feature: ClassVar[str]
    key: ClassVar[str]
    folder_suffixes: ClassVar[frozenset[str]] = frozenset()  # of files that `datasets` does not read from folders

    def __init__(
        self,
        table: "Dataset",
        column: str,
        labels: np.ndarray,
        class_names: Sequence[str],
        source: str,
        rows: np.ndarray | None = None,
    ) -> None:
        super().__init__(labels, class_names, source, rows)
        self.table, self.column = table, column

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = int(self.rows[index])
        return {"row": row, "augment": self.augment, self.key: self.read(row), "labels": int(self._labels[row])}

    def values(self, column: str) -> list[Any]:
        """Another column of these rows, such as the speaker.

        Raises:
            HoloError: there is no such column.
        """
        if column not in self.table.column_names:
            raise unknown(f"column of {self.source}", column, self.table.column_names)
        everything = self.table[column][:]
        return [everything[row] for row in self.rows]

    def has(self, row: int) -> bool:
        """Whether there is something in a row of the table."""
        entry = self.table[row][self.column] or {}
        return bool(entry.get("bytes") or entry.get("path"))

    def read(self, row: int) -> Any:
        """What is in a row of the table, decoded.

        Raises:
            HoloError: the file is missing, damaged or empty; the message names the row.
        """
        entry = self.table[row][self.column] or {}
        try:
            return self.decode(_content(entry))
        except Exception as error:  # of a damaged file, decoders raise anything
            name = f" ({Path(entry['path']).name})" if entry.get("path") else ""
            raise HoloError(
                f"{self.source}: row {row}{name} of column {self.column!r} cannot be read: "
                f"{first_line(error) or type(error).__name__}"
            ) from error

    def decode(self, content: bytes) -> Any:
        """The content of one file."""
        raise NotImplementedError

    def check(self: AnyLabelled) -> AnyLabelled:
        """As [`Examples.check`]."""
        for row in tqdm(self.rows, desc=f"reading {self.key}s", unit="file", leave=False, delay=2):
            self.read(int(row))
        return self


def _content(entry: Mapping[str, Any]) -> bytes:
    """The bytes of a file, which a table holds or names."""
    return entry["bytes"] if entry.get("bytes") else Path(entry.get("path") or "").read_bytes()


@dataclass(frozen=True)
class LabelledSplits(Generic[AnyExamples]):
    """What is learned from, and what is held out.

    Attributes:
        train, validation: the examples.
        class_names: names of the classes, which both share.
    """

    train: AnyExamples
    validation: AnyExamples

    @property
    def class_names(self) -> list[str]:
        return self.train.class_names

    def each(self, change: Callable[[AnyExamples], AnyExamples]) -> "LabelledSplits[AnyExamples]":
        """The same change to both parts."""
        return LabelledSplits(change(self.train), change(self.validation))

    def checked(self) -> "LabelledSplits[AnyExamples]":
        """See [`Labelled.check`]."""
        return self.each(lambda part: part.check())


# Reading ------------------------------------------------------------------------------------------------------------


def load_labelled(
    kind: type[AnyLabelled],
    train_file: str | Sequence[str] | None = None,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    column: str | None = None,
    label_column: str | None = None,
    validation_fraction: float = 0.1,
    hold_out: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> LabelledSplits[AnyLabelled]:
    """Read and split labelled files.

    A split that is called `validation` or, without one, `test` is held out; where the data has neither, a share drawn
    with the seed is.

    Args:
        kind: `Images` or `Sounds`.
        train_file: tables (parquet, JSON, CSV) with a column of files; or one folder: of tables that are called
            `train` and `test`, or of files in one folder for each class (`cat/1.png`), with or without `train/` and
            `test/` above.
        dataset_name, dataset_config_name: a data set on the Hub, in place of files.
        column, label_column: where the files and the classes are; default: the column of the kind, and the column
            whose type says that it holds classes, or else the one that is called so.
        validation_fraction: the share.
        hold_out: hold out the rows of all splits that have these values, such as `{"speaker": "theo"}`, instead.
        seed: of the share.

    Raises:
        HoloError: nothing is there, it cannot be read, or a column or a label is missing.
    """
    source = name_of_data(train_file, dataset_name)
    tables = dict(read_tables(kind, train_file, dataset_name, dataset_config_name, source))
    read = _parts(kind, tables, column, label_column, source)
    if hold_out:
        return _held_out_by_value(read, hold_out)
    return LabelledSplits(*read) if len(read) == 2 else split(read[0], validation_fraction, seed)


def load_to_score(
    kind: type[AnyLabelled],
    eval_file: str | Sequence[str],
    column: str | None = None,
    label_column: str | None = None,
) -> AnyLabelled:
    """Read labelled files to score a model on: the held-out split where they have one, or else all of them.

    Args:
        eval_file: as `train_file` of [`load_labelled`].
        others, errors: likewise.
    """
    source = name_of_data(eval_file, None, "eval_file")
    return _parts(kind, dict(read_tables(kind, eval_file, None, None, source)), column, label_column, source)[-1]


def _parts(
    kind: type[AnyLabelled],
    tables: Mapping[Any, "Dataset"],
    column: str | None,
    label_column: str | None,
    source: str,
) -> list[AnyLabelled]:
    """The split to learn from, and the one to hold out if there is one; both with the classes of both."""
    names = [name for name in named_splits(tables, source) if name is not None]
    labels, class_names = labels_of([tables[name] for name in names], label_column, source)
    return [
        kind(
            undecoded(tables[name], kind, column, source),
            column_of(tables[name], kind, column, source),
            numbers,
            class_names,
            f"{source}, {name}",
        )
        for name, numbers in zip(names, labels, strict=True)
    ]


def split(examples: AnyExamples, fraction: float, seed: int = 0) -> LabelledSplits[AnyExamples]:
    """Hold out a share of the examples, drawn with the seed: data sets are often sorted by class.

    Raises:
        HoloError: one of the two parts would be empty.
    """
    held_out = round(len(examples) * fraction)
    if not 0 < held_out < len(examples):
        raise HoloError(f"validation_fraction: {fraction} of {len(examples)} examples leaves one part empty")
    order = np.random.default_rng(seed).permutation(len(examples))
    return LabelledSplits(examples.select(np.sort(order[held_out:])), examples.select(np.sort(order[:held_out])))


def _held_out_by_value(parts: list[AnyLabelled], hold_out: Mapping[str, Any]) -> LabelledSplits[AnyLabelled]:
    from datasets import concatenate_datasets

    first = parts[0]
    whole = type(first)(
        concatenate_datasets([part.table for part in parts]),
        first.column,
        np.concatenate([part.labels for part in parts]),
        first.class_names,
        first.source,
    )
    found = np.ones(len(whole), dtype=bool)
    for column, value in hold_out.items():
        found &= np.array([str(entry) == str(value) for entry in whole.values(column)])
    if found.all() or not found.any():
        raise HoloError(f"hold_out: {dict(hold_out)} is true of {found.sum()} of {len(found)} rows; of some is needed")
    return LabelledSplits(whole.select(np.flatnonzero(~found)), whole.select(np.flatnonzero(found)))


def name_of_data(file: str | Sequence[str] | None, dataset_name: str | None, argument: str = "train_file") -> str:
    """The argument that names the data and its value, to begin a message with; `argument`: the one for files."""
    if dataset_name:
        return f"dataset_name: {dataset_name!r}"
    files = listed(file)
    if not files:
        raise HoloError(f"{argument}: name a folder, or a parquet, JSON or CSV file, or give --dataset_name")
    return f"{argument}: {', '.join(map(repr, map(str, files)))}"


def read_tables(
    kind: type[Labelled],
    train_file: str | Sequence[str] | None,
    dataset_name: str | None,
    config: str | None,
    source: str,
) -> Mapping[Any, "Dataset"]:
    """The tables by the names of their splits."""
    from datasets import load_dataset

    try:
        if dataset_name:
            return load_dataset(dataset_name, config)
        files = listed(train_file)
        for file in files:
            if not Path(file).exists():
                raise HoloError(f"{source}: there is no file or folder {str(file)!r}")
        if len(files) == 1 and Path(files[0]).is_dir():
            return _folder_by_class(kind, Path(files[0])) or load_dataset(str(files[0]))
        formats = {TABLE_FORMATS.get(Path(file).suffix) for file in files}
        if len(formats) != 1 or None in formats:
            raise HoloError(f"{source}: give one folder, or files of one of the kinds {', '.join(TABLE_FORMATS)}")
        return load_dataset(str(formats.pop()), data_files={"train": [str(file) for file in files]})
    except HoloError:
        raise
    except Exception as error:  # datasets raises many kinds, for what is missing, damaged or not to be understood
        raise HoloError(f"{source} cannot be read: {first_line(error.__cause__ or error)}") from error


def _folder_by_class(kind: type[Labelled], folder: Path) -> dict[str, "Dataset"]:
    """Files in one folder for each class, with or without folders for the splits above: by split. Nothing if there are
    none of this kind, or if `datasets` reads them itself."""
    import datasets

    rows: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in kind.folder_suffixes:
            above = path.relative_to(folder).parts[:-2]
            rows.setdefault(above[0] if above else "train", []).append(path)
    tables = {}
    for name, paths in rows.items():
        files = [{"bytes": None, "path": str(path)} for path in paths]
        table = datasets.Dataset.from_dict({kind.key: files, "label": [path.parent.name for path in paths]})
        tables[name] = table.cast_column(kind.key, getattr(datasets, kind.feature)(decode=False))
    return tables


def named_splits(tables: Mapping[str, "Dataset"], source: str) -> tuple[str, str | None]:
    """The names of the split to learn from and of the one to hold out, if there is one."""
    held_out = next((name for name in VALIDATION_SPLITS if name in tables), None)
    names = [name for name in tables if name != held_out]
    if not names:
        return str(held_out), None  # a table that is called test.parquet, alone
    name = "train" if "train" in names else names[0]
    if not len(tables[name]):
        raise HoloError(f"{source}: the split {name!r} is empty")
    return name, held_out


def column_of(table: "Dataset", kind: type[Labelled], column: str | None, source: str) -> str:
    """The column that is named, or the only one of the kind."""
    found = [name for name, feature in table.features.items() if type(feature).__name__ == kind.feature]
    if column is None:
        if len(found) == 1:
            return found[0]
        what = f"has several columns of {kind.key}s, {', '.join(found)}" if found else f"has no column of {kind.key}s"
        raise HoloError(f"{source} {what}; name one of {', '.join(table.column_names)} with --{kind.key}_column")
    if column not in table.column_names:
        raise unknown(f"column of {source}", column, table.column_names)
    return column


def undecoded(table: "Dataset", kind: type[Labelled], column: str | None, source: str) -> "Dataset":
    """The table with its files as bytes."""
    import datasets

    name = column_of(table, kind, column, source)
    try:
        return table.cast_column(name, getattr(datasets, kind.feature)(decode=False))
    except Exception as error:  # pyarrow's, for a column of another type
        raise HoloError(f"{source}: column {name!r} holds no {kind.key}s: {first_line(error)}") from error


def labels_of(tables: Sequence["Dataset"], label_column: str | None, source: str) -> tuple[list[np.ndarray], list[str]]:
    """Classes of every row of every table, and their names."""
    from datasets import ClassLabel

    first = tables[0]
    typed = [name for name, feature in first.features.items() if isinstance(feature, ClassLabel)]
    found = [label_column] if label_column else [*typed, *(name for name in LABEL_COLUMNS if name in first.features)]
    if not found or any(found[0] not in table.column_names for table in tables):
        raise HoloError(
            f"{source} has no column {label_column or 'of classes'!r}; name one of {', '.join(first.column_names)} "
            "with --label_column"
        )
    columns = [table[found[0]][:] for table in tables]
    for table, column in zip(tables, columns, strict=True):
        missing = [row for row, value in enumerate(column) if value is None or value == -1]
        if missing:
            raise HoloError(f"{source}: row {missing[0]} of {len(table)} has no label in {found[0]!r}")
    if found[0] in typed:
        return [np.asarray(column) for column in columns], list(first.features[found[0]].names)
    values = sorted({value for column in columns for value in column})
    number = {value: index for index, value in enumerate(values)}
    return [np.array([number[value] for value in column]) for column in columns], [str(value) for value in values]


# Batches ------------------------------------------------------------------------------------------------------------


class LabelledCollator:
    """Batches of what a processor makes of the examples, with augmentation in training.

    The random numbers of a batch follow from its rows and the seed. Each epoch mixes its batches again, so an example
    is changed in another way each time, and a resumed run draws the same numbers as one that was never interrupted.

    Args:
        process: a list of decoded examples to the arguments of `forward`.
        key: where an example has what was decoded.
        augmentations: are applied in this order.
        seed: of their random numbers.
    """

    def __init__(
        self,
        process: Callable[[list[Any]], Mapping[str, torch.Tensor]],
        key: str,
        augmentations: Sequence[Augmentation] = (),
        seed: int = 0,
    ) -> None:
        self.process, self.key, self.augmentations, self.seed = process, key, augmentations, seed

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rows = np.array([example["row"] for example in examples])
        random = np.random.default_rng(zlib.crc32(rows.tobytes(), self.seed))
        labels = torch.tensor([example["labels"] for example in examples])
        return {**self.process(self.decoded(examples, random)), "labels": labels}

    def decoded(self, examples: list[dict[str, Any]], random: np.random.Generator) -> list[Any]:
        """What the processor is given."""
        decoded = [example[self.key] for example in examples]
        for augment in self.augmentations if self.augmenting(examples) else ():
            decoded = [augment(one, random) for one in decoded]
        return decoded

    @staticmethod
    def augmenting(examples: list[dict[str, Any]]) -> bool:
        """Whether these examples are to be changed; held-out ones say that they are not."""
        return examples[0].get("augment", True)


def named_augmentations(names: Sequence[str], known: Mapping[str, Augmentation]) -> list[Augmentation]:
    """The augmentations of these names.

    Raises:
        HoloError: one is unknown.
    """
    for name in names:
        if name not in known:
            raise unknown("augmentation", name, known)
    return [known[name] for name in names]
