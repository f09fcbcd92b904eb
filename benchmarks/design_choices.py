"""Design choices of a family: each variant trains on the same windows, for equal time or for equal steps.

    python benchmarks/design_choices.py tinyshakespeare.txt --seconds 600
    python benchmarks/design_choices.py tinyshakespeare.txt --family resonance --steps 300

In equal time, what a variant costs per step is part of its figure. All variants have the learning rate of the default.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from characters import CharacterText, windowed_loss
from fitting import Fit, fit
from report import RESULTS, earlier_rows, print_footer, print_table, report_name, write_report
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
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args(argv)
    if args.steps is None and args.seconds is None:
        args.seconds = 600.0
    variants = VARIANTS[args.family]
    for variant in args.variants or ():
        if variant not in variants:
            parser.error(f"--variants: {variant!r} is no variant of {args.family}; choose from {', '.join(variants)}")

    name = report_name("design_choices", args.family)
    text = CharacterText(args.text)
    names = ("seconds", "steps", "learning_rate", "width", "depth", "rows", "length", "seed")
    settings = {key: getattr(args, key) for key in names if getattr(args, key) is not None}
    settings["characters"] = len(text.train) + len(text.validation)
    runs, seconds = earlier_rows(name, {"settings": settings}, args.results, "runs")

    how = Fit(args.learning_rate, "muon", args.steps, args.seconds, args.rows, args.length, args.seed)
    for variant in args.variants or variants:
        if any(run["variant"] == variant for run in runs):
            continue
        print(variant, flush=True)
        start = time.perf_counter()
        torch.manual_seed(args.seed)
        sizes = {"vocab_size": text.vocab_size, "hidden_size": args.width, "num_hidden_layers": args.depth}
        model = make(args.family, **sizes, **variants[variant])
        steps = fit(model, text, how)
        trained = time.perf_counter() - start
        run = {"variant": variant, "parameters": model.num_parameters(), "steps": steps}
        run |= {"seconds_per_step": trained / steps, "loss": windowed_loss(model, text.validation, args.length)}
        runs.append(run)
        seconds += time.perf_counter() - start
        write_report(name, {"settings": settings, "runs": runs}, seed=args.seed, seconds=seconds, folder=args.results)

    print_table(runs)
    print_footer(args.results / f"{name}.json", seconds)


if __name__ == "__main__":
    main()
