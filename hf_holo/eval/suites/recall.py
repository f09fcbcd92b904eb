"""What models find again in a text of random tokens that they have just read; nothing is trained.

`copy` and `pairs` are the generated tasks [`Repeat`] and [`Pairs`], in tokens of the model. They show what it has
learned to look up in its context, which one with random weights has not.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ...modeling.losses import IGNORED
from ..cost import state_bytes
from ..figures import draw_lines
from ..markdown import markdown_table
from ..tasks import Pairs, Repeat, Task
from .models import Evaluated
from .options import Options
from .run import Part, Row, Tables, affordable

COPIES = (16, 64, 256)  # tokens to copy
PAIRS, FILLERS = (4, 16, 64), (0, 128, 1024)  # to look up, and tokens between them and the questions
SEQUENCES, ROWS = 64, 8  # scored for each point, and at a time


@dataclass(frozen=True)
class Question:
    """A batch of a task in the tokens of a model.

    Attributes:
        ids: `[B, T]` tokens.
        places: `[A]` positions whose next token is asked for.
        answers: `[B, A]` the right ones; each row is also what its answers are chosen among.
    """

    ids: torch.Tensor
    places: torch.Tensor
    answers: torch.Tensor


def ask(task: Task, symbols: torch.Tensor, rows: int, length: int, generator: torch.Generator) -> Question:
    """Sequences of a task, written with these tokens `[S]`; all rows are asked at the same places."""
    tokens, labels = task.batch(rows, length, generator)
    places = (labels[0] != IGNORED).nonzero()[:, 0]
    return Question(symbols[tokens], places, symbols[labels[:, places]])


@torch.no_grad()
def answer(model: Evaluated, question: Question) -> tuple[float, float]:
    """Shares of the answers that are the model's first guess among all tokens, and among the choices."""
    ids, right = question.ids.to(model.device), question.answers.to(model.device)
    logits = model.model(input_ids=ids).logits[:, question.places]  # [B, A, V]
    among = logits.gather(2, right[:, None].expand(-1, logits.shape[1], -1)).argmax(2)  # [B, A]
    named = right.gather(1, among)
    return (logits.argmax(2) == right).double().mean().item(), (named == right).double().mean().item()


def parts(models: Sequence[Evaluated], options: Options) -> Iterator[Part]:
    """Both tasks at every size, for every model."""
    for model in models:
        settings = {"model": model.fingerprint, **options.chosen()}
        for length in COPIES:
            measure = partial(_measure, model, options.seed, "copy", length, 0)
            yield Part("copy", f"{model.name}, copy of {length}", settings, measure)
        for pairs in PAIRS:
            for filler in FILLERS:
                measure = partial(_measure, model, options.seed, "pairs", pairs, filler)
                yield Part("pairs", f"{model.name}, {pairs} pairs after {filler}", settings, measure)


def _measure(model: Evaluated, seed: int, task: str, size: int, filler: int, seconds: float | None = None) -> list[Row]:
    """One point of a task; none where the vocabulary or the positions of the model are too few."""
    symbols = _symbols(model)
    if len(symbols) < 3 * size:
        return []
    asking: Task
    if task == "copy":
        asking, length = Repeat(len(symbols)), 2 * size - 1
    else:
        asking = pairs = Pairs(size, len(symbols) // 3, distinct=True)
        length = pairs.length(filler)
    if model.max_length is not None and length > model.max_length:
        return []
    generator, start = torch.Generator().manual_seed(seed), time.perf_counter()
    found: list[tuple[float, float]] = []
    batches = SEQUENCES // ROWS
    while len(found) < batches:
        found.append(answer(model, ask(asking, symbols, ROWS, length, generator)))
        batches = affordable((time.perf_counter() - start) / len(found), seconds, SEQUENCES // ROWS)
    named, chosen = torch.tensor(found, dtype=torch.float64).mean(0).tolist()
    row: Row = {"model": model.name, "task": task, "size": size, "filler": filler, "tokens": length}
    row |= {"named": named, "chosen": chosen, "chance": 1 / (size - (task == "copy"))}  # the first is not asked
    return [row | {"sequences": ROWS * len(found), "state_bytes": state_bytes(model.model)}]


def _symbols(model: Evaluated) -> torch.Tensor:
    """The tokens of a model that stand for text."""
    special = set(model.tokenizer.all_special_ids) if model.tokenizer is not None else set()
    return torch.tensor([token for token in range(model.vocab_size) if token not in special])


def told(tables: Tables, folder: Path) -> str:
    """The section of the report."""
    rows = [row for name in ("copy", "pairs") for row in tables.get(name, [])]
    if not rows:
        return "No model has enough tokens for these tasks."
    head = ("model", "task", ">size", ">filler", ">named", ">chosen among those shown", ">chance of that", ">state")
    cells = [
        (
            row["model"],
            row["task"],
            row["size"],
            row["filler"],
            f"{row['named']:.1%}",
            f"{row['chosen']:.1%}",
            f"{row['chance']:.1%}",
            "" if row["state_bytes"] is None else f"{row['state_bytes'] / 2**10:,.0f} KiB",
        )
        for row in rows
    ]
    pieces = [markdown_table(head, cells)]
    if pairs := tables.get("pairs"):
        lines = [row | {"line": f"{row['model']}, {row['size']} pairs", "after": 1 + row["filler"]} for row in pairs]
        labels = ("tokens from the pairs to the questions", "share of values chosen")
        draw_lines(lines, "after", "chosen", folder / "recall.png", "Pairs looked up", labels, by="line")
        pieces.append("![Pairs looked up](recall.png)")
    return "\n\n".join(pieces)
