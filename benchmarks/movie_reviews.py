"""Whole movie reviews: hsn and Resonance beside a ModernBERT that sees their first part. The example, with a report.

    python benchmarks/movie_reviews.py train.parquet test.parquet

All other arguments are those of examples/classify_movie_reviews.py, which says how the models are compared.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from example_scripts import example
from report import RESULTS, print_footer, write_report

NAME = "movie_reviews"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the report")
    args, others = parser.parse_known_args(argv)

    done = example("classify_movie_reviews").main(others)
    figures = {"settings": done["settings"], "rows": done["rows"]}
    seed, seconds = done["settings"]["seed"], done["seconds"]
    print_footer(write_report(NAME, figures, seed=seed, seconds=seconds, folder=args.results), seconds)


if __name__ == "__main__":
    main()
