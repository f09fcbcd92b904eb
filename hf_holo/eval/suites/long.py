"""What more context is worth: the loss of the same tokens, predicted from the last 128, 512, 2,048, ... tokens; and
whether a number that was named once in a text of that length is found again, [`Passkey`]. Nothing is trained."""

import inspect
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from ...data.scoring import summed_losses
from ...data.windows import encode
from ...modeling.losses import IGNORED
from ..figures import draw_lines
from ..learning import UNSEEN, accuracy
from ..markdown import markdown_table
from ..tasks import Passkey
from .models import Evaluated
from .options import Options
from .run import Part, Row, Tables, affordable

TARGETS, PLACES = 64, 32  # tokens that are predicted at a place, and places in the text
KEYS = 16  # sequences with a pass key


def parts(models: Sequence[Evaluated], options: Options) -> Iterator[Part]:
    """Every length of context, and of a text with a pass key, for every model.

    Raises:
        HoloError: the text is not there, or a model has no tokenizer.
    """
    documents = options.documents()
    for model in models:
        ids = torch.from_numpy(encode(model.needed_tokenizer(), documents)).long()
        longest = max((length for length in options.lengths if length + TARGETS <= len(ids)), default=0)
        settings = {"model": model.fingerprint, **options.chosen("eval_file", "dataset_name", "text_column", "lengths")}
        for length in (length for length in options.lengths if length <= longest):
            measure = partial(with_context, model, ids, length, longest)
            yield Part("contexts", f"{model.name}, {length:,} tokens", settings, measure)
        for length in options.lengths:
            measure = partial(with_pass_key, model, documents, length, options.seed)
            yield Part("pass_keys", f"{model.name}, pass key in {length:,} tokens", settings, measure)


@torch.no_grad()
def with_context(
    model: Evaluated, ids: torch.Tensor, length: int, longest: int, seconds: float | None = None
) -> list[Row]:
    """One row: the loss of tokens of which the last `length` before them are given.

    Args:
        model: that predicts.
        ids: `[N]` tokens of the text.
        length: of the context.
        longest: of the contexts of all rows, so that all predict the same tokens.
        seconds: to spend; fewer places are tried where they would take longer.

    Returns:
        No row if the model has fewer positions.
    """
    if model.max_length is not None and length + TARGETS > model.max_length:
        return []
    keeps = "logits_to_keep" in inspect.signature(model.model.forward).parameters
    only_last = {"logits_to_keep": TARGETS + 1} if keeps else {}
    order = torch.randperm(PLACES, generator=torch.Generator().manual_seed(0))  # so that any first few are fair
    places = torch.linspace(longest, len(ids) - TARGETS, PLACES).long()[order].tolist()
    totals, tried, count, start = torch.zeros(2, dtype=torch.float64), 0, PLACES, time.perf_counter()
    while tried < count:
        place = places[tried]
        window = ids[place - length : place + TARGETS][None].to(model.device)  # [1, length + TARGETS]
        labels = window.clone()
        labels[:, :length] = IGNORED
        logits = model.model(input_ids=window, **only_last).logits
        totals += summed_losses(logits, labels[:, -logits.shape[1] :]).double().sum(0).cpu()
        tried += 1
        count = max(tried, affordable((time.perf_counter() - start) / tried, seconds, PLACES))
    nats, tokens = totals.tolist()
    return [{"model": model.name, "context": length, "loss": nats / tokens, "tokens": int(tokens)}]


def with_pass_key(
    model: Evaluated, documents: Sequence[str], length: int, seed: int, seconds: float | None = None
) -> list[Row]:
    """One row: the share of the tokens of a number that are named again in `length` tokens of prose.

    Args:
        model: that reads.
        documents: the prose.
        length: of a sequence.
        seed: of numbers and places.
        seconds: to spend; fewer sequences are tried where they would take longer.

    Returns:
        No row if the model has fewer positions, or the sentences take more than `length` tokens.
    """
    task = Passkey(model.needed_tokenizer(), documents)
    if length < task.shortest or (model.max_length is not None and length > model.max_length):
        return []
    found: list[float] = []
    count, start = KEYS, time.perf_counter()
    while len(found) < count:
        found.append(accuracy(model.model, task, length, sequences=1, seed=UNSEEN + KEYS * seed + len(found)))
        count = affordable((time.perf_counter() - start) / len(found), seconds, KEYS)
    row: Row = {"model": model.name, "tokens": length, "named": sum(found) / len(found), "chance": task.chance}
    return [row | {"sequences": len(found)}]


def told(tables: Tables, folder: Path) -> str:
    """The section of the report."""
    rows = tables.get("contexts", [])
    if not rows:
        return "The text is shorter than the shortest context, or the models have fewer positions."
    head = ("model", ">tokens of context", ">nats per token", ">tokens predicted")
    cells = [(row["model"], f"{row['context']:,}", f"{row['loss']:.4f}", f"{row['tokens']:,}") for row in rows]
    labels = ("tokens of context", "loss (nats per token)")
    draw_lines(rows, "context", "loss", folder / "long.png", "What more context is worth", labels)
    pieces = [markdown_table(head, cells), "![What more context is worth](long.png)"]
    if keys := tables.get("pass_keys"):
        pieces.append(
            markdown_table(
                ("model", ">tokens", ">of a pass key named", ">by guessing", ">sequences"),
                [
                    (
                        row["model"],
                        f"{row['tokens']:,}",
                        f"{row['named']:.1%}",
                        f"{row['chance']:.1%}",
                        row["sequences"],
                    )
                    for row in keys
                ],
            )
        )
    return "\n\n".join(pieces)
