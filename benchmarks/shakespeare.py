"""The recipe shakespeare-char: loss over the whole validation split, with parameters, tokens and seconds.

    python benchmarks/shakespeare.py tinyshakespeare.txt
    python benchmarks/shakespeare.py tinyshakespeare.txt --family resonance --steps 1500

The tiny preset of the family takes the place of the recipe's. A finished run in `--output_dir` is read, not repeated.
The seconds are those between the first file of the run, written ahead of the first step, and the last one, written
after the final evaluation.
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

import yaml
from report import RESULTS, flags, print_footer, print_table, report_name, write_report
from transformers import AutoModelForCausalLM

from hf_holo.training.train import main as train

RECIPE = "shakespeare-char"


def figures(run: Path, recipe: dict) -> dict[str, float | int]:
    """What a finished run says about itself."""
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        last = list(csv.DictReader(file))[-1]
    steps = int(last["step"])
    return {
        "parameters": AutoModelForCausalLM.from_pretrained(run).num_parameters(),
        "steps": steps,
        "tokens": steps * recipe["per_device_train_batch_size"] * recipe["block_size"],
        "window": recipe["block_size"],
        "validation_loss": float(last["validation_loss"]),
        "bits_per_character": float(last["validation_bits_per_character"]),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="text file; the last tenth validates")
    parser.add_argument("--family", choices=("hsn", "resonance"), default="hsn")
    parser.add_argument("--output_dir", type=Path, help="folder of the run; default: by family, below runs")
    parser.add_argument("--steps", type=int, help="default: those of the recipe")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args(argv)

    run = args.output_dir or Path("runs") / f"{RECIPE}-{args.family}"
    if not (run / "sample.txt").exists():  # the last file that a run writes
        arguments = {
            "recipe": RECIPE,
            "preset": f"{args.family}-tiny",
            "train_file": args.text,
            "output_dir": run,
        }
        if args.steps:
            arguments |= {"max_steps": args.steps, "warmup_steps": max(1, args.steps // 20)}  # the share in the recipe
        train(flags(arguments))
    recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    found = figures(run, recipe)
    print_table([found])
    first, last = run / "recipe.yaml", run / "sample.txt"
    seconds = last.stat().st_mtime - first.stat().st_mtime
    name, seed = report_name("shakespeare", args.family), recipe.get("seed", 42)
    path = write_report(name, found, seed=seed, seconds=seconds, folder=args.results)
    print_footer(path, seconds)


if __name__ == "__main__":
    main()
