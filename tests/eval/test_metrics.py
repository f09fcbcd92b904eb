"""Metrics that work offline: known values, and what plugs them into a Trainer."""

import math

import evaluate
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import EvalPrediction

from hf_holo import hsn_tiny
from hf_holo.data.tokenizers import character_tokenizer
from hf_holo.errors import HoloError
from hf_holo.eval import metrics
from hf_holo.eval.metrics import LanguageScores, TextScores, accuracy, bleu, f1, of_classes, rouge_l
from hf_holo.modeling.losses import IGNORED

TEXTS = ["the cat sat on the mat today", "a wave binds a key to its value"]


def test_classes():
    predictions, references = [0, 1, 1, 2], [0, 1, 2, 2]
    assert accuracy(predictions=predictions, references=references) == {"accuracy": 0.75}
    scores = f1(predictions=predictions, references=references)
    assert scores["f1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    assert f1(predictions, references, average="micro")["f1"] == pytest.approx(0.75)


def test_texts():
    assert bleu(predictions=TEXTS, references=TEXTS)["bleu"] == pytest.approx(100)
    assert rouge_l(predictions=TEXTS, references=TEXTS) == {"rougeL": 1.0}
    assert bleu(TEXTS[::-1], TEXTS)["bleu"] < 5
    (score,) = rouge_l(["the cat on mat"], ["the cat sat on the mat"]).values()
    assert score == pytest.approx(2 * 1 * (4 / 6) / (1 + 4 / 6))  # all four words, in order, of six


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sacrebleu", None)
    with pytest.raises(HoloError, match=r"sacrebleu is not installed; `pip install 'hf-holo\[eval\]'`"):
        bleu(TEXTS, TEXTS)


def test_labels_of_padding_are_left_out():
    logits = np.eye(3)[[[0, 1, 2], [2, 2, 2]]]  # [2, 3, classes]
    labels = np.array([[0, 1, IGNORED], [0, IGNORED, IGNORED]])
    for predictions in (logits, (logits, np.zeros(7))):  # some models give more than logits
        scores = of_classes(accuracy, f1)(EvalPrediction(predictions, labels))
        assert scores["accuracy"] == pytest.approx(2 / 3) and set(scores) == {"accuracy", "f1"}


@pytest.mark.parametrize("shift", [True, False])
def test_language_scores_are_those_of_every_token(shift):
    logits, labels = torch.randn(4, 6, 11), torch.randint(0, 11, (4, 6))
    labels[1, 3:] = IGNORED
    scores = LanguageScores(characters=30, shift=shift)
    rows = torch.cat([scores.reduce(logits[:3], labels[:3]), scores.reduce(logits[3:], labels[3:])])
    found = scores(EvalPrediction(rows.numpy(), labels.numpy()))
    pairs = [(logits[b, t - shift], labels[b, t]) for b in range(4) for t in range(int(shift), 6)]
    pairs = [(scores, label) for scores, label in pairs if label != IGNORED]
    losses = [F.cross_entropy(scores, label).item() for scores, label in pairs]
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert found["bits_per_character"] == pytest.approx(sum(losses) / math.log(2) / 30, rel=1e-5)
    assert found["accuracy"] == pytest.approx(np.mean([bool(s.argmax() == label) for s, label in pairs]))
    assert "bits_per_character" not in LanguageScores()(EvalPrediction(rows.numpy(), labels.numpy()))


def test_evaluate_loads_a_metric_of_models_on_texts(tmp_path):
    """What it says is what the model's probabilities say, whatever the windows and batches."""
    tokenizer = character_tokenizer(TEXTS)
    torch.manual_seed(0)
    model = hsn_tiny(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1).eval()
    nats, hits = 0.0, 0
    for text in TEXTS:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text).input_ids]])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        nats += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        hits += (logits.argmax(-1) == ids[0, 1:]).sum().item()
    count = sum(map(len, TEXTS))

    module = evaluate.load(str(metrics.MODULES / "language_model"))
    found = module.compute(predictions=TEXTS, model=model, tokenizer=tokenizer)
    assert found["loss"] == pytest.approx(nats / count, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-5)
    assert found["bits_per_character"] == pytest.approx(nats / count / math.log(2), rel=1e-5)
    assert found["accuracy"] == pytest.approx(hits / count)

    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    named = metrics.evaluate_module("language_model").compute(predictions=TEXTS, model=str(tmp_path), batch_size=1)
    assert named == pytest.approx(found, rel=1e-5)
    with pytest.raises(ValueError, match="tokenizer: None"):
        module.compute(predictions=TEXTS, model=model)


def test_evaluate_loads_a_metric_of_tokens():
    module = metrics.evaluate_module("token_accuracy")
    found = module.compute(predictions=[[1, 2, 3], [4]], references=[[1, 5, IGNORED], [4]])
    assert found == {"accuracy": pytest.approx(2 / 3), "tokens": 3}
    with pytest.raises(ValueError, match="as many of each"):
        module.compute(predictions=[[1, 2]], references=[[1]])


def test_a_metric_of_evaluate_fits_into_a_trainer():
    logits, labels = np.eye(3)[[[0, 1, 2]]], np.array([[0, 1, 1]])

    def per_token(predictions, references):
        return metrics.evaluate_module("token_accuracy").compute(predictions=[predictions], references=[references])

    assert of_classes(per_token)(EvalPrediction(logits, labels))["accuracy"] == pytest.approx(2 / 3)


def test_an_unknown_module_is_refused():
    with pytest.raises(HoloError, match=r"unknown module 'perplexety'.* known are language_model, token_accuracy"):
        metrics.evaluate_module("perplexety")


def test_text_scores_compare_first_guesses_with_the_labels():
    tokenizer = character_tokenizer(TEXTS)
    scores = TextScores(tokenizer, (bleu, metrics.rouge_l))
    ids = [tokenizer(text).input_ids for text in TEXTS]
    labels = torch.full((2, 40), IGNORED)
    logits = torch.zeros(2, 40, len(tokenizer))
    for row, text in enumerate(ids):
        places = torch.arange(3, 3 + len(text))  # after a prompt that is not scored
        labels[row, places] = torch.tensor(text)
        logits[row, places - 1, torch.tensor(text)] = 1.0
    guesses = scores.reduce(logits, labels)
    perfect = scores(EvalPrediction(guesses.numpy(), labels.numpy()))
    assert perfect == {"bleu": pytest.approx(100), "rougeL": 1.0}
    wrong = scores(EvalPrediction(scores.reduce(logits.roll(1, 2), labels).numpy(), labels.numpy()))
    assert wrong["rougeL"] < 0.5
