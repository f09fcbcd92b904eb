"""Resonance against a BERT of the same size: masked tokens in held-out files of Python's standard library.

    python benchmarks/infilling.py

Both models see the same windows with the same masks in the same order, for the same number of steps, with the same
optimizer and schedule, each with every learning rate of the list; it is shown at its best. Neither has dropout: no
window is seen often enough to be learned by heart. Whole files are held out, and all models are scored on the same
masks, each of which hides one token. A finished run is kept in the result file and not repeated, so that runs can be
made one at a time (`--models bert --learning_rates 0.004`). First of all, while the process is still small, the
pipeline "fill-mask" reads one file of 100,000 tokens in one piece with the preset python-code at its full size.
"""

import argparse
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from common.fitting import OPTIMIZERS, make_optimizer
from common.own_process import peak_gib
from common.report import RESULTS, earlier_rows, markdown_table, measured_on, print_footer, print_table, write_report
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm
from transformers import (
    BertConfig,
    BertForMaskedLM,
    PreTrainedModel,
    get_cosine_with_min_lr_schedule_with_warmup,
    pipeline,
)

from hf_holo import preset_model
from hf_holo.data.documents import hold_out_documents, python_stdlib
from hf_holo.data.masking import Masking, MaskingCollator, masked_splits
from hf_holo.data.tokenizers import make_tokenizer
from hf_holo.data.windows import Collator, Splits
from hf_holo.eval.metrics import summed_scores
from hf_holo.modeling.losses import IGNORED

NAME = "infilling"
PRESET = "python-code"
MODELS = ("resonance", "bert")
MASKED_SHARE = 0.15


def fill_long_file(tokens: int) -> dict[str, float | int]:
    """Seconds to fill one gap in a file of this many tokens, and the most memory that this process has had by then."""
    tokenizer = make_tokenizer("bytes", [], masked=True)
    model = preset_model(PRESET)
    code = "".join(python_stdlib()).encode("ascii", "ignore").decode()[: tokens - 1]
    text = code[: tokens // 2] + tokenizer.mask_token + code[tokens // 2 :]
    start = time.perf_counter()
    pipeline("fill-mask", model=model, tokenizer=tokenizer, top_k=1)(text)
    seconds = time.perf_counter() - start
    return {
        "tokens": len(tokenizer(text).input_ids),
        "parameters": model.num_parameters(),
        "seconds": seconds,
        "peak_gib": peak_gib(),
    }


def build_bert(parameters: int, length: int, **sizes: int) -> BertForMaskedLM:
    """The BERT with positions up to `length` whose intermediate size brings it closest to `parameters`."""

    def build(intermediate_size: int) -> BertForMaskedLM:
        config = BertConfig(
            **sizes,
            num_attention_heads=max(1, sizes["hidden_size"] // 32),
            intermediate_size=intermediate_size,
            max_position_embeddings=length,
            type_vocab_size=1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        return BertForMaskedLM(config)

    smallest, next_one = build(1).num_parameters(), build(2).num_parameters()
    return build(max(1, 1 + round((parameters - smallest) / (next_one - smallest))))


def build(name: str, vocab_size: int, length: int, width: int, depth: int, seed: int) -> PreTrainedModel:
    """A new model of this name.

    Raises:
        ValueError: no BERT comes within 2 % of the parameters of the other model.
    """
    sizes = {"vocab_size": vocab_size, "hidden_size": width, "num_hidden_layers": depth}
    torch.manual_seed(seed)
    resonance = preset_model(PRESET, **sizes)
    if name == "resonance":
        return resonance
    torch.manual_seed(seed)
    bert = build_bert(resonance.num_parameters(), length, **sizes)
    if abs(bert.num_parameters() / resonance.num_parameters() - 1) > 0.02:
        raise ValueError(f"width {width} allows no BERT within 2 % of {resonance.num_parameters()} parameters")
    return bert


def load(files: int | None, vocab_size: int, length: int, windows: int) -> tuple[Splits, MaskingCollator]:
    """Windows of the files to train on, evenly spread masked ones of those held out, and what makes batches of them."""
    train, validation = hold_out_documents(python_stdlib()[:files], 0.1)
    tokenizer = make_tokenizer("bpe", train, vocab_size, masked=True)
    splits = masked_splits(train, validation, tokenizer, length, apart=True, fraction=MASKED_SHARE)
    every = math.ceil(len(splits.validation) / windows)
    splits.validation = Subset(splits.validation, range(0, len(splits.validation), every))
    return splits, MaskingCollator(Masking(tokenizer, MASKED_SHARE), tokenizer.pad_token_id, seed=0)


def batches(data: Splits, collator: Collator, rows: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Batches without end, in an order that depends on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from DataLoader(data.train, rows, shuffle=True, drop_last=True, collate_fn=collator, generator=generator)


def fit(model: PreTrainedModel, data: Splits, collator: Collator, rate: float, args: argparse.Namespace) -> None:
    """Trains `model` in place; the learning rate rises for a tenth of the steps and falls along a cosine to a tenth."""
    optimizer = make_optimizer(args.optimizer, model, rate)
    schedule = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, max(1, args.steps // 10), args.steps, min_lr_rate=0.1
    )
    model.train()
    stream = islice(batches(data, collator, args.rows, args.seed), args.steps)
    progress = tqdm(stream, desc=f"{model.config.model_type}, learning rate {rate}", total=args.steps, unit="step")
    for step, batch in enumerate(progress):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")


@torch.no_grad()
def score(model: PreTrainedModel, validation: Subset, collator: Collator, rows: int) -> dict[str, float]:
    """Loss, perplexity and top-1 accuracy over all hidden tokens of the validation windows, each counted once."""
    model.eval()
    totals = torch.zeros(3, dtype=torch.float64)
    for batch in DataLoader(validation, rows, collate_fn=collator):
        labels = batch.pop("labels")
        totals += summed_scores(model(**batch).logits, labels, shift=False).double().sum(0)
    nats, tokens, hits = totals.tolist()
    return {"loss": nats / tokens, "perplexity": math.exp(nats / tokens), "accuracy": hits / tokens}


def hidden_tokens(validation: Subset) -> list[int]:
    labels = torch.cat([example["labels"] for example in validation])
    return labels[labels != IGNORED].tolist()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--optimizer", choices=tuple(OPTIMIZERS), default="muon")
    parser.add_argument("--learning_rates", nargs="+", type=float, default=(0.001, 0.002, 0.004))
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--vocab_size", type=int, default=2048)
    parser.add_argument("--validation_windows", type=int, default=512, help="held-out windows to score, at most")
    parser.add_argument("--files", type=int, help="take only this many files; default: all")
    parser.add_argument(
        "--long_tokens", type=int, default=100_000, help="tokens of the file that is filled in one piece"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args(argv)

    long_file = fill_long_file(args.long_tokens)
    print_table([long_file])
    data, collator = load(args.files, args.vocab_size, args.length, args.validation_windows)
    hidden = hidden_tokens(data.validation)
    names = ("optimizer", "steps", "length", "width", "depth", "vocab_size", "files", "seed")
    settings = {name: getattr(args, name) for name in names} | {"windows_a_step": args.rows}
    settings |= {"training_windows": len(data.train), "hidden_tokens": len(hidden)}
    settings["commonest_token"] = Counter(hidden).most_common(1)[0][1] / len(hidden)
    rows, seconds = earlier_rows(NAME, settings, args.results)
    for name in args.models:
        for rate in args.learning_rates:
            if any((row["model"], row["learning_rate"]) == (name, rate) for row in rows):
                continue
            start = time.perf_counter()
            model = build(name, args.vocab_size, args.length, args.width, args.depth, args.seed)
            fit(model, data, collator, rate, args)
            row = {"model": name, "learning_rate": rate, "parameters": model.num_parameters()}
            row |= score(model, data.validation, collator, args.rows)
            rows.append(row | {"seconds": round(time.perf_counter() - start, 1)})
            seconds += rows[-1]["seconds"]
            figures = summarise(settings, rows) | {"long_file": long_file}
            write_report(NAME, figures, seed=args.seed, seconds=seconds, folder=args.results)

    print_table(rows)
    figures = summarise(settings, rows)
    print(
        f"always the most common token: {figures['commonest_token']:.1%} of {figures['hidden_tokens']:,} hidden tokens"
    )
    if figures["advantage"] is not None:
        print(f"resonance is right {100 * figures['advantage']:+.1f} points more often than bert")
    print_footer(args.results / f"{NAME}.json", seconds)


def summarise(settings: dict, rows: list[dict]) -> dict:
    """The best accuracy of each model and, once both are known, by how much that of Resonance is higher."""
    best = {name: max((r["accuracy"] for r in rows if r["model"] == name), default=None) for name in MODELS}
    advantage = None if None in best.values() else best["resonance"] - best["bert"]
    return {**settings, "rows": rows, "best": best, "advantage": advantage}


def caveat(figures: dict) -> str:
    """What a reader must know before comparing the two models."""
    begun = figures["best"]["bert"]
    if begun is None or begun > 2 * figures["commonest_token"]:
        return ""
    return f"; {figures['steps']} steps are few: BERT has barely begun to learn"


def sentence(result: dict) -> str:
    f = result["figures"]
    rows = ", ".join(f"{name} {accuracy:.1%}" for name, accuracy in f["best"].items() if accuracy is not None)
    return (
        f"masked tokens of held-out Python files that are filled right, after {f['steps']} steps of "
        f"{f['windows_a_step']}×{f['length']} at equal parameters, each at its best learning rate, one seed: {rows}; "
        f"always the most common token {f['commonest_token']:.1%}{caveat(f)}"
    )


def table(result: dict) -> str:
    """How many masked tokens both models fill right, at each learning rate."""
    f, long_file = result["figures"], result["figures"]["long_file"]
    head = ("model", ">parameters", ">learning rate", ">nats per hidden token", ">filled right")
    rows = [
        (r["model"], f"{r['parameters']:,}", r["learning_rate"], f"{r['loss']:.3f}", f"{r['accuracy']:.1%}")
        for r in f["rows"]
    ]
    return "\n".join(
        [
            markdown_table(head, rows),
            "",
            f"{f['steps']} steps of {f['windows_a_step']}×{f['length']} with {OPTIMIZERS[f['optimizer']]}, "
            f"{f['vocab_size']:,} tokens of BPE, {f['hidden_tokens']:,} gaps in held-out files; always the most common "
            f"token: {f['commonest_token']:.1%}. One seed{caveat(f)}. The pipeline fills a gap in a file of "
            f"{long_file['tokens']:,} tokens in {long_file['seconds']:.0f} seconds and {long_file['peak_gib']:.1f} "
            f"GiB. {result['seconds']:,.0f} seconds for all runs on: {measured_on(result)}.",
        ]
    )


if __name__ == "__main__":
    main()
