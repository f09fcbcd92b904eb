"""Gradient norms of resonator banks over depth and length: weights in magnitude and phase against plain complex ones.

    python benchmarks/gradient_norms.py

A stack of residual blocks, each a norm and a resonator bank, is asked for a random target. The same stack with the same
filters is differentiated twice: with respect to the magnitudes and phases of its complex weights, and with respect to
their real and imaginary parts. With g the complex derivative with respect to the parts, theory says
∂L/∂m = Re(e^{-iφ} g) and ∂L/∂φ = m Im(e^{-iφ} g): the smaller a mode, the smaller the gradient of its phase.
"""

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from common.report import RESULTS, image_path, print_footer, print_table, write_report
from matplotlib.figure import Figure
from torch import nn
from tqdm.auto import tqdm

from hf_holo.files import replacing, write_csv
from hf_holo.modeling.resonators import ResonatorBank, resonate

NAME = "gradient_norms"
DEPTHS, LENGTHS = (1, 2, 4, 8, 16, 24), (64, 256, 1024, 4096)
WEIGHTS = {"magnitude and phase": ("magnitude", "phase"), "real and imaginary": ("real", "imaginary")}


class PlainBank(ResonatorBank):
    """The filters of another bank, whose weights are real and imaginary parts."""

    def __init__(self, bank: ResonatorBank):
        super().__init__(*bank.magnitude.shape[:1], *bank.raw_damping.shape, bank.lowest, bank.highest)
        self.load_state_dict(bank.state_dict())
        magnitude, phase = self.magnitude.detach(), self.phase.detach()
        del self.magnitude, self.phase
        self.real, self.imaginary = (nn.Parameter(magnitude * part) for part in (phase.cos(), phase.sin()))

    def forward(self, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[`resonate`] with these parameters: `[B, T, D]`, and the state."""
        magnitude, phase = torch.hypot(self.real, self.imaginary), torch.atan2(self.imaginary, self.real)
        return resonate(u, self.damping(), self.omega(), magnitude, phase)


def norms(depth: int, length: int, rows: int, width: int, modes: int, seed: int) -> list[dict]:
    """Norms of the gradient of the first and the last block, for both kinds of weights."""
    torch.manual_seed(seed)
    banks = [ResonatorBank(width, 4, modes, 2 * math.pi / length, math.pi) for _ in range(depth)]
    x, target = torch.randn(2, rows, length, width)
    found = []
    for kind, names in WEIGHTS.items():
        stack = banks if kind == "magnitude and phase" else [PlainBank(bank) for bank in banks]
        y = x
        for bank in stack:
            y = y + bank(F.rms_norm(y, (width,)))[0]
        loss = F.mse_loss(F.rms_norm(y, (width,)), target)
        chosen = [getattr(bank, name) for bank in (stack[0], stack[-1]) for name in names]
        first, first_2, last, last_2 = (gradient.norm().item() for gradient in torch.autograd.grad(loss, chosen))
        row = {"weights": kind, "depth": depth, "length": length, "seed": seed, "loss": loss.item()}
        found.append(row | {"first_block": math.hypot(first, first_2), "last_block": math.hypot(last, last_2)})
    return found


def plot(points: list[dict], depth: int, length: int, path: Path) -> None:
    """The gradient of the first and the last block over depth and over length: a line for the mean of the seeds."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    figure.suptitle("Gradient of a resonator bank's weights")
    fixed = {"depth": ("length", length, "tokens"), "length": ("depth", depth, "blocks")}
    for axes, (name, (other, value, unit)) in zip(figure.subplots(1, 2, sharey=True), fixed.items(), strict=True):
        for colour, kind in zip(("tab:blue", "tab:red"), WEIGHTS, strict=True):
            for block, style in (("first_block", "o-"), ("last_block", "s:")):
                own = [point for point in points if point["weights"] == kind and point[other] == value]
                at = sorted({point[name] for point in own})
                means = [_mean([point[block] for point in own if point[name] == n]) for n in at]
                label = f"{kind}, {block.replace('_', ' ')}"
                axes.plot(at, means, style, color=colour, markersize=4, label=label)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda at, _: f"{at:,.0f}")
        axes.set(yscale="log", xlabel={"depth": "blocks", "length": "tokens"}[name], title=f"at {value:,} {unit}")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("gradient norm")
    figure.axes[1].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def summary(points: list[dict], depth: int, length: int) -> list[dict]:
    """For both kinds of weights, how many times the gradient of the first block varies over depth and over length."""
    rows = []
    for kind in WEIGHTS:
        row = {"weights": kind}
        for name, other, value in (("depth", "length", length), ("length", "depth", depth)):
            own = [point for point in points if point["weights"] == kind and point[other] == value]
            means = [_mean([p["first_block"] for p in own if p[name] == at]) for at in {p[name] for p in own}]
            row[f"varies_over_{name}"] = max(means) / min(means)
        rows.append(row)
    return rows


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS, help="blocks, at the second of the lengths")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens, at the middle depth")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--modes", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--image", type=Path, help="the figure, as PNG; default: where the results belong")
    args = parser.parse_args(argv)
    args.image = args.image or image_path(NAME, args.results)

    start = time.perf_counter()
    depth, length = args.depths[len(args.depths) // 2], args.lengths[min(1, len(args.lengths) - 1)]
    sizes = dict.fromkeys([(d, length) for d in args.depths] + [(depth, n) for n in args.lengths])
    points = []
    for d, n in tqdm(sizes, desc="sizes", leave=False):
        for seed in range(args.seeds):
            points += norms(d, n, args.rows, args.width, args.modes, seed)
    rows = summary(points, depth, length)
    print_table(rows)
    seconds = time.perf_counter() - start
    settings = {name: getattr(args, name) for name in ("rows", "width", "modes", "seeds")}
    settings |= {"depth": depth, "length": length}
    path = write_report(NAME, {"settings": settings, "rows": rows}, seed=0, seconds=seconds, folder=args.results)
    write_csv(points, path.with_suffix(".csv"))
    plot(points, depth, length, args.image)
    print_footer(path, seconds)


def sentence(result: dict) -> str:
    rows = [
        f"{row['varies_over_depth']:.2f} over depth and {row['varies_over_length']:.2f} over length with weights as "
        f"{row['weights']}"
        for row in result["figures"]["rows"]
    ]
    seeds = result["figures"]["settings"]["seeds"]
    return f"the largest gradient of the first block, divided by the smallest: {'; '.join(rows)}; mean of {seeds} seeds"


def table(result: dict) -> str:
    """The sentence as a line of its own."""
    told = sentence(result)
    return f"{told[0].upper()}{told[1:]}."


if __name__ == "__main__":
    main()
