"""Which package of the standard library does a file belong to? Whole files, read by a bidirectional Resonance.

    python examples/classify_python_files.py

A quarter of the files of every package is held out. The accuracy of the model is compared with those of always naming
the largest package and of a logistic regression on TF-IDF weights of words, which takes under a second and is hard to
beat: the words of a file give its package away. With `--checkpoint runs/python-code` the model starts from one
that has learned to fill masked tokens (on the text of all files, those held out here among them; it has not seen a
label).
"""

import argparse
import time
from collections import Counter
from collections.abc import Sequence

import numpy as np
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_holo import ResonanceConfig
from hf_holo.data.documents import stdlib_sources
from hf_holo.data.tokenizers import make_tokenizer

FEWEST = 12  # files of a package that is worth a class
ACCUMULATED = 4  # files a step; one at a time goes through the model, so that none has to be padded or cut


def load_files(packages: Sequence[str] | None) -> tuple[list[str], np.ndarray, list[str]]:
    """Texts, the class of each, and the names of the classes: the packages named, or all that have enough files."""
    files = [(name.split("/")[0], text) for name, text in stdlib_sources().items() if "/" in name]
    counts = Counter(package for package, _ in files)
    classes = sorted(packages or (package for package, count in counts.items() if count >= FEWEST))
    chosen = [(text, classes.index(package)) for package, text in files if package in classes]
    return [text for text, _ in chosen], np.array([label for _, label in chosen]), classes


def baselines(train: list[str], train_labels: np.ndarray, test: list[str], test_labels: np.ndarray) -> dict[str, float]:
    """Accuracy of the majority class and of TF-IDF with logistic regression."""
    words = TfidfVectorizer(token_pattern=r"\w+", sublinear_tf=True, min_df=2)
    models = {
        "always the largest package": DummyClassifier(),
        "TF-IDF, logistic regression": make_pipeline(words, LogisticRegression(C=100.0, max_iter=1000)),
    }
    return {name: model.fit(train, train_labels).score(test, test_labels) for name, model in models.items()}


def load_model(
    args: argparse.Namespace, texts: list[str], classes: list[str]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A new model with a tokenizer made from the texts, or the checkpoint with a new head."""
    names = {"id2label": dict(enumerate(classes)), "label2id": {name: index for index, name in enumerate(classes)}}
    if args.checkpoint:
        model = AutoModelForSequenceClassification.from_pretrained(args.checkpoint, **names)
        return model, AutoTokenizer.from_pretrained(args.checkpoint)
    tokenizer = make_tokenizer("bpe", texts, args.vocab_size)
    config = ResonanceConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.width,
        num_hidden_layers=args.depth,
        causal=False,
        pad_token_id=tokenizer.pad_token_id,
        **names,
    )
    return AutoModelForSequenceClassification.from_config(config), tokenizer


def train(args: argparse.Namespace, model: PreTrainedModel, train_set: list[dict], test_set: list[dict]) -> Trainer:
    steps = max(1, args.epochs * len(train_set) // ACCUMULATED)
    arguments = TrainingArguments(
        output_dir=args.output_dir,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=ACCUMULATED,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 10,
        weight_decay=0.1,
        logging_steps=max(1, steps // 10),
        save_strategy="no",
        report_to="none",
        seed=args.seed,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model, arguments, train_dataset=train_set, eval_dataset=test_set, compute_metrics=accuracy)
    trainer.train()
    return trainer


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Print the accuracies and return them by name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", nargs="+", help=f"default: all of at least {FEWEST} files")
    parser.add_argument("--checkpoint", help="folder of a bidirectional model to start from, with its tokenizer")
    parser.add_argument("--output_dir", default="runs/classify-python-files", help="folder of the final model")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    start = time.perf_counter()
    set_seed(args.seed)
    texts, labels, classes = load_files(args.packages)
    split = train_test_split(texts, labels, test_size=0.25, stratify=labels, random_state=args.seed)
    train_texts, test_texts, train_labels, test_labels = split
    model, tokenizer = load_model(args, train_texts, classes)
    sets = [
        [{"input_ids": tokenizer(text).input_ids, "labels": int(label)} for text, label in zip(*part, strict=True)]
        for part in ((train_texts, train_labels), (test_texts, test_labels))
    ]
    longest = max(len(example["input_ids"]) for part in sets for example in part)
    print(f"{len(texts)} files of {len(classes)} packages, {len(test_texts)} held out; the longest: {longest:,} tokens")
    trainer = train(args, model, *sets)
    trainer.save_model()
    tokenizer.save_pretrained(args.output_dir)

    found = baselines(train_texts, train_labels, test_texts, test_labels)
    found[f"Resonance, {model.num_parameters():,} parameters"] = trainer.evaluate()["eval_accuracy"]
    for name, value in found.items():
        print(f"{value:6.1%}  {name}")
    print(f"{time.perf_counter() - start:.0f} seconds in all; the model is saved in {args.output_dir}")
    return found


if __name__ == "__main__":
    main()
