"""Time of Muon's orthogonalisation in float32 and in bfloat16, which torch.optim.Muon takes on every device.

    python benchmarks/muon_precision.py

Square matrices on the CPU; both precisions take turns, and the figures are medians.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from common.report import RESULTS, interleaved_medians, print_footer, print_table, write_report

from hf_holo.training.optim import orthogonalized

COEFFICIENTS, STEPS, EPS = (3.4445, -4.775, 2.0315), 5, 1e-7  # those of torch.optim.Muon


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", nargs="+", type=int, default=(64, 128, 256, 512))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    start = time.perf_counter()
    rows = []
    for width in args.widths:
        matrix = torch.randn(width, width)
        tasks = {
            str(dtype): (lambda m=matrix, d=dtype: orthogonalized(m, COEFFICIENTS, STEPS, EPS, d))
            for dtype in (torch.float32, torch.bfloat16)
        }
        exact, short = interleaved_medians(tasks, args.repeats).values()
        rows.append({"width": width, "float32_ms": 1e3 * exact, "bfloat16_ms": 1e3 * short, "ratio": short / exact})
    print_table(rows)
    seconds = time.perf_counter() - start
    print_footer(write_report("muon_precision", {"rows": rows}, seed=0, seconds=seconds, folder=args.results), seconds)


def sentence(result: dict) -> str:
    ratios = ", ".join(f"{row['ratio']:.1f} ({row['width']}²)" for row in result["figures"]["rows"])
    return f"Muon's orthogonalisation in bfloat16, its time in float32 being 1: {ratios}; medians on this processor"


if __name__ == "__main__":
    main()
