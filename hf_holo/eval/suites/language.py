"""How well models predict a text: in blocks, in sliding windows, per word as the literature does, and by position."""

import math
import re
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from torch.utils.data import Subset

from ...data.scoring import summed_by_position, summed_over
from ...data.windows import AnyWindows, SlidingWindows, encode, evenly, scoring_windows
from ...errors import HoloError
from ..figures import draw_lines
from ..markdown import markdown_table
from .models import Evaluated
from .options import Options
from .run import Part, Row, Tables, affordable

TEXT = ("eval_file", "dataset_name", "text_column", "block_size", "eval_windows")
# How WikiText writes English: what its tokens stand for in a text that people would write.
MARKS = (
    (r" @(.)@ ", r"\1"),  # hyphens, and commas and points inside numbers
    (r" ([.,:;!?%)\]}])", r"\1"),
    (r"([(\[{$£]) ", r"\1"),
    (r'" (.*?) "', r'"\1"'),
    (r" ('(?:s|re|ve|ll|d|m)|n't)\b", r"\1"),
    (r"(?m)^ (=+) (.*?) \1 ?$", r"\1 \2 \1"),
)


def parts(models: Sequence[Evaluated], options: Options) -> Iterator[Part]:
    """Every protocol for every model.

    Raises:
        HoloError: the text is not there, or a model has no tokenizer.
    """
    documents = options.documents()
    if options.block_size < 4:
        raise HoloError(f"block_size: {options.block_size} is too small; at least 4 tokens")
    for model in models:
        model.needed_tokenizer()
        settings = {"model": model.fingerprint, **options.chosen(*TEXT), "characters": sum(map(len, documents))}
        for protocol in ("blocks", "sliding", "words"):
            measure = partial(score, model, documents, protocol, options)
            yield Part("protocols", f"{model.name}, {protocol}", settings, measure)
        measure = partial(by_position, model, documents, options)
        yield Part("positions", f"{model.name}, by position", settings, measure)


def score(
    model: Evaluated, documents: Sequence[str], protocol: str, options: Options, seconds: float | None = None
) -> list[Row]:
    """One row: loss, perplexity and bits per byte of a model on texts.

    Args:
        model: with its tokenizer.
        documents: the texts.
        protocol: "blocks": windows side by side. "sliding": each token has at least half a window before it. "words":
            blocks over the text without the marks of WikiText, and the perplexity per word of the text as it was given,
            words being what white space separates.
        options: sizes.
        seconds: to spend; fewer windows are scored where they would take longer.
    """
    tokenizer = model.needed_tokenizer()
    texts = [written(text) for text in documents] if protocol == "words" else list(documents)
    ids, block = encode(tokenizer, texts), block_of(model, options)
    if len(ids) < 2:
        raise HoloError(f"eval_file: the text has {len(ids)} tokens; at least 2 are needed")
    everything = SlidingWindows(ids, block, block // 2) if protocol == "sliding" else scoring_windows(ids, block)
    windows = chosen(model, everything, options, seconds)
    nats, tokens, hits = summed_over(model.model, windows, options.batch_size, pad_id(model)).tolist()
    share = tokens / (len(ids) - 1)  # of the text: where some windows are left out, sizes are estimated by it
    size = sum(len(text.encode()) for text in texts) - len(tokenizer.decode(ids[:1]).encode())
    words = sum(len(text.split()) for text in documents)
    row = {
        "model": model.name,
        "protocol": protocol,
        "loss": nats / tokens,
        "perplexity": math.exp(min(nats / tokens, 700)),
        "bits_per_byte": nats / math.log(2) / (share * size),
        "word_perplexity": math.exp(min(nats / (share * words), 700)),
        "accuracy": hits / tokens,
        "tokens": int(tokens),
        "share": share,
        "block_size": block,
    }
    return [row]


def by_position(
    model: Evaluated, documents: Sequence[str], options: Options, seconds: float | None = None
) -> list[Row]:
    """The loss where a token has this many before it in its window, in bins that double: 1, 2 to 3, 4 to 7, ..."""
    windows = scoring_windows(encode(model.needed_tokenizer(), documents), block_of(model, options))
    totals = summed_by_position(
        model.model, chosen(model, windows, options, seconds), options.batch_size, pad_id(model)
    )
    rows = []
    for start in (2**power for power in range(int(math.log2(len(totals) - 1)) + 1)):
        nats, tokens = totals[start : 2 * start].sum(0).tolist()
        if tokens:
            rows.append({"model": model.name, "tokens_before": start, "loss": nats / tokens, "tokens": int(tokens)})
    return rows


def written(text: str) -> str:
    """A text of WikiText as people would write it; other texts hardly change."""
    for pattern, replacement in MARKS:
        text = re.sub(pattern, replacement, text)
    return text


def block_of(model: Evaluated, options: Options) -> int:
    """Tokens in a window: as many as are wanted, or as the model takes."""
    return min(options.block_size, model.max_length or options.block_size)


def pad_id(model: Evaluated) -> int:
    tokenizer = model.needed_tokenizer()
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0


def chosen(model: Evaluated, windows: AnyWindows, options: Options, seconds: float | None) -> AnyWindows:
    """As many windows as are wanted and can be afforded, at equal distances."""
    wanted = evenly(windows, options.eval_windows)
    if seconds is None:
        return wanted
    first = Subset(wanted, range(min(options.batch_size, len(wanted))))
    start = time.perf_counter()
    summed_over(model.model, first, options.batch_size, pad_id(model))
    each = (time.perf_counter() - start) / len(first)
    return evenly(windows, affordable(each, seconds - each * len(first), len(wanted)))


def told(tables: Tables, folder: Path) -> str:
    """The section of the report."""
    pieces = []
    if rows := tables.get("protocols"):
        sizes = (">perplexity", ">bits per byte", ">perplexity per word", ">tokens", ">of the text")
        head = ("model", "protocol", ">nats per token", *sizes)
        cells = [
            (
                row["model"],
                row["protocol"],
                f"{row['loss']:.4f}",
                f"{row['perplexity']:.2f}",
                f"{row['bits_per_byte']:.4f}",
                f"{row['word_perplexity']:.1f}",
                f"{row['tokens']:,}",
                f"{row['share']:.0%}",
            )
            for row in rows
        ]
        pieces.append(markdown_table(head, cells))
        pieces.append(
            f"Windows of {rows[0]['block_size']:,} tokens. `blocks`: side by side; `sliding`: each token has at least "
            "half a window before it; `words`: without the marks of WikiText, and per word of the text as it was given."
        )
    if rows := tables.get("positions"):
        labels = ("tokens before, from this many on", "loss (nats per token)")
        draw_lines(rows, "tokens_before", "loss", folder / "language.png", "Loss by position", labels)
        pieces.append("![Loss by position](language.png)")
    return "\n\n".join(pieces)
