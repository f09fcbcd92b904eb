"""A guard for any Trainer: a causal model that sees the future is stopped before it wastes a run."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..distributed import ContextCache
from ..errors import HoloError
from ..eval.conformance.causality import CausalityReport, Leak, probe_batch, probe_causality
from ..eval.conformance.checks import Violation
from ..eval.conformance.exchange import training_settings
from ..eval.conformance.subject import Subject

PROBED_LENGTHS = (17, 65)  # the longer one reaches over the border of the usual chunks; both are fast
NEEDS = ("text", "causal", "token outputs")


class CausalityCallback(TrainerCallback):
    """Stops the training of a causal language model that sees the tokens which it should predict.

    It tests in two ways. Before the first step it probes a copy of the model with its weights moved, so that no flat
    start hides a leak; at every evaluation, a copy as it is. The copies run in float64 and float32 on the CPU. And in
    the batches of the run itself, with all that the collator gives, in the mode, precision and place of the run, it
    exchanges the second half of every text: at the steps 1, 2, 4, 8 and so on, and once in every evaluation. That
    costs a few forward passes each time. A model that passes was tested at these points; no more is proved.

    The model, its gradients and the random state stay as they are: a run ends with the same weights with and without
    the callback.

    It works in any Trainer, with mixed precision and with PEFT adapters, but not on weights that are quantised or
    spread over several processes. What it cannot judge (bidirectional models, classifiers of whole sequences, inputs
    other than token ids, outputs that are not finite) trains on, with a warning. Batches that `nn.DataParallel` splits
    or several processes share (context parallelism) are not probed.

    Args:
        lengths: lengths of the sequences to try, in tokens. A longer one finds leaks within longer chunks, and takes
            longer.

    Raises:
        HoloError: from the training loop: the model looks ahead, or is not one of transformers.
    """

    def __init__(self, lengths: Sequence[int] = PROBED_LENGTHS) -> None:
        self.lengths = lengths
        self._judges: bool | None = None  # whether it can; None: not known yet
        self._half = False
        self._hook: RemovableHandle | None = None  # on the model whose next batch is probed

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._judges = self.probe(kwargs["model"], move_weights=True)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if (state.global_step + 1).bit_count() == 1:  # a power of two
            self._probe_next_batch(kwargs["model"], args)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_evaluate:
            self._probe_next_batch(kwargs["model"], args)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._judges is None:  # an evaluation without training: from its second batch on
            self._judges = _subject(kwargs["model"]).lacks(NEEDS) is None
            self._probe_next_batch(kwargs["model"], args)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._forget_batch()
        self.probe(kwargs["model"], move_weights=False)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._forget_batch()

    def _probe_next_batch(self, model: nn.Module, args: TrainingArguments) -> None:
        self._forget_batch()
        self._half = args.bf16 or args.fp16 or next(model.parameters()).dtype in (torch.bfloat16, torch.float16)
        if self._judges:
            self._hook = model.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    def _forget_batch(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    @torch.compiler.disable
    def _before_forward(self, model: nn.Module, args: tuple, inputs: dict[str, Any]) -> None:
        """A hook that probes the batch which the model is about to read.

        Raises:
            HoloError: the model looks ahead.
        """
        if self._hook is None or getattr(model, "_is_replica", False):  # compiled code calls hooks that are gone
            return
        if not any(isinstance(value, torch.Tensor) for value in (*args, *inputs.values())):
            return  # no texts: a distillation that reaches the parts of the model through its forward
        self._forget_batch()
        if any(isinstance(value, ContextCache) for value in inputs.values()):  # a part of a batch, for one pass only
            return
        with torch.random.fork_rng(range(torch.cuda.device_count())), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # checkpoints complain that there are no gradients
            point = probe_batch(model, inputs, self._half)
        if point.leak is not None:
            raise _error(_unwrapped(model), point.leak)
        if point.untested is not None:
            warnings.warn(f"CausalityCallback does not judge {point.untested}", stacklevel=2)

    def probe(self, model: nn.Module, move_weights: bool) -> bool:
        """Whether it can judge the model; HoloError if the model looks ahead.

        Args:
            model: any causal language model of transformers, bare or as Trainer or PEFT wraps it.
            move_weights: probe it with its weights moved away from where they are.
        """
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            subject = _subject(model, move_weights)
            report = self._report(subject)
        if report is not None and not report.passed:
            raise _error(subject, max(report.leaks, key=lambda leak: leak.ahead))
        return report is not None

    def _report(self, subject: Subject) -> CausalityReport | None:
        """What the probes say; None, after a warning, if they cannot say anything."""
        reason = subject.lacks(NEEDS)
        if reason is None:
            try:
                return probe_causality(subject, self.lengths, training_settings(subject))
            except Violation as violation:
                reason = str(violation)
        warnings.warn(f"CausalityCallback does not judge {subject}: {reason}", stacklevel=2)
        return None


def _subject(model: nn.Module, move_weights: bool = False) -> Subject:
    return Subject(_unwrapped(model), move_weights=move_weights)


def _error(model: Subject | nn.Module, leak: Leak) -> HoloError:
    name = model if isinstance(model, Subject) else type(model).__name__
    return HoloError(
        f"model: {name} sees the tokens that it should predict: {leak}. Its loss would fall by reading them "
        "and would say nothing about text of its own, where they are not there yet. `hf-holo check PATH` tells "
        "more about a saved model; without this check it trains all the same"
    )


def _unwrapped(model: nn.Module) -> Any:
    """The model of transformers, adapters included, out of what Trainer and PEFT have put around it."""
    bare: Any = extract_model_from_parallel(model, keep_torch_compile=False)
    return bare.get_base_model() if hasattr(bare, "get_base_model") else bare
