"""A module of the package `evaluate`: the share of tokens that a model gets right."""

import datasets
import evaluate
import numpy as np

from hf_holo.modeling.losses import IGNORED

DESCRIPTION = "The share of labels that the predictions equal, over all sequences; labels of -100 are left out."
INPUTS = """
Args:
    predictions: token ids of each sequence; for a causal model, those predicted for the places of the references.
    references: labels of each sequence, of the same lengths.
Returns:
    accuracy, and tokens: how many it is of.
"""


class TokenAccuracy(evaluate.Metric):
    """See `DESCRIPTION` and `INPUTS`."""

    def _info(self) -> evaluate.MetricInfo:
        ids = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": ids, "references": ids}),
        )

    def _compute(self, predictions: list[list[int]], references: list[list[int]]) -> dict[str, float]:
        lengths = [(len(p), len(r)) for p, r in zip(predictions, references, strict=True)]
        if any(p != r for p, r in lengths):
            raise ValueError(f"predictions: {lengths} tokens and labels; as many of each in every sequence")
        guesses, labels = np.concatenate(predictions), np.concatenate(references)
        known = labels != IGNORED
        return {"accuracy": float((guesses == labels)[known].mean()), "tokens": int(known.sum())}
