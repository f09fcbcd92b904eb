"""State tracking: can a model keep count beyond the lengths that it was trained with?

    python benchmarks/state_tracking.py

Parity, sums modulo 3 and products in the group S3 (Liu et al., 2023; Merrill et al., 2024; Grazzi et al., 2025): after
every token the running result is asked. Sequences of training have up to 40 (S3: 32) tokens; longer ones are asked
only. A transition of the state that can only shrink it, as a decay between 0 and 1 does, cannot keep parity for long.
Options are named with the model, `--models "hsn, write=cancel"`; the learning rate is chosen by sequences that are kept
back, half as long again as those of the training: at the trained length, who counts and who does not look alike. A
finished run is kept in the result file and not repeated.
"""

import argparse
import time
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path

from common.contenders import FILTERED, Runs, accuracies_of, at_best_rate, contender, edge_note, mean_accuracies
from common.fitting import OPTIMIZERS, Fit, fit
from common.report import RESULTS, image_path, markdown_table, measured_on, print_footer, print_table

from hf_holo.eval.learning import UNSEEN, accuracy, draw_accuracies
from hf_holo.eval.tasks import GroupProducts, Sums

NAME = "state_tracking"
TASKS = {"parity": (Sums(2), 40), "sums modulo 3": (Sums(3), 40), "S3": (GroupProducts("S", 3), 32)}  # trained length
SHORTEST = 3  # tokens in training
LENGTHS = (40, 64, 128, 256, 512, 1024)
TURNS = "drift=data, drift_share=0.0, learned_state=true, state_start=1.0, turn_fractions"  # of a state that is there
COUNTS = f"hsn, {TURNS}=[6], memory=[2,1000000]"
# A turn and a reflection in one plane make all of S3; the reflection is a write of β = 2.
TURNS_AND_REFLECTS = (
    f"hsn, {TURNS}=[3], memory=[100000,1000000], num_heads=4, num_phases=1, "
    "write=cancel, write_range=2.0, write_start=1.0"
)
SHORT = {COUNTS: "hsn that turns", TURNS_AND_REFLECTS: "hsn that turns and reflects"}  # what tables call them
MODELS = ("hsn", COUNTS, TURNS_AND_REFLECTS, FILTERED)
LEARNING_RATES = (0.002, 0.004, 0.008)


def measure(name: str, task_name: str, args: argparse.Namespace, rate: float, seed: int) -> dict:
    """Train one model on one task: accuracy on kept-back sequences, and at every length."""
    task, longest = TASKS[task_name]
    start = time.perf_counter()
    model = contender(name, task.vocab_size, args.width, args.depth, seed)
    how = {"steps": args.steps, "rows": args.rows, "length": (SHORTEST, longest), "growing": args.growing}
    fit(model, task, Fit(rate, args.optimizer, seed=seed, **how))
    run = {"parameters": model.num_parameters()}
    run["chosen_by"] = accuracy(model, task, longest * 3 // 2, args.sequences, seed=UNSEEN + 1)
    run["accuracies"] = {str(n): accuracy(model, task, n, args.sequences, rows=16) for n in args.lengths}
    return run | {"seconds": round(time.perf_counter() - start, 1)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, help="FAMILY, or 'FAMILY, OPTION=VALUE, ...'")
    parser.add_argument("--tasks", nargs="+", choices=tuple(TASKS), default=tuple(TASKS))
    parser.add_argument("--optimizer", choices=tuple(OPTIMIZERS), default="adamw")
    parser.add_argument("--learning_rates", nargs="+", type=float, default=LEARNING_RATES, help="to start from")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--growing", type=float, default=0.8, help="share of the steps in which lengths grow")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="to ask")
    parser.add_argument("--sequences", type=int, default=64, help="to score")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args(argv)

    names = ("optimizer", "steps", "rows", "growing", "lengths", "sequences", "width", "depth")
    settings = {name: getattr(args, name) for name in names} | {"lengths": list(args.lengths)}
    kept = Runs(NAME, settings, args.results, args.seeds[0])
    for task, name in product(args.tasks, args.models):
        run = partial(measure, name, task, args)
        kept.search({"task": task, "model": name}, args.learning_rates, args.seeds, run)
    rows = at_best_rate(kept.runs, ("task", "model"))
    print_table([{name: row[name] for name in ("task", "model", "learning_rate")} | accuracies_of(row) for row in rows])
    for task in dict.fromkeys(row["task"] for row in rows):
        points = [point for row in rows if row["task"] == task for point in mean_accuracies(row, _name(row))]
        title = f"{task}, trained on up to {TASKS[task][1]} tokens"
        draw_accuracies(points, title, image_path(f"{NAME}_{task.replace(' ', '_')}", args.results))
    print_footer(args.results / f"{NAME}.json", kept.seconds)


def _name(row: dict) -> str:
    return SHORT.get(row["model"], row["model"])


def sentence(result: dict) -> str:
    f = result["figures"]
    rows, longest = at_best_rate(f["runs"], ("task", "model")), str(max(f["settings"]["lengths"]))
    parts = []
    for task in dict.fromkeys(row["task"] for row in rows):
        shares = [f"{_name(row)} {accuracies_of(row)[longest]}" for row in rows if row["task"] == task]
        parts.append(f"{task} ({TASKS[task][0].chance:.0%} by guessing): {', '.join(shares)}")
    return (
        f"running results that are right in {int(longest):,} tokens, after training on at most 40 (S3: 32): "
        f"{'; '.join(parts)}; seeds: {len({run['seed'] for run in f['runs']})}{edge_note(rows)}"
    )


def table(result: dict) -> str:
    """Every model on every task at every length."""
    f = result["figures"]
    settings, rows = f["settings"], at_best_rate(f["runs"], ("task", "model"))
    head = ("task", "model", ">parameters", *(f">{n:,} tokens" for n in settings["lengths"]), ">learning rate")
    cells = [
        (
            row["task"],
            _name(row),
            f"{row['runs'][0]['parameters']:,}",
            *(accuracies_of(row)[str(n)] for n in settings["lengths"]),
            f"{row['learning_rate']:g}",
        )
        for row in rows
    ]
    chances = ", ".join(f"{name} {task.chance:.0%}" for name, (task, _) in TASKS.items())
    return "\n".join(
        [
            markdown_table(head, cells),
            "",
            f"Share of the places whose running result is named, the lowest and the highest of "
            f"{len({run['seed'] for run in f['runs']})} seeds; by guessing: {chances}. {settings['steps']:,} steps of "
            f"{settings['rows']} sequences of {SHORTEST} to 40 (S3: 32) tokens with "
            f"{OPTIMIZERS[settings['optimizer']]}, width {settings['width']}, depth {settings['depth']}, each at the "
            f"best of its learning rates by sequences of 60 (48) tokens kept back{edge_note(rows)}. "
            f"{_what_names_mean(rows)}{result['seconds']:,.0f} seconds for all on: {measured_on(result)}.",
        ]
    )


def _what_names_mean(rows: list[dict]) -> str:
    """The options of the models that have a short name."""
    known = [name for name in SHORT if any(row["model"] == name for row in rows)]
    return "".join(f"{SHORT[name].capitalize()}: `{name.removeprefix('hsn, ')}`. " for name in known)


if __name__ == "__main__":
    main()
