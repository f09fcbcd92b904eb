"""What the suites vision, audio and multimodal share: how well a classifier tells the classes of held-out examples.

Examples come in a random order that is the same for every model, so that what fits into a budget is a fair sample.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ...data.labelled import Augmentation, LabelledCollator
from ...errors import HoloError, first_line
from ..classes import draw_confusion
from ..figures import draw_bars, draw_lines
from ..markdown import markdown_table
from ..metrics import ClassScores, confusion_matrix
from ..timing import interleaved_times
from .models import Evaluated
from .options import Options
from .run import Part, Row, Tables

UNCHANGED = "as they are"
Conditions = Mapping[str, Augmentation | None]  # by their names what changes an example; None: nothing


class Scoring:
    """The scores of a model on held-out examples, computed once.

    Args:
        model: with its processor.
        examples: that are read, with `labels` and `class_names`.
        collator: makes batches for the model.
        options: sizes.

    Raises:
        HoloError: the model does not know a class of the data.
    """

    def __init__(self, model: Evaluated, examples: Any, collator: LabelledCollator, options: Options) -> None:
        self.model, self.examples, self.collator, self.options = model, examples, collator, options
        self.numbers = _numbers(model, examples.class_names)
        order = np.random.default_rng(options.seed).permutation(len(examples))
        self.order = order[: options.limit] if options.limit else order
        self._logits: np.ndarray | None = None

    @property
    def names(self) -> list[str]:
        """Of the classes of the model."""
        return _class_names(self.model)

    def logits(self, seconds: float | None = None) -> np.ndarray:
        """`[N, classes]` of the first N examples, all of them or as many as fit into the seconds."""
        if self._logits is None:
            self._logits = self.score(self.examples, self.collator, self.order, seconds)
        return self._logits

    @torch.no_grad()
    def score(
        self, examples: Any, collator: LabelledCollator, order: np.ndarray, seconds: float | None = None
    ) -> np.ndarray:
        """`[N, classes]` of these examples in this order."""
        model, size, start, found = self.model, self.options.batch_size, time.perf_counter(), []
        batches = range(0, len(order), size)
        for first in tqdm(batches, desc=model.name, unit="batch", leave=False, delay=2):
            batch = collator([examples[int(row)] for row in order[first : first + size]])
            given = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
            found.append(model.model(**given).logits.float().cpu().numpy())
            if seconds is not None and time.perf_counter() - start > seconds:
                break
        return np.concatenate(found)

    def labels(self, count: int) -> np.ndarray:
        """Of the first examples, as the model numbers the classes: `[count]`."""
        return self.numbers[np.asarray(self.examples.labels)[self.order[:count]]]

    def right(self, logits: np.ndarray) -> float:
        """Share of the first examples whose best class is theirs."""
        return float((logits.argmax(-1) == self.labels(len(logits))).mean())


def _class_names(model: Evaluated) -> list[str]:
    known = model.model.config.id2label or {}
    return [str(known[number]) for number in sorted(known)]


def _numbers(model: Evaluated, class_names: Sequence[str]) -> np.ndarray:
    """How the model numbers the classes of the data: by their names, or in their order where it has no names."""
    own = _class_names(model)
    if own == [f"LABEL_{number}" for number in range(len(own))]:
        if len(class_names) > len(own):
            raise HoloError(f"MODEL: {model.name!r} has {len(own)} classes, and the data {len(class_names)}")
        return np.arange(len(class_names))
    missing = [name for name in class_names if name not in own]
    if missing:
        raise HoloError(
            f"MODEL: {model.name!r} does not know the class {missing[0]!r} of the data; it knows {', '.join(own[:20])}"
        )
    return np.array([own.index(name) for name in class_names])


def data_of(options: Options, suite: str) -> str | Sequence[str]:
    """The files to score.

    Raises:
        HoloError: none are named.
    """
    if not options.eval_file:
        raise HoloError(f"eval_file: the suite {suite!r} needs a table or a folder of labelled examples")
    return options.eval_file


def sense_parts(
    scoring: Scoring, settings: dict[str, Any], conditions: Conditions, speed: Callable[..., list[Row]]
) -> Iterator[Part]:
    """What is measured of a classifier of pictures or of sounds: classes, conditions and times.

    Args:
        scoring: of the model.
        settings: that its scores depend on.
        conditions: as for [`under_conditions`].
        speed: times a model; gets the model, the repeats and the seed.
    """
    model, options = scoring.model, scoring.options
    yield from class_parts(scoring, settings)
    measure = partial(under_conditions, scoring, conditions)
    yield Part("conditions", f"{model.name}, conditions", settings, measure)
    timing = {"model": model.fingerprint, **options.chosen("repeats")}
    yield Part("speed", f"{model.name}, speed", timing, partial(speed, model, options.repeats, options.seed))


def class_parts(scoring: Scoring, settings: dict[str, Any]) -> Iterator[Part]:
    """How many are right, and what is taken for what."""
    name = scoring.model.name
    yield Part("classes", f"{name}, classes", settings, partial(_classes, scoring))
    yield Part("confusion", f"{name}, confusion", settings, partial(_confusion, scoring))


def _classes(scoring: Scoring, seconds: float | None = None) -> list[Row]:
    start = time.perf_counter()
    logits = scoring.logits(seconds)
    took = time.perf_counter() - start
    scores = ClassScores().of(logits, scoring.labels(len(logits)))
    row: Row = {"model": scoring.model.name, "examples": len(logits), **scores}
    return [row | {"ms_each": 1000 * took / len(logits)}]


def _confusion(scoring: Scoring, seconds: float | None = None) -> list[Row]:
    """How many examples of a class were taken for each, in long form and without zeros."""
    logits, names = scoring.logits(seconds), scoring.names
    counts = confusion_matrix(logits.argmax(-1), scoring.labels(len(logits)), len(names))
    return [
        {"model": scoring.model.name, "class": names[true], "taken_for": names[guess], "examples": int(count)}
        for (true, guess), count in np.ndenumerate(counts)
        if count
    ]


def under_conditions(scoring: Scoring, conditions: Conditions, seconds: float | None = None) -> list[Row]:
    """Accuracy of the same examples, each time changed in one way.

    Args:
        scoring: of one model.
        conditions: of the examples.
        seconds: for all of them.
    """
    each = None if seconds is None else seconds / len(conditions)
    rows = []
    for name, change in conditions.items():
        if change is None:
            logits = scoring.logits(each)
        else:
            collator = LabelledCollator(
                scoring.collator.process, scoring.collator.key, [change], seed=scoring.options.seed
            )
            logits = scoring.score(scoring.examples, collator, scoring.order, each)
        row: Row = {"model": scoring.model.name, "condition": name, "examples": len(logits)}
        rows.append(row | {"accuracy": scoring.right(logits)})
    return rows


@torch.no_grad()
def timed(model: Evaluated, size: str, inputs: dict[int, dict[str, torch.Tensor]], repeats: int) -> list[Row]:
    """Time of one example of every size, in turns; a size that a model does not take has a reason in place of it.

    Args:
        model: a classifier.
        size: how the column of sizes is called.
        inputs: arguments of its forward by size.
        repeats: of every timing.
    """
    taken, rows = {}, []
    for number, given in inputs.items():
        given = {name: value.to(model.device, model.model.dtype) for name, value in given.items()}
        try:
            model.model(**given)
        except (ValueError, RuntimeError) as error:
            rows.append({"model": model.name, size: number, "ms": None, "spread": None, "reason": first_line(error)})
            continue
        taken[number] = partial(model.model, **given)
    times = interleaved_times({str(number): call for number, call in taken.items()}, repeats, warmup=0)
    for number in taken:
        found = 1000 * np.array(times[str(number)])
        row: Row = {"model": model.name, size: number, "ms": float(np.median(found))}
        rows.append(row | {"spread": float(found.max() - found.min()), "reason": None})
    return sorted(rows, key=lambda row: row[size])


# The report ---------------------------------------------------------------------------------------------------------


def sense_told(tables: Tables, folder: Path, suite: str, what: str, size: str, sizes: str) -> str:
    """The section of pictures or of sounds.

    Args:
        tables: of the suite.
        folder: of the pictures.
        suite: its name.
        what: the examples, in words.
        size: column of the sizes in the table of times.
        sizes: what that counts, in words.
    """
    pieces = [*classes_told(tables, folder), *conditions_told(tables, folder, suite, what)]
    if rows := tables.get("speed"):
        title, file = f"Time of one of the {what}", f"{suite}_speed.png"
        pieces += times_told(rows, size, sizes)
        draw_lines(rows, size, "ms", folder / file, title, (sizes, "ms"), log_y=True)
        pieces.append(f"![{title}]({file})")
    return "\n\n".join(pieces)


def classes_told(tables: Tables, folder: Path) -> list[str]:
    """A table of all models, and for each a picture of what it takes for what."""
    rows = tables.get("classes", [])
    head = ("model", ">examples", ">right", ">F1", ">nats", ">ms each")
    cells = [
        (
            row["model"],
            f"{row['examples']:,}",
            f"{row['accuracy']:.1%}",
            f"{row['f1']:.3f}",
            f"{row['loss']:.3f}",
            f"{row['ms_each']:.1f}",
        )
        for row in rows
    ]
    pieces = [markdown_table(head, cells)] if cells else []
    counted = tables.get("confusion", [])
    for number, model in enumerate(dict.fromkeys(row["model"] for row in counted)):
        own = [row for row in counted if row["model"] == model]
        names = list(dict.fromkeys(row[side] for side in ("class", "taken_for") for row in own))
        counts = np.zeros((len(names), len(names)), dtype=int)
        for row in own:
            counts[names.index(row["class"]), names.index(row["taken_for"])] = row["examples"]
        file = f"confusion_{number}.png"
        draw_confusion(counts, names, folder / file, model)
        pieces.append(f"![What {model} takes for what]({file})")
    return pieces


def conditions_told(tables: Tables, folder: Path, suite: str, what: str) -> list[str]:
    """A table and a picture of how much is right under every condition; `what`: the examples, in words."""
    rows = tables.get("conditions", [])
    if not rows:
        return []
    models, names = (list(dict.fromkeys(row[key] for row in rows)) for key in ("model", "condition"))
    found = {(row["model"], row["condition"]): f"{row['accuracy']:.1%}" for row in rows}
    cells = [(name, *(found.get((model, name), "") for model in models)) for name in names]
    path = folder / f"{suite}_conditions.png"
    bars = [
        row | {"name": f"{row['condition']}, {row['model']}"}
        for name in names
        for row in rows
        if row["condition"] == name
    ]
    title = f"Held-out {what}, as they are and changed"
    draw_bars(bars, "name", "accuracy", path, title, "share that is right", by="model")
    return [markdown_table((what, *(f">{model}" for model in models)), cells), f"![{title}]({path.name})"]


def times_told(rows: Sequence[Row], size: str, head: str) -> list[str]:
    """A table of times, a line for every size and a column for every model."""
    if not rows:
        return []
    models, sizes = list(dict.fromkeys(row["model"] for row in rows)), sorted({row[size] for row in rows})
    found = {(row["model"], row[size]): "not taken" if row["ms"] is None else f"{row['ms']:,.1f}" for row in rows}
    cells = [(f"{number:,}", *(found.get((model, number), "") for model in models)) for number in sizes]
    return [markdown_table((f">{head}", *(f">{model}, ms" for model in models)), cells)]
