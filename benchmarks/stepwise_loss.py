"""The loss of a checkpoint one token at a time through the cache, against its loss over the whole window at once.

    python benchmarks/stepwise_loss.py CHECKPOINT tinyshakespeare.txt

A model that looks ahead has a low loss over the window and a high one token by token; a causal one has the same.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from common.report import RESULTS, print_footer, print_table, write_report
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_holo  # noqa: F401 (registers the families with the Auto classes)


@torch.no_grad()
def losses(model: torch.nn.Module, windows: torch.Tensor) -> tuple[float, float]:
    """Mean nats per token of `windows` [rows, length + 1]: over whole windows, and one token at a time."""
    inputs, targets = windows[:, :-1], windows[:, 1:]
    teacher_forced = model(input_ids=inputs, use_cache=False).logits  # [rows, length, V]
    stepwise, cache = [], None
    for t in range(inputs.shape[1]):
        output = model(input_ids=inputs[:, t : t + 1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        stepwise.append(output.logits)
    both = (teacher_forced, torch.cat(stepwise, 1))
    return tuple(F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item() for logits in both)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder with a causal model and its tokenizer")
    parser.add_argument("text", type=Path, help="text file; windows are taken from its last tenth")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args(argv)

    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint).eval()
    text = args.text.read_text(encoding="utf-8")
    tail = AutoTokenizer.from_pretrained(args.checkpoint)(text[int(0.9 * len(text)) :], add_special_tokens=False)
    needed = args.rows * (args.length + 1)
    if len(tail["input_ids"]) < needed:
        raise ValueError(f"the last tenth of {args.text} has {len(tail['input_ids'])} tokens, {needed} are needed")
    windows = torch.tensor(tail["input_ids"][:needed]).view(args.rows, -1)
    teacher_forced, stepwise = losses(model, windows)
    figures = {
        "tokens": args.rows * args.length,
        "teacher_forced": teacher_forced,
        "stepwise": stepwise,
        "difference": abs(stepwise - teacher_forced),
    }
    print_table([figures])
    seconds = time.perf_counter() - start
    print_footer(write_report("stepwise_loss", figures, seed=0, seconds=seconds, folder=args.results), seconds)


def sentence(result: dict) -> str:
    f = result["figures"]
    return (
        f"loss one token at a time {f['stepwise']:.5f}, over the whole window {f['teacher_forced']:.5f} "
        f"(one trained model, {f['tokens']:,} tokens)"
    )


if __name__ == "__main__":
    main()
