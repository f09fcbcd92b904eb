"""Time and memory of reading, of a training step and of one more token, over lengths, next to peers of equal size.

All models run eagerly in one process and take turns. A point that runs out of memory, or would take longer than there
is time for, says so and is not tried at longer lengths. Memory is the most bytes of tensors alive above the weights.
"""

import inspect
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ...errors import unknown
from ...modeling.cache import CACHE_NAMES
from ..cost import LiveBytes
from ..figures import draw_lines
from ..markdown import markdown_table
from ..timing import interleaved_times, keep_freed_memory
from .models import Evaluated
from .options import Options
from .peers import PEERS, peer
from .run import Part, Row, Tables, affordable

KINDS = {"reading": "reading, logits of the last token", "training": "a training step", "decoding": "one more token"}
OUT_OF_MEMORY = "out of memory"
PATIENCE = 120.0  # seconds for a single pass, from which on longer lengths are not tried


def parts(models: Sequence[Evaluated], options: Options) -> Iterator[Part]:
    """Every kind at every length: all models and their peers together, in turns.

    Raises:
        HoloError: a peer is unknown.
    """
    for name in options.peers:
        if name not in PEERS:
            raise unknown("peer", name, PEERS)
    fleet = Fleet(models, options)
    settings = {"models": [model.fingerprint for model in models], **options.chosen("peers", "repeats", "lengths")}
    settings |= {"threads": torch.get_num_threads()}
    for kind in KINDS:
        for length in sorted(options.lengths):
            measure = partial(fleet.measure, kind, length)
            yield Part(kind, f"{kind} at {length:,} tokens", settings, measure)


class Fleet:
    """The models and their peers, which are built when the first of them is timed.

    Args:
        models: those to measure.
        options: of the run.
    """

    def __init__(self, models: Sequence[Evaluated], options: Options) -> None:
        self._given, self._options = models, options
        self._models: dict[str, Evaluated] = {}
        self._too_long: dict[tuple[str, str], str] = {}  # kind and model: why longer texts are not tried

    @property
    def _room(self) -> int:
        """Tokens that are decoded after a text, over all calls of a task."""
        return self._options.repeats + 2

    @property
    def models(self) -> dict[str, Evaluated]:
        """By name; peers are called after the first model, and are of its size, place and type."""
        if not self._models:
            keep_freed_memory()
            first = self._given[0].model
            self._models = {model.name: model for model in self._given}
            for kind in self._options.peers:
                torch.manual_seed(self._options.seed)
                built = peer(kind, first, max(self._options.lengths) + self._room)
                moved = built.to(first.device, first.dtype)  # type: ignore[arg-type]  # transformers wraps `to`
                name = f"{kind}, as large"
                self._models[name] = Evaluated(name, moved)
        return self._models

    def measure(self, kind: str, length: int, seconds: float | None = None) -> list[Row]:
        """A row for every model: median and spread of the seconds, and memory."""
        tasks: dict[str, Callable[[], object]] = {}
        rows: dict[str, Row] = {}
        for name, model in self.models.items():
            row: Row = {"model": name, "parameters": model.parameters, "tokens": length, "seconds": None}
            rows[name] = row
            positions = length + (self._room if kind == "decoding" else 0)
            reason = self._too_long.get((kind, name))
            if model.max_length is not None and positions > model.max_length:
                reason = f"it takes {model.max_length:,} tokens"
            if reason is None:
                reason = self._try(kind, model, length, tasks, row, seconds)
            row["not_measured"] = reason
        if tasks:
            each = sum(rows[name]["first_seconds"] for name in tasks)
            repeats = affordable(each, seconds, self._options.repeats)
            for name, times in interleaved_times(tasks, repeats, warmup=int(repeats > 1)).items():
                median = statistics.median(times)
                spread = (max(times) - min(times)) / median
                rows[name] |= {"seconds": median, "spread": spread, "repeats": repeats}
                rows[name] |= {"tokens_per_second": (1 if kind == "decoding" else length) / median}
        return list(rows.values())

    def _try(
        self,
        kind: str,
        model: Evaluated,
        length: int,
        tasks: dict[str, Callable[[], object]],
        row: Row,
        seconds: float | None,
    ) -> str | None:
        """Run it once and put it among the tasks; returns why that is not possible."""
        limit = PATIENCE if seconds is None else min(PATIENCE, seconds)
        try:
            task = task_of(kind, model.model, length, self._options.seed)
            start = time.perf_counter()
            row["peak_bytes"] = peak_bytes(task, model.device)
            row["first_seconds"] = time.perf_counter() - start
        except (MemoryError, RuntimeError) as error:
            if not (isinstance(error, MemoryError) or "memory" in str(error).lower()):
                raise
            self._too_long[kind, model.name] = OUT_OF_MEMORY
            return OUT_OF_MEMORY
        if row["first_seconds"] > limit / 2:
            self._too_long[kind, model.name] = f"{length:,} tokens already took {row['first_seconds']:.0f} s"
        tasks[model.name] = task
        return None


def task_of(kind: str, model: PreTrainedModel, length: int, seed: int) -> Callable[[], object]:
    """What is timed, as a function without arguments, on `length` random tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, model.config.get_text_config().vocab_size, (1, length + 1), generator=generator)
    ids = ids.to(next(model.parameters()).device)
    names = inspect.signature(model.forward).parameters
    last = {"logits_to_keep": 1} if "logits_to_keep" in names else {}
    if kind == "reading":
        return torch.no_grad()(partial(model, input_ids=ids[:, :length], use_cache=False, **last))
    if kind == "training":
        return partial(_training_step, model, ids[:, :length])
    with torch.no_grad():
        output = model(input_ids=ids[:, :length], use_cache=True, **last)
    cache = next(name for name in (*CACHE_NAMES, "cache_params") if output.get(name) is not None)
    return partial(_one_more, model, ids[:, length:], {cache: output[cache]}, length)


def _training_step(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """Forward and backward, gradients thrown away."""
    model.train()
    try:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    finally:  # memory may run out
        model.zero_grad(set_to_none=True)
        model.eval()


@torch.no_grad()
def _one_more(model: PreTrainedModel, ids: torch.Tensor, cache: dict[str, object], length: int) -> None:
    """One token after the cache, which grows by it: over a few repeats that hardly matters."""
    names = inspect.signature(model.forward).parameters
    place = torch.tensor([length], device=ids.device)
    where = {"cache_position": place} if "cache_params" in cache and "cache_position" in names else {}
    model(input_ids=ids, use_cache=True, **cache, **where)


def peak_bytes(task: Callable[[], object], device: torch.device) -> int:
    """Most bytes of tensors that are alive at a time while the task runs, above those from before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        task()
        return torch.cuda.max_memory_allocated(device) - before
    with LiveBytes() as live:
        task()
    return live.peak


def told(tables: Tables, folder: Path) -> str:
    """The section of the report."""
    pieces = []
    for kind, rows in tables.items():
        head = ("model", ">parameters", ">tokens", ">time", ">spread", ">tokens/s", ">memory")
        cells = [_cells(row) for row in rows]
        labels = ("tokens", "seconds")
        draw_lines(rows, "tokens", "seconds", folder / f"speed_{kind}.png", KINDS[kind], labels, log_y=True)
        title = KINDS[kind]
        pieces += [f"### {title[0].upper()}{title[1:]}", markdown_table(head, cells), f"![{title}](speed_{kind}.png)"]
    note = "Medians of runs in turns, eager PyTorch; the spread is that of largest and smallest, relative."
    return "\n\n".join([*pieces, note])


def _cells(row: Row) -> tuple[str, ...]:
    size = (row["model"], f"{row['parameters']:,}", f"{row['tokens']:,}")
    if row["seconds"] is None:
        return (*size, row["not_measured"], "", "", "")
    memory = f"{row['peak_bytes'] / 2**20:,.1f} MiB"
    return (
        *size,
        f"{1000 * row['seconds']:,.1f} ms",
        f"{row['spread']:.0%}",
        f"{row['tokens_per_second']:,.0f}",
        memory,
    )
