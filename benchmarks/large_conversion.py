"""The memory and time that converting a model as large as Phi-3-mini takes, block by block.

    python benchmarks/large_conversion.py wikitext2-valid.txt

The model has Phi-3-mini's own configuration, the default one of transformers, with random weights in bfloat16: memory
and time do not depend on what they are, and perplexities would mean nothing. `--blocks` says how many of its blocks are
converted. More take longer and no more memory, since no more statistics are kept at a time than `--memory` allows. The
models need twice the weights' size of disk, below `--folder`, and are deleted afterwards.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from common.report import RESULTS, flags, print_footer, write_report
from transformers import Phi3Config, Phi3ForCausalLM, set_seed

from hf_holo.data.tokenizers import make_tokenizer

NAME = "large_conversion"


def make_teacher(folder: str, text: Path, config: dict, seed: int) -> dict[str, int | float]:
    """Write the model and its tokenizer, and return what it holds."""
    set_seed(seed)
    torch.set_default_dtype(torch.bfloat16)  # in float32 it would take twice the memory to make
    model = Phi3ForCausalLM(Phi3Config(pad_token_id=None, bos_token_id=None, eos_token_id=None, **config))
    model.save_pretrained(folder)
    words = text.read_text(encoding="utf-8")
    make_tokenizer("bpe", [words], min(4096, model.config.vocab_size)).save_pretrained(folder)
    weights = sum(p.nbytes for p in model.parameters()) / 2**30
    return {"parameters": model.num_parameters(), "depth": model.config.num_hidden_layers, "weights_gib": weights}


def converted(teacher: str, student: str, options: dict) -> dict:
    """`hf-holo convert`, and what its report says."""
    command = [sys.executable, "-m", "hf_holo.cli", "convert", teacher, student, *flags(options)]
    subprocess.run(command, check=True)
    report = json.loads(Path(student, "report.json").read_text(encoding="utf-8"))
    return {"peak_gib": report["peak_memory_gib"], "kept": report["kept"], "parts": report["seconds"]}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--blocks", type=int, default=1, help="that are converted")
    parser.add_argument("--ratio", type=float, default=0.8)
    parser.add_argument("--window", type=int, default=128, help="tokens in a window of text")
    parser.add_argument("--tokens", type=int, default=512, help="of calibration, for the activations")
    parser.add_argument("--fisher_tokens", type=int, default=128, help="of them for the gradients too")
    parser.add_argument("--memory", type=float, default=4.0, help="GiB that the statistics may take at a time")
    parser.add_argument("--config", type=json.loads, default={}, help="JSON: values other than Phi-3-mini's")
    parser.add_argument("--folder", type=Path, default=Path("runs") / NAME, help="of the two models")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args(argv)

    teacher, student = str(args.folder / "teacher"), str(args.folder / "student")
    settings = {key: getattr(args, key) for key in ("ratio", "window", "tokens", "fisher_tokens", "memory")}
    modules = rf"layers\.({'|'.join(map(str, range(args.blocks)))})\."
    options = {key: getattr(args, key) for key in ("ratio", "tokens", "fisher_tokens", "memory")}
    options |= {"modules": modules, "train_file": args.text, "block_size": args.window}
    options |= {"eval_windows": 1, "sample_tokens": 1}
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as apart:  # a process starts with the peak of its parent
            model = apart.submit(make_teacher, teacher, args.text, args.config, args.seed).result()
        result = converted(teacher, student, options)
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)
    figures = {**model, "blocks": args.blocks, **settings, **result}
    seconds = result["parts"]["total"]
    print(f"{model['weights_gib']:.2f} GiB of weights, at most {result['peak_gib']:.2f} GiB of memory")
    print_footer(write_report(NAME, figures, seed=args.seed, seconds=seconds, folder=args.results), seconds)


def sentence(result: dict) -> str:
    f = result["figures"]
    return (
        f"converting {f['blocks']} of the {f['depth']} blocks of a Phi-3 with {f['parameters']:,} parameters in "
        f"bfloat16 ({f['weights_gib']:.1f} GiB), statistics of {f['memory']:g} GiB at a time, takes at most "
        f"{f['peak_gib']:.1f} GiB of memory (random weights: the memory does not depend on the seed)"
    )


if __name__ == "__main__":
    main()
