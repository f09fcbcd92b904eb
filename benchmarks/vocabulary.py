"""Embedding strategies after equal training, and what a step with a vocabulary of 1,000,000 takes.

    python benchmarks/vocabulary.py brown.txt

A byte-level BPE of 32,768 tokens is trained on the first nine tenths of the text. Then one small Resonance model for
each strategy sees the same windows in the same order with the same optimizer. The losses are in nats per token, over
the same held-out tokens; the excess is that over the first strategy, which is dense. The last table is one training
step of 2 × 256 tokens at width 768 with the hash strategy, measured in a process of its own.
"""

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from common.characters import windowed_loss
from common.fitting import make_optimizer
from common.own_process import in_own_process, parsed, peak_gib
from common.report import RESULTS, markdown_table, measured_on, print_footer, print_table, write_report
from tqdm import trange
from transformers import PreTrainedModel

from hf_holo import ResonanceConfig, ResonanceForCausalLM
from hf_holo.data.tokenizers import bpe_tokenizer
from hf_holo.data.windows import encode
from hf_holo.modeling.configuration_vocabulary import STRATEGIES
from hf_holo.modeling.hashing import collisions
from hf_holo.modeling.vocabulary import vocabulary_parameters


def read_tokens(path: Path, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of the first nine tenths of a text and of the rest; the tokenizer knows the first part only."""
    text = path.read_text(encoding="utf-8")
    border = int(0.9 * len(text))
    parts = text[:border], text[border:]
    tokenizer = bpe_tokenizer(parts[:1], vocab_size)
    train, validation = (torch.from_numpy(encode(tokenizer, [part])).long() for part in parts)
    return train, validation


def fit(model: PreTrainedModel, ids: torch.Tensor, args: argparse.Namespace) -> float:
    """Trains on random windows, the same for every model of a seed, by the model's own loss; returns the seconds.

    The learning rate rises over the first tenth of the run and then falls along a cosine to a tenth of its peak.
    """
    optimizer = make_optimizer("muon", model, args.learning_rate)

    def scale(step: int) -> float:
        progress = (step + 0.5) / args.steps
        return min(1.0, progress / 0.1) * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    generator = torch.Generator().manual_seed(args.seed)
    model.train()
    start = time.perf_counter()
    for _ in trange(args.steps, desc=model.config.embedding_strategy, unit="step"):
        starts = torch.randint(len(ids) - args.length, (args.rows,), generator=generator)
        window = ids[starts[:, None] + torch.arange(args.length)]  # [rows, length]
        loss = model(input_ids=window, labels=window).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return time.perf_counter() - start


def compare(strategy: str, train: torch.Tensor, validation: torch.Tensor, args: argparse.Namespace) -> dict:
    torch.manual_seed(args.seed)
    config = ResonanceConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.width,
        num_hidden_layers=args.depth,
        embedding_strategy=strategy,
    )
    model = ResonanceForCausalLM(config)
    seconds = fit(model, train, args)
    stored, dense = vocabulary_parameters(model)
    return {
        "strategy": strategy,
        "parameters": stored,
        "compression": dense / stored,
        "loss": windowed_loss(model, validation[: args.validation_tokens + 1], args.length, rows=4),
        "seconds_per_step": seconds / args.steps,
        "options": config.embedding_options,
    }


def large_step(vocab_size: int, width: int, rows: int, length: int) -> dict:
    """One step of training with the hash strategy: parameters, seconds, and the most memory that the process had."""
    torch.manual_seed(0)
    config = ResonanceConfig(
        vocab_size=vocab_size, hidden_size=width, num_hidden_layers=1, embedding_strategy="hash", use_cache=False
    )
    model = ResonanceForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(vocab_size, (rows, length))
    start = time.perf_counter()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    seconds = time.perf_counter() - start
    peak = peak_gib()
    stored, dense = vocabulary_parameters(model)
    return {
        "vocab_size": vocab_size,
        "width": width,
        "tokens": rows * length,
        "parameters": stored,
        "compression": dense / stored,
        "loss": loss.item(),
        "seconds": seconds,
        "peak_gib": peak,
        "collisions": collisions(model.get_input_embeddings()),
    }


def flat(row: dict) -> dict:
    """What fits into a table."""
    return {name: value for name, value in row.items() if not isinstance(value, dict)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, nargs="?", help="text file; the last tenth validates")
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=STRATEGIES)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--learning_rate", type=float, default=0.004)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--vocab_size", type=int, default=32_768)
    parser.add_argument("--validation_tokens", type=int, default=32_768)
    parser.add_argument("--large_vocab_size", type=int, default=1_000_000)
    parser.add_argument("--large_width", type=int, default=768)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    args = parsed(parser, argv, large_step)
    if args.text is None:
        parser.error("a text file is needed")

    start = time.perf_counter()
    large = in_own_process(__file__, vocab_size=args.large_vocab_size, width=args.large_width, rows=2, length=256)
    print_table([flat(large)])
    train, validation = read_tokens(args.text, args.vocab_size)
    names = ("steps", "learning_rate", "width", "depth", "rows", "length", "vocab_size", "validation_tokens")
    settings = {name: getattr(args, name) for name in names} | {"training_tokens": len(train)}
    runs: list[dict] = []
    for strategy in args.strategies:
        run = compare(strategy, train, validation, args)
        runs.append(run | {"excess": run["loss"] - (runs or [run])[0]["loss"]})
        seconds = time.perf_counter() - start
        figures = {"settings": settings, "runs": runs, "large_step": large}
        path = write_report("vocabulary", figures, seed=args.seed, seconds=seconds, folder=args.results)
    print_table([flat(run) for run in runs])
    print_footer(path, seconds)


def sentence(result: dict) -> str:
    settings, large = result["figures"]["settings"], result["figures"]["large_step"]
    runs = [f"{run['strategy']} {run['loss']:.3f}" for run in result["figures"]["runs"]]
    return (
        f"nats per token with {settings['vocab_size']:,} tokens, {settings['steps']} steps, so hardly trained yet, one "
        f'seed: {", ".join(runs)}; "hash" at {large["vocab_size"]:,}×{large["width"]}: 1/{large["compression"]:.1f} of '
        f"the dense parameters, a training step of {large['tokens']} tokens peaks at {large['peak_gib']:.2f} GiB"
    )


def table(result: dict) -> str:
    """Losses of all strategies after equal training."""
    settings = result["figures"]["settings"]
    head = ("strategy", ">parameters of the vocabulary", ">of the dense ones", ">nats per token", ">above dense")
    rows = []
    for run in result["figures"]["runs"]:
        share = f"1/{run['compression']:.1f}" if run["compression"] > 1 else "all"
        rows.append((run["strategy"], f"{run['parameters']:,}", share, f"{run['loss']:.3f}", f"{run['excess']:+.3f}"))
    return "\n".join(
        [
            markdown_table(head, rows),
            "",
            f"{settings['steps']} steps of {settings['rows']}×{settings['length']}, so hardly trained yet, with "
            f"{settings['vocab_size']:,} tokens of BPE, width {settings['width']}, depth {settings['depth']}, one "
            f"learning rate, one seed, {result['seconds']:,.0f} seconds for all on: {measured_on(result)}.",
        ]
    )


if __name__ == "__main__":
    main()
