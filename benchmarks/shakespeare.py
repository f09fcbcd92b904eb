"""The recipe shakespeare-char: loss over the whole validation split, with parameters, tokens and seconds.

    python benchmarks/shakespeare.py tinyshakespeare.txt
    python benchmarks/shakespeare.py tinyshakespeare.txt --family resonance --steps 1500

hsn is the model of the recipe. Another family trains its tiny preset as it is, since a preset on the command line takes
the place of the recipe's model. A finished run in `--output_dir` is read, not repeated. The seconds are those between
the first file of the run, written before the first step, and the last one, written after the final evaluation.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from common.recipe_runs import figures, seconds, seed, train_once
from common.report import RESULTS, in_threads, print_footer, print_table, report_name, write_report

RECIPE = "shakespeare-char"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="text file; the last tenth validates")
    parser.add_argument("--family", choices=("hsn", "resonance"), default="hsn")
    parser.add_argument("--output_dir", type=Path, help="folder of the run; default: by family, below runs")
    parser.add_argument("--steps", type=int, help="default: those of the recipe")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args(argv)

    run = args.output_dir or Path("runs") / f"{RECIPE}-{args.family}"
    model = {} if args.family == "hsn" else {"preset": f"{args.family}-tiny"}  # the recipe's own is hsn's
    train_once(RECIPE, run, args.steps, train_file=args.text, **model)
    found, taken = figures(run), seconds(run)
    print_table([found])
    name = report_name("shakespeare", args.family)
    print_footer(write_report(name, found, seed=seed(run), seconds=taken, folder=args.results), taken)


def sentence(result: dict) -> str:
    f = result["figures"]
    return (
        f"{f['validation_loss']:.3f} nats per character over the whole validation split of tinyshakespeare "
        f"({f['parameters']:,} parameters, {f['tokens'] / 1e6:.1f} M tokens, windows of {f['window']}; one seed)"
    )


def headline(result: dict) -> str:
    f, threads = result["figures"], in_threads(result["machine"]["threads"])
    return (
        f"{f['validation_loss']:.2f} nats per character on held-out text after {result['seconds'] / 60:.0f} minutes on "
        f"{threads} of a CPU, {f['parameters'] / 1e6:.1f} M parameters (one seed)"
    )


if __name__ == "__main__":
    main()
