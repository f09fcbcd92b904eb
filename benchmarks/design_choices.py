"""Design choices of HSN at equal time: each variant trains for the same number of seconds on the same windows.

    python benchmarks/design_choices.py tinyshakespeare.txt --seconds 600

What a variant costs per step is thereby part of its figure.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from characters import CharacterText, windowed_loss
from fitting import Fit, fit
from report import RESULTS, print_footer, print_table, read_report, write_report

from hf_holo import HsnConfig, HsnForCausalLM

NAME = "design_choices"
VARIANTS = {
    "default": {},
    "write=cancel": {"write": "cancel"},
    "binding=static": {"binding": "static"},
    "gate=sublayer": {"gate_placement": "sublayer"},
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="text file; the last tenth validates")
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=tuple(VARIANTS))
    parser.add_argument("--seconds", type=float, default=600.0, help="of training, per variant")
    parser.add_argument("--learning_rate", type=float, default=0.004)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args(argv)

    text = CharacterText(args.text)
    names = ("seconds", "learning_rate", "width", "depth", "rows", "length", "seed")
    settings = {name: getattr(args, name) for name in names} | {"characters": len(text.train) + len(text.validation)}
    earlier = read_report(NAME, args.results)
    same = earlier["figures"].get("settings") == settings
    runs, seconds = (earlier["figures"]["runs"], earlier["seconds"]) if same else ([], 0.0)

    how = Fit(args.learning_rate, seconds=args.seconds, rows=args.rows, length=args.length, seed=args.seed)
    for variant in args.variants:
        if any(run["variant"] == variant for run in runs):
            continue
        print(variant, flush=True)
        start = time.perf_counter()
        torch.manual_seed(args.seed)
        config = HsnConfig(
            vocab_size=text.vocab_size,
            hidden_size=args.width,
            num_hidden_layers=args.depth,
            channel_mix="gated",
            **VARIANTS[variant],
        )
        model = HsnForCausalLM(config)
        steps = fit(model, text, how)
        loss = windowed_loss(model, text.validation, args.length)
        runs.append({"variant": variant, "parameters": model.num_parameters(), "steps": steps, "loss": loss})
        seconds += time.perf_counter() - start
        write_report(NAME, {"settings": settings, "runs": runs}, seed=args.seed, seconds=seconds, folder=args.results)

    print_table(runs)
    print_footer(args.results / f"{NAME}.json", seconds)


if __name__ == "__main__":
    main()
