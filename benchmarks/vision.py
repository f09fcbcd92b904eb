"""Pictures: Resonance against a ViT and an MLP-Mixer of the same size, all from scratch.

    python benchmarks/vision.py cifar10 --data cifar10
    python benchmarks/vision.py mnist --data mnist --epochs 12

The first argument is a folder with `train.parquet` and `test.parquet`. A tenth of the former is kept back. Each model
is trained once for each learning rate and each seed, and shown at the rate whose mean over the seeds is best on what
was kept back; the test pictures have no part in that. All see the same pictures in the same order with the same
augmentation (shifted by up to an eighth and, in colour, mirrored half of the time) for as many epochs, with the same
optimizer and schedule, and have the same number of parameters up to 5 %. ViT and Mixer cut patches of `--patch_size`
pixels. `plain` is Resonance without interference, its channel mix as much wider as that saves.
The last lines are about time: pictures from 32² to 512² pixels.
A finished run is kept in the result file and not repeated, so that runs can be made one at a time
(`--models vit --learning_rates 0.004 --seeds 1`).
"""

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from common.fitting import KEPT_BACK, OPTIMIZERS, make_optimizer, rates_tried
from common.report import (
    RESULTS,
    best_runs,
    earlier_rows,
    interleaved_medians,
    markdown_table,
    measured_on,
    print_footer,
    print_table,
    read_report,
    write_report,
)
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from hf_holo import ResonanceVisionForImageClassification, preset_config, preset_model
from hf_holo.data.images import SHIFT, load_images
from hf_holo.data.labelled import split

MODELS = {"resonance": "Resonance", "plain": "without interference", "vit": "ViT", "mixer": "MLP-Mixer"}
PRESET = "resonance-vision-tiny"
DATA: dict[str, dict[str, Any]] = {"cifar10": {}, "mnist": {"num_channels": 1, "image_size": 28}}  # and its options
SIDES = (32, 64, 128, 256, 512)
NEAR = 0.05  # share by which the numbers of parameters may differ


# ------------------------------------------------------------------------------------------------------- models
class MlpMixer(nn.Module):
    """MLP-Mixer (Tolstikhin et al., 2021): in turns an MLP over the patches and one over the channels.

    Args:
        channels, side: of the pictures.
        patch_size: side of a patch in pixels.
        width: channels of a patch.
        depth: blocks.
        inner: inner width of the MLP over the channels; that of the one over the patches is half the width.
        classes: to tell apart.
    """

    def __init__(self, channels: int, side: int, patch_size: int, width: int, depth: int, inner: int, classes: int):
        super().__init__()
        self.patch_size = patch_size
        patches = (side // patch_size) ** 2
        self.embed = nn.Linear(channels * patch_size**2, width)
        self.blocks = nn.ModuleList([MixerBlock(patches, width, inner) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, classes)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`[B, C, H, W]` to logits."""
        x = self.embed(F.unfold(pixel_values, self.patch_size, stride=self.patch_size).mT)  # [B, patches, width]
        for block in self.blocks:
            x = block(x)
        return self.classifier(self.norm(x).mean(1))


class MixerBlock(nn.Module):
    """One MLP over `[B, patches, width]` transposed, then one over it as it is, each with norm and residual."""

    def __init__(self, patches: int, width: int, inner: int) -> None:
        super().__init__()
        self.patch_norm, self.channel_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.over_patches, self.over_channels = (
            nn.Sequential(nn.Linear(size, middle), nn.GELU(), nn.Linear(middle, size))
            for size, middle in ((patches, max(1, width // 2)), (width, inner))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.over_patches(self.patch_norm(x).mT).mT
        return x + self.over_channels(self.channel_norm(x))


class Sizes(NamedTuple):
    """What the models that are compared have in common."""

    channels: int
    side: int
    classes: int
    patch_size: int
    width: int
    depth: int


def vit(sizes: Sizes, inner: int) -> ViTForImageClassification:
    config = ViTConfig(
        image_size=sizes.side,
        num_channels=sizes.channels,
        patch_size=sizes.patch_size,
        hidden_size=sizes.width,
        num_hidden_layers=sizes.depth,
        num_attention_heads=max(1, sizes.width // 32),
        intermediate_size=inner,
        num_labels=sizes.classes,
    )
    return ViTForImageClassification(config)


def mixer(sizes: Sizes, inner: int) -> MlpMixer:
    return MlpMixer(sizes.channels, sizes.side, sizes.patch_size, sizes.width, sizes.depth, inner, sizes.classes)


def resonance(data: str, **options: Any) -> ResonanceVisionForImageClassification:
    return preset_model(PRESET, **DATA[data], **options)


def plain(data: str) -> ResonanceVisionForImageClassification:
    """Two matrices in place of three, each 3/2 as wide."""
    return resonance(data, interference=False, mlp_ratio=1.5 * preset_config(PRESET).mlp_ratio)


def build(name: str, data: str, sizes: Sizes, seed: int) -> nn.Module:
    """A new model; the inner width of ViT and Mixer brings them closest to the size of Resonance.

    Raises:
        ValueError: none comes within 5 %.
    """
    torch.manual_seed(seed)
    ours = resonance(data)
    if name == "resonance":
        return ours
    torch.manual_seed(seed)
    if name == "plain":
        model: nn.Module = plain(data)
    else:
        make: Callable[[Sizes, int], nn.Module] = {"vit": vit, "mixer": mixer}[name]
        least, per_unit = parameters(make(sizes, 1)), sizes.depth * (2 * sizes.width + 1)
        torch.manual_seed(seed)
        model = make(sizes, max(1, 1 + round((parameters(ours) - least) / per_unit)))
    if abs(parameters(model) / parameters(ours) - 1) > NEAR:
        raise ValueError(f"width {sizes.width} allows no {name} within {NEAR:.0%} of {parameters(ours)} parameters")
    return model


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# --------------------------------------------------------------------------------------------------------- data
class Pictures(NamedTuple):
    """Normalised pictures `[N, C, H, W]` and their classes `[N]`."""

    pixels: torch.Tensor
    labels: torch.Tensor


def read(folder: Path, limit: int | None) -> tuple[Pictures, Pictures, Pictures]:
    """Those to learn from, to choose a learning rate by, and to score, normalised as the first are."""
    splits = load_images(str(folder))
    known = split(splits.train, KEPT_BACK)
    parts = []
    for part in (known.train, known.validation, splits.validation):
        part = part if limit is None else part.select(range(min(limit, len(part))))
        parts.append(Pictures(torch.from_numpy(part.arrays()).permute(0, 3, 1, 2) / 255, torch.from_numpy(part.labels)))
    deviation, centre = torch.std_mean(parts[0].pixels, (0, 2, 3), keepdim=True)
    train, chosen_by, test = (part._replace(pixels=(part.pixels - centre) / deviation) for part in parts)
    return train, chosen_by, test


def augmented(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shifted by up to an eighth of the side, zeros coming in, and, in colour, mirrored half of the time."""
    rows, channels, side = pixels.shape[:3]
    margin = round(SHIFT * side)
    across, down = torch.randint(2 * margin + 1, (2, rows, 1), generator=generator) + torch.arange(side)
    if channels > 1:
        across = torch.where(torch.rand(rows, 1, generator=generator) < 0.5, across.flip(1), across)
    padded = F.pad(pixels, (margin,) * 4)
    picked = padded[torch.arange(rows)[:, None, None], :, down[:, :, None], across[:, None]]  # [B, H, W, C]
    return picked.permute(0, 3, 1, 2)


# ----------------------------------------------------------------------------------------------------- training
def logits_of(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    output = model(pixel_values=pixels)
    return output if isinstance(output, torch.Tensor) else output.logits


def train(model: nn.Module, pictures: Pictures, rate: float, seed: int, settings: Mapping) -> None:
    """Whole epochs in batches of random pictures, the last ones of an epoch left out; the learning rate rises over the
    first tenth of the run and falls along a line to zero. Labels are smoothed by a tenth."""
    optimizer = make_optimizer(settings["optimizer"], model, rate)
    peaks = [group["lr"] for group in optimizer.param_groups]
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    rows = settings["rows"]
    per_epoch = len(pictures.labels) // rows
    model.train()
    start = time.perf_counter()
    for epoch in range(settings["epochs"]):
        order, total = torch.randperm(len(pictures.labels), generator=generator), 0.0
        for index in range(per_epoch):
            chosen = order[index * rows : (index + 1) * rows]
            logits = logits_of(model, augmented(pictures.pixels[chosen], generator))
            loss = F.cross_entropy(logits, pictures.labels[chosen], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            progress = (epoch + (index + 0.5) / per_epoch) / settings["epochs"]
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * min(1.0, 10 * progress) * (1 - progress)
            optimizer.step()
            total += loss.item()
        print(f"  epoch {epoch + 1}: loss {total / per_epoch:.3f}, {time.perf_counter() - start:.0f} s", flush=True)


@torch.no_grad()
def accuracy(model: nn.Module, pictures: Pictures, rows: int = 200) -> float:
    model.eval()
    batches = zip(pictures.pixels.split(rows), pictures.labels.split(rows), strict=True)
    return sum((logits_of(model, x).argmax(1) == y).sum().item() for x, y in batches) / len(pictures.labels)


# --------------------------------------------------------------------------------------------------------- time
@torch.no_grad()
def speed(data: str, sides: Sequence[int]) -> dict[str, float]:
    """Nanoseconds per pixel for one picture of each side, in turns."""
    model = resonance(data).eval()
    pictures = {side: torch.randn(1, model.config.num_channels, side, side) for side in sides}
    tasks = {str(side): (lambda p=p: model(pixel_values=p)) for side, p in pictures.items()}
    return {side: 1e9 * t / int(side) ** 2 for side, t in interleaved_medians(tasks, repeats=7).items()}


# --------------------------------------------------------------------------------------------------------- report
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with train.parquet and test.parquet")
    parser.add_argument("--data", choices=tuple(DATA), default="cifar10", help="what is in it")
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=tuple(MODELS))
    parser.add_argument("--optimizer", choices=tuple(OPTIMIZERS), default="muon")
    parser.add_argument("--learning_rates", nargs="+", type=float, default=(0.002, 0.004, 0.008))
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--patch_size", type=int, default=4, help="of ViT and Mixer")
    parser.add_argument("--width", type=int, default=128, help="of ViT and Mixer")
    parser.add_argument("--depth", type=int, default=6, help="of ViT and Mixer")
    parser.add_argument("--limit", type=int, help="take only so many pictures of each part; default: all")
    parser.add_argument("--sides", nargs="+", type=int, default=SIDES, help="of the pictures that are timed")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args(argv)

    name = f"vision_{args.data}"
    names = ("data", "optimizer", "epochs", "rows", "patch_size", "width", "depth", "limit")
    settings = {option: getattr(args, option) for option in names} | {"kept_back": KEPT_BACK}
    runs, seconds = earlier_rows(name, {"settings": settings}, args.results, "runs")
    figures = {"settings": settings, "runs": runs}
    figures["speed"] = read_report(name, args.results)["figures"].get("speed") if runs else None
    train_pictures, chosen_by, test_pictures = read(args.folder, args.limit)
    channels, side = train_pictures.pixels.shape[1:3]
    sizes = Sizes(channels, side, int(train_pictures.labels.max()) + 1, args.patch_size, args.width, args.depth)
    for seed in args.seeds:
        for rate in args.learning_rates:
            for model_name in args.models:
                wanted = {"model": model_name, "learning_rate": rate, "seed": seed}
                if any(wanted.items() <= run.items() for run in runs):
                    continue
                print(f"{model_name}, learning rate {rate}, seed {seed}", flush=True)
                model = build(model_name, args.data, sizes, seed)
                start = time.perf_counter()
                train(model, train_pictures, rate, seed, settings)
                taken = time.perf_counter() - start
                run = wanted | {"parameters": parameters(model), "validation": accuracy(model, chosen_by)}
                runs.append(run | {"accuracy": accuracy(model, test_pictures), "seconds": round(taken, 1)})
                seconds += taken
                write_report(name, figures, seed=args.seeds[0], seconds=seconds, folder=args.results)
    if figures["speed"] is None:
        figures["speed"] = speed(args.data, args.sides)
    path = write_report(name, figures, seed=args.seeds[0], seconds=seconds, folder=args.results)
    print_table(runs)
    print({side: f"{ns:.0f} ns per pixel" for side, ns in figures["speed"].items()})
    print_footer(path, seconds)


def best(runs: Sequence[dict]) -> dict[str, list[dict]]:
    """Of every model the runs at the learning rate whose mean over the seeds is highest on what was kept back."""

    def alike(run: Mapping) -> list[dict]:
        return [r for r in runs if (r["model"], r["learning_rate"]) == (run["model"], run["learning_rate"])]

    chosen = best_runs(runs, ("model",), lambda run: mean(r["validation"] for r in alike(run)))
    return {run["model"]: alike(run) for run in chosen}


def mean_accuracy(runs: Sequence[dict]) -> str:
    """Mean and, of several seeds, deviation."""
    values = [100 * run["accuracy"] for run in runs]
    spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean(values):.1f}{spread} %"


def sentence(result: dict) -> str:
    f = result["figures"]
    settings, chosen = f["settings"], best(f["runs"])
    told = ", ".join(f"{MODELS[name]} {mean_accuracy(runs)}" for name, runs in chosen.items())
    small, large = min(f["speed"], key=int), max(f["speed"], key=int)
    seeds, size = max(len(runs) for runs in chosen.values()), f"{chosen['resonance'][0]['parameters']:,}"
    return (
        f"right on the test pictures of {settings['data']} after {settings['epochs']} epochs with "
        f"{OPTIMIZERS[settings['optimizer']]}, {size} parameters ± {NEAR:.0%}, each "
        f"{rates_tried(f['runs'])}, seeds: {seeds}: {told}; a pixel takes "
        f"{f['speed'][large] / f['speed'][small]:.2f} times as long at {large}² as at {small}² (log n: "
        f"{math.log(int(large)) / math.log(int(small)):.2f})"
    )


def table(result: dict) -> str:
    """For the page about pictures, also while there is no result."""
    f = result["figures"]
    if not f:
        return "Not measured yet."
    settings, chosen = f["settings"], best(f["runs"])
    own = mean(run["seconds"] for run in chosen["resonance"])
    rows = [
        [
            MODELS[name],
            f"{runs[0]['parameters']:,}",
            mean_accuracy(runs),
            len(runs),
            runs[0]["learning_rate"],
            f"{mean(run['seconds'] for run in runs) / 60:.1f} min",
            f"{mean(run['seconds'] for run in runs) / own:.2f}",
        ]
        for name, runs in chosen.items()
    ]
    head = ("", ">parameters", ">right", ">seeds", ">learning rate", ">training", ">time, relative")
    rates = {name: sorted({run["learning_rate"] for run in f["runs"] if run["model"] == name}) for name in chosen}
    tried = "; ".join(f"{MODELS[name]} {values}" for name, values in rates.items())
    times = ", ".join(f"{side}²: {ns:.0f}" for side, ns in f["speed"].items())
    return (
        f"{markdown_table(head, rows)}\n\n"
        f"{settings['data']}, {settings['epochs']} epochs in batches of {settings['rows']} with "
        f"{OPTIMIZERS[settings['optimizer']]}; patches of ViT and Mixer: {settings['patch_size']} pixels; learning "
        f"rates tried: {tried}. Nanoseconds per pixel of one picture: {times}. {result['seconds']:,.0f} seconds of "
        f"training on: {measured_on(result)}."
    )


if __name__ == "__main__":
    main()
