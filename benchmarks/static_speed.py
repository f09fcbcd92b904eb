"""Time of the HSN block with static binding as the sequence grows: linear is 4 times the tokens, 4 times the time.

    python benchmarks/static_speed.py

Forward and backward of one row; the lengths take turns, and the figures are medians.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from block_speed import hsn_block, training_step
from common.report import RESULTS, interleaved_medians, print_footer, print_table, write_report


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--lengths", nargs="+", type=int, default=(2048, 4096, 8192))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    start = time.perf_counter()
    block = hsn_block(args.width, binding="static")
    steps = {str(tokens): training_step(block, 1, tokens, args.width) for tokens in args.lengths}
    medians = interleaved_medians(steps, args.repeats)
    shortest = args.lengths[0]
    rows = [
        {
            "tokens": n,
            "ms": 1e3 * medians[str(n)],
            "times_tokens": n / shortest,
            "times_time": medians[str(n)] / medians[str(shortest)],
        }
        for n in args.lengths
    ]
    print_table(rows)
    seconds = time.perf_counter() - start
    figures = {"width": args.width, "rows": rows}
    print_footer(write_report("static_speed", figures, seed=0, seconds=seconds, folder=args.results), seconds)


def sentence(result: dict) -> str:
    first, last = result["figures"]["rows"][0], result["figures"]["rows"][-1]
    return (
        f"static binding: {last['tokens'] / first['tokens']:.0f} times the tokens ({last['tokens']:,}) "
        f"take {last['times_time']:.2f} times the time (medians)"
    )


if __name__ == "__main__":
    main()
