"""transformers' Trainer with every family: the best model, early stopping, metrics, streams, packed documents."""

from collections.abc import Iterator

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import (
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    EarlyStoppingCallback,
    Trainer,
    TrainingArguments,
)

from hf_holo.data.tokenizers import character_tokenizer
from hf_holo.data.windows import Collator
from hf_holo.eval.metrics import LanguageScores, TextScores, accuracy, f1, of_classes
from hf_holo.modeling.losses import IGNORED

TEXT = "the wave binds a key "
OTHERS_SLOW = pytest.mark.parametrize(
    "family",
    ["hsn", *(pytest.param(family, marks=pytest.mark.slow) for family in ("holo", "resonance"))],
    indirect=True,
)


@pytest.fixture
def arguments(tmp_path):
    """TrainingArguments of a small run."""
    small = {"max_steps": 6, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 3, "learning_rate": 1e-2}
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "logging_steps": 1}
    return lambda **changes: TrainingArguments(tmp_path / "run", **{**small, **quiet, **changes})


def rows(ids: torch.Tensor) -> Dataset:
    """Texts whose tokens are all predicted, but for the first."""
    labels = ids.clone()
    labels[:, 0] = IGNORED
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.feature("Trainer", "the best model, early stopping")
def test_it_stops_early_and_loads_the_best_model(tiny, family, arguments, repeating_ids, tmp_path):
    """The more a model learns one text by heart, the worse it predicts another: the first evaluation is the best."""
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = Trainer(
        tiny(family),
        arguments(
            max_steps=12,
            load_best_model_at_end=True,
            metric_for_best_model="perplexity",
            greater_is_better=False,
            **every,
        ),
        train_dataset=rows(repeating_ids(4)[:1].repeat(16, 1)),
        eval_dataset=rows(repeating_ids(4)[1:]),
        compute_metrics=LanguageScores(),
        preprocess_logits_for_metrics=LanguageScores().reduce,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )
    trainer.train()
    scores = [entry["eval_perplexity"] for entry in trainer.state.log_history if "eval_perplexity" in entry]
    best = scores.index(min(scores))
    assert len(scores) == best + 3 < 12
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best + 1}")
    assert trainer.evaluate()["eval_perplexity"] == pytest.approx(min(scores), rel=1e-5)
    saved = AutoModelForCausalLM.from_pretrained(trainer.state.best_model_checkpoint).state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in trainer.model.state_dict().items())


@pytest.mark.feature("Trainer", "metrics")
def test_metrics_of_language_models(tiny, family, arguments, repeating_ids):
    tokenizer = character_tokenizer([TEXT])
    ids = torch.tensor(tokenizer([TEXT] * 5).input_ids)
    shared = {"model": tiny(family, vocab_size=len(tokenizer)), "args": arguments(), "eval_dataset": rows(ids)}
    found = {}
    for scores in (LanguageScores(characters=5 * (len(TEXT) - 1)), TextScores(tokenizer)):
        trainer = Trainer(**shared, compute_metrics=scores, preprocess_logits_for_metrics=scores.reduce)
        found |= trainer.evaluate()
    assert {"eval_perplexity", "eval_bits_per_character", "eval_accuracy", "eval_bleu", "eval_rougeL"} <= found.keys()
    assert found["eval_perplexity"] == pytest.approx(2 ** found["eval_bits_per_character"], rel=1e-5)


@pytest.mark.feature("Trainer", "metrics of classifiers")
@pytest.mark.parametrize("head", ["AutoModelForSequenceClassification", "AutoModelForTokenClassification"])
def test_metrics_of_classifiers(tiny, family, head, arguments, repeating_ids):
    ids = repeating_ids()
    labels = ids[:, 0] % 3 if "Sequence" in head else ids % 3
    data = Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})
    metrics = of_classes(accuracy, f1)
    trainer = Trainer(
        tiny(family, head), arguments(max_steps=20), train_dataset=data, eval_dataset=data, compute_metrics=metrics
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"]
    assert after["eval_accuracy"] > before["eval_accuracy"] and after["eval_f1"] > before["eval_f1"]


@OTHERS_SLOW
@pytest.mark.feature("Trainer", "streaming datasets")
def test_a_stream_is_read_as_it_is_needed(tiny, family, arguments, repeating_ids):
    """It gives the losses of the same rows in a table, and no more of it is read than a batch ahead."""
    ids, taken = repeating_ids(48), []

    def stream() -> Iterator[dict[str, list[int]]]:
        for number, row in enumerate(rows(ids)):
            taken.append(number)
            yield row

    streamed = Trainer(tiny(family), arguments(), train_dataset=IterableDataset.from_generator(stream))
    streamed.train()
    assert 24 <= len(taken) <= 28
    in_order = Trainer(tiny(family), arguments(), train_dataset=rows(ids))
    in_order._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(ids)
    in_order.train()
    assert losses(streamed) == pytest.approx(losses(in_order), abs=1e-5)


@OTHERS_SLOW
@pytest.mark.feature("Trainer", "packed documents")
def test_packed_documents_train_as_padded_ones(tiny, family, arguments, repeating_ids):
    """In one row, told apart by positions or by `seq_idx`: no document sees another."""
    texts = [row[:length] for row, length in zip(repeating_ids(8), [3, 24, 9, 17, 5, 12, 24, 7], strict=True)]
    documents = [{"input_ids": t.tolist(), "labels": [IGNORED, *t[1:].tolist()]} for t in texts]
    tensors = [{name: torch.tensor(value) for name, value in document.items()} for document in documents]
    found = []
    for data, collator in (
        (tensors, Collator(pad_token_id=0)),
        (documents, DataCollatorWithFlattening()),
        (documents, DataCollatorWithFlattening(return_position_ids=False, return_seq_idx=True)),
    ):
        trainer = Trainer(tiny(family), arguments(max_steps=4), train_dataset=data, data_collator=collator)
        trainer.train()
        found.append(losses(trainer))
    assert found[1] == pytest.approx(found[0], abs=2e-4) and found[2] == pytest.approx(found[0], abs=2e-4)


@pytest.mark.feature("Trainer", "label smoothing")
def test_smoothed_labels_are_shifted(tiny, family, arguments, repeating_ids):
    """Smoothing that all but vanishes gives the plain loss, of a user's own subclass too."""
    model = tiny(family)
    model.__class__ = type(f"Own{type(model).__name__}", (type(model),), {})
    type(model)(model.config)
    trainer = Trainer(model, arguments(label_smoothing_factor=1e-6), eval_dataset=rows(repeating_ids(3)))
    expected = Trainer(model, arguments(), eval_dataset=rows(repeating_ids(3))).evaluate()["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-3)


HEADS = {
    "one label": ("AutoModelForSequenceClassification", {"num_labels": 3}, lambda ids: ids[:, 0] % 3),
    "tokens": ("AutoModelForTokenClassification", {"num_labels": 3}, lambda ids: ids % 3),
    "several labels": (
        "AutoModelForSequenceClassification",
        {"num_labels": 3, "problem_type": "multi_label_classification"},
        lambda ids: (ids[:, :3] % 2).float(),
    ),
    "regression": ("AutoModelForSequenceClassification", {"num_labels": 1}, lambda ids: ids[:, 0].float() / 10),
}


@OTHERS_SLOW
@pytest.mark.feature("Trainer", "gradient accumulation")
@pytest.mark.parametrize(
    "head", [pytest.param(head, marks=[pytest.mark.slow] * (head == "several labels")) for head in HEADS]
)
def test_accumulated_gradients_are_those_of_one_batch(tiny, family, arguments, repeating_ids, head):
    auto, options, label = HEADS[head]
    ids = repeating_ids(8)
    data = Dataset.from_dict({"input_ids": ids.tolist(), "labels": label(ids).tolist()})
    norms = []
    for steps in (1, 4):
        small = {"max_steps": 1, "learning_rate": 0.0, "max_grad_norm": 1e9}
        pieces = {"per_device_train_batch_size": 8 // steps, "gradient_accumulation_steps": steps}
        trainer = Trainer(tiny(family, auto, **options), arguments(**small, **pieces), train_dataset=data)
        trainer.train()
        norms.append(next(entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry))
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
