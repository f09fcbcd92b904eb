"""Rows of a table with a text, a picture and a sound, any of which may be missing, and one class."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import HoloError, unknown
from .audio import Sounds
from .images import Images
from .labelled import (
    Examples,
    Labelled,
    LabelledSplits,
    changed,
    column_of,
    labels_of,
    name_of_data,
    named_splits,
    read_tables,
    split,
    undecoded,
)
from .senses import KEYS, SENSES

if TYPE_CHECKING:
    from datasets import Dataset  # takes seconds


class Scenes(Examples):
    """Examples with `row`, `labels`, `image`, `audio` and `text`, each of them None where it is missing.

    Args:
        senses: "vision", "audio" and "text" to what has them: pictures, sounds, or the text of every row.
        others: as for [`Examples`].
    """

    def __init__(
        self,
        senses: Mapping[str, Labelled | Sequence[str | None]],
        labels: np.ndarray,
        class_names: Sequence[str],
        source: str,
        rows: np.ndarray | None = None,
    ) -> None:
        super().__init__(labels, class_names, source, rows)
        self.senses = dict(senses)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = int(self.rows[index])
        given = {KEYS[sense]: self._sense(sense, row) for sense in SENSES}
        return {"row": row, "augment": self.augment, "labels": int(self._labels[row]), **given}

    def _sense(self, sense: str, row: int) -> Any:
        source = self.senses.get(sense)
        if source is None:
            return None
        if isinstance(source, Labelled):
            return source.read(row) if source.has(row) else None
        return source[row] or None

    def with_senses(self, *senses: str) -> "Scenes":
        """The same examples, of which only these senses are given."""
        return changed(self, senses={sense: self.senses[sense] for sense in senses if sense in self.senses})

    def check(self) -> "Scenes":
        """Read every file once.

        Returns:
            These examples.

        Raises:
            HoloError: a file is damaged, or a row has nothing at all; the message names the row.
        """
        for index, row in enumerate(self.rows):
            example = self[index]
            if all(example[KEYS[sense]] is None for sense in SENSES):
                raise HoloError(f"{self.source}: row {row} has neither {', nor '.join(self.senses)}")
        return self


def load_scenes(
    train_file: str | Sequence[str] | None = None,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    image_column: str | None = None,
    audio_column: str | None = None,
    text_column: str = "text",
    label_column: str | None = None,
    validation_fraction: float = 0.1,
    seed: int = 0,
    sampling_rate: int | None = None,
) -> LabelledSplits[Scenes]:
    """Read and split tables with at least two of a column of texts, one of pictures and one of sounds.

    Args:
        text_column: where texts are, if there is such a column.
        sampling_rate: of the sounds, in Hz; default: as recorded.
        others: as in [`load_labelled`].

    Raises:
        HoloError: as [`load_labelled`]; there are fewer than two senses.
    """
    source = name_of_data(train_file, dataset_name)
    tables = dict(read_tables(Images, train_file, dataset_name, dataset_config_name, source))
    columns = {"vision": image_column, "audio": audio_column, "text": text_column}
    parts = _parts(tables, columns, label_column, source, sampling_rate)
    return LabelledSplits(*parts) if len(parts) == 2 else split(parts[0], validation_fraction, seed)


def load_scenes_to_score(
    eval_file: str | Sequence[str],
    image_column: str | None = None,
    audio_column: str | None = None,
    text_column: str = "text",
    label_column: str | None = None,
    sampling_rate: int | None = None,
) -> Scenes:
    """Read tables as [`load_scenes`] does, to score a model on: the held-out split where they have one, or else all."""
    source = name_of_data(eval_file, None, "eval_file")
    columns = {"vision": image_column, "audio": audio_column, "text": text_column}
    tables = dict(read_tables(Images, eval_file, None, None, source))
    return _parts(tables, columns, label_column, source, sampling_rate)[-1]


def _parts(
    tables: Mapping[Any, "Dataset"],
    columns: Mapping[str, str | None],
    label_column: str | None,
    source: str,
    sampling_rate: int | None,
) -> list[Scenes]:
    """The split to learn from, and the one to hold out if there is one; both with the classes of both."""
    names = [name for name in named_splits(tables, source) if name is not None]
    labels, class_names = labels_of([tables[name] for name in names], label_column, source)
    parts = []
    for name, numbers in zip(names, labels, strict=True):
        place = f"{source}, {name}"
        senses = _senses(tables[name], columns, numbers, class_names, place, sampling_rate)
        if len(senses) < 2:
            has = ", ".join(tables[name].column_names)
            raise HoloError(
                f"{place}: {len(senses)} of texts, pictures and sounds among its columns {has}; two are needed"
            )
        parts.append(Scenes(senses, numbers, class_names, place))
    return parts


def _senses(
    table: "Dataset",
    columns: Mapping[str, str | None],
    labels: np.ndarray,
    class_names: Sequence[str],
    source: str,
    sampling_rate: int | None,
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for sense, kind in (("vision", Images), ("audio", Sounds)):
        typed = any(type(feature).__name__ == kind.feature for feature in table.features.values())
        if columns[sense] or typed:
            column = column_of(table, kind, columns[sense], source)
            found[sense] = kind(undecoded(table, kind, columns[sense], source), column, labels, class_names, source)
    if "audio" in found and sampling_rate is not None:
        found["audio"] = found["audio"].at(sampling_rate)
    text = str(columns["text"])
    if text in table.column_names:
        found["text"] = table[text][:]
    elif text != "text":
        raise unknown(f"column of {source}", text, table.column_names)
    return found
