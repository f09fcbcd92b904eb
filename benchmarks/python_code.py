"""The recipes for code, and the example that continues from one of them: what they reach on held-out files.

    python benchmarks/python_code.py

Trains by python-code and python-code-completion, then examples/classify_python_files.py from the model that fills. A
finished run below `--runs` is read, not repeated; a row of the result file is not measured again, so that the parts can
be run one at a time (`--parts filling`). The seconds of a recipe are those between the first file of the run, written
before the first step, and the last one, written after the final evaluation.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from common.example_scripts import example
from common.recipe_runs import figures, seconds, seed, train_once
from common.report import RESULTS, earlier_rows, markdown_table, measured_on, print_footer, print_table, write_report

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


def sentence(result: dict) -> str:
    rows = {row["part"]: row for row in result["figures"]["rows"]}
    parts = [
        f"{recipe} {rows[part]['validation_loss']:.3f} nats per token, {rows[part]['validation_accuracy']:.1%} right"
        for part, recipe in RECIPES.items()
        if part in rows
    ]
    if "classification" in rows:
        shares = [f"{name} {share:.1%}" for name, share in rows["classification"]["accuracies"].items()]
        parts.append(f"package of a file: {', '.join(shares)}")
    return f"on held-out files of Python's standard library: {'; '.join(parts)}; one seed"


def table(result: dict) -> str:
    """What the recipes reach, and what the example that classifies files does."""
    rows = {row["part"]: row for row in result["figures"]["rows"]}
    recipes = []
    for part, recipe in RECIPES.items():
        row = rows[part]
        sizes = f"{row['parameters']:,}", f"{row['tokens']:,}"
        scores = f"{row['validation_loss']:.3f}", f"{row['validation_accuracy']:.1%}"
        recipes.append((recipe, *sizes, *scores, f"{row['seconds'] / 60:.0f}"))
    head = ("recipe", ">parameters", ">tokens read", ">nats per token", ">right at first guess", ">minutes")
    accuracies = [(name, f"{share:.1%}") for name, share in rows["classification"]["accuracies"].items()]
    minutes = rows["classification"]["seconds"] / 60
    return "\n".join(
        [
            markdown_table(head, recipes),
            "",
            markdown_table(("package of a file", ">right"), accuracies),
            "",
            f"The classifier started from python-code and took {minutes:.0f} minutes. One seed; {measured_on(result)}.",
        ]
    )


if __name__ == "__main__":
    main()
