"""Speculative decoding: tokens a second of prompt lookup, and what it costs to check several guesses at once.

    python benchmarks/speculative.py --threads 1

A model of about 135 million parameters with random weights, which soon repeats itself when it decodes greedily: text
that repeats, where prompt lookup guesses right, the best case. Plain and speculative generation take turns and must
give the same tokens (speculation may go a few past the last, which count as well). What a call with k tokens costs,
that with one being 1, is the most that guessing can gain where every guess is right: k divided by it. A call that may
be taken back also records how, which is in it.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common.report import RESULTS, in_threads, interleaved_medians, print_footer, print_table, write_report
from transformers import PreTrainedModel

from hf_holo import HsnConfig, HsnForCausalLM, ResonanceConfig, ResonanceForCausalLM

FAMILIES = {"hsn": (HsnForCausalLM, HsnConfig), "resonance": (ResonanceForCausalLM, ResonanceConfig)}
GUESSES = (1, 2, 4, 8, 16)


def make(family: str, width: int, depth: int, vocab_size: int) -> PreTrainedModel:
    torch.manual_seed(0)
    model_class, config = FAMILIES[family]
    model = model_class(config(vocab_size=vocab_size, hidden_size=width, num_hidden_layers=depth, channel_mix="gated"))
    model.generation_config.eos_token_id = 0  # prompt lookup asks for one; see min_new_tokens
    return model.eval()


class Calls:
    """Counts the calls of a model inside the context."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.count = model, 0

    def __enter__(self) -> "Calls":
        self.handle = self.model.register_forward_pre_hook(self._add)
        return self

    def _add(self, *_: Any) -> None:
        self.count += 1

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


def generated(model: PreTrainedModel, ids: torch.Tensor, tokens: int, **options: Any) -> torch.Tensor:
    lengths = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **lengths, **options)


def checking(model: PreTrainedModel, ids: torch.Tensor, guesses: int) -> Callable[[], None]:
    """Reads `guesses` tokens after `ids` and takes all of them back, as a function without arguments."""
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    cache.activate_past_recording()
    more = ids[:, :guesses]

    @torch.no_grad()
    def step() -> None:
        model(more, past_key_values=cache, use_cache=True)
        cache.crop(-guesses)

    return step


def measure(family: str, args: argparse.Namespace) -> dict[str, Any]:
    model = make(family, args.width, args.depth, args.vocab_size)
    ids = torch.randint(1, args.vocab_size, (1, args.context), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([ids, generated(model, ids, args.tokens)[:, args.context :]], 1)  # into its repetition
    ways: dict[str, dict[str, Any]] = {"plain": {}, "prompt lookup": {"prompt_lookup_num_tokens": args.guesses}}
    calls, texts = {}, {}
    for name, options in ways.items():
        with Calls(model) as counted:
            texts[name] = generated(model, ids, args.tokens, **options)
        calls[name] = counted.count
    made = {name: text.shape[1] - ids.shape[1] for name, text in texts.items()}
    seconds = interleaved_medians(
        {name: lambda options=options: generated(model, ids, args.tokens, **options) for name, options in ways.items()},
        args.repeats,
    )
    rates = {name: made[name] / seconds[name] for name in ways}
    checks = interleaved_medians({str(k): checking(model, ids, k) for k in GUESSES}, 3 * args.repeats)
    return {
        "family": family,
        "parameters": model.num_parameters(),
        "same_tokens": bool(torch.equal(*(text[:, : ids.shape[1] + args.tokens] for text in texts.values()))),
        "tokens_per_call": made["prompt lookup"] / calls["prompt lookup"],
        "plain_tokens_per_second": rates["plain"],
        "lookup_tokens_per_second": rates["prompt lookup"],
        "speedup": rates["prompt lookup"] / rates["plain"],
        **{f"cost_of_{k}": checks[str(k)] / checks["1"] for k in GUESSES},
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=tuple(FAMILIES))
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--depth", type=int, default=13)
    parser.add_argument("--vocab_size", type=int, default=32000)
    parser.add_argument("--context", type=int, default=16, help="random tokens before the text that repeats")
    parser.add_argument("--tokens", type=int, default=96, help="tokens generated, and before them as many")
    parser.add_argument("--guesses", type=int, default=10, help="tokens that prompt lookup guesses at once")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None, help="of torch; default: its own")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)

    start = time.perf_counter()
    rows = []
    for family in args.families:
        rows.append(measure(family, args))
        print_table(rows[-1:])
    seconds = time.perf_counter() - start
    figures = {"rows": rows, "tokens": args.tokens, "guesses": args.guesses}
    print_footer(write_report("speculative", figures, seed=0, seconds=seconds, folder=args.results), seconds)


def sentence(result: dict) -> str:
    f = result["figures"]
    gains = [
        f"{row['family']} ({row['parameters'] / 1e6:.0f} M parameters) {row['speedup']:.2f} times the tokens a second, "
        f"{row['tokens_per_call']:.1f} tokens a call, a call with 8 tokens costs {row['cost_of_8']:.1f} of one's"
        for row in f["rows"]
    ]
    return (
        f"prompt lookup on text that repeats, {f['guesses']} guesses: {'; '.join(gains)}; random weights, medians, "
        f"{in_threads(result['machine']['threads'])}"
    )


if __name__ == "__main__":
    main()
