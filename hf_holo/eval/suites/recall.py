"""What models find again in a text of random tokens that they have just read; nothing is trained.

`copy`: a sequence comes twice, and is to be predicted the second time. `pairs`: keys with their values, then filler,
then every key again in another order, whose value is to be named (as in multi-query associative recall, Arora et al.,
"Zoology", 2023). It shows what a model has learned to look up in its context, which one with random weights has not.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ..cost import state_bytes
from ..markdown import markdown_table
from .figures import draw_lines
from .models import Evaluated
from .options import Options
from .run import Part, Row, Tables, affordable

COPIES = (16, 64, 256)  # tokens to copy
PAIRS, FILLERS = (4, 16, 64), (0, 128, 1024)  # to look up, and tokens between them and the questions
SEQUENCES, ROWS = 64, 8  # scored for each point, and at a time


@dataclass(frozen=True)
class Question:
    """Sequences of random tokens with an answer at some places.

    Attributes:
        ids: `[B, T]` tokens.
        places: `[A]` positions whose next token is asked for.
        choices: `[B, C]` tokens among which the right answer is.
    """

    ids: torch.Tensor
    places: torch.Tensor
    choices: torch.Tensor


def copy_questions(symbols: torch.Tensor, rows: int, length: int, generator: torch.Generator) -> Question:
    """A sequence of `length` of these tokens `[S]`, twice: `[rows, 2 length]`; its first token says that it begins."""
    once = symbols[torch.randint(len(symbols), (rows, length), generator=generator)]
    places = torch.arange(length, 2 * length - 1)
    return Question(torch.cat([once, once], 1), places, once)


def pair_questions(symbols: torch.Tensor, rows: int, pairs: int, filler: int, generator: torch.Generator) -> Question:
    """Pairs, filler and questions out of these tokens `[S]`, keys, values and filler being three kinds of them:
    `[rows, 4 pairs + filler]`."""
    keys, values, rest = symbols.tensor_split(3)
    key = keys[torch.rand(rows, len(keys), generator=generator).argsort(1)[:, :pairs]]  # each at most once
    value = values[torch.rand(rows, len(values), generator=generator).argsort(1)[:, :pairs]]
    noise = rest[torch.randint(len(rest), (rows, filler), generator=generator)]
    order = torch.rand(rows, pairs, generator=generator).argsort(1)
    asked = torch.stack([key.gather(1, order), value.gather(1, order)], -1).flatten(1)  # [rows, 2 pairs]
    ids = torch.cat([torch.stack([key, value], -1).flatten(1), noise, asked], 1)
    return Question(ids, torch.arange(2 * pairs + filler, ids.shape[1], 2), value)


@torch.no_grad()
def answer(model: Evaluated, question: Question) -> tuple[float, float]:
    """Shares of the answers that are the model's first guess among all tokens, and among the choices."""
    ids, choices = question.ids.to(model.device), question.choices.to(model.device)
    logits = model.model(input_ids=ids).logits[:, question.places]  # [B, A, V]
    right = ids[:, question.places + 1]  # [B, A]
    among = logits.gather(2, choices[:, None].expand(-1, logits.shape[1], -1)).argmax(2)  # [B, A]
    named = choices.gather(1, among)
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
    symbols, tokens = _symbols(model), 2 * size if task == "copy" else 4 * size + filler
    if len(symbols) < 3 * size or (model.max_length is not None and tokens > model.max_length):
        return []
    generator, start = torch.Generator().manual_seed(seed), time.perf_counter()
    found: list[tuple[float, float]] = []
    batches = SEQUENCES // ROWS
    while len(found) < batches:
        if task == "copy":
            question = copy_questions(symbols, ROWS, size, generator)
        else:
            question = pair_questions(symbols, ROWS, size, filler, generator)
        found.append(answer(model, question))
        batches = affordable((time.perf_counter() - start) / len(found), seconds, SEQUENCES // ROWS)
    named, chosen = torch.tensor(found, dtype=torch.float64).mean(0).tolist()
    row: Row = {"model": model.name, "task": task, "size": size, "filler": filler, "tokens": tokens}
    row |= {"named": named, "chosen": chosen, "chance": 1 / size, "sequences": ROWS * len(found)}
    return [row | {"state_bytes": state_bytes(model.model)}]


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
