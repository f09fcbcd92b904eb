"""Is a movie review positive? Whole reviews, up to several thousand tokens, beside a BERT that sees their first part.

    python examples/classify_movie_reviews.py train.parquet test.parquet

The tables have columns `text` and `label`. Three models of about the same size learn from scratch with the same
tokenizer, steps and optimizer: HoloSpectralNet and Resonance read all of a review in both directions at a cost that
grows with its length; BERT's grows with the square of it, so its reviews are cut at `--bert_length` tokens, as usual.
Accuracies go to `--output_dir` as reviews.json.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from datasets import Dataset, load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DataCollatorWithPadding,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_holo import HsnConfig, ResonanceConfig
from hf_holo.eval.metrics import accuracy, of_classes
from hf_holo.training.tokenizers import bpe_tokenizer

WIDTH, LAYERS, HEADS = 128, 4, 4


def config_of(name: str, tokenizer: PreTrainedTokenizerBase, length: int) -> PretrainedConfig:
    """A small bidirectional classifier with two labels."""
    shared = {"vocab_size": len(tokenizer), "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_labels": 2}
    shared["pad_token_id"] = tokenizer.pad_token_id
    if name == "hsn":
        return HsnConfig(**shared, causal=False, channel_mix="gated")
    if name == "resonance":
        return ResonanceConfig(**shared, causal=False)
    return BertConfig(**shared, num_attention_heads=HEADS, intermediate_size=4 * WIDTH, max_position_embeddings=length)


def encode(reviews: Dataset, tokenizer: PreTrainedTokenizerBase, length: int) -> Dataset:
    """Token ids, at most `length` of each review."""
    return reviews.map(
        lambda batch: tokenizer(batch["text"], truncation=True, max_length=length),
        batched=True,
        remove_columns=[name for name in reviews.column_names if name != "label"],
    )


def classify(name: str, length: int, splits: dict[str, Dataset], tokenizer, args: argparse.Namespace) -> dict:
    """Train one model, and say how often it is right on the test reviews."""
    set_seed(args.seed)
    model = AutoModelForSequenceClassification.from_config(config_of(name, tokenizer, length))
    data = {split: encode(reviews, tokenizer, length) for split, reviews in splits.items()}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.output_dir / name),
            max_steps=args.max_steps,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            learning_rate=1e-3,
            warmup_steps=args.max_steps // 10,
            lr_scheduler_type="cosine",
            weight_decay=0.1,
            logging_steps=max(1, args.max_steps // 20),
            save_strategy="no",
            report_to=[],
            seed=args.seed,
            use_cpu=args.cpu,
        ),
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,
        compute_metrics=of_classes(accuracy),
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    score = trainer.evaluate()["eval_accuracy"]
    lengths = [len(ids) for ids in data["test"]["input_ids"]]
    return {
        "model": name,
        "parameters": model.num_parameters(),
        "longest_review": max(lengths),
        "mean_review": round(float(np.mean(lengths)), 1),
        "accuracy": round(score, 4),
        "training_seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", help="parquet file with the columns text and label")
    parser.add_argument("test", help="likewise")
    parser.add_argument("--models", nargs="+", default=["hsn", "resonance", "bert"])
    parser.add_argument("--max_steps", type=int, default=600)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--length", type=int, default=4096, help="most tokens of a review for hsn and resonance")
    parser.add_argument("--bert_length", type=int, default=512, help="most tokens of a review for BERT")
    parser.add_argument("--reviews", type=int, help="take so many of each file; default: all")
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    parser.add_argument("--output_dir", type=Path, default=Path("reviews"))
    args = parser.parse_args()

    splits = dict(load_dataset("parquet", data_files={"train": args.train, "test": args.test}))
    splits = {split: reviews.shuffle(seed=args.seed) for split, reviews in splits.items()}
    if args.reviews:
        splits = {split: reviews.select(range(min(args.reviews, len(reviews)))) for split, reviews in splits.items()}
    tokenizer = bpe_tokenizer(splits["train"]["text"], args.vocab_size)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in args.models:
        length = args.bert_length if name == "bert" else args.length
        rows.append(classify(name, length, splits, tokenizer, args))
        print(json.dumps(rows[-1]))
        (args.output_dir / "reviews.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    print(f"written to {args.output_dir / 'reviews.json'}")


if __name__ == "__main__":
    main()
