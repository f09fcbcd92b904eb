"""Forward and backward of one HSN block against one Llama block of the same width, MLP and (nearly) parameters.

    python benchmarks/block_speed.py

Both run eagerly in one process and take turns; the figures are medians, and freed memory is kept for reuse. Llama's
block is that of transformers, with causal scaled_dot_product_attention. The last table is the HSN block alone: its time
per token must not grow.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from common.report import RESULTS, interleaved_medians, keep_freed_memory, print_footer, print_table, write_report
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from hf_holo import HoloSpectralBlock, HsnConfig

SHAPES = ((16, 256, 128), (16, 256, 256), (16, 256, 512), (1, 4096, 256), (1, 4096, 512))  # rows, tokens, width
LENGTHS = (1024, 2048, 4096, 8192, 16384)
VOCAB_SIZE = 65  # no part of a block


def hsn_config(width: int, **options) -> HsnConfig:
    return HsnConfig(vocab_size=VOCAB_SIZE, hidden_size=width, num_hidden_layers=1, channel_mix="gated", **options)


def hsn_block(width: int, **options) -> torch.nn.Module:
    return HoloSpectralBlock(hsn_config(width, **options), 0)


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


def training_step(block: torch.nn.Module, rows: int, tokens: int, width: int, **inputs) -> Callable[[], None]:
    """One forward and backward over fixed random input, as a function without arguments."""
    x = torch.randn(rows, tokens, width, generator=torch.Generator().manual_seed(0)).requires_grad_()
    block.train()

    def step() -> None:
        output = block(x, **inputs)
        output = output[0] if isinstance(output, tuple) else output
        output.sum().backward()
        block.zero_grad()
        x.grad = None

    return step


def parameters(block: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in block.parameters())


def compare(rows: int, tokens: int, width: int, repeats: int) -> dict[str, float]:
    hsn = hsn_block(width)
    llama, rotary = llama_block(width)
    positions = rotary(torch.empty(1, tokens, width), torch.arange(tokens)[None])
    medians = interleaved_medians(
        {
            "hsn": training_step(hsn, rows, tokens, width),
            "llama": training_step(llama, rows, tokens, width, position_embeddings=positions, attention_mask=None),
        },
        repeats,
    )
    return {
        "rows": rows,
        "tokens": tokens,
        "width": width,
        "hsn_ms": 1e3 * medians["hsn"],
        "llama_ms": 1e3 * medians["llama"],
        "time_ratio": medians["hsn"] / medians["llama"],
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
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    keep_freed_memory()
    start = time.perf_counter()
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes] if args.shapes else SHAPES
    comparison = [compare(*shape, args.repeats) for shape in shapes]
    print_table(comparison)
    print()
    growth = time_per_token(args.length_width, args.lengths, args.repeats)
    print_table(growth)
    seconds = time.perf_counter() - start
    figures = {"against_llama": comparison, "time_per_token": growth}
    print_footer(write_report("block_speed", figures, seed=0, seconds=seconds, folder=args.results), seconds)


def sentence(result: dict) -> str:
    f = result["figures"]
    rows = [f"{r['time_ratio']:.2f} ({r['tokens']:,} tokens, width {r['width']})" for r in f["against_llama"]]
    growth = [row["relative"] for row in f["time_per_token"]]
    lengths = [row["tokens"] for row in f["time_per_token"]]
    return (
        f"time of a training step of one block, Llama's being 1: {', '.join(rows)}; time per token between "
        f"{lengths[0]:,} and {lengths[-1]:,} tokens: {min(growth):.2f} to {max(growth):.2f} of the first; medians, "
        "PyTorch without compilation"
    )


if __name__ == "__main__":
    main()
