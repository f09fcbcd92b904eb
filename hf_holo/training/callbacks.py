"""A guard for any Trainer: a causal model that sees the future is stopped before it wastes a run."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import HoloError
from ..eval.conformance.causality import CausalityReport, probe_causality
from ..eval.conformance.checks import Violation
from ..eval.conformance.subject import Subject

PROBED_LENGTHS = (17, 65)  # the longer one lies beyond the border of the usual chunks; both are quick


class CausalityCallback(TrainerCallback):
    """Stops the training of a causal language model that sees the tokens which it should predict.

    Before the first step it probes a copy of the model with its weights moved, so that no flat start hides a leak; at
    every evaluation, a copy as it is. The copies run in float64 on the CPU. The model, its gradients and the random
    state stay as they are: a run ends with the same weights with and without the callback.

    It works in any Trainer, with mixed precision and with PEFT adapters, but not on weights that are quantised or
    spread over several processes. What it cannot judge (bidirectional models, classifiers of whole sequences, inputs
    other than token ids, outputs that are not finite) trains on, with a warning.

    Args:
        lengths: lengths of the sequences to try, in tokens. A longer one finds leaks within longer chunks, and takes
            longer.

    Raises:
        HoloError: from the training loop: the model looks ahead, or is none of transformers.
    """

    def __init__(self, lengths: Sequence[int] = PROBED_LENGTHS) -> None:
        self.lengths = lengths

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        self.probe(model, move_weights=True)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        self.probe(model, move_weights=False)

    def probe(self, model: nn.Module, move_weights: bool) -> None:
        """Raise HoloError if the model looks ahead.

        Args:
            model: any causal language model of transformers, bare or as Trainer or PEFT wraps it.
            move_weights: probe it with its weights moved away from where they are.
        """
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            subject = Subject(_unwrapped(model), move_weights=move_weights)
            report = self._report(subject)
        if report is None or report.passed:
            return
        farthest = max(report.leaks, key=lambda leak: leak.ahead)
        raise HoloError(
            f"model={subject} sees the tokens that it should predict: {farthest}. Its loss would fall by reading them "
            "and would say nothing about text of its own, where they are not there yet. `hf-holo check PATH` tells "
            "more about a saved model; without this check it trains all the same"
        )

    def _report(self, subject: Subject) -> CausalityReport | None:
        """What the probes say; None, after a warning, if they cannot say anything."""
        reason = subject.lacks(("text", "causal", "token outputs"))
        if reason is None:
            try:
                return probe_causality(subject, self.lengths)
            except Violation as violation:
                reason = str(violation)
        warnings.warn(f"CausalityCallback does not judge {subject}: {reason}", stacklevel=2)
        return None


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model of transformers, adapters included, out of what Trainer and PEFT have put around it."""
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    return model.get_base_model() if hasattr(model, "get_base_model") else model
