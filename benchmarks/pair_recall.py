"""Recall in context: which models, made of which parts, can look up what they have read?

    python benchmarks/pair_recall.py

A sequence names pairs of a key and a value, continues with filler, and then asks for every key in another order; only
the answers are trained and scored (multi-query associative recall; Arora et al., "Zoology", 2023). Nothing repeats
between sequences, so that weights cannot hold the answers, the state must. All models have the same width and depth,
see the same sequences in the same order, and are shown at the best of the same learning rates. The Llama has a short
causal filter ahead of its attention, as the others have: without one it needs many more steps to learn the task. Each
is asked after the filler it was trained with, and after more than it ever saw. Options are named with the model,
`--models "hsn, write=cancel"`. A finished run is kept in the result file and not repeated, so that runs can be made
one at a time (`--models hsn --learning_rates 0.004`).
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from common.contenders import FILTERED, SOLVED, Runs, contender
from common.fitting import Fit, fit
from common.report import RESULTS, best_runs, markdown_table, measured_on, print_footer, print_table

from hf_holo.eval.learning import accuracy
from hf_holo.eval.tasks import Pairs

NAME = "pair_recall"
MODELS = {  # as tables call them, and their names in full
    "resonance": "resonance",
    "resonance, interference": "resonance, interference=true",
    "resonance, context of 16": "resonance, chunk_length=16",
    "resonance, memory of 64": "resonance, memory_dimension=64, memory_chunk_length=16",
    "hsn": "hsn",
    "hsn, write=cancel": "hsn, write=cancel",
    FILTERED: FILTERED,
}


def best(runs: list[dict]) -> list[dict]:
    """Of every model the run that recalls most after the filler it was trained with."""
    return best_runs(runs, ("model",), lambda run: run["near"])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", default=tuple(MODELS), help="of the table, or 'FAMILY, OPTION=VALUE, ...'"
    )
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
    kept = Runs(NAME, settings, args.results, args.seed)
    for name in args.models:
        for rate in args.learning_rates:
            kept.run({"model": name, "learning_rate": rate}, lambda: measure(name, task, rate, args))  # noqa: B023
    print_table(kept.runs)
    print_footer(args.results / f"{NAME}.json", kept.seconds)


def measure(name: str, task: Pairs, rate: float, args: argparse.Namespace) -> dict:
    """Train one model at one learning rate, and ask it near and far."""
    start = time.perf_counter()
    model = contender(MODELS.get(name, name), task.vocab_size, args.width, args.depth, args.seed)
    near, far = task.length(args.filler), task.length(args.longer_filler)
    fit(model, task, Fit(rate, steps=args.steps, rows=args.rows, length=near, seed=args.seed))
    run = {"parameters": model.num_parameters(), "near": accuracy(model, task, near, args.sequences)}
    run["far"] = accuracy(model, task, far, args.sequences)
    return run | {"seconds": round(time.perf_counter() - start, 1)}


def caveat(figures: dict) -> str:
    """Whether attention is a baseline at all."""
    attention = [run["near"] for run in figures["runs"] if run["model"] in ("llama", FILTERED)]
    if not attention or max(attention) >= SOLVED:
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
            f"the best of the learning rates {rates} on the very sequences that are scored, width {settings['width']}, "
            f"depth {settings['depth']}, one seed{caveat(f)}. {result['seconds']:,.0f} seconds for all on: "
            f"{measured_on(result)}.",
        ]
    )


if __name__ == "__main__":
    main()
