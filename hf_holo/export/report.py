"""What an export leaves next to the model: report.json and README.md, both measured on the written file."""

import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..data.scoring import summed_losses
from ..data.windows import Windows, encode, scoring_windows
from ..errors import HoloError
from ..files import write_text
from ..modeling.cache import RecurrentLayer, given_cache
from .formats import Format, Program, SavedModel, continues
from .graph import PAST, TOTAL, Graph, State, held_by, make_cache

LENGTHS, BATCHES = (1, 16, 17, 65, 250), (1, 3)
TOLERANCE = 1e-4  # of a format that computes with the weights as they are, relative to the largest output
PROMPT, NEW_TOKENS = 12, 64
WINDOW = 256  # tokens of a text that are read at once, for timings and perplexity
REPEATS = 20
WARM_UP = 2  # calls of a block that are not counted


def measure(source: SavedModel, form: Format, folder: Path, text: str | None = None) -> dict[str, Any]:
    """Everything that the report says of an export.

    Args:
        source: what was exported.
        form: its format.
        folder: of the export.
        text: a held-out text to measure the perplexity on; default: none.

    Raises:
        HoloError: the outputs of a format that should be exact differ.
    """
    program = form.load(folder / form.file, source.graph)
    record: dict[str, Any] = {"task": source.task, "parity": parity(source, program)}
    worst = max(row["max_relative"] for row in record["parity"])
    if form.exact and not worst <= TOLERANCE:
        raise HoloError(f"its outputs differ from PyTorch's by {worst:.1e} of the largest, allowed {TOLERANCE:.0e}")
    if continues(source):
        record["generation"] = generation(source, program)
    if text is not None:
        record["perplexity"] = perplexities(source, program, text)
    record["bytes"] = sum(path.stat().st_size for path in folder.glob(f"{form.file}*"))
    record["float32_bytes"] = sum(p.nbytes for p in {p.data_ptr(): p for p in source.model.parameters()}.values())
    record["milliseconds"] = latencies(source, program)
    return record


@torch.no_grad()
def parity(source: SavedModel, program: Program) -> list[dict[str, float]]:
    """Maximum and mean difference of all outputs against PyTorch's, one record for each length and batch size: of a
    text and, where there is a state, of the same text once more after it. An image has one length.

    The states of a program that takes no positions hold keys that were turned by others than PyTorch's under padding.
    They are compared with what PyTorch computes by the same positions, the output with what it computes by its own."""
    own, rows = source.graph, []
    graph = own if getattr(program, "takes_positions", True) else own.counting_padding()
    for length in _lengths(source):
        for batch in BATCHES:
            tensors = list(own.example(batch, length, past=0).values())
            pairs = _compare(graph, source, program, tensors)
            if own.states:
                again = own.again(tensors, [wanted for wanted, _ in pairs[1:]])
                pairs += _compare(graph, source, program, again)
            if graph is not own:
                pairs += _compare(own, source, program, tensors)[:1]
            differences = torch.cat([(wanted - given).double().abs().flatten() for wanted, given in pairs])
            relative = max(((a - b).abs().max() / a.abs().max().clamp_min(1)).item() for a, b in pairs if a.numel())
            row = {"length": length, "batch": batch, "max": differences.max().item(), "mean": differences.mean().item()}
            rows.append(row | {"max_relative": relative})
    return rows


def _lengths(source: SavedModel) -> list[int]:
    if all(axes.keys() == {0} for axes in source.graph.inputs.values()):
        return [1]
    return [length for length in LENGTHS if 2 * length <= _most_tokens(source)]


def _most_tokens(source: SavedModel) -> int:
    """As many as the model was made for: those with a table of positions fail beyond."""
    return getattr(source.model.config, "max_position_embeddings", None) or sys.maxsize


def _window(source: SavedModel) -> int:
    return min(WINDOW, _most_tokens(source))


def _new_tokens(source: SavedModel) -> int:
    return min(NEW_TOKENS, _most_tokens(source) - PROMPT)


def _compare(
    graph: Graph, source: SavedModel, program: Program, tensors: list[torch.Tensor]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What PyTorch and what the program make of these inputs."""
    return list(zip(graph.call(source.model, tensors), program(tensors), strict=True))


def generation(source: SavedModel, program: Program) -> dict[str, float]:
    """Share of equal tokens in what both write after two prompts, one of them padded: greedily and with 4 beams."""
    model: Any = source.model  # that generates
    ids, new = source.graph.example(2, PROMPT, past=0)["input_ids"], _new_tokens(source)
    mask = torch.ones_like(ids)
    mask[0, : PROMPT // 3] = 0
    shares = {}
    for name, beams in (("greedy", 1), ("beams", 4)):
        options = {
            "attention_mask": mask,
            "do_sample": False,
            "num_beams": beams,
            "max_new_tokens": new,
            "min_new_tokens": new,
            "pad_token_id": getattr(model.config, "pad_token_id", None) or 0,
        }
        wanted = model.generate(ids, **options)
        with computed_by(model, source.graph, program):
            given = model.generate(ids, **options)
        shares[name] = (wanted == given)[:, PROMPT:].double().mean().item()
    return shares


@contextmanager
def computed_by(model: PreTrainedModel, graph: Graph, program: Program) -> Iterator[None]:
    """In this block a causal language model computes by an exported program, and can do all that it does else."""
    original = model.forward

    @functools.wraps(original)
    def forward(
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        cache, (batch, tokens) = given_cache(past_key_values, cache), input_ids.shape
        seen = 0 if cache is None else cache.get_seq_length()
        if attention_mask is None:
            attention_mask = torch.ones(batch, seen + tokens, dtype=torch.long)
        held = {} if cache is None else dict(held_by(cache))
        states = (held.get((state.layer, state.name)) for state in graph.states)
        filled = (s.zeros(batch) if x is None else x for s, x in zip(graph.states, states, strict=True))
        logits, *new = program([input_ids, attention_mask, *filled])
        if cache is not None:
            cache.layers = make_cache(model.config, graph.states, new).layers
            for layer in cache.layers:
                if isinstance(layer, RecurrentLayer):
                    layer.seen = seen + tokens
        return CausalLMOutputWithPast(None, logits, cache)  # type: ignore[arg-type]  # it asks for a FloatTensor

    model.forward = forward
    try:
        yield
    finally:
        del model.forward


@torch.no_grad()
def perplexities(source: SavedModel, program: Program, text: str) -> dict[str, float]:
    """exp of the mean loss in nats a token on a text, PyTorch's and the program's, in windows of `WINDOW` tokens."""
    nats = {"float32": 0.0, "exported": 0.0}
    runs: dict[str, Program] = {"float32": functools.partial(source.graph.call, source.model), "exported": program}
    windows, tokens = held_out(source, text), 0
    for number in range(len(windows)):
        window = windows[number]["input_ids"][None]  # [1, T]
        states = [state.zeros(1) for state in source.graph.states]
        for name, run in runs.items():
            logits = run([window, torch.ones_like(window), *states])[0]
            nats[name] += summed_losses(logits, window)[0, 0].item()
        tokens += window.shape[1] - 1
    return {name: torch.tensor(value / tokens).exp().item() for name, value in nats.items()}


def held_out(source: SavedModel, text: str) -> Windows:
    """The windows of a text that a perplexity is measured on, cut as those of `hf-holo train`: every token but the
    first is predicted once.

    Raises:
        HoloError: the model has no tokenizer, or the text is shorter than a window.
    """
    if source.processor is None:
        raise HoloError("the perplexity cannot be measured, because the model has no tokenizer")
    ids, width = encode(source.processor, [text]), _window(source)
    if len(ids) < width:
        raise HoloError(f"{len(ids)} tokens are too few; give at least {width}")
    return scoring_windows(ids, width)


def latencies(source: SavedModel, program: Program) -> dict[str, dict[str, float]]:
    """Median milliseconds of a call, eager PyTorch's and the program's: for a text of `WINDOW` tokens (or as
    many as the model was made for) or another input and, if there is a state, for one token more."""
    eager = functools.partial(source.graph.call, source.model)
    whole = "text" if source.graph.reads_text else "input"
    lengths = {whole: _window(source)} | ({"token": 1} if source.graph.states else {})
    return {
        name: _medians({"pytorch": eager, "exported": program}, list(source.graph.example(1, tokens).values()))
        for name, tokens in lengths.items()
    }


@torch.no_grad()
def _medians(runs: Mapping[str, Callable], tensors: list[torch.Tensor]) -> dict[str, float]:
    """Each in two blocks, A B B A: call by call, the waiting threads of one runtime would slow the other down."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for name in (*runs, *reversed(list(runs))):
        for call in range(REPEATS):
            start = time.perf_counter()
            runs[name](tensors)
            if call >= WARM_UP:
                seconds[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(values) for name, values in seconds.items()}


# ---------------------------------------------------------------------------------------------- what is written
def write_report(record: Mapping[str, Any], source: SavedModel, name: str, form: Format, folder: Path) -> None:
    """Write report.json and README.md into the folder of an export."""
    write_text(folder / "report.json", json.dumps(record, indent=2) + "\n")
    write_text(folder / "README.md", model_card(record, source, name, form))


def summary(record: Mapping[str, Any]) -> str:
    """The measurement in one line: exactness, size, speed and, if it was measured, perplexity."""
    worst = max(row["max"] for row in record["parity"])
    parts = [
        f"differs from PyTorch by at most {worst:.1e}",
        f"{record['bytes'] / 2**20:.1f} MiB ({record['bytes'] / record['float32_bytes']:.2f} of the float32 weights)",
        *(
            f"{what} in {times['exported']:.2f} ms (PyTorch {times['pytorch']:.2f})"
            for what, times in record["milliseconds"].items()
        ),
    ]
    if "perplexity" in record:
        parts.append("perplexity {exported:.3f} (PyTorch {float32:.3f})".format(**record["perplexity"]))
    return ", ".join(parts)


def model_card(record: Mapping[str, Any], source: SavedModel, name: str, form: Format) -> str:
    """The model card of an export: what it is, how it is used, and the measured figures."""
    worst = max(record["parity"], key=lambda row: row["max"])
    lengths = sorted({row["length"] for row in record["parity"]})
    sizes = "lengths" if source.graph.reads_text else "sizes larger by"
    shapes = (f"{sizes} {_list(lengths)}, " if len(lengths) > 1 else "") + f"batches {_list(BATCHES)}"
    calls = {"text": f"{_window(source)} tokens", "token": "one token", "input": "one input"}
    lines = [
        "---",
        f"library_name: {'onnxruntime' if name.startswith('onnx') else 'torch'}",
        f"pipeline_tag: {source.graph.task}",
        f"tags: [hf_holo, {source.model.config.model_type}, {name}]",
        "---",
        f"# {type(source.model).__name__} as {name}",
        "",
        f"Exported by `hf-holo export --format {name}` for the task `{source.task}`. The model is `{form.file}`.",
        "",
        _usage(source, name),
        "",
        "| measured on this file | |",
        "|---|--:|",
        f"| largest difference from PyTorch, {shapes} | {worst['max']:.1e} |",
        f"| mean difference | {max(row['mean'] for row in record['parity']):.1e} |",
        *(
            f"| tokens equal to PyTorch's, {_new_tokens(source)} new ones, {way} | {100 * share:.1f} % |"
            for way, share in record.get("generation", {}).items()
        ),
        *(f"| perplexity on the given text, {way} | {x:.3f} |" for way, x in record.get("perplexity", {}).items()),
        f"| size, of the float32 weights | {record['bytes'] / record['float32_bytes']:.2f} |",
        *(
            f"| milliseconds for {calls[what]}: exported, eager PyTorch "
            f"| {times['exported']:.2f}, {times['pytorch']:.2f} |"
            for what, times in record["milliseconds"].items()
        ),
        "",
        "## Inputs and outputs",
        "",
        *(f"- {name}: {_shape(axes)}" for name, axes in source.graph.inputs.items()),
        *(f"- {state.input_name}: {_state(state, PAST)}" for state in source.graph.states),
        "",
        f"- → {source.graph.output}: {_shape(source.graph.output_axes[source.graph.output])}",
        *(f"- → {state.output_name}: {_state(state, TOTAL)}" for state in source.graph.states),
        "",
        *(["A text begins with states of zeros.", ""] if source.graph.states else []),
    ]
    return "\n".join(lines)


def _usage(source: SavedModel, name: str) -> str:
    if name.startswith("onnx") and continues(source):
        return "`python generate.py PROMPT` writes text; it needs numpy, onnxruntime and tokenizers only."
    if name.startswith("onnx"):
        return "It runs with the class of `optimum.onnxruntime` for its task, or with onnxruntime alone."
    if name == "torchscript":
        return "`torch.jit.freeze(torch.jit.load(...))`; in C++ `torch::jit::freeze(torch::jit::load(...))`."
    after = " after `import torchao`" if "torchao" in name else ""
    return f"Load it with `torch.export.load(...).module(check_guards=False)`{after}."


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _shape(axes: Mapping[int, str]) -> str:
    return ", ".join(f"axis {axis} {name}" for axis, name in axes.items())


def _state(state: State, tokens: str) -> str:
    """Such as `[batch_size, 1, 32, 32] float32`: all that a program in another language needs to make it."""
    return f"[{', '.join(map(str, state.sizes(tokens)))}] {str(state.dtype).removeprefix('torch.')}"
