"""Time per generated token after a short and after a long context: with a constant-size state they are the same.

    python benchmarks/decode_speed.py

The state after each context is the real one: the context is fed through the model first, in segments.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from common.report import RESULTS, interleaved_medians, print_footer, print_table, write_report

from hf_holo import hsn_tiny

VOCAB_SIZE = 256


@torch.no_grad()
def decoder(model: torch.nn.Module, context: int, tokens: int, segment: int) -> Callable[[], None]:
    """Feeds `context` tokens and returns a function that feeds `tokens` more, one at a time."""
    ids = torch.randint(VOCAB_SIZE, (1, context), generator=torch.Generator().manual_seed(context))
    cache = None
    for piece in ids.split(segment, dim=1):
        cache = model(input_ids=piece, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
    token = ids[:, -1:]

    @torch.no_grad()
    def step() -> None:
        for _ in range(tokens):
            model(input_ids=token, past_key_values=cache, use_cache=True)

    return step


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", nargs="+", type=int, default=(128, 32768))
    parser.add_argument("--tokens", type=int, default=32, help="tokens fed per measurement")
    parser.add_argument("--segment", type=int, default=4096, help="tokens of context fed at once")
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    start = time.perf_counter()
    model = hsn_tiny(vocab_size=VOCAB_SIZE).eval()
    tasks = {str(context): decoder(model, context, args.tokens, args.segment) for context in args.contexts}
    medians = interleaved_medians(tasks, args.repeats)
    first = medians[str(args.contexts[0])]
    rows = [
        {"context": n, "ms_per_token": 1e3 * medians[str(n)] / args.tokens, "relative": medians[str(n)] / first}
        for n in args.contexts
    ]
    print_table(rows)
    seconds = time.perf_counter() - start
    figures = {"model": "hsn-tiny", "parameters": model.num_parameters(), "rows": rows}
    print_footer(write_report("decode_speed", figures, seed=0, seconds=seconds, folder=args.results), seconds)


def sentence(result: dict) -> str:
    first, last = result["figures"]["rows"][0], result["figures"]["rows"][-1]
    return (
        f"time per token after {last['context']:,} tokens is {last['relative']:.2f} of that after {first['context']:,} "
        f"(`{result['figures']['model']}` with random weights, medians)"
    )


def headline(result: dict) -> str:
    first, last = result["figures"]["rows"][0], result["figures"]["rows"][-1]
    return (
        f"a token after {last['context']:,} tokens takes {last['relative']:.2f} times as long as one after "
        f"{first['context']:,}"
    )


if __name__ == "__main__":
    main()
