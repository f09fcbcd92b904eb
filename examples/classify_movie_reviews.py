"""Is a movie review positive? Whole reviews, up to several thousand tokens, against a BERT that sees their first part.

    python examples/classify_movie_reviews.py train.parquet test.parquet

The tables have columns `text` and `label`. Three models of about the same size learn from scratch, with the same
tokenizer, the same reviews in the same order, and AdamW. All of them judge by the mean over the tokens that they see.
HoloSpectralNet and Resonance read all of a review in both directions, at a cost that grows with its length; that of
ModernBERT grows with the square of it, so its reviews are cut at `--bert_length` tokens, as usual. Each is trained at
every one of the `--learning_rates`; the test reviews judge the one that is right most often on a tenth of the training
reviews, which is held out. Logistic regression on TF-IDF weights of words needs seconds and is hard to beat: words
alone say a lot. Everything goes to `--output_dir` as reviews.json.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, load_dataset
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    ModernBertConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import ModelOutput

from hf_holo import HsnConfig, ResonanceConfig
from hf_holo.data.tokenizers import bpe_tokenizer
from hf_holo.eval.metrics import accuracy, of_classes
from hf_holo.files import write_text

MODELS = ("hsn", "resonance", "modernbert")
WORDS = "TF-IDF"
DROPOUT = 0.1
HEAD_SIZE = 32  # of attention
Splits = dict[str, Dataset]  # train, validation and test


def read(files: dict[str, str], reviews: int | None, seed: int) -> Splits:
    """The reviews of both files in random order, at most `reviews` of each; a tenth of the first is for validation."""
    splits = {split: data.shuffle(seed=seed) for split, data in load_dataset("parquet", data_files=files).items()}
    if reviews:
        splits = {split: data.select(range(min(reviews, len(data)))) for split, data in splits.items()}
    train = splits["train"].train_test_split(0.1, seed=seed)
    return {"train": train["train"], "validation": train["test"], "test": splits["test"]}


def encode(reviews: Dataset, tokenizer: PreTrainedTokenizerBase, length: int) -> Dataset:
    """Token ids, at most `length` of each review, and labels."""
    return reviews.map(
        lambda batch: tokenizer(batch["text"], truncation=True, max_length=length),
        batched=True,
        remove_columns=[name for name in reviews.column_names if name != "label"],
    )


def config_of(name: str, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> PretrainedConfig:
    """A small bidirectional classifier with two labels."""
    shared = {
        "vocab_size": len(tokenizer),
        "hidden_size": args.width,
        "num_hidden_layers": args.depth,
        "num_labels": 2,
        "pad_token_id": tokenizer.pad_token_id,
        "classifier_dropout": DROPOUT,
    }
    if name == "hsn":
        return HsnConfig(**shared, causal=False, channel_mix="gated", hidden_dropout_prob=DROPOUT)
    if name == "resonance":
        return ResonanceConfig(**shared, causal=False, hidden_dropout_prob=DROPOUT)
    return ModernBertConfig(
        **shared,
        num_attention_heads=args.width // HEAD_SIZE,
        intermediate_size=5 * args.width // 2,  # as many parameters as the others
        max_position_embeddings=args.bert_length,
        global_attn_every_n_layers=1,
        classifier_pooling="mean",
        embedding_dropout=DROPOUT,
        mlp_dropout=DROPOUT,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")),
    )


def mean_loss(outputs: ModelOutput, labels: torch.Tensor, num_items_in_batch: int | None = None) -> torch.Tensor:
    """Over all reviews of a step, for every model alike: of those that take the number, not all divide by it."""
    return F.cross_entropy(outputs.logits, labels, reduction="sum") / (num_items_in_batch or len(labels))


def train(
    name: str, learning_rate: float, data: Splits, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace
) -> Trainer:
    """Train one model at one learning rate. Reviews go through it one at a time, so that none has to be padded."""
    set_seed(args.seed)
    steps = max(1, round(args.epochs * len(data["train"]) / args.batch_size))
    trainer = Trainer(
        model=AutoModelForSequenceClassification.from_config(config_of(name, tokenizer, args)),
        args=TrainingArguments(
            output_dir=str(args.output_dir / name),
            max_steps=steps,
            per_device_train_batch_size=1,
            per_device_eval_batch_size=1,
            gradient_accumulation_steps=args.batch_size,
            learning_rate=learning_rate,
            warmup_steps=steps // 10,
            lr_scheduler_type="cosine",
            weight_decay=0.1,
            logging_steps=max(1, steps // 10),
            save_strategy="no",
            report_to="none",
            seed=args.seed,
            use_cpu=args.cpu,
            dataloader_pin_memory=False,
        ),
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        compute_loss_func=mean_loss,
        compute_metrics=of_classes(accuracy),
    )
    trainer.train()
    return trainer


def compare(name: str, splits: Splits, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> dict:
    """How often a model is right on the test reviews at the learning rate that is best for it."""
    length = args.bert_length if name == "modernbert" else args.length
    data = {split: encode(reviews, tokenizer, length) for split, reviews in splits.items()}
    start = time.perf_counter()
    runs = {rate: train(name, rate, data, tokenizer, args) for rate in args.learning_rates}
    seconds = time.perf_counter() - start
    scores = {rate: run.evaluate()["eval_accuracy"] for rate, run in runs.items()}
    best = max(scores, key=scores.get)
    lengths = [len(ids) for ids in data["test"]["input_ids"]]
    seen = runs[best].state.max_steps * args.batch_size * np.mean([len(ids) for ids in data["train"]["input_ids"]])
    return {
        "model": name,
        "parameters": runs[best].model.num_parameters(),
        **judged(runs[best].evaluate(data["test"])["eval_accuracy"], len(lengths)),
        "learning_rate": best,
        "validation_accuracy": {str(rate): round(score, 4) for rate, score in scores.items()},
        "tokens_in_training": round(seen),  # of one run
        "longest_review": max(lengths),
        "mean_review": round(float(np.mean(lengths)), 1),
        "training_seconds": round(seconds / len(runs), 1),  # likewise
    }


def words_alone(splits: Splits) -> dict:
    """Logistic regression on TF-IDF weights of words and pairs of them."""
    words = TfidfVectorizer(sublinear_tf=True, min_df=2, ngram_range=(1, 2))
    start = time.perf_counter()
    model = make_pipeline(words, LogisticRegression(C=100.0, max_iter=1000))
    model.fit(splits["train"]["text"][:], splits["train"]["label"][:])
    seconds = time.perf_counter() - start
    score = model.score(splits["test"]["text"][:], splits["test"]["label"][:])
    parameters = int(model[-1].coef_.size + 1)
    return {
        "model": WORDS,
        "parameters": parameters,
        **judged(score, len(splits["test"])),
        "training_seconds": round(seconds, 1),
    }


def judged(score: float, reviews: int) -> dict[str, float]:
    """An accuracy, and how far chance alone may have moved it."""
    return {"accuracy": round(score, 4), "standard_error": round(math.sqrt(score * (1 - score) / reviews), 4)}


def main(argv: Sequence[str] | None = None) -> dict:
    """Compare all models, write and return the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", help="parquet file with the columns text and label")
    parser.add_argument("test", help="likewise")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--learning_rates", nargs="+", type=float, default=[1e-3, 2e-3, 4e-3])
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--batch_size", type=int, default=8, help="reviews a step")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--length", type=int, default=4096, help="most tokens of a review for hsn and resonance")
    parser.add_argument("--bert_length", type=int, default=512, help="most tokens of a review for ModernBERT")
    parser.add_argument("--reviews", type=int, help="take this many of each file; default: all")
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/classify-movie-reviews"))
    args = parser.parse_args(argv)

    start = time.perf_counter()
    splits = read({"train": args.train, "test": args.test}, args.reviews, args.seed)
    tokenizer = bpe_tokenizer(splits["train"]["text"], args.vocab_size)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in vars(args).items() if name not in ("train", "test", "output_dir")}
    settings |= {f"{split}_reviews": len(reviews) for split, reviews in splits.items()}
    report = {"settings": settings, "versions": {name: version(name) for name in ("hf-holo", "torch", "transformers")}}
    path = args.output_dir / "reviews.json"
    rows = []
    for name in (WORDS, *args.models):
        rows.append(words_alone(splits) if name == WORDS else compare(name, splits, tokenizer, args))
        print(json.dumps(rows[-1]))
        report |= {"rows": rows, "seconds": round(time.perf_counter() - start, 1)}
        write_text(path, json.dumps(report, indent=2) + "\n")  # what is known is kept
    for row in rows:
        print(f"{row['accuracy']:6.1%} ± {row['standard_error']:.1%}  {row['model']}, {row['parameters']:,} parameters")
    print(f"{report['seconds']:.0f} seconds in all; written to {path}")
    return report


if __name__ == "__main__":
    main()
