"""Multi-query associative recall (MQAR, Arora et al., "Zoology", 2023): how many pairs does a state of this size hold?

    python benchmarks/multi_query_recall.py

Keys with their values, then a text in which every key comes again once and its value is asked. Attention solves it at
any size; what a model with a constant state reaches depends on its state, whose bytes are in the table. The Llama has a
short causal filter, as the recurrent models have. Options are named with the model (`--models "hsn, write=cancel"`);
the learning rate is chosen by sequences that are kept back. A finished run is kept in the result file and not repeated.
"""

import argparse
import time
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path

from common.contenders import FILTERED, SOLVED, Runs, at_best_rate, contender, edge_note, range_of
from common.fitting import OPTIMIZERS, Fit, fit
from common.report import RESULTS, markdown_table, measured_on, print_footer, print_table

from hf_holo.eval.cost import state_bytes
from hf_holo.eval.learning import UNSEEN, accuracy
from hf_holo.eval.tasks import QueriedPairs

NAME = "multi_query_recall"
SIZES = ("16x128", "32x256", "64x512")  # pairs and tokens
MODELS = ("hsn", "hsn, write=cancel", "resonance", "resonance, memory_dimension=64", FILTERED)
LEARNING_RATES = (0.002, 0.004, 0.008)


def measure(name: str, size: str, args: argparse.Namespace, rate: float, seed: int) -> dict:
    """Train one model at one size, on as many tokens a step as at any other."""
    pairs, length = map(int, size.split("x"))
    task = QueriedPairs(pairs, args.vocabulary)
    start = time.perf_counter()
    model = contender(name, task.vocab_size, args.width, args.depth, seed)
    rows = max(1, args.tokens // length)
    fit(model, task, Fit(rate, args.optimizer, steps=args.steps, rows=rows, length=length, seed=seed))
    run = {"parameters": model.num_parameters(), "state_bytes": state_bytes(model)}
    run["chosen_by"] = accuracy(model, task, length, args.sequences, seed=UNSEEN + 1)
    run["accuracy"] = accuracy(model, task, length, args.sequences)
    return run | {"seconds": round(time.perf_counter() - start, 1)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, help="FAMILY, or 'FAMILY, OPTION=VALUE, ...'")
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="PAIRSxTOKENS")
    parser.add_argument("--vocabulary", type=int, default=512)
    parser.add_argument("--optimizer", choices=tuple(OPTIMIZERS), default="muon")
    parser.add_argument("--learning_rates", nargs="+", type=float, default=LEARNING_RATES, help="to start from")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=8192, help="in a batch")
    parser.add_argument("--sequences", type=int, default=512, help="to score")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args(argv)

    names = ("vocabulary", "optimizer", "steps", "tokens", "sequences", "width", "depth")
    kept = Runs(NAME, {name: getattr(args, name) for name in names}, args.results, args.seeds[0])
    for size, name in product(args.sizes, args.models):
        run = partial(measure, name, size, args)
        kept.search({"size": size, "model": name}, args.learning_rates, args.seeds, run)
    rows = at_best_rate(kept.runs, ("size", "model"))
    print_table(
        [{name: row[name] for name in ("size", "model", "learning_rate")} | {"right": _share(row)} for row in rows]
    )
    print_footer(args.results / f"{NAME}.json", kept.seconds)


def _share(row: dict) -> str:
    return range_of([run["accuracy"] for run in row["runs"]])


def caveat(rows: Sequence[dict]) -> str:
    """Whether attention is a baseline at all."""
    failed = [row["size"] for row in rows if row["model"] == FILTERED and _best(row) < SOLVED]
    return f"; attention has not learned {', '.join(failed)}, which it solves in the literature" if failed else ""


def _best(row: dict) -> float:
    return max(run["accuracy"] for run in row["runs"])


def sentence(result: dict) -> str:
    f = result["figures"]
    rows = at_best_rate(f["runs"], ("size", "model"))
    parts = []
    for size in dict.fromkeys(row["size"] for row in rows):
        pairs, length = size.split("x")
        shares = ", ".join(f"{row['model']} {_share(row)}" for row in rows if row["size"] == size)
        parts.append(f"{pairs} pairs in {length} tokens: {shares}")
    seeds = len({run["seed"] for run in f["runs"]})
    return f"values of keys named (MQAR), {'; '.join(parts)}; seeds: {seeds}{edge_note(rows)}{caveat(rows)}"


def table(result: dict) -> str:
    """Every model at every size."""
    f = result["figures"]
    settings, rows = f["settings"], at_best_rate(f["runs"], ("size", "model"))
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    titles = (">{} pairs in {} tokens".format(*size.split("x")) for size in sizes)
    cells = []
    for name in dict.fromkeys(row["model"] for row in rows):
        own = {row["size"]: row for row in rows if row["model"] == name}
        first = next(iter(own.values()))["runs"][0]
        state = "grows" if first["state_bytes"] is None else f"{first['state_bytes'] / 2**10:,.0f} KiB"
        shares = (_share(own[size]) if size in own else "" for size in sizes)
        cells.append((name, f"{first['parameters']:,}", state, *shares))
    return "\n".join(
        [
            markdown_table(("", ">parameters", ">state", *titles), cells),
            "",
            f"Share of the keys whose value is named, among {settings['vocabulary']} tokens, the lowest and the "
            f"highest of {len({run['seed'] for run in f['runs']})} seeds; {settings['steps']:,} steps of "
            f"{settings['tokens']:,} tokens with {OPTIMIZERS[settings['optimizer']]}, width {settings['width']}, depth "
            f"{settings['depth']}, each at the best of its learning rates by sequences kept back{edge_note(rows)}"
            f"{caveat(rows)}. {result['seconds']:,.0f} seconds for all on: {measured_on(result)}.",
        ]
    )


if __name__ == "__main__":
    main()
