"""What a context of 262,144 tokens costs: memory, time per token, a training step, decoding, and what is exact of it.

    python benchmarks/long_context.py
    python benchmarks/long_context.py --preset hsn-small --parts reading speed decoding

Every part runs in a process of its own, so that its peak of memory is nobody else's; `--parts` measures some of them
again and leaves the others of an earlier run with the same settings as they are. Weights are random: no figure here
depends on their values.

- reading: one forward pass over the whole context, logits of the last position only
- speed: the same against a short text, in turns
- training: forward, backward and optimizer step of one long row with gradient checkpointing
- pieces: a text read piece by piece against the same text read at once, in float32
- decoding: one token after a long and after a short context, in turns
- stability: how large the state and the logits are along a text longer than the context
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from common.own_process import in_own_process, parsed, peak_gib
from common.report import (
    RESULTS,
    interleaved_medians,
    keep_freed_memory,
    markdown_table,
    measured_on,
    print_footer,
    print_table,
    read_report,
    write_report,
)
from tqdm import tqdm
from transformers import Cache, PreTrainedModel

from hf_holo.registry import preset_model

PIECE = 4096  # tokens fed at once where a context is built up
MARKS = (0.001, 0.01, 0.1, 0.3, 1.0)  # where along the text the state is read


def make(preset: str, vocab_size: int) -> PreTrainedModel:
    torch.manual_seed(0)
    return preset_model(preset, vocab_size=vocab_size).eval()


def random_ids(model: PreTrainedModel, length: int) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(length))


def feed(model: PreTrainedModel, ids: torch.Tensor, piece: int = PIECE, keep: int = 1, cache=None):
    """Reads `[1, T]` piece by piece: the cache, and the last `keep` logits of every piece (0: all)."""
    logits = []
    for part in ids.split(piece, dim=1):
        output = model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=keep)
        cache = output.past_key_values
        logits.append(output.logits)
    return cache, torch.cat(logits, 1)


def states_of(cache: Cache) -> list[torch.Tensor]:
    """What a cache keeps in all its layers: named states, or the keys and values of attention."""
    kept = (layer.states.values() if hasattr(layer, "states") else (layer.keys, layer.values) for layer in cache.layers)
    return [state for states in kept for state in states]


def state_bytes(cache: Cache) -> int:
    return sum(state.nbytes for state in states_of(cache))


# ---------------------------------------------------------------------------------------------- the parts
@torch.no_grad()
def reading(model: PreTrainedModel, context: int) -> dict:
    """Peaks of the process before the pass and after it."""
    before, ids = peak_gib(), random_ids(model, context)
    start = time.perf_counter()
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
    seconds = time.perf_counter() - start
    return {
        "tokens": context,
        "peak_gib": peak_gib(),
        "before_gib": before,  # imports and weights
        "weights_gib": sum(p.nbytes for p in model.parameters()) / 2**30,
        "seconds": seconds,
        "finite": bool(torch.isfinite(logits).all()),
    }


@torch.no_grad()
def speed(model: PreTrainedModel, context: int, short: int, repeats: int) -> list[dict]:
    """Medians of whole passes, in turns."""
    lengths = (short, context)

    def task(length: int) -> Callable[[], object]:
        ids = random_ids(model, length)
        return lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1)

    medians = interleaved_medians({str(n): task(n) for n in lengths}, repeats, warmup=1)
    rows = [{"tokens": n, "us_per_token": 1e6 * medians[str(n)] / n} for n in lengths]
    return [row | {"relative": row["us_per_token"] / rows[0]["us_per_token"]} for row in rows]


def training(model: PreTrainedModel, training_tokens: int, steps: int = 2) -> dict:
    """The first step allocates the state of the optimizer; the time is that of the last."""
    before, ids = peak_gib(), random_ids(model, training_tokens)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(steps):
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - start
    return {
        "tokens": training_tokens,
        "peak_gib": peak_gib(),
        "before_gib": before,
        "seconds": seconds,
        "us_per_token": 1e6 * seconds / training_tokens,
        "loss": loss.item(),
    }


@torch.no_grad()
def pieces(model: PreTrainedModel, exact_tokens: int, sizes: Sequence[int]) -> list[dict]:
    """Largest differences of all logits; a model with a `segment_length` of its own is tried with each size, too."""
    ids, own = random_ids(model, exact_tokens), hasattr(model.config, "segment_length")

    def whole(segment: int) -> torch.Tensor:
        if own:
            model.config.segment_length = segment
        return model(input_ids=ids, use_cache=False).logits

    expected = whole(exact_tokens)
    rows = []
    for size in tqdm(sizes, desc="pieces", unit="size"):
        row = {"tokens": exact_tokens, "piece": size}
        if own:
            row["segment_length"] = (whole(size) - expected).abs().max().item()
            model.config.segment_length = exact_tokens
        fed = feed(model, ids, piece=size, keep=0)[1]
        rows.append(row | {"fed_in_pieces": (fed - expected).abs().max().item(), "largest": fed.abs().max().item()})
    return rows


@torch.no_grad()
def decoding(model: PreTrainedModel, context: int, short_context: int, tokens: int, repeats: int) -> list[dict]:
    """Medians of `tokens` single tokens, in turns, after contexts that the model has really read."""
    contexts = (short_context, context)
    caches = {n: feed(model, random_ids(model, n))[0] for n in contexts}
    sizes = {n: state_bytes(cache) for n, cache in caches.items()}

    def task(cache) -> Callable[[], object]:
        token = random_ids(model, 1)
        return lambda: [model(input_ids=token, past_key_values=cache, use_cache=True) for _ in range(tokens)]

    medians = interleaved_medians({str(n): task(cache) for n, cache in caches.items()}, repeats)
    rows = [{"context": n, "ms_per_token": 1e3 * medians[str(n)] / tokens, "state_bytes": sizes[n]} for n in contexts]
    return [row | {"relative": row["ms_per_token"] / rows[0]["ms_per_token"]} for row in rows]


@torch.no_grad()
def stability(model: PreTrainedModel, stability_tokens: int) -> list[dict]:
    ids, cache, rows, start = random_ids(model, stability_tokens), None, [], 0
    for mark in MARKS:
        stop = max(start + 1, round(mark * stability_tokens))
        cache, logits = feed(model, ids[:, start:stop], cache=cache)
        states = torch.cat([state.flatten() for state in states_of(cache)])
        rows.append(
            {
                "tokens": stop,
                "largest_state": states.abs().max().item(),
                "largest_logit": logits.abs().max().item(),
                "finite": bool(torch.isfinite(states).all() and torch.isfinite(logits).all()),
            }
        )
        start = stop
    return rows


PARTS = {
    "reading": (reading, ("context",)),
    "speed": (speed, ("context", "short", "repeats")),
    "training": (training, ("training_tokens",)),
    "pieces": (pieces, ("exact_tokens", "sizes")),
    "decoding": (decoding, ("context", "short_context", "tokens", "repeats")),
    "stability": (stability, ("stability_tokens",)),
}


def run_part(part: str, preset: str, vocab_size: int, **arguments) -> dict:
    keep_freed_memory()
    return {part: PARTS[part][0](make(preset, vocab_size), **arguments)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="resonance-small")
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=tuple(PARTS))
    parser.add_argument("--context", type=int, default=262_144, help="tokens")
    parser.add_argument("--short", type=int, default=8192, help="tokens that the speed is compared with")
    parser.add_argument("--short_context", type=int, default=1024, help="tokens that decoding is compared with")
    parser.add_argument("--training_tokens", type=int, default=65_536)
    parser.add_argument("--exact_tokens", type=int, default=16_384, help="length of the text read in pieces")
    parser.add_argument("--sizes", nargs="+", type=int, default=[512, 1000, 4096], help="tokens of a piece")
    parser.add_argument("--tokens", type=int, default=32, help="tokens decoded per measurement")
    parser.add_argument("--stability_tokens", type=int, default=300_000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    args = parsed(parser, argv, run_part)

    name = "long_context" if args.preset == parser.get_default("preset") else f"long_context_{args.preset}"
    settings = {key: value for key, value in vars(args).items() if key not in ("parts", "results")}
    earlier = read_report(name, args.results)
    same = earlier["figures"].get("settings") == settings
    figures, seconds = (earlier["figures"], earlier["seconds"]) if same else ({"settings": settings}, 0.0)
    for part in args.parts:
        start = time.perf_counter()
        arguments = {key: settings[key] for key in ("preset", "vocab_size", *PARTS[part][1])}
        figures |= in_own_process(__file__, part=part, **arguments)
        seconds += time.perf_counter() - start
        rows = figures[part]
        print(part, flush=True)
        print_table(rows if isinstance(rows, list) else [rows])
        path = write_report(name, figures, seed=0, seconds=seconds, folder=args.results)
    print_footer(path, seconds)


def sentence(result: dict) -> str:
    f = result["figures"]
    parts = {
        "reading": lambda r: f"reading {r['tokens']:,} tokens takes {r['seconds']:.0f} s and {r['peak_gib']:.2f} GiB",
        "speed": lambda r: f"time per token there {r[-1]['relative']:.2f} of that at {r[0]['tokens']:,}",
        "training": lambda r: f"a training step over {r['tokens']:,} takes {r['peak_gib']:.2f} GiB",
        "pieces": lambda r: f"in pieces the logits differ by {max(x['fed_in_pieces'] for x in r):.0e} at most",
        "decoding": lambda r: (
            f"a token after {r[-1]['context']:,} takes {r[-1]['relative']:.2f} of one after {r[0]['context']:,}"
        ),
        "stability": lambda r: f"the largest state after {r[-1]['tokens']:,} tokens is {r[-1]['largest_state']:.3g}",
    }
    told = "; ".join(say(f[part]) for part, say in parts.items() if part in f)
    return f"`{f['settings']['preset']}` with random weights, one seed: {told}"


def headline(result: dict) -> str:
    read, (short, long) = result["figures"]["reading"], result["figures"]["speed"]
    return (
        f"`{result['figures']['settings']['preset']}` reads {read['tokens']:,} tokens in {read['seconds']:.0f} s and "
        f"{read['peak_gib']:.2f} GiB on a CPU; time per token is {long['relative']:.2f} times that at "
        f"{short['tokens']:,} (random weights: this is cost, not recall)"
    )


def table(result: dict) -> str:
    """What long texts cost."""
    f = result["figures"]
    (short, long), (early, late), read, step = f["speed"], f["decoding"], f["reading"], f["training"]

    def row(what: str, tokens: int, memory: str, time: str) -> tuple[str, str, str, str]:
        return what, f"{tokens:,}", memory, time

    rows = [
        row(
            "reading, logits of the last position",
            read["tokens"],
            f"{read['peak_gib']:.2f} GiB",
            f"{read['seconds']:.0f} s",
        ),
        row("the same, per token", short["tokens"], "", f"{short['us_per_token']:.0f} µs"),
        row("", long["tokens"], "", f"{long['us_per_token']:.0f} µs"),
        row(
            "a training step with gradient checkpointing",
            step["tokens"],
            f"{step['peak_gib']:.2f} GiB",
            f"{step['seconds']:.0f} s",
        ),
        row(
            "one more token after",
            early["context"],
            f"state {early['state_bytes']:,} B",
            f"{early['ms_per_token']:.1f} ms",
        ),
        row("", late["context"], f"state {late['state_bytes']:,} B", f"{late['ms_per_token']:.1f} ms"),
    ]
    return "\n".join(
        [
            markdown_table(("", ">tokens", ">peak memory", ">time"), rows),
            "",
            f"Segments and pieces of {', '.join(str(row['piece']) for row in f['pieces'])} tokens change the logits of "
            f"{f['pieces'][0]['tokens']:,} tokens by at most {max(row['fed_in_pieces'] for row in f['pieces']):.0e}. "
            f"Memory includes Python and its packages, {read['before_gib']:.2f} GiB. `{f['settings']['preset']}` with "
            f"random weights, {result['seconds']:,.0f} seconds for all on: {measured_on(result)}.",
        ]
    )


if __name__ == "__main__":
    main()
