"""`hf-holo recall`: how many pairs a holographic memory recalls, against theory, one-shot and with cancellation.

Random codes are written under random keys; every pair is read and cleaned up, each by itself (one-shot), and all
together while their crosstalk is cancelled. Writes recall.json, recall.csv and recall.png into the output folder and
replaces older ones there.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from ..errors import HoloError, Parser
from ..files import output_folder, replacing, write_csv, write_text
from ..modeling.memory import HolographicMemory, phasors, recall_theory

DIMENSIONS = (256, 512, 1024, 2048)
PAIRS = (1, 4, 16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 256, 320, 384, 512, 640, 1024, 2000)
EIGHTH = 8  # cancellation takes many times longer than one-shot, so it is measured on the first eighth of the reads
GOOD = 0.95  # the share from which on the summary calls a number of pairs recalled


@dataclass(frozen=True)
class Point:
    """Shares of the pairs that were recalled, of how many that were read, and what theory says."""

    dimension: int
    pairs: int
    one_shot: float
    one_shot_theory: float
    one_shot_reads: int
    cancelled: float
    cancelled_theory: float
    cancelled_reads: int


def main(argv: list[str]) -> None:
    """Run `hf-holo recall` with these arguments.

    Raises:
        HoloError: bad input; the message is one line that says what to do.
    """
    args = _parse(argv)
    folder = output_folder(args.output_dir)
    start = time.perf_counter()
    points = measure(args.dimensions, args.pairs, args.codes, args.rounds, args.reads, args.seed)
    seconds = time.perf_counter() - start
    settings = {"codes": args.codes, "rounds": args.rounds, "seed": args.seed}
    rows = [asdict(point) for point in points]
    record = settings | {"seconds": round(seconds, 1), "points": rows}
    write_text(folder / "recall.json", json.dumps(record, indent=2) + "\n")
    write_csv(rows, folder / "recall.csv")
    plot(points, args.codes, args.rounds, folder / "recall.png")
    Console().print(summary(points))
    print(f"{seconds:.0f} s; written to {folder / 'recall.png'}, recall.csv and recall.json next to it")


def measure(
    dimensions: Sequence[int], pairs: Sequence[int], codes: int, rounds: int, reads: int, seed: int = 0
) -> list[Point]:
    """Fill memories and read them.

    Args:
        dimensions: of the memories, in phasors.
        pairs: in a memory.
        codes: random unit phasors in the codebook.
        rounds: of cancellation.
        reads: pairs to read one-shot for each point, and an eighth of them with cancellation, over as many memories as
            that takes; every memory is read whole.
        seed: of keys, codes and choices.

    Returns:
        A point for every dimension and number of pairs.
    """
    points = []
    with tqdm(total=len(dimensions) * len(pairs), desc="points", leave=False) as progress:
        for dimension in dimensions:
            generator = torch.Generator().manual_seed(seed)
            codebook = phasors(_random_phases(generator, codes, dimension))
            for count in pairs:
                progress.set_postfix_str(f"{count:,} pairs in {dimension:,} phasors")
                points.append(_point(codebook, count, rounds, reads, generator))
                progress.update()
    return points


@torch.no_grad()
def _point(codebook: torch.Tensor, pairs: int, rounds: int, reads: int, generator: torch.Generator) -> Point:
    codes, dimension = codebook.shape[0], codebook.shape[1] // 2
    memory = HolographicMemory(dimension)
    memories = math.ceil(reads / EIGHTH / pairs)  # filled and read together
    guesses = []
    for batch in range(math.ceil(reads / memories / pairs)):
        keys = _random_phases(generator, memories, pairs, dimension)
        stored = torch.randint(codes, (memories, pairs), generator=generator)
        state = memory.write(memory.empty(memories), keys, codebook[stored])
        guesses.append(memory.cleanup(memory.read(state, keys), codebook) == stored)
        if batch == 0:
            cancelled = memory.recall(state, keys, codebook, rounds=rounds).argmax(-1) == stored
    one_shot, cancelled = torch.cat(guesses).double(), cancelled.double()
    return Point(
        dimension=dimension,
        pairs=pairs,
        one_shot=one_shot.mean().item(),
        one_shot_theory=recall_theory(dimension, pairs, codes),
        one_shot_reads=one_shot.numel(),
        cancelled=cancelled.mean().item(),
        cancelled_theory=recall_theory(dimension, pairs, codes, rounds),
        cancelled_reads=cancelled.numel(),
    )


def _random_phases(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return 2 * math.pi * torch.rand(*shape, generator=generator)


def summary(points: list[Point]) -> Table:
    """For each dimension the pairs that are recalled well, and the largest distance from theory."""
    table = Table(
        *("phasors", "one-shot", "theory", "with cancellation", "theory", "one-shot is off by"),
        title=f"Most pairs tried of which {GOOD:.0%} are recalled",
    )
    for dimension in dict.fromkeys(point.dimension for point in points):
        own = [point for point in points if point.dimension == dimension]
        capacities = (
            max((point.pairs for point in own if getattr(point, name) >= GOOD), default=0)
            for name in ("one_shot", "one_shot_theory", "cancelled", "cancelled_theory")
        )
        off = max(abs(point.one_shot - point.one_shot_theory) for point in own)
        table.add_row(f"{dimension:,}", *(f"{capacity:,}" for capacity in capacities), f"{100 * off:.1f} points")
    return table


def plot(points: list[Point], codes: int, rounds: int, path: Path) -> None:
    """Recall over pairs, measured as dots and theory as lines: one-shot compared with cancellation."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    figure.suptitle(f"Pairs recalled from one holographic memory, among {codes:,} codes")
    titles = {"one_shot": "one-shot: each pair by itself", "cancelled": f"{rounds} rounds of cancellation"}
    for axes, (name, title) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
        for i, dimension in enumerate(dict.fromkeys(point.dimension for point in points)):
            own = sorted((point for point in points if point.dimension == dimension), key=lambda point: point.pairs)
            pairs = [point.pairs for point in own]
            axes.plot(pairs, [100 * getattr(point, f"{name}_theory") for point in own], color=f"C{i}", linewidth=1)
            axes.plot(
                pairs, [100 * getattr(point, name) for point in own], "o", color=f"C{i}", label=f"{dimension:,} phasors"
            )
        axes.plot([], [], color="grey", linewidth=1, label="theory")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set(xlabel="pairs in the memory", title=title)
        axes.grid(alpha=0.3)
        axes.legend(loc="lower left")
    figure.axes[0].set_ylabel("recalled (%)")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="hf-holo recall", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="runs/recall", help="folder for recall.png, recall.csv and recall.json")
    parser.add_argument("--dimensions", type=int, nargs="+", default=DIMENSIONS, help="of the memories, in phasors")
    parser.add_argument("--pairs", type=int, nargs="+", default=PAIRS, help="in a memory")
    parser.add_argument("--codes", type=int, default=1000, help="in the codebook")
    parser.add_argument("--rounds", type=int, default=12, help="of cancellation")
    parser.add_argument("--reads", type=int, default=2000, help="pairs to read for each point, at least")
    parser.add_argument("--seed", type=int, default=0, help="of keys, codes and choices")
    args = parser.parse_args(argv)
    for name in ("dimensions", "pairs", "codes", "rounds", "reads"):
        value = getattr(args, name)
        if min(value if isinstance(value, Sequence) else [value]) < 1:
            raise HoloError(f"{name}: {value} is not at least 1")
    if not 0 <= args.seed < 2**63:
        raise HoloError(f"seed: {args.seed} is not in [0, 2^63)")
    return args
