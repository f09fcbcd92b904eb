"""Design choices of a family: each variant trains on the same windows, for equal time or for equal steps.

    python benchmarks/design_choices.py tinyshakespeare.txt --seconds 600
    python benchmarks/design_choices.py tinyshakespeare.txt --family resonance --steps 300

In equal time, what a variant costs per step is part of its figure. All variants have the learning rate of the default.
When all are trained, new models of all variants take turns at a forward and a backward pass, so that a slow moment of
the machine hits all of them alike. A trained variant is kept in the result file and not trained again.
"""

import argparse
import time
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from common.characters import CharacterText, windowed_loss
from common.fitting import Fit, fit
from common.report import (
    RESULTS,
    earlier_rows,
    interleaved_medians,
    markdown_table,
    measured_on,
    print_footer,
    print_table,
    report_name,
    write_report,
)
from transformers import PreTrainedModel

from hf_holo import SpectralGate
from hf_holo.registry import get_architecture

VARIANTS = {
    "hsn": {
        "default": {},
        "write=cancel": {"write": "cancel"},
        "binding=static": {"binding": "static"},
        "gate=sublayer": {"gate_placement": "sublayer"},
    },
    "resonance": {
        "default": {},
        "interference": {"interference": True},
        "context of 64": {"chunk_length": 64},
        "context of 256": {"chunk_length": 256},
        "memory of 64": {"memory_dimension": 64, "memory_chunk_length": 32},
        "8 modes": {"num_modes": 8},
        "32 modes": {"num_modes": 32},
        "4 banks": {"num_banks": 4},
        "64 banks": {"num_banks": 64},
        "no delayed taps": {"delayed": 0},
        "no filter": {"gate_taps": 1},
    },
}


def make(family: str, delayed: int | None = None, **options) -> PreTrainedModel:
    """A model of these options of its config; `delayed` is how many channels the filters of its mixers delay."""
    architecture = get_architecture(family)
    model = architecture.main_model(architecture.config(channel_mix="gated", **options))
    for module in model.modules():
        if isinstance(module, SpectralGate) and delayed is not None:
            module.delayed = delayed
    return model


def step_seconds(
    models: dict[str, PreTrainedModel], x: torch.Tensor, y: torch.Tensor, repeats: int
) -> dict[str, float]:
    """Median seconds of a forward and a backward pass of each model over the same `[rows, length]` characters."""

    def step(model: PreTrainedModel) -> None:
        model.zero_grad()
        F.cross_entropy(model(input_ids=x, use_cache=False).logits.flatten(0, 1), y.flatten()).backward()

    return interleaved_medians({name: partial(step, model) for name, model in models.items()}, repeats)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="text file; the last tenth validates")
    parser.add_argument("--family", choices=tuple(VARIANTS), default="hsn")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="default: all of the family")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--seconds", type=float, help="of training, per variant (default: 600)")
    budget.add_argument("--steps", type=int, help="of training, per variant, instead of seconds")
    parser.add_argument("--learning_rate", type=float, default=0.004)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7, help="of the timings")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0,), help="each variant is trained with each of them")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args(argv)
    if args.steps is None and args.seconds is None:
        args.seconds = 600.0
    variants = VARIANTS[args.family]
    for variant in args.variants or ():
        if variant not in variants:
            parser.error(
                f"--variants: {variant!r} is not a variant of {args.family}; choose from {', '.join(variants)}"
            )

    name = report_name("design_choices", args.family)
    text = CharacterText(args.text)
    names = ("seconds", "steps", "learning_rate", "width", "depth", "rows", "length")
    settings = {key: getattr(args, key) for key in names if getattr(args, key) is not None}
    settings["characters"] = len(text.train) + len(text.validation)
    runs, seconds = earlier_rows(name, {"settings": settings}, args.results, "runs")

    sizes = {"vocab_size": text.vocab_size, "hidden_size": args.width, "num_hidden_layers": args.depth}
    for variant, seed in product(args.variants or variants, args.seeds):
        if any((run["variant"], run["seed"]) == (variant, seed) for run in runs):
            continue
        print(f"{variant}, seed {seed}", flush=True)
        start = time.perf_counter()
        torch.manual_seed(seed)
        model = make(args.family, **sizes, **variants[variant])
        how = Fit(args.learning_rate, "muon", args.steps, args.seconds, args.rows, args.length, seed)
        run = {"variant": variant, "seed": seed, "parameters": model.num_parameters(), "steps": fit(model, text, how)}
        runs.append(run | {"loss": windowed_loss(model, text.validation, args.length)})
        seconds += time.perf_counter() - start
        write_report(name, {"settings": settings, "runs": runs}, seed=seed, seconds=seconds, folder=args.results)

    start, seed = time.perf_counter(), args.seeds[0]
    trained = dict.fromkeys(run["variant"] for run in runs)
    models = {variant: make(args.family, **sizes, **variants[variant]) for variant in trained}
    batch = text.batch(args.rows, args.length, torch.Generator().manual_seed(seed))
    taken = step_seconds(models, *batch, args.repeats)
    seconds += time.perf_counter() - start
    figures = {"settings": settings, "runs": runs, "step_seconds": taken}
    write_report(name, figures, seed=seed, seconds=seconds, folder=args.results)

    print_table(runs)
    print_footer(args.results / f"{name}.json", seconds)


def sentence(result: dict) -> str:
    f = result["figures"]
    seed, settings = f["runs"][0]["seed"], f["settings"]
    rows = [f"{row['variant']} {row['loss']:.3f}" for row in f["runs"] if row["seed"] == seed]
    budget = f"{settings['steps']} steps" if "steps" in settings else f"{settings['seconds']:.0f} seconds"
    return f"validation loss after {budget} of training: {', '.join(rows)}; seed {seed}, one learning rate"


def table(result: dict) -> str:
    """What each variant is worth in training on a text."""
    f = result["figures"]
    settings, taken = f["settings"], f["step_seconds"]
    default = {run["seed"]: run["loss"] for run in f["runs"] if run["variant"] == "default"}
    seeds = f"seed{'s' * (len(default) > 1)} {', '.join(map(str, sorted(default)))}"
    rows = []
    for variant in taken:
        runs = [run for run in f["runs"] if run["variant"] == variant]
        losses = ", ".join(f"{run['loss']:.3f}" for run in runs)
        above = ", ".join(f"{round(run['loss'] - default[run['seed']], 3) + 0.0:+.3f}" for run in runs)  # no "-0.000"
        cost = taken[variant] / taken["default"]
        rows.append((variant, f"{runs[0]['parameters']:,}", losses, above, f"{cost:.2f}"))
    return "\n".join(
        [
            markdown_table(
                ("", ">parameters", ">nats per character, per seed", ">above the default", ">time of a step"), rows
            ),
            "",
            f"{settings['steps']} steps of {settings['rows']}×{settings['length']} characters of tinyshakespeare with "
            f"Muon, width {settings['width']}, depth {settings['depth']}, one learning rate, {seeds}; "
            "the loss is that of the whole validation split, the time that of a forward and a backward pass. "
            f"{result['seconds']:,.0f} seconds for all on: {measured_on(result)}.",
        ]
    )


if __name__ == "__main__":
    main()
