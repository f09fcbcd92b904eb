"""Questions that a model was not trained on: LAMBADA, BLiMP, PIQA, ARC and COPA from local files, through lm-eval.

The tasks are the YAML files in `tasks/`; the evaluator is lm-eval's. Where not all questions are asked, they are taken
at equal distances over the file.
"""

import logging
import statistics
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import HoloError
from ..conformance.quiet import quiet
from ..markdown import markdown_table
from .models import Evaluated
from .options import Options
from .run import Part, Row, Tables, affordable

if TYPE_CHECKING:
    from ..harness import HoloLM

FILES = {  # of the tasks; in this order
    "lambada": "lambada.jsonl",
    "blimp": "blimp.parquet",
    "piqa": "piqa.jsonl",
    "arc_easy": "arc_easy.jsonl",
    "arc_challenge": "arc_challenge.jsonl",
    "copa": "copa.jsonl",
}
CHANCE = {"lambada": 0.0, "blimp": 0.5, "piqa": 0.5, "arc_easy": 0.25, "arc_challenge": 0.25, "copa": 0.5}  # about
TRIED = 8  # questions that tell how long one takes


def parts(models: Sequence[Evaluated], options: Options) -> Iterator[Part]:
    """Every task whose file is in the folder, for every model.

    Raises:
        HoloError: no folder is named, there is no question in it, lm-eval is missing, or a model has no tokenizer.
    """
    folder = options.zero_shot_data
    found = [task for task, file in FILES.items() if folder is not None and Path(folder, file).is_file()]
    if folder is None or not found:
        raise HoloError(
            f"zero_shot_data: {folder!r} holds none of {', '.join(FILES.values())}; name the folder of the questions"
        )
    try:
        from .. import harness  # noqa: F401
    except ImportError as error:
        raise HoloError(f"zero-shot: {error.name} is not installed; `pip install 'hf-holo[eval]'` brings it") from None
    for model in models:
        model.needed_tokenizer()
        for task in found:
            settings = {"model": model.fingerprint, "bytes": Path(folder, FILES[task]).stat().st_size}
            settings |= options.chosen("limit")
            yield Part("tasks", f"{model.name}, {task}", settings, partial(ask, model, task, folder, options))


def ask(model: Evaluated, task: str, folder: str, options: Options, seconds: float | None = None) -> list[Row]:
    """The shares of a task that a model answers rightly: one row, and for BLiMP one more for every paradigm.

    Args:
        model: with its tokenizer.
        task: one of `FILES`.
        folder: of the files.
        options: how many questions.
        seconds: to spend; fewer questions are asked where they would take longer.
    """
    from ..harness import HoloLM

    size = _size(Path(folder, FILES[task]))
    lm = HoloLM(model.model, tokenizer=model.needed_tokenizer(), batch_size=options.batch_size, allow_leaks=True)
    count = min(size, options.limit or size)
    if seconds is not None and count > TRIED:
        start = time.perf_counter()
        _evaluate(lm, task, folder, _evenly(size, TRIED))
        each = (time.perf_counter() - start) / TRIED
        count = affordable(each, seconds - TRIED * each, count)
    result = _evaluate(lm, task, folder, _evenly(size, count))
    figures = {name.partition(",")[0]: value for name, value in result["results"][f"hf_holo_{task}"].items()}
    row: Row = {"model": model.name, "task": task, "questions": count, "of": size, "chance": CHANCE[task]}
    row |= {name: figures.get(name) for name in ("acc", "acc_stderr", "acc_norm", "perplexity")}
    return [row, *(_paradigms(model, result) if task == "blimp" else [])]


def _paradigms(model: Evaluated, result: dict[str, Any]) -> list[Row]:
    """The share of right answers for every paradigm of BLiMP."""
    answers: dict[tuple[str, str], list[float]] = {}
    for sample in result["samples"]["hf_holo_blimp"]:
        answers.setdefault((sample["doc"]["field"], sample["doc"]["uid"]), []).append(sample["acc"])
    return [
        {"model": model.name, "task": f"blimp/{field}/{uid}", "questions": len(right), "acc": statistics.mean(right)}
        for (field, uid), right in sorted(answers.items())
    ]


def _evaluate(lm: "HoloLM", task: str, folder: str, chosen: list[int]) -> dict[str, Any]:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    from ..harness import TASKS

    name = f"hf_holo_{task}"
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with quiet():
        manager = TaskManager(include_path=[str(TASKS)], include_defaults=False, metadata={"zero_shot_data": folder})
        found = simple_evaluate(lm, tasks=[name], samples={name: chosen}, task_manager=manager, bootstrap_iters=100)
    assert found is not None  # it is None in processes that only help
    return dict(found)


def _evenly(size: int, count: int) -> list[int]:
    """Indices of `count` questions, at equal distances."""
    return [i * size // count for i in range(count)]


def _size(path: Path) -> int:
    """Questions in a file."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_metadata(path).num_rows
    with path.open(encoding="utf-8") as file:
        return sum(bool(line.strip()) for line in file)


def told(tables: Tables, folder: Path) -> str:
    """The section of the report; the paradigms of BLiMP are in the CSV file."""
    head = ("model", "task", ">right", ">± standard error", ">by length", ">perplexity", ">chance", ">questions")
    cells = [
        (
            row["model"],
            row["task"],
            f"{row['acc']:.1%}",
            f"{row['acc_stderr']:.1%}" if isinstance(row["acc_stderr"], float) else "",
            f"{row['acc_norm']:.1%}" if row["acc_norm"] is not None else "",
            f"{row['perplexity']:,.1f}" if row["perplexity"] is not None else "",
            f"{row['chance']:.0%}",
            f"{row['questions']:,} of {row['of']:,}",
        )
        for row in tables.get("tasks", [])
        if "/" not in row["task"]
    ]
    _draw(tables.get("tasks", []), folder / "zero_shot.png")
    return "\n\n".join([markdown_table(head, cells), "![Questions answered](zero_shot.png)"])


def _draw(rows: list[Row], path: Path) -> None:
    """Bars for every task and model, and the share that guessing gets."""
    from matplotlib.figure import Figure  # slow to import

    from ...files import replacing

    rows = [row for row in rows if "/" not in row["task"]]
    models, tasks = (list(dict.fromkeys(row[name] for row in rows)) for name in ("model", "task"))
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes, width = figure.subplots(), 0.8 / max(1, len(models))
    for number, model in enumerate(models):
        own = {row["task"]: row["acc"] for row in rows if row["model"] == model}
        places = [i + (number - (len(models) - 1) / 2) * width for i in range(len(tasks))]
        axes.bar(places, [100 * own.get(task, 0) for task in tasks], width, label=model)
    for i, task in enumerate(tasks):
        axes.plot([i - 0.45, i + 0.45], 2 * [100 * CHANCE[task]], color="black", linewidth=1)
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set(ylabel="right (%)", title="Questions answered; the line is guessing")
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
