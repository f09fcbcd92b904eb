"""Metrics that need no download, and what plugs them into `Trainer(compute_metrics=...)`.

[`accuracy`], [`f1`], [`bleu`] and [`rouge_l`] are called as the metrics of the package `evaluate` are, with
`predictions=` and `references=`, and return a mapping as those do: wherever one fits, so does the other
(`of_classes(evaluate.load("accuracy").compute)`).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from transformers import EvalPrediction, PreTrainedTokenizerBase

from ..data.scoring import aligned, only_logits, summed_scores
from ..errors import HoloError, unknown
from ..modeling.losses import IGNORED

if TYPE_CHECKING:
    from evaluate import EvaluationModule

Metric = Callable[..., dict[str, float]]
MODULES = Path(__file__).with_name("modules")  # for `evaluate.load`


def evaluate_module(name: str) -> "EvaluationModule":
    """A metric of this package as a module of the package `evaluate`, for all that works with those:

        evaluate_module("language_model").compute(model="runs/quickstart", predictions=["A text.", "Another one."])

    Args:
        name: "language_model" (loss, perplexity, bits per character and accuracy of a model on texts) or
            "token_accuracy". `evaluate.load(str(MODULES / name))` is the same.

    Raises:
        HoloError: there is no such module.
    """
    import evaluate  # late: it takes seconds

    known = [path.name for path in MODULES.iterdir() if (path / f"{path.name}.py").is_file()]
    if name not in known:
        raise unknown("module", name, known)
    return evaluate.load(str(MODULES / name))


def accuracy(predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
    """Share of the predictions that equal their references."""
    return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


def f1(predictions: Sequence[int], references: Sequence[int], average: str = "macro") -> dict[str, float]:
    """F1 by scikit-learn: the mean over the classes, or whatever `average` asks for there."""
    f1_score = _needed("sklearn.metrics").f1_score
    return {"f1": float(f1_score(references, predictions, average=average))}


def bleu(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """BLEU of a corpus by sacrebleu, 0 to 100, with one reference for each text."""
    return {"bleu": _needed("sacrebleu").corpus_bleu(list(predictions), [list(references)]).score}


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """ROUGE-L by rouge-score, 0 to 1: the F-measure of the longest common subsequence, in the mean over the texts."""
    scorer = _needed("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    scores = [scorer.score(r, p)["rougeL"].fmeasure for p, r in zip(predictions, references, strict=True)]
    return {"rougeL": float(np.mean(scores))}


def _needed(module: str) -> ModuleType:
    """A module of an optional dependency."""
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as error:
        raise HoloError(f"metrics: {error.name} is not installed; `pip install 'hf-holo[eval]'` brings it") from error


# In a Trainer -------------------------------------------------------------------------------------------------------


def of_classes(*metrics: Metric) -> Callable[[EvalPrediction], dict[str, float]]:
    """A `compute_metrics` for classifiers of texts or of tokens; labels of -100 are left out.

    Args:
        metrics: of class numbers, such as [`accuracy`] and [`f1`].
    """

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits, labels = only_logits(prediction.predictions), prediction.label_ids
        known = labels != IGNORED
        pairs = {"predictions": logits.argmax(-1)[known], "references": labels[known]}
        return {name: value for metric in metrics for name, value in metric(**pairs).items()}

    return compute_metrics


@dataclass(frozen=True)
class LanguageScores:
    """Perplexity, accuracy and bits per character of a language model, over all tokens that have a label:

        scores = LanguageScores()
        Trainer(..., compute_metrics=scores, preprocess_logits_for_metrics=scores.reduce)

    `reduce` leaves three numbers of every text, so that no logits are gathered. `eval_loss` becomes the mean over all
    tokens, each counted once; Trainer's own is a mean of the means of batches, which depends on the batch size.

    Args:
        characters: number of characters that the scored tokens stand for; None: no bits per character.
        shift: whether a label belongs to the logits of the position before, as for causal models.
    """

    characters: int | None = None
    shift: bool = True

    def reduce(self, logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
        """[`summed_scores`]."""
        return summed_scores(logits, labels, self.shift)

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """The metrics of a whole evaluation, from the rows of `reduce`."""
        return self.of_sums(np.asarray(prediction.predictions, np.float64).sum(0))

    def of_sums(self, sums: Iterable[float]) -> dict[str, float]:
        """The metrics, from nats, tokens and right first guesses over all texts."""
        nats, tokens, hits = map(float, sums)
        per_character = {"bits_per_character": nats / self.characters / math.log(2)} if self.characters else {}
        loss = nats / tokens
        return {"loss": loss, "perplexity": math.exp(min(loss, 700)), "accuracy": hits / tokens, **per_character}


class ClassScores:
    """Loss, accuracy and F1 of a classifier of pictures, sounds or whole texts, to be used as [`LanguageScores`] is."""

    def reduce(self, logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
        """The scores of the classes `[B, classes]`, without what else a model gives."""
        return only_logits(logits).float()

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        return self.of(np.asarray(prediction.predictions), np.asarray(prediction.label_ids))

    @staticmethod
    def of(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """The metrics of scores `[N, classes]` of examples with these classes `[N]`."""
        logits = scores.astype(np.float64)
        losses = F.cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels), reduction="none")
        confusion = confusion_matrix(logits.argmax(-1), labels, logits.shape[-1])
        accuracy = float(confusion.trace() / confusion.sum())
        return {"loss": losses.mean().item(), "accuracy": accuracy, "f1": macro_f1(confusion)}


def confusion_matrix(predictions: np.ndarray, references: np.ndarray, classes: int) -> np.ndarray:
    """How many examples of each class (row) were taken for each (column): `[classes, classes]`."""
    confusion = np.zeros((classes, classes), dtype=int)
    np.add.at(confusion, (references, predictions), 1)
    return confusion


def macro_f1(confusion: np.ndarray) -> float:
    """The mean of F1 over the classes that occur, in the examples or in the predictions; 0 where none is right."""
    counted = confusion.sum(0) + confusion.sum(1)  # examples and predictions of each class
    occurs = counted > 0
    return float((2 * confusion.diagonal()[occurs] / counted[occurs]).mean())


@dataclass(frozen=True)
class TextScores:
    """Metrics of texts for a language model, to be used as [`LanguageScores`] is.

    The prediction is the model's first guess at every token with a label, given the true tokens before it. So it
    compares checkpoints of one run; what a model writes by itself is worse, and is scored by calling [`bleu`] or
    [`rouge_l`] on generated texts.

    Args:
        tokenizer: turns the tokens into texts.
        metrics: of texts.
        shift: as in [`LanguageScores`].
    """

    tokenizer: PreTrainedTokenizerBase
    metrics: tuple[Metric, ...] = (bleu, rouge_l)
    shift: bool = True

    def reduce(self, logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
        """The first guesses `[B, T]` at the labels; -100 where there is none."""
        guesses, targets = aligned(logits, labels, self.shift)
        guesses = guesses.argmax(-1).masked_fill(targets == IGNORED, IGNORED)
        return F.pad(guesses, (labels.shape[1] - guesses.shape[1], 0), value=IGNORED)

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        labels = np.where(prediction.predictions == IGNORED, IGNORED, prediction.label_ids)
        texts = {"predictions": self._decoded(np.asarray(prediction.predictions)), "references": self._decoded(labels)}
        return {name: value for metric in self.metrics for name, value in metric(**texts).items()}

    def _decoded(self, rows: np.ndarray) -> list[str]:
        return [self.tokenizer.decode(row[row != IGNORED], skip_special_tokens=True) for row in rows]
