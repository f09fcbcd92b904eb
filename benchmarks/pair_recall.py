"""Recall in context: which models, made of which parts, can look up what they have read?

    python benchmarks/pair_recall.py

A sequence names pairs of a key and a value, continues with filler, and then asks for every key in another order; only
the answers are trained and scored (multi-query associative recall; Arora et al., "Zoology", 2023). Nothing repeats
between sequences, so that weights cannot hold the answers, the state must. All models have the same width and depth,
see the same sequences in the same order, and are shown at the best of the same learning rates. A Llama is trained like
them; in this budget it does not learn the task, which attention solves in the literature with more steps or a short
filter. Each is asked after the filler it was trained with, and after more than it ever saw.
A finished run is kept in the result file and not repeated, so that runs can be made one at a time
(`--models llama --learning_rates 0.004`).
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from common.fitting import Fit, fit
from common.report import (
    RESULTS,
    best_runs,
    earlier_rows,
    markdown_table,
    measured_on,
    print_footer,
    print_table,
    write_report,
)
from design_choices import make
from llama_comparison import small_llama
from transformers import PreTrainedModel

from hf_holo.modeling.losses import IGNORED

NAME = "pair_recall"
SOLVED = 0.9  # share of the answers from which on a model has learned the task
CHUNK = 16  # tokens after which chunk means and memories can be read
MODELS = {
    "resonance": {},
    "resonance, interference": {"interference": True},
    "resonance, context of 16": {"chunk_length": CHUNK},
    "resonance, memory of 64": {"memory_dimension": 64, "memory_chunk_length": CHUNK},
    "hsn": {},
    "hsn, write=cancel": {"write": "cancel"},
    "llama": {},
}


@dataclass(frozen=True)
class Pairs:
    """Sequences of pairs, filler and questions. Keys, values and filler are `symbols` tokens each."""

    pairs: int
    symbols: int

    @property
    def vocab_size(self) -> int:
        return 3 * self.symbols

    def batch(self, rows: int, filler: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and, one on, what is to be predicted (-100 where nothing is), both `[rows, 4 pairs + filler - 1]`."""
        keys = torch.rand(rows, self.symbols, generator=generator).argsort(1)[:, : self.pairs]  # each at most once
        values = self.symbols + torch.randint(self.symbols, keys.shape, generator=generator)
        noise = 2 * self.symbols + torch.randint(self.symbols, (rows, filler), generator=generator)
        order = torch.rand(keys.shape, generator=generator).argsort(1)
        answers = values.gather(1, order)
        named = torch.stack([keys, values], -1).flatten(1)  # [rows, 2 pairs]
        asked = torch.stack([keys.gather(1, order), answers], -1).flatten(1)  # [rows, 2 pairs]
        silent = torch.full_like(answers, IGNORED)
        scored = torch.stack([silent, answers], -1).flatten(1)  # [rows, 2 pairs]
        tokens = torch.cat([named, noise, asked], 1)
        labels = torch.cat([torch.full_like(tokens[:, : -scored.shape[1]], IGNORED), scored], 1)
        return tokens[:, :-1], labels[:, 1:]


def build(name: str, vocab_size: int, width: int, depth: int, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    if name == "llama":
        return small_llama(vocab_size, width, depth, width * 8 // 3)
    sizes = {"vocab_size": vocab_size, "hidden_size": width, "num_hidden_layers": depth}
    return make(name.split(",")[0], **sizes, **MODELS[name])


@torch.no_grad()
def accuracy(model: PreTrainedModel, task: Pairs, filler: int, sequences: int, rows: int = 64) -> float:
    """Share of the questions whose most likely answer is the right one, over sequences that no training has seen."""
    model.eval()
    generator = torch.Generator().manual_seed(2**31)
    right = asked = 0
    for _ in range(0, sequences, rows):
        tokens, labels = task.batch(rows, filler, generator)
        right += (model(input_ids=tokens, use_cache=False).logits.argmax(-1) == labels).sum().item()
        asked += (labels != IGNORED).sum().item()
    return right / asked


def best(runs: list[dict]) -> list[dict]:
    """Of every model the run that recalls most after the filler it was trained with."""
    return best_runs(runs, ("model",), lambda run: run["near"])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=tuple(MODELS))
    parser.add_argument("--learning_rates", nargs="+", type=float, default=(0.002, 0.004, 0.008))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--symbols", type=int, default=32, help="of each kind: keys, values, filler")
    parser.add_argument("--filler", type=int, default=32, help="tokens between the pairs and the questions")
    parser.add_argument("--longer_filler", type=int, default=512, help="the same, at a distance never trained")
    parser.add_argument("--sequences", type=int, default=1024, help="to score")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args(argv)

    task = Pairs(args.pairs, args.symbols)
    names = ("steps", "rows", "pairs", "symbols", "filler", "longer_filler", "sequences", "width", "depth", "seed")
    settings = {name: getattr(args, name) for name in names}
    runs, seconds = earlier_rows(NAME, {"settings": settings}, args.results, "runs")
    for name in args.models:
        for rate in args.learning_rates:
            if any((run["model"], run["learning_rate"]) == (name, rate) for run in runs):
                continue
            print(f"{name}, learning rate {rate}", flush=True)
            start = time.perf_counter()
            model = build(name, task.vocab_size, args.width, args.depth, args.seed)
            fit(model, task, Fit(rate, steps=args.steps, rows=args.rows, length=args.filler, seed=args.seed))
            run = {"model": name, "learning_rate": rate, "parameters": model.num_parameters()}
            run["near"] = accuracy(model, task, args.filler, args.sequences)
            run["far"] = accuracy(model, task, args.longer_filler, args.sequences)
            runs.append(run | {"seconds": round(time.perf_counter() - start, 1)})
            seconds += runs[-1]["seconds"]
            write_report(
                NAME, {"settings": settings, "runs": runs}, seed=args.seed, seconds=seconds, folder=args.results
            )

    print_table(runs)
    print_footer(args.results / f"{NAME}.json", seconds)


def caveat(figures: dict) -> str:
    """Whether the Llama is a baseline at all."""
    attention = [run["near"] for run in figures["runs"] if run["model"] == "llama"]
    if not attention or max(attention) > SOLVED:
        return ""
    return (
        "; no comparison with attention: the Llama has not learned this task, which attention solves in the literature"
    )


def sentence(result: dict) -> str:
    f = result["figures"]
    settings = f["settings"]
    shares = [f"{run['model']} {run['near']:.0%} / {run['far']:.0%}" for run in best(f["runs"])]
    return (
        f"{settings['pairs']} pairs looked up after {settings['filler']} / {settings['longer_filler']} tokens of "
        f"filler, {settings['steps']:,} steps on {settings['filler']}: {'; '.join(shares)}; one seed{caveat(f)}"
    )


def table(result: dict) -> str:
    """What each model looks up, near and far, at its best learning rate."""
    f = result["figures"]
    settings, rates = f["settings"], sorted({run["learning_rate"] for run in f["runs"]})
    near, far = settings["filler"], settings["longer_filler"]
    head = ("", ">parameters", f">{near:,} tokens of filler", f">{far:,} tokens", ">learning rate")
    rows = [
        (run["model"], f"{run['parameters']:,}", f"{run['near']:.1%}", f"{run['far']:.1%}", run["learning_rate"])
        for run in best(f["runs"])
    ]
    return "\n".join(
        [
            markdown_table(head, rows),
            "",
            f"Share of {settings['pairs']} keys whose value is named, out of {settings['symbols']} values; "
            f"{settings['steps']:,} steps of {settings['rows']} sequences with {near} tokens of filler, each model at "
            f"the best of the learning rates {rates}, width {settings['width']}, depth {settings['depth']}, one "
            f"seed{caveat(f)}. {result['seconds']:,.0f} seconds for all on: {measured_on(result)}.",
        ]
    )


if __name__ == "__main__":
    main()
