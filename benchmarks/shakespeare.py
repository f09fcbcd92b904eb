"""The recipe shakespeare-char: loss over the whole validation split, with parameters, tokens and seconds.

    python benchmarks/shakespeare.py tinyshakespeare.txt

A finished run in `--output_dir` is read, not repeated. The seconds are those between the first file of the run, written
ahead of the first step, and the last one, written after the final evaluation.
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

import yaml
from report import RESULTS, print_footer, print_table, write_report
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
    parser.add_argument("--output_dir", type=Path, default=Path("runs") / RECIPE, help="folder of the run")
    parser.add_argument("--steps", type=int, help="default: those of the recipe")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args(argv)

    if not (args.output_dir / "sample.txt").exists():  # the last file that a run writes
        steps = [] if args.steps is None else ["--max_steps", str(args.steps), "--warmup_steps", "1"]
        train(["--recipe", RECIPE, "--train_file", str(args.text), "--output_dir", str(args.output_dir), *steps])
    recipe = yaml.safe_load((args.output_dir / "recipe.yaml").read_text(encoding="utf-8"))
    found = figures(args.output_dir, recipe)
    print_table([found])
    first, last = args.output_dir / "recipe.yaml", args.output_dir / "sample.txt"
    seconds = last.stat().st_mtime - first.stat().st_mtime
    path = write_report("shakespeare", found, seed=recipe.get("seed", 42), seconds=seconds, folder=args.results)
    print_footer(path, seconds)


if __name__ == "__main__":
    main()
