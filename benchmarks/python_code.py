"""The recipes for code, and the example that goes on from one of them: what they reach on held-out files.

    python benchmarks/python_code.py

Trains by python-code and python-code-completion, then examples/classify_python_files.py from the model that fills. A
finished run below `--runs` is read, not repeated; a row of the result file is not measured again, so that the parts can
be run one at a time (`--parts filling`). The seconds of a recipe are those between the first file of the run, written
ahead of the first step, and the last one, written after the final evaluation.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from example_scripts import example
from recipe_runs import figures, seconds, seed, train_once
from report import RESULTS, earlier_rows, print_footer, print_table, write_report

NAME = "python_code"
RECIPES = {"filling": "python-code", "completion": "python-code-completion"}
PARTS = (*RECIPES, "classification")


def train(part: str, args: argparse.Namespace) -> dict[str, float | int]:
    """Figures of the run of a recipe, which is trained if it has not been."""
    run = args.runs / RECIPES[part]
    train_once(RECIPES[part], run, args.steps)
    return figures(run) | {"seed": seed(run), "seconds": seconds(run)}


def classify(args: argparse.Namespace) -> dict[str, float | dict]:
    """Accuracies of the example, which starts from the model that fills, and the seconds it took."""
    filling = args.runs / RECIPES["filling"]
    if not filling.exists():
        raise SystemExit(f"--parts classification starts from {filling}: run the part filling")
    start = time.perf_counter()
    folders = ["--checkpoint", filling, "--output_dir", args.runs / "classify-python-files"]
    packages = ["--packages", *args.packages] if args.packages else []
    accuracies = example("classify_python_files").main([*map(str, folders), *packages])
    return {"accuracies": accuracies, "seconds": time.perf_counter() - start}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs (default: runs)")
    parser.add_argument("--steps", type=int, help="default: those of the recipes")
    parser.add_argument("--packages", nargs="+", help="to classify; default: those of the example")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args(argv)

    settings = {"steps": args.steps, "packages": args.packages}
    rows, taken = earlier_rows(NAME, settings, args.results)
    for part in args.parts:
        if any(row["part"] == part for row in rows):
            continue
        rows.append({"part": part} | (classify(args) if part == "classification" else train(part, args)))
        taken += rows[-1]["seconds"]
        write_report(NAME, {**settings, "rows": rows}, seed=0, seconds=taken, folder=args.results)

    for row in rows:
        print_table([{key: value for key, value in row.items() if not isinstance(value, dict)}])
    print_footer(args.results / f"{NAME}.json", taken)


if __name__ == "__main__":
    main()
