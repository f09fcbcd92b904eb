"""Some attention layers of a language model become holographic mixers and are distilled.

    python benchmarks/partial_transfer.py MODEL --text wikitext2-valid.txt tinyshakespeare.txt --held_out 0.5 0.1

MODEL is the folder of a Llama, Mistral or Phi-3 with its tokenizer. Perplexities are measured on evenly spaced windows
of the held-out part of each text. The seconds are those of training; scoring is not counted. Models that are in
`--folder` already are used again.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from common.distilling import distil, shortened
from common.report import RESULTS, print_footer, print_table, write_report
from transfer import figures
from transformers import AutoConfig

from hf_holo.conversion.sources import Source
from hf_holo.conversion.surgery.transfer import transfer_to_hsn


def every_fourth(depth: int) -> list[int]:
    """A quarter of the layers, rounded up, at equal distances and never the first or the last."""
    count = math.ceil(depth / 4)
    return [(2 * i + 1) * depth // (2 * count) for i in range(count)]


def replaced(args: argparse.Namespace, layers: list[int]) -> dict:
    """Transfer and distil, unless that has been done, and return the report."""
    student, folder = args.folder / "student", args.folder / "distilled"
    if not (folder / "model.safetensors").exists():
        torch.manual_seed(args.seed)
        transfer_to_hsn(Source.find(args.model).load(), layers).save_pretrained(student)
    options = {"validation_fraction": args.held_out, "block_size": args.window, "eval_windows": args.eval_windows}
    options |= {"bf16": args.bf16, "seed": args.seed} | shortened(args.stage_steps)
    return distil("distill-hsn-part", args.model, student, folder, args.text, **options)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="folder of the teacher")
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--held_out", nargs="+", type=float, default=[0.1], help="share at the end of each text")
    parser.add_argument("--layers", nargs="+", type=int, help="that get a mixer; default: a quarter, evenly spaced")
    parser.add_argument("--stage_steps", type=int, help="steps of every stage; default: those of the recipe")
    parser.add_argument("--bf16", action="store_true", help="where the processor knows that type: half the time")
    parser.add_argument("--window", type=int, default=512, help="tokens, of training and of scoring")
    parser.add_argument("--eval_windows", type=int, default=32, help="of each text, evenly spaced")
    parser.add_argument("--folder", type=Path, default=Path("runs/partial_transfer"), help="folder of the models")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args(argv)

    depth = AutoConfig.from_pretrained(args.model).num_hidden_layers
    layers = args.layers or every_fourth(depth)
    report = replaced(args, layers)
    texts = {Path(text).name: figures(report, Path(text).stem) for text in args.text}
    rows = [{"text": name, **stage} for name, found in texts.items() for stage in found["stages"]]
    print_table(rows)
    ratios = {name: math.exp(found["loss"] - found["teacher_loss"]) for name, found in texts.items()}
    print(
        "perplexity divided by the teacher's: " + ", ".join(f"{value:.3f} ({name})" for name, value in ratios.items())
    )
    (seconds,) = {found["seconds"] for found in texts.values()}
    settings = {"depth": depth, "layers": layers}
    settings |= {key: getattr(args, key) for key in ("window", "eval_windows", "bf16")}
    found = settings | {"ratios": ratios, "texts": texts}
    path = write_report("partial_transfer", found, seed=args.seed, seconds=seconds, folder=args.results)
    print_footer(path, seconds)


def sentence(result: dict) -> str:
    f = result["figures"]
    (first, *_) = f["texts"].values()
    ratios = ", ".join(f"{ratio:.3f} ({text})" for text, ratio in f["ratios"].items())
    return (
        f"{len(f['layers'])} of the {f['depth']} attention layers of a model with {first['teacher_parameters']:,} "
        f"parameters replaced by holographic mixers: perplexity divided by the teacher's {ratios} after "
        f"{first['steps']} steps of distillation ({first['seconds'] / 60:.0f} minutes); one seed"
    )


if __name__ == "__main__":
    main()
