"""What a process needs where several share a text: memory of a training step, what is sent, and whether it is the same.

    python benchmarks/context_parallel.py
    python benchmarks/context_parallel.py --preset resonance-tiny --tokens 16384

Every number of processes takes one step, forward and backward, over the same text with the same random weights; each
process measures the most memory that it has had since it was ready (weights and their gradients included), with one
thread. They share the cores of one machine, so the time says little where there are more of them than cores.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from common.own_process import in_own_processes, parsed, peak_gib
from common.report import RESULTS, markdown_table, measured_on, print_footer, print_table, write_report

from hf_holo.distributed import ContextParallel
from hf_holo.registry import preset_model

WARM_UP = 32  # tokens of every process in a step before the measured one


def measure(index: int, count: int, store: str, preset: str, tokens: int, vocab_size: int) -> dict:
    """What one process of `count` needs for its part of a text of `tokens`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=index, world_size=count)
    torch.manual_seed(0)
    model = preset_model(preset, vocab_size=vocab_size, hidden_dropout_prob=0.0).train()
    context = ContextParallel(model)
    ids = torch.randint(vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))

    def step(ids: torch.Tensor) -> tuple[float, float, int]:
        """The loss, the time, and the bytes that were sent."""
        dist.barrier()
        sent, start = context.channel.sent_bytes, time.perf_counter()
        loss = context(input_ids=ids, labels=ids).loss
        loss.backward()
        context.sum_gradients()
        return loss.item(), time.perf_counter() - start, context.channel.sent_bytes - sent

    _, _, sent_short = step(ids[:, : WARM_UP * count])
    model.zero_grad(set_to_none=False)
    before = peak_gib()
    loss, seconds, sent = step(ids)
    norm = torch.stack([p.grad.double().norm() for p in model.parameters() if p.grad is not None]).norm().item()
    dist.barrier()
    dist.destroy_process_group()
    return {
        "before_gib": before,
        "peak_gib": peak_gib(),
        "seconds": seconds,
        "loss": loss,
        "gradient_norm": norm,
        "sent": sent,
        "sent_short": sent_short,
        "layers": model.config.num_hidden_layers,
    }


def summary(count: int, parts: list[dict]) -> dict:
    """The process that needs most, and the one that sends most."""
    most = max(part["peak_gib"] - part["before_gib"] for part in parts)
    return {
        "processes": count,
        "activations_gib": most,
        "peak_gib": max(part["peak_gib"] for part in parts),
        "seconds": max(part["seconds"] for part in parts),
        "sent_per_layer": max(part["sent"] for part in parts) / parts[0]["layers"],  # both ways
        "sent_per_layer_short": max(part["sent_short"] for part in parts) / parts[0]["layers"],
        "loss": parts[0]["loss"],
        "gradient_norm": parts[0]["gradient_norm"],
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="hsn-tiny")
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--vocab_size", type=int, default=256)
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2, 4], help="the first is compared with")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    args = parsed(parser, argv, measure)

    start = time.perf_counter()
    settings = {"preset": args.preset, "tokens": args.tokens, "vocab_size": args.vocab_size}
    rows: list[dict] = []
    for count in args.processes:
        with tempfile.TemporaryDirectory() as folder:
            each = [{"index": i, "count": count, "store": f"{folder}/store", **settings} for i in range(count)]
            row = summary(count, in_own_processes(__file__, each))
        first = rows[0] if rows else row
        rows.append(row | {"relative": row["activations_gib"] / first["activations_gib"]})
    print_table(rows)
    seconds = time.perf_counter() - start
    path = write_report("context_parallel", {**settings, "rows": rows}, seed=0, seconds=seconds, folder=args.results)
    print_footer(path, seconds)


def sentence(result: dict) -> str:
    f = result["figures"]
    one, *_, most = f["rows"]
    return (
        f"a training step of `{f['preset']}` (random weights, one seed) over {f['tokens']:,} tokens takes "
        f"{one['activations_gib']:.2f} GiB of activations in one process and {most['relative']:.2f} of that in each of "
        f"{most['processes']}, with losses that differ by {abs(most['loss'] - one['loss']):.0e}; a process sends "
        f"{most['sent_per_layer'] / 2**10:.1f} KiB per layer, forward and backward together"
    )


def table(result: dict) -> str:
    """Memory, traffic and time by number of processes."""
    f = result["figures"]
    rows = [
        (
            str(row["processes"]),
            f"{row['activations_gib']:.2f} GiB",
            f"{row['relative']:.2f}",
            f"{row['sent_per_layer'] / 2**10:.1f} KiB",
            f"{row['seconds']:.0f} s",
            f"{row['loss']:.6f}",
            f"{row['gradient_norm']:.6f}",
        )
        for row in f["rows"]
    ]
    names = (">processes", ">activations of each", ">relative", ">sent per layer", ">time", ">loss", ">gradient norm")
    return "\n".join(
        [
            markdown_table(names, rows),
            "",
            f"A training step of `{f['preset']}` with random weights over {f['tokens']:,} tokens, one seed. "
            "Activations: the peak of memory above that of a process that is ready. Sent: by the process that sends "
            "most, forward and backward together. All processes share one machine, so that the time is no measure of "
            f"what several machines would take: {measured_on(result)}.",
        ]
    )


if __name__ == "__main__":
    main()
