"""HoloLinear against nn.Linear: a training step of one layer, and decoding with thin and with merged factors.

    python benchmarks/holo_speed.py [--teacher FOLDER --student FOLDER]

Layers take turns in one process; the figures are medians, freed memory is kept for reuse, and every step is measured
with one thread and with all. `largest` is the largest tensor that forward and backward make, in units of tokens times
max(harmonics, outputs). Decoding and prefill compare a dense language model with ones whose layers have the form that
`hf-holo convert` gives them (stored pivoted bases, shared by the layers that read the same input): by default random
weights in the shapes of SmolLM2-135M, or the checkpoints that are named. All of them take turns.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from common.report import (
    RESULTS,
    in_threads,
    interleaved_medians,
    keep_freed_memory,
    print_footer,
    print_table,
    write_report,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from hf_holo.conversion import HoloSurgeryConfig
from hf_holo.conversion.surgery.calibration import find_sites, surgery_plan
from hf_holo.modeling.harmonics import HarmonicBasis, HoloLinear
from hf_holo.modeling.quantizer import swap

KEPT = (0.8, 0.6)
SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
}
PREFILL = 512  # tokens


class Largest(TorchDispatchMode):
    """The most values in any tensor that an operation makes."""

    values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = (x for x in tree_leaves(result) if isinstance(x, torch.Tensor))
        self.values = max([self.values, *(x.untyped_storage().nbytes() // x.itemsize for x in tensors)])
        return result


def training_step(layer: torch.nn.Module, tokens: int) -> Callable[[], None]:
    """Forward and backward, to the weights and to the input, as a function without arguments."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, layer.in_features, generator=generator).requires_grad_()
    gradient = torch.randn(tokens, layer.out_features, generator=generator)

    def step() -> None:
        layer(x).backward(gradient)
        layer.zero_grad()
        x.grad = None

    return step


def compare_layers(width: int, harmonics: int, tokens: int, repeats: int) -> list[dict[str, float]]:
    layers = {
        "nn.Linear": torch.nn.Linear(width, width),
        "amplitude, phase": HoloLinear(width, width, harmonics),
        "folded": HoloLinear(width, width, harmonics, folded=True),
    }
    steps = {name: training_step(layer, tokens) for name, layer in layers.items()}
    sizes = {}
    for name, step in steps.items():
        with Largest() as largest:
            step()
        sizes[name] = largest.values / (tokens * max(harmonics, width))
    rows = []
    all_threads = torch.get_num_threads()
    for threads in sorted({1, all_threads}):
        torch.set_num_threads(threads)
        seconds = interleaved_medians(steps, repeats)
        for name in layers:
            rows.append(
                {
                    "layer": name,
                    "width": width,
                    "harmonics": harmonics,
                    "tokens": tokens,
                    "threads": threads,
                    "ms": 1e3 * seconds[name],
                    "times_quicker": seconds["nn.Linear"] / seconds[name],
                    "largest": sizes[name],
                }
            )
    torch.set_num_threads(all_threads)
    return rows


def build(depth: int) -> tuple[PreTrainedModel, list[PreTrainedModel]]:
    """A dense model with random weights, and ones with all layers of their blocks converted, also random."""
    config = LlamaConfig(**SMOLLM2 | {"num_hidden_layers": depth})
    return AutoModelForCausalLM.from_config(config), [converted(config, ratio) for ratio in KEPT]


def converted(config: LlamaConfig, ratio: float) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(config)
    sites = find_sites(model, HoloSurgeryConfig(basis="data", shared=True))
    ranks = [site.largest_rank(ratio, pivoted=True) for site in sites]
    swap(model, HoloSurgeryConfig(basis="data", layers=surgery_plan(sites, ranks)))
    for module in model.modules():
        if isinstance(module, HarmonicBasis):
            torch.nn.init.normal_(module.tail, std=module.in_features**-0.5)
    return model


def decoding_step(model: PreTrainedModel, context: int) -> Callable[[], None]:
    """Read one token after `context` others, as a function without arguments."""
    model.eval()
    ids = torch.randint(model.config.vocab_size, (1, context + 1), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cache = model(ids[:, :-1]).past_key_values

    @torch.no_grad()
    def step() -> None:
        model(ids[:, -1:], past_key_values=cache)
        cache.crop(-1)

    return step


def prefill(model: PreTrainedModel, tokens: int) -> Callable[[], None]:
    """Read `tokens` tokens at once, as a function without arguments."""
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def step() -> None:
        model(ids, logits_to_keep=1)

    return step


def holo_layers(model: PreTrainedModel) -> list[HoloLinear]:
    return [module for module in model.modules() if isinstance(module, HoloLinear)]


def kept_in(model: PreTrainedModel) -> float:
    """Share of the values of the converted layers that a checkpoint keeps."""
    counts = [layer.count_numbers() for layer in holo_layers(model)]
    return sum(count["stored"] for count in counts) / sum(count["dense"] for count in counts)


def compare_decoding(
    dense: PreTrainedModel, students: Sequence[PreTrainedModel], context: int, repeats: int
) -> list[dict]:
    """Milliseconds a token of the dense model and of the converted ones: with thin factors, then merged."""
    rows = []
    for form in ("thin", "merged"):
        if form == "merged":
            students = students[:1]  # a dense matrix has one size
            for layer in holo_layers(students[0]):
                layer.merge()
        rows += timed(decoding_step, dense, students, form, context, repeats)
        if form == "thin":
            rows += timed(prefill, dense, students, "thin, prefill", PREFILL, max(3, repeats // 3))
    return rows


def timed(
    task: Callable[[PreTrainedModel, int], Callable[[], None]],
    dense: PreTrainedModel,
    students: Sequence[PreTrainedModel],
    form: str,
    tokens: int,
    repeats: int,
) -> list[dict]:
    """Milliseconds of a task for all models, in turns."""
    steps = {"dense": task(dense, tokens)} | {str(n): task(student, tokens) for n, student in enumerate(students)}
    seconds = interleaved_medians(steps, repeats)
    return [
        {
            "factors": form,
            "tokens": tokens,
            "threads": torch.get_num_threads(),
            "kept": kept_in(student),
            "dense_ms": 1e3 * seconds["dense"],
            "student_ms": 1e3 * seconds[str(n)],
            "time_ratio": seconds[str(n)] / seconds["dense"],
        }
        for n, student in enumerate(students)
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=4096, help="inputs and outputs of the layer")
    parser.add_argument("--harmonics", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--teacher", type=Path, help="folder of a dense checkpoint, to compare its --student with")
    parser.add_argument("--student", type=Path, help="folder of a converted checkpoint")
    parser.add_argument("--depth", type=int, default=SMOLLM2["num_hidden_layers"], help="blocks, without checkpoints")
    parser.add_argument("--context", type=int, default=128, help="tokens in the cache while decoding")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args(argv)
    if (args.teacher is None) != (args.student is None):
        parser.error("--teacher and --student go together")

    torch.manual_seed(0)
    keep_freed_memory()
    start = time.perf_counter()
    layers = compare_layers(args.width, args.harmonics, args.tokens, args.repeats)
    print_table(layers)
    print()
    if args.teacher is None:
        dense, students = build(args.depth)
    else:
        dense, student = (AutoModelForCausalLM.from_pretrained(folder) for folder in (args.teacher, args.student))
        students = [student]
    decoding = compare_decoding(dense, students, args.context, 3 * args.repeats)
    print_table(decoding)
    seconds = time.perf_counter() - start
    figures = {"layers": layers, "decoding": decoding, "checkpoints": args.teacher is not None}
    print_footer(write_report("holo_speed", figures, seed=0, seconds=seconds, folder=args.results), seconds)


def sentence(result: dict) -> str:
    f = result["figures"]
    first = f["layers"][0]
    layers = [
        f"{row['layer']} {row['times_quicker']:.1f} ({in_threads(row['threads'])})"
        for row in f["layers"]
        if row["layer"] != first["layer"]
    ]
    times: dict[str, list[str]] = {}
    for row in f["decoding"]:
        times.setdefault(row["factors"], []).append(f"{row['time_ratio']:.2f} ({row['kept']:.0%} kept)")
    decoding = "; ".join(f"{form} {', '.join(ratios)}" for form, ratios in times.items())
    return (
        f"a training step of HoloLinear {first['width']}→{first['width']} with {first['harmonics']} harmonics, "
        f"{first['tokens']} tokens, is faster than nn.Linear's by the factors: {', '.join(layers)}; time per token "
        f"of a converted model, the dense one's being 1: {decoding}; medians"
    )


if __name__ == "__main__":
    main()
