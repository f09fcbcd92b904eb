"""Recall far behind: which models find pairs again behind more text than they have ever seen?

    python benchmarks/far_recall.py

A sequence names pairs of a key and a value, continues with up to 64 tokens of filler in training, and then asks for
every key in another order; scored behind 64, 512 and 4,096 tokens. `far` is HoloSpectralNet as it is set for this: no
drift, which would turn contents out of phase at distances never trained; states that hold for a million tokens; and a
write that cancels what its key recalls, whose strength is its own, so that filler need not be written. The Llama has a
short causal filter, as the recurrent models have. The learning rate is chosen by sequences with as much filler as the
longest of the training that are kept back. A finished run is kept in the result file and not repeated.
"""

import argparse
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from common.contenders import (
    FILTERED,
    SOLVED,
    Runs,
    accuracies_of,
    at_best_rate,
    contender,
    edge_note,
    mean_accuracies,
)
from common.fitting import OPTIMIZERS, Fit, fit
from common.report import RESULTS, image_path, markdown_table, measured_on, print_footer, print_table

from hf_holo.eval.learning import UNSEEN, accuracy, draw_accuracies
from hf_holo.eval.tasks import Pairs

NAME = "far_recall"
FAR = "drift_share=0.0, memory=[10000,1000000], write=cancel, write_start=0.05, phase_spread=3.0"
MODELS = {"hsn": "hsn", "hsn, far": f"hsn, {FAR}", FILTERED: FILTERED}  # as tables call them, and their names in full
LEARNING_RATES = (0.002, 0.004, 0.008)
FILLERS = (64, 512, 4096)


def measure(name: str, task: Pairs, args: argparse.Namespace, rate: float, seed: int) -> dict:
    """Train one model, and ask it near and far."""
    start = time.perf_counter()
    model = contender(MODELS.get(name, name), task.vocab_size, args.width, args.depth, seed)
    lengths = (task.length(0), task.length(args.filler))
    fit(model, task, Fit(rate, args.optimizer, steps=args.steps, rows=args.rows, length=lengths, seed=seed))
    run = {"parameters": model.num_parameters()}
    run["chosen_by"] = accuracy(model, task, lengths[1], args.sequences, seed=UNSEEN + 1)
    run["accuracies"] = {str(n): accuracy(model, task, task.length(n), args.sequences, rows=8) for n in args.fillers}
    return run | {"seconds": round(time.perf_counter() - start, 1)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", default=tuple(MODELS), help="of the table, or 'FAMILY, OPTION=VALUE, ...'"
    )
    parser.add_argument("--optimizer", choices=tuple(OPTIMIZERS), default="muon")
    parser.add_argument("--learning_rates", nargs="+", type=float, default=LEARNING_RATES, help="to start from")
    parser.add_argument("--steps", type=int, default=750)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--symbols", type=int, default=32, help="of each kind: keys, values, filler")
    parser.add_argument(
        "--filler", type=int, default=64, help="tokens between pairs and questions, at most, in training"
    )
    parser.add_argument("--fillers", nargs="+", type=int, default=FILLERS, help="the same, to ask")
    parser.add_argument("--sequences", type=int, default=128, help="to score")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args(argv)

    task = Pairs(args.pairs, args.symbols)
    names = ("optimizer", "steps", "rows", "pairs", "symbols", "filler", "sequences", "width", "depth")
    settings = {name: getattr(args, name) for name in names} | {"fillers": list(args.fillers)}
    kept = Runs(NAME, settings, args.results, args.seeds[0])
    for name in args.models:
        kept.search({"model": name}, args.learning_rates, args.seeds, partial(measure, name, task, args))
    rows = at_best_rate(kept.runs, ("model",))
    print_table([{"model": row["model"], "learning_rate": row["learning_rate"]} | accuracies_of(row) for row in rows])
    told = [row for row in rows if not (row["model"] == FILTERED and caveat(rows, args.fillers))]
    points = [point for row in told for point in mean_accuracies(row, row["model"])]
    draw_accuracies(
        points, f"{args.pairs} pairs behind filler, trained on up to {args.filler}", image_path(NAME, args.results)
    )
    print_footer(args.results / f"{NAME}.json", kept.seconds)


def caveat(rows: Sequence[dict], fillers: Sequence[int]) -> str:
    """Whether attention is a baseline at all."""
    near = str(min(fillers))
    learned = [max(run["accuracies"][near] for run in row["runs"]) for row in rows if row["model"] == FILTERED]
    if not learned or max(learned) >= SOLVED:
        return ""
    return (
        "; no comparison with attention: in these steps the Llama has not learned what it learns in more (pair_recall)"
    )


def sentence(result: dict) -> str:
    f = result["figures"]
    settings, rows = f["settings"], at_best_rate(f["runs"], ("model",))
    shares = "; ".join(f"{row['model']} {' / '.join(accuracies_of(row).values())}" for row in rows)
    behind = " / ".join(f"{n:,}" for n in settings["fillers"])
    return (
        f"{settings['pairs']} pairs looked up behind {behind} tokens of filler, after {settings['steps']:,} steps with "
        f"at most {settings['filler']}: {shares}; seeds: {len({run['seed'] for run in f['runs']})}{edge_note(rows)}"
        f"{caveat(rows, settings['fillers'])}"
    )


def table(result: dict) -> str:
    """What each model looks up, near and far, at its best learning rate."""
    f = result["figures"]
    settings, rows = f["settings"], at_best_rate(f["runs"], ("model",))
    head = ("", ">parameters", *(f">{n:,} tokens of filler" for n in settings["fillers"]), ">learning rate")
    cells = [
        (
            row["model"],
            f"{row['runs'][0]['parameters']:,}",
            *accuracies_of(row).values(),
            f"{row['learning_rate']:g}",
        )
        for row in rows
    ]
    return "\n".join(
        [
            markdown_table(head, cells),
            "",
            f"Share of values named, the lowest and the highest of {len({run['seed'] for run in f['runs']})} seeds; "
            f"{settings['pairs']} pairs of {settings['symbols']} keys and values, {settings['steps']:,} steps of "
            f"{settings['rows']} sequences with up to {settings['filler']} tokens of filler with "
            f"{OPTIMIZERS[settings['optimizer']]}, width {settings['width']}, depth {settings['depth']}, each at the "
            f"best of its learning rates by sequences kept back{edge_note(rows)}{caveat(rows, settings['fillers'])}. "
            f"Far: `{FAR}`. "
            f"{result['seconds']:,.0f} seconds for all on: {measured_on(result)}.",
        ]
    )


if __name__ == "__main__":
    main()
