"""How many pairs a holographic memory recalls, against theory: `hf-holo recall` at its full size, with a report.

    python benchmarks/memory_recall.py

All other arguments are those of `hf-holo recall`, which says how the memories are filled and read.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from common.report import RESULTS, image_path, markdown_table

from hf_holo.eval.recall import GOOD
from hf_holo.eval.recall import main as recall
from hf_holo.files import replacing

NAME = "memory_recall"
SHOWN, FEWEST = 1024, 48  # phasors and, since fewer are all recalled, pairs in the table
WAYS = ("one_shot", "cancelled")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    args, others = parser.parse_known_args(argv)

    args.results.mkdir(parents=True, exist_ok=True)
    kept = {".json": args.results / f"{NAME}.json", ".csv": args.results / f"{NAME}.csv"}
    kept[".png"] = image_path(NAME, args.results)
    with TemporaryDirectory() as folder:
        recall(["--output_dir", folder, *others])
        for ending, path in kept.items():
            with replacing(path) as temporary:
                shutil.copy(Path(folder) / f"recall{ending}", temporary)
    print(f"kept as {', '.join(map(str, kept.values()))}")


def points_of(result: dict) -> dict[int, list[dict]]:
    """The measured points of each dimension."""
    points = result["points"]
    return {d: [p for p in points if p["dimension"] == d] for d in dict.fromkeys(p["dimension"] for p in points)}


def sentence(result: dict) -> str:
    rows = []
    for dimension, points in points_of(result).items():
        most = [max((p["pairs"] for p in points if p[way] >= GOOD), default=0) for way in WAYS]
        rows.append(f"{dimension:,} phasors {most[0]:,} / {most[1]:,}")
    return (
        f"how many pairs a memory may hold and still recall {GOOD:.0%} of them, of {result['codes']:,} codes, read one "
        f"by one / all together with their crosstalk cancelled: {'; '.join(rows)}; one seed"
    )


def table(result: dict) -> str:
    """What a memory of 1,024 phasors recalls, and how far every dimension is from theory."""
    shares, distances = [], []
    for dimension, points in points_of(result).items():
        if dimension == SHOWN:
            for point in (p for p in points if p["pairs"] >= FEWEST):
                cells = (point[way + kind] for way in WAYS for kind in ("", "_theory"))
                shares.append((f"{point['pairs']:,}", *(f"{share:.1%}" for share in cells)))
        farthest = [max(points, key=lambda p, way=way: abs(p[way] - p[f"{way}_theory"])) for way in WAYS]
        cells = (off(point, way) for point, way in zip(farthest, WAYS, strict=True))
        distances.append((f"{dimension:,}", *cells))
    head = (">phasors", "one-shot is off theory by at most", "with cancellation by at most")
    points = result["points"]
    return "\n".join(
        [
            markdown_table((">pairs", ">one-shot", ">theory", ">with cancellation", ">theory"), shares),
            "",
            markdown_table(head, distances),
            "",
            f"{result['codes']:,} codes, {result['rounds']} rounds of cancellation, one seed; one-shot over at least "
            f"{min(point['one_shot_reads'] for point in points):,} pairs a point, cancellation over at least "
            f"{min(point['cancelled_reads'] for point in points):,}; {result['seconds']:,.0f} seconds for all "
            f"{len(points)} points.",
        ]
    )


def off(point: dict, way: str) -> str:
    """How far a point is from theory."""
    distance = 100 * (point[way] - point[f"{way}_theory"])
    return f"{distance:+.1f} points: {point[way]:.1%} of {point['pairs']:,} pairs"


if __name__ == "__main__":
    main()
