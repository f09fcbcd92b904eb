"""Classifiers of several senses: how many held-out examples are right, with every choice of their senses."""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

from ...data.scenes import load_scenes_to_score
from ...data.senses import KEYS, SENSES, load_digits, senses_collator
from ..figures import draw_bars
from ..markdown import markdown_table
from .classifying import Scoring, class_parts, classes_told, data_of
from .models import Evaluated
from .options import Options
from .run import Part, Row, Tables

DATA = ("eval_file", "image_data", "audio_data", "question", "image_column", "audio_column", "text_column")


def parts(models: Sequence[Evaluated], options: Options) -> Iterator[Part]:
    """Classes of every model, and what is right with fewer senses.

    Raises:
        HoloError: the data is missing or damaged, or a model does not know one of its classes.
    """
    for model in models:
        processor = model.needed_processor()
        examples = _examples(options, getattr(getattr(processor, "feature_extractor", None), "sampling_rate", None))
        settings = {"model": model.fingerprint, **options.chosen(*DATA, "label_column", "limit", "batch_size")}
        scoring = Scoring(model, examples, senses_collator(processor), options)
        yield from class_parts(scoring, settings | {"examples": len(examples)})
        yield Part(
            "senses", f"{model.name}, senses", settings | {"examples": len(examples)}, partial(by_senses, scoring)
        )


def _examples(options: Options, sampling_rate: int | None) -> Any:
    """A table of texts, pictures and sounds; or digits of three senses, made of pictures and recordings."""
    if options.image_data and options.audio_data and not options.eval_file:
        sources = options.image_data, options.audio_data
        return load_digits(*sources, options.question, sampling_rate, seed=options.seed).validation
    columns = options.image_column, options.audio_column, options.text_column, options.label_column
    return load_scenes_to_score(data_of(options, "multimodal"), *columns, sampling_rate).check()


def by_senses(scoring: Scoring, seconds: float | None = None) -> list[Row]:
    """Accuracy with each choice of the senses that all of the examples have."""
    known = [sense for sense in SENSES if sense in scoring.model.model.config.modalities]
    scored = [scoring.examples[int(row)] for row in scoring.order]
    senses = [sense for sense in known if all(example[KEYS[sense]] is not None for example in scored)]
    choices = [given for count in range(1, len(senses) + 1) for given in combinations(senses, count)]
    each = None if seconds is None else seconds / max(1, len(choices))
    rows: list[Row] = []
    for given in choices:
        logits = scoring.score(scoring.examples.with_senses(*given), scoring.collator, scoring.order, each)
        row: Row = {"model": scoring.model.name, "given": " + ".join(given), "examples": len(logits)}
        rows.append(row | {"accuracy": scoring.right(logits)})
    return rows


def told(tables: Tables, folder: Path) -> str:
    """The section of the report."""
    pieces = classes_told(tables, folder)
    if rows := tables.get("senses"):
        cells = [(row["model"], row["given"], f"{row['examples']:,}", f"{row['accuracy']:.1%}") for row in rows]
        pieces.append(markdown_table(("model", "given", ">examples", ">right"), cells))
        bars = [row | {"name": f"{row['given']}, {row['model']}"} for row in rows]
        path = folder / "multimodal_senses.png"
        draw_bars(bars, "name", "accuracy", path, "What is given of each example", "share that is right", by="model")
        pieces.append(f"![What is given of each example]({path.name})")
    return "\n\n".join(pieces)
