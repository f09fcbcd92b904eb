"""Time per token of generate(), eagerly, of every family and of models of transformers with as many parameters.

    python benchmarks/generation_speed.py --threads 1

All models generate in one process and take turns. A token's time is that between two tokens that a streamer is given,
so the text before them is not in it; the median over all rounds is told. Operations are those that torch dispatches for
one token, views included. The time to the first token is that of reading the text. Weights are random.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common.report import RESULTS, in_threads, keep_freed_memory, print_footer, print_table, write_report
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from hf_holo import (
    HoloConfig,
    HoloForCausalLM,
    HsnConfig,
    HsnForCausalLM,
    ResonanceConfig,
    ResonanceForCausalLM,
)
from hf_holo.eval.suites.peers import PEERS, peer

VOCAB_SIZE = 1000
LEARNED_POSITIONS, LONGEST = 2**11, 2**20  # the former are weights, the latter a number in a config
SLOW = ("gpt2", "mamba", "holo")  # not asked to read long texts


def make_models(width: int, depth: int, names: Sequence[str]) -> dict[str, PreTrainedModel]:
    """Models of a width and depth; HOLO, whose layers are thin, is twice as wide, and the models of transformers have
    the parameters of hsn."""
    own: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "hidden_size": width, "num_hidden_layers": depth}
    made = {
        "hsn": lambda: HsnForCausalLM(HsnConfig(**own, channel_mix="gated")),
        "resonance": lambda: ResonanceForCausalLM(ResonanceConfig(**own)),
        "holo": lambda: HoloForCausalLM(HoloConfig(**own | {"hidden_size": 2 * width})),
    }
    for kind in PEERS:
        made[kind] = partial(peer, kind, made["hsn"](), LEARNED_POSITIONS if kind == "gpt2" else LONGEST)
    models = {}
    for name in names:
        torch.manual_seed(0)
        models[name] = made[name]().eval()
        models[name].generation_config.eos_token_id = None  # so that every text has its length
    return models


class Clock(BaseStreamer):
    """When generate() gave the text and each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None: ...


def generate(model: PreTrainedModel, context: int, tokens: int, **options: Any) -> None:
    ids = torch.randint(1, VOCAB_SIZE, (1, context), generator=torch.Generator().manual_seed(context))
    lengths = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    model.generate(ids, attention_mask=torch.ones_like(ids), **lengths, **options)


class Operations(TorchDispatchMode):
    """Counts the operations that torch dispatches inside the context."""

    count = 0

    def __torch_dispatch__(
        self, func: Callable, types: Iterable[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations_per_token(model: PreTrainedModel, context: int = 16, tokens: int = 8) -> float:
    counts = []
    generate(model, context, 2)  # what happens once
    for more in (0, tokens):
        with Operations() as operations:
            generate(model, context, 2 + more)
        counts.append(operations.count)
    return (counts[1] - counts[0]) / tokens


def measure(models: dict[str, PreTrainedModel], context: int, tokens: int, repeats: int) -> dict[str, dict[str, float]]:
    """Median milliseconds to the first token and of each further one, by model."""
    for model in models.values():
        generate(model, min(context, 64), 3)
    first: dict[str, list[float]] = {name: [] for name in models}
    further: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(repeats):
        for name, model in models.items():
            clock, start = Clock(), time.perf_counter()
            generate(model, context, tokens + 1, streamer=clock)
            first[name].append(clock.times[1] - start)
            further[name] += [b - a for a, b in zip(clock.times[1:-1], clock.times[2:], strict=True)]
    return {
        name: {"ms_to_first": 1e3 * statistics.median(first[name]), "ms_per_token": 1e3 * statistics.median(times)}
        for name, times in further.items()
    }


def compare(models: dict[str, PreTrainedModel], context: int, tokens: int, repeats: int) -> list[dict[str, Any]]:
    """One row a model, with its times as shares of Llama's."""
    medians = measure(models, context, tokens, repeats)
    shares = {f"{key}_of_llama": key for key in ("ms_to_first", "ms_per_token")}
    return [
        {"context": context, "model": name, **row}
        | {share: row[key] / medians["llama"][key] for share, key in shares.items()}
        for name, row in medians.items()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("hsn", "resonance", "holo", "llama", "gpt2", "mamba")
    parser.add_argument("--models", nargs="+", choices=names, default=names, help="Llama is always among them")
    parser.add_argument("--contexts", nargs="+", type=int, default=(64, 256, 8192), help="tokens before those timed")
    parser.add_argument("--tokens", type=int, default=32, help="tokens timed in a round")
    parser.add_argument("--repeats", type=int, default=9, help="rounds; a third as many after a long text")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--threads", type=int, default=None, help="of torch; default: its own")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)

    keep_freed_memory()
    start = time.perf_counter()
    models = make_models(args.width, args.depth, [name for name in names if name in (*args.models, "llama")])
    sizes = [
        {"model": name, "parameters": model.num_parameters(), "operations_per_token": operations_per_token(model)}
        for name, model in models.items()
    ]
    print_table(sizes)
    rows = []
    for context in args.contexts:
        long = context > 1024
        chosen = {name: model for name, model in models.items() if not (long and name in SLOW)}
        rows += compare(chosen, context, args.tokens, max(1, args.repeats // 3) if long else args.repeats)
        print()
        print_table(rows[-len(chosen) :])
    seconds = time.perf_counter() - start
    figures = {"models": sizes, "rows": rows}
    print_footer(write_report("generation_speed", figures, seed=0, seconds=seconds, folder=args.results), seconds)


def sentence(result: dict) -> str:
    figures = result["figures"]
    own = [row for row in figures["rows"] if row["model"] in ("hsn", "resonance")]
    shares = [f"{row['ms_per_token_of_llama']:.2f} ({row['model']}, after {row['context']:,} tokens)" for row in own]
    operations = [f"{row['operations_per_token']:.0f} ({row['model']})" for row in figures["models"]]
    return (
        f"time of a token in `generate()`, that of a Llama of the same width being 1: {', '.join(shares)}; operations "
        f"of a token: {', '.join(operations)}; medians, PyTorch without compilation, "
        f"{in_threads(result['machine']['threads'])}"
    )


if __name__ == "__main__":
    main()
