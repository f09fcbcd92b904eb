"""How much of the difference between HoloSpectralNet and a Llama of its size is due to the short filter?

    python benchmarks/llama_filter.py tinyshakespeare.txt

HoloSpectralNet filters the last few tokens before its projections, which the Llama of `llama_comparison.py` does not.
Here each of the two models is trained with that filter and without it: the same text, windows, steps, optimizer and
learning rate, once for each number of steps. A finished run is kept in the result file and not repeated.
"""

import argparse
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch
from common.characters import CharacterText, windowed_loss
from common.contenders import add_filter
from common.fitting import Fit, fit
from common.report import RESULTS, earlier_rows, print_footer, print_table, write_report
from llama_comparison import build, build_hsn
from transformers import PreTrainedModel

NAME = "llama_filter"
MODELS = ("hsn", "hsn without filter", "llama", "llama with filter")


def make(name: str, vocab_size: int, width: int, depth: int, seed: int) -> PreTrainedModel:
    """The model of this name; those with the same weights start from the same ones."""
    if name == "hsn without filter":
        torch.manual_seed(seed)
        return build_hsn(vocab_size, width, depth, gate_taps=1)  # a gain per channel is left
    model = build(name.split()[0], vocab_size, width, depth, seed)
    if name == "llama with filter":
        add_filter(model)
    return model


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="text file; the last tenth validates")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--learning_rate", type=float, default=0.004, help="of Muon")
    parser.add_argument("--steps", nargs="+", type=int, default=(300, 600), help="of one training each")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args(argv)

    text = CharacterText(args.text)
    names = ("learning_rate", "rows", "length", "width", "depth", "seed")
    settings = {name: getattr(args, name) for name in names} | {"characters": len(text.train) + len(text.validation)}
    runs, seconds = earlier_rows(NAME, {"settings": settings}, args.results, "runs")
    for steps, name in product(args.steps, args.models):
        if any((run["steps"], run["model"]) == (steps, name) for run in runs):
            continue
        print(f"{name}, {steps} steps", flush=True)
        start = time.perf_counter()
        model = make(name, text.vocab_size, args.width, args.depth, args.seed)
        fit(model, text, Fit(args.learning_rate, steps=steps, rows=args.rows, length=args.length, seed=args.seed))
        run = {"steps": steps, "model": name, "parameters": model.num_parameters()}
        run |= {"loss": windowed_loss(model, text.validation, args.length)}
        runs.append(run | {"seconds": round(time.perf_counter() - start, 1)})
        seconds += runs[-1]["seconds"]
        figures = {"settings": settings, "runs": runs}
        write_report(NAME, figures, seed=args.seed, seconds=seconds, folder=args.results)
    print_table(runs)
    print_footer(args.results / f"{NAME}.json", seconds)


def sentence(result: dict) -> str:
    runs = result["figures"]["runs"]
    rows = []
    for steps in sorted({run["steps"] for run in runs}):
        losses = ", ".join(f"{run['model']} {run['loss']:.3f}" for run in runs if run["steps"] == steps)
        rows.append(f"after {steps} steps {losses}")
    return f"nats per character, trained with Muon: {'; '.join(rows)}; one learning rate, one seed"


if __name__ == "__main__":
    main()
