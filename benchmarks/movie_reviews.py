"""Whole movie reviews: hsn and Resonance against a ModernBERT that sees their first part. The example, with a report.

    python benchmarks/movie_reviews.py train.parquet test.parquet

All other arguments are those of examples/classify_movie_reviews.py, which says how the models are compared.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from common.example_scripts import example
from common.report import RESULTS, print_footer, write_report

NAME = "movie_reviews"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the report")
    args, others = parser.parse_known_args(argv)

    done = example("classify_movie_reviews").main(others)
    figures = {"settings": done["settings"], "rows": done["rows"]}
    seed, seconds = done["settings"]["seed"], done["seconds"]
    print_footer(write_report(NAME, figures, seed=seed, seconds=seconds, folder=args.results), seconds)


def sentence(result: dict) -> str:
    settings, rows = result["figures"]["settings"], result["figures"]["rows"]
    told = ", ".join(f"{row['model']} {row['accuracy']:.1%} ({row['parameters']:,} parameters)" for row in rows)
    return (
        f"whole movie reviews judged right, ± {max(row['standard_error'] for row in rows):.1%}, by models that "
        f"have seen {settings['train_reviews']:,} of them {settings['epochs']:g} times and nothing else, each at its "
        f"best of the learning rates {settings['learning_rates']}, ModernBERT the first {settings['bert_length']} "
        f"tokens only, one seed: {told}"
    )


if __name__ == "__main__":
    main()
