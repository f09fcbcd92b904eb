"""Forward and backward of an HSN and a Resonance block against a Llama block of the same width, MLP and (nearly)
parameters.

    python benchmarks/block_speed.py
    python benchmarks/block_speed.py --compile

All run in one process and take turns; the figures are medians, and freed memory is kept for reuse. Llama's block is
that of transformers, with causal scaled_dot_product_attention. With `--compile` all blocks are compiled by
torch.compile. The last table is the HSN block alone: its time per token must not grow.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from common.report import RESULTS, interleaved_medians, keep_freed_memory, print_footer, print_table, write_report
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from hf_holo import HoloSpectralBlock, HsnConfig, ResonanceConfig
from hf_holo.modeling.modeling_resonance import ResonanceBlock

SHAPES = ((16, 256, 128), (16, 256, 256), (16, 256, 512), (1, 4096, 256), (1, 4096, 512))  # rows, tokens, width
LENGTHS = (1024, 2048, 4096, 8192, 16384)
VOCAB_SIZE = 65  # no part of a block


def hsn_config(width: int, **options) -> HsnConfig:
    return HsnConfig(vocab_size=VOCAB_SIZE, hidden_size=width, num_hidden_layers=1, channel_mix="gated", **options)


def hsn_block(width: int, **options) -> torch.nn.Module:
    return HoloSpectralBlock(hsn_config(width, **options), 0)


def resonance_block(width: int) -> torch.nn.Module:
    return ResonanceBlock(ResonanceConfig(vocab_size=VOCAB_SIZE, hidden_size=width, num_hidden_layers=1), 0)


def llama_block(width: int) -> tuple[torch.nn.Module, LlamaRotaryEmbedding]:
    """A decoder layer with the MLP width and the number of heads of the HSN block, and its rotary embedding."""
    hsn = hsn_config(width)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=width,
        intermediate_size=hsn.intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=hsn.num_heads,
    )
    config._attn_implementation = "sdpa"
    return LlamaDecoderLayer(config, layer_idx=0), LlamaRotaryEmbedding(config)


def training_step(
    block: torch.nn.Module, rows: int, tokens: int, width: int, compiled: bool = False, **inputs
) -> Callable[[], None]:
    """One forward and backward over fixed random input, as a function without arguments."""
    x = torch.randn(rows, tokens, width, generator=torch.Generator().manual_seed(0)).requires_grad_()
    block.train()
    run = torch.compile(block, fullgraph=True, dynamic=False) if compiled else block

    def step() -> None:
        output = run(x, **inputs)
        output = output[0] if isinstance(output, tuple) else output
        output.sum().backward()
        block.zero_grad()
        x.grad = None

    return step


def parameters(block: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in block.parameters())


def compare(rows: int, tokens: int, width: int, repeats: int, compiled: bool = False) -> dict[str, float]:
    hsn, resonance = hsn_block(width), resonance_block(width)
    llama, rotary = llama_block(width)
    positions = rotary(torch.empty(1, tokens, width), torch.arange(tokens)[None])
    size = rows, tokens, width, compiled
    medians = interleaved_medians(
        {
            "hsn": training_step(hsn, *size),
            "resonance": training_step(resonance, *size),
            "llama": training_step(llama, *size, position_embeddings=positions, attention_mask=None),
        },
        repeats,
    )
    return {
        "rows": rows,
        "tokens": tokens,
        "width": width,
        "hsn_ms": 1e3 * medians["hsn"],
        "llama_ms": 1e3 * medians["llama"],
        "resonance_ms": 1e3 * medians["resonance"],
        "time_ratio": medians["hsn"] / medians["llama"],
        "resonance_time_ratio": medians["resonance"] / medians["llama"],
        "parameter_ratio": parameters(hsn) / parameters(llama),
    }


def time_per_token(width: int, lengths: Sequence[int], repeats: int) -> list[dict[str, float]]:
    block = hsn_block(width)
    medians = interleaved_medians({str(n): training_step(block, 1, n, width) for n in lengths}, repeats)
    rows = [{"width": width, "tokens": n, "us_per_token": 1e6 * medians[str(n)] / n} for n in lengths]
    return [row | {"relative": row["us_per_token"] / rows[0]["us_per_token"]} for row in rows]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", help="rows x tokens x width, for example 16x256x128")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="tokens, for the time per token")
    parser.add_argument("--length_width", type=int, default=256, help="width of the block in the time per token")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=None, help="of torch; default: its own")
    parser.add_argument("--compile", action="store_true", help="compile all blocks, into a report of its own")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args(argv)

    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    keep_freed_memory()
    start = time.perf_counter()
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes] if args.shapes else SHAPES
    comparison = [compare(*shape, args.repeats, args.compile) for shape in shapes]
    print_table(comparison)
    if args.compile:
        seconds, figures = time.perf_counter() - start, {"against_llama": comparison, "compiled": True}
        report = write_report("block_speed_compiled", figures, seed=0, seconds=seconds, folder=args.results)
        return print_footer(report, seconds)
    print()
    growth = time_per_token(args.length_width, args.lengths, args.repeats)
    print_table(growth)
    seconds = time.perf_counter() - start
    figures = {"against_llama": comparison, "time_per_token": growth}
    print_footer(write_report("block_speed", figures, seed=0, seconds=seconds, folder=args.results), seconds)


def sentence(result: dict) -> str:
    f = result["figures"]
    rows = [f"{r['time_ratio']:.2f} ({r['tokens']:,} tokens, width {r['width']})" for r in f["against_llama"]]
    if all("resonance_time_ratio" in r for r in f["against_llama"]):
        of_resonance = ", ".join(f"{r['resonance_time_ratio']:.2f}" for r in f["against_llama"])
        rows[-1] += f"; of a Resonance block {of_resonance}"
    if f.get("compiled"):
        return f"time of a compiled training step of one block, compiled Llama's being 1: {', '.join(rows)}; medians"
    growth = [row["relative"] for row in f["time_per_token"]]
    lengths = [row["tokens"] for row in f["time_per_token"]]
    return (
        f"time of a training step of one block, Llama's being 1: {', '.join(rows)}; time per token between "
        f"{lengths[0]:,} and {lengths[-1]:,} tokens: {min(growth):.2f} to {max(growth):.2f} of the first; medians, "
        "PyTorch without compilation"
    )


if __name__ == "__main__":
    main()
