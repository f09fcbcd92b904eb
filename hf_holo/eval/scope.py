"""`hf-holo scope`: a ReLU network and a holographic one of as many parameters learn two spirals; see what they see.

A third network, dense with sines, shows what the sine alone does. All get the same points, steps and optimizer (Adam),
each at the better of two learning rates; the accuracy is that on points that none of them has seen. Writes scope.png
and scope.json into the output folder and replaces older ones there.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn
from tqdm.auto import tqdm

from ..errors import HoloError, Parser
from ..files import output_folder, replacing, write_text
from ..modeling.harmonics import HoloLinear, SineActivation

TURNS, NOISE, POINTS = 4, 0.02, 1000  # of a spiral; in units of its radius; for training, and as many for testing
WIDTH, HARMONICS, FREQUENCY = 48, 8, 12.0  # of the holographic network
LEARNING_RATES = (1e-2, 3e-3)
EDGE, PIXELS = 1.15, 240  # half the side of the picture, and its resolution
COLOURS = ("#7f1d1d", "#1e3a8a")


@dataclass(frozen=True)
class View:
    """A trained network: `accuracy` on unseen points, and `picture`, the probability of class 1 at every pixel."""

    network: str
    parameters: int
    learning_rate: float
    train_accuracy: float
    accuracy: float
    seconds: float
    picture: torch.Tensor

    def record(self) -> dict[str, Any]:
        """All but the picture."""
        return {name: value for name, value in asdict(self).items() if name != "picture"}


def main(argv: list[str]) -> None:
    """Run `hf-holo scope` with these arguments.

    Raises:
        HoloError: bad input; the message is one line that says what to do.
    """
    args = _parse(argv)
    folder = output_folder(args.output_dir)
    views = compare(args.seed, args.steps)
    test = spirals(POINTS, args.seed + 1)
    record = {"seed": args.seed, "steps": args.steps, "points": POINTS, "networks": [view.record() for view in views]}
    write_text(folder / "scope.json", json.dumps(record, indent=2) + "\n")
    plot(views, test, folder / "scope.png")
    table = Table("network", "parameters", "accuracy, seen points", "accuracy, unseen points", "seconds")
    for view in views:
        shares = (f"{100 * share:.1f} %" for share in (view.train_accuracy, view.accuracy))
        table.add_row(view.network, f"{view.parameters:,}", *shares, f"{view.seconds:.1f}")
    Console().print(table)
    print(f"written to {folder / 'scope.png'} and {folder / 'scope.json'}")


def compare(seed: int = 0, steps: int = 1000) -> list[View]:
    """Train both networks and look at them.

    Args:
        seed: of points and weights.
        steps: of training, each over all points.

    Returns:
        The ReLU network, the holographic one, and the dense one with sines.
    """
    parameters = count(holographic_network())
    networks = {
        "ReLU": lambda: dense_network(parameters, nn.ReLU()),
        "holographic, sine": holographic_network,
        "dense, sine": lambda: dense_network(parameters, SineActivation(FREQUENCY)),
    }
    views = []
    with tqdm(total=steps * len(networks) * len(LEARNING_RATES), desc="training", unit="step", leave=False) as progress:
        for name, make in networks.items():
            trials = [_train(name, make, rate, seed, steps, progress) for rate in LEARNING_RATES]
            views.append(max(trials, key=lambda view: view.train_accuracy))  # the unseen points choose nothing
    return views


def spirals(points: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy points on two interleaved spirals, and which of the two: `[points, 2]` within about the unit circle,
    `[points]`."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(points) % 2
    radius = (0.05 + 0.95 * torch.rand(points, generator=generator)).sqrt()  # more points where the arm is longer
    angle = 2 * math.pi * TURNS * radius + math.pi * labels
    arms = radius[:, None] * torch.stack([angle.cos(), angle.sin()], -1)
    return arms + NOISE * torch.randn(points, 2, generator=generator), labels


def dense_network(parameters: int, activation: nn.Module) -> nn.Sequential:
    """The narrowest network of two hidden layers with at least this many parameters; its sines SIREN-initialised."""
    width = next(w for w in range(1, parameters) if w * w + 6 * w + 2 >= parameters)
    first, second = nn.Linear(2, width), nn.Linear(width, width)
    if isinstance(activation, SineActivation):
        activation.init_linear_(first, first=True)
        activation.init_linear_(second)
    return nn.Sequential(first, activation, second, activation, nn.Linear(width, 2))


def holographic_network() -> nn.Sequential:
    """Two hidden layers of sines between holographic layers, SIREN-initialised."""
    sine = SineActivation(FREQUENCY)
    first = sine.init_linear_(HoloLinear(2, WIDTH, 2), first=True)
    second = sine.init_linear_(HoloLinear(WIDTH, WIDTH, HARMONICS, seed=1))
    return nn.Sequential(first, sine, second, sine, HoloLinear(WIDTH, 2, HARMONICS, seed=2))


def count(network: nn.Module) -> int:
    """Its trained parameters; a HoloLinear has amplitudes, phases and a bias, its basis is not stored."""
    return sum(parameter.numel() for parameter in network.parameters())


def _train(name: str, make: Callable[[], nn.Module], rate: float, seed: int, steps: int, progress: tqdm) -> View:
    torch.manual_seed(seed)
    network = make()
    points, labels = spirals(POINTS, seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    start = time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(network(points), labels).backward()
        optimizer.step()
        schedule.step()
        progress.update()
    seconds = time.perf_counter() - start
    seen, unseen = (_accuracy(network, *spirals(POINTS, s)) for s in (seed, seed + 1))
    return View(name, count(network), rate, seen, unseen, round(seconds, 1), picture(network))


@torch.no_grad()
def _accuracy(network: nn.Module, points: torch.Tensor, labels: torch.Tensor) -> float:
    return (network(points).argmax(-1) == labels).double().mean().item()


@torch.no_grad()
def picture(network: nn.Module) -> torch.Tensor:
    """The probability of class 1 over the square, `[PIXELS, PIXELS]`, rows from bottom to top."""
    axis = torch.linspace(-EDGE, EDGE, PIXELS)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return network(torch.stack([x, y], -1)).softmax(-1)[..., 1]


def plot(views: list[View], test: tuple[torch.Tensor, torch.Tensor], path: Path) -> None:
    """Draw what each network sees, with the unseen points, side by side."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(4.5 * len(views), 5.2), layout="constrained")
    for axes, view in zip(figure.subplots(1, len(views), squeeze=False)[0], views, strict=True):
        extent = (-EDGE, EDGE, -EDGE, EDGE)
        axes.imshow(view.picture.numpy(), cmap="RdYlBu", vmin=0, vmax=1, origin="lower", extent=extent, alpha=0.45)
        axes.contour(view.picture.numpy(), levels=[0.5], colors="black", linewidths=1, extent=extent)
        points, labels = test
        axes.scatter(*points.T.numpy(), c=labels.numpy(), cmap=ListedColormap(COLOURS), s=7, linewidths=0)
        axes.set_title(f"{view.network}: {view.parameters:,} parameters\n{100 * view.accuracy:.1f} % of unseen points")
        axes.set(xticks=[], yticks=[])
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="hf-holo scope", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="runs/scope", help="folder for scope.png and scope.json")
    parser.add_argument("--seed", type=int, default=0, help="of points and weights")
    parser.add_argument("--steps", type=int, default=1000, help="training steps of each network")
    args = parser.parse_args(argv)
    if args.steps < 1:
        raise HoloError(f"steps: {args.steps} is not at least 1")
    if not 0 <= args.seed < 2**63 - 1:
        raise HoloError(f"seed: {args.seed} is not in [0, 2^63 - 1)")
    return args
