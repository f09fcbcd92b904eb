"""HoloSpectralNet against a Llama of the same size: same text, windows, steps, optimizer family, schedule and loss.

    python benchmarks/llama_comparison.py tinyshakespeare.txt

Each model is trained once per learning rate and shown at its best. A finished run is kept in the result file and not
repeated, so that runs can be made one at a time (`--models hsn --learning_rates 0.004`).
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from common.characters import CharacterText, windowed_loss
from common.contenders import small_llama
from common.fitting import OPTIMIZERS, Fit, fit
from common.report import RESULTS, earlier_rows, print_footer, print_table, write_report
from transformers import LlamaForCausalLM

from hf_holo import HsnConfig, HsnForCausalLM

NAME = "llama_comparison"
LEARNING_RATES = {"muon": (0.002, 0.004, 0.008), "adamw": (0.001, 0.002, 0.004)}


def build_hsn(vocab_size: int, width: int, depth: int, **options) -> HsnForCausalLM:
    sizes = {"vocab_size": vocab_size, "hidden_size": width, "num_hidden_layers": depth}
    return HsnForCausalLM(HsnConfig(**sizes, channel_mix="gated", **options))


def build_llama(vocab_size: int, width: int, depth: int, parameters: int) -> LlamaForCausalLM:
    """The Llama of this width and depth whose intermediate size brings it closest to `parameters`."""
    without_mlp = small_llama(vocab_size, width, depth, 1).num_parameters() - 3 * width * depth
    return small_llama(vocab_size, width, depth, max(1, round((parameters - without_mlp) / (3 * width * depth))))


def build(name: str, vocab_size: int, width: int, depth: int, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    hsn = build_hsn(vocab_size, width, depth)
    if name == "hsn":
        return hsn
    torch.manual_seed(seed)
    llama = build_llama(vocab_size, width, depth, hsn.num_parameters())
    if abs(llama.num_parameters() / hsn.num_parameters() - 1) > 0.03:
        raise ValueError(f"width {width} allows no Llama within 3 % of {hsn.num_parameters()} parameters")
    return llama


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="text file; the last tenth validates")
    parser.add_argument("--models", nargs="+", choices=("hsn", "llama"), default=("hsn", "llama"))
    parser.add_argument("--optimizer", choices=tuple(LEARNING_RATES), default="muon")
    parser.add_argument("--learning_rates", nargs="+", type=float, help="default: three for the optimizer")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args(argv)

    text = CharacterText(args.text)
    names = ("optimizer", "steps", "rows", "length", "width", "depth", "seed")
    settings = {name: getattr(args, name) for name in names} | {"characters": len(text.train) + len(text.validation)}
    name = f"{NAME}_{args.optimizer}"
    runs, seconds = earlier_rows(name, {"settings": settings}, args.results, "runs")

    for model_name in args.models:
        for rate in args.learning_rates or LEARNING_RATES[args.optimizer]:
            if any(run["model"] == model_name and run["learning_rate"] == rate for run in runs):
                continue
            print(f"{model_name}, learning rate {rate}", flush=True)
            start = time.perf_counter()
            model = build(model_name, text.vocab_size, args.width, args.depth, args.seed)
            fit(
                model,
                text,
                Fit(rate, args.optimizer, steps=args.steps, rows=args.rows, length=args.length, seed=args.seed),
            )
            run = {
                "model": model_name,
                "learning_rate": rate,
                "parameters": model.num_parameters(),
                "loss": windowed_loss(model, text.validation, args.length),
                "seconds": round(time.perf_counter() - start, 1),
            }
            runs.append(run)
            seconds += run["seconds"]
            write_report(name, summarise(settings, runs), seed=args.seed, seconds=seconds, folder=args.results)

    print_table(runs)
    figures = summarise(settings, runs)
    if figures["advantage"] is not None:
        best = figures["best"]
        print(f"over the whole validation split: hsn {best['hsn']:.4f}, llama {best['llama']:.4f} nats per character")
        print(f"hsn is lower by {figures['advantage']:.4f}")
    print_footer(args.results / f"{name}.json", seconds)


def summarise(settings: dict, runs: list[dict]) -> dict:
    """The best loss of each model and, once both are known, by how much that of HSN is lower."""
    best = {run["model"]: min(r["loss"] for r in runs if r["model"] == run["model"]) for run in runs}
    advantage = best["llama"] - best["hsn"] if len(best) == 2 else None
    return {"settings": settings, "runs": runs, "best": best, "advantage": advantage}


def sentence(result: dict) -> str:
    settings, best = result["figures"]["settings"], result["figures"]["best"]
    rates = sorted({run["learning_rate"] for run in result["figures"]["runs"]})
    chosen = f"each at its best of the learning rates {rates}" if len(rates) > 1 else f"learning rate {rates[0]}"
    return (
        f"{best['hsn']:.3f} nats, Llama of the same size {best['llama']:.3f}, after {settings['steps']} steps of "
        f"{settings['rows']}×{settings['length']} with {OPTIMIZERS[settings['optimizer']]}, {chosen}, one seed; the "
        "Llama has no short filter over the tokens, hsn has one (`llama_filter` gives it one)"
    )


def headline(result: dict, filtered: dict) -> str:
    """With what the Llama reaches in as many steps if it has the filter, from the result of llama_filter.py."""
    best, steps = result["figures"]["best"], result["figures"]["settings"]["steps"]
    runs = filtered["figures"]["runs"]
    (loss,) = (run["loss"] for run in runs if (run["model"], run["steps"]) == ("llama with filter", steps))
    return (
        f"{best['hsn']:.2f} nats per character, a Llama of the same size {best['llama']:.2f} after equal training "
        f"({loss:.2f} with hsn's short filter before its attention; one seed, one learning rate)"
    )


if __name__ == "__main__":
    main()
