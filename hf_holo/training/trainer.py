"""Trainer with exact validation losses, an average of the weights, and checkpoints that are whole or ignored."""

import json
import shutil
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.optim import Optimizer
from torch.utils.data import Sampler
from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import safe_globals
from transformers.trainer_utils import TrainOutput

from ..errors import HoloError
from ..eval.metrics import LanguageScores
from ..modeling.cache import CACHE_NAME
from ..modeling.checkpoint import check_files, check_finite, weight_files
from .states import PassedStates, StreamSampler

UNFINISHED = "unfinished"  # the folder next to the checkpoints of what is being written or deleted


class WeightAverage(TrainerCallback):
    """Exponential moving average of the trained weights.

    The average is in the optimizer's state, so that every checkpoint carries it and a resumed run continues it
    exactly. It starts from the first update and looks back over at most a tenth of the steps so far, so that the
    initial weights are soon forgotten.

    Args:
        decay: share of the old average that each step keeps, in (0, 1).

    Raises:
        ValueError: `decay` is out of range.
    """

    def __init__(self, decay: float) -> None:
        if not 0.0 < decay < 1.0:
            raise ValueError(f"ema_decay: {decay} is not between 0 and 1")
        self.decay = decay

    @torch.no_grad()
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"]
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        for parameter, own in _updated(optimizer):
            if "average" in own:
                own["average"].lerp_(parameter, 1.0 - decay)
            else:
                own["average"] = parameter.clone()

    @contextmanager
    def applied(self, optimizer: Optimizer) -> Iterator[None]:
        """Put the averages into the model, and the trained weights back at the end."""
        self.swap(optimizer)
        try:
            yield
        finally:
            self.swap(optimizer)

    @torch.no_grad()
    def swap(self, optimizer: Optimizer) -> None:
        """Exchange the trained weights and their averages."""
        for parameter, own in _updated(optimizer):
            if "average" in own:
                trained = parameter.clone()
                parameter.copy_(own["average"])
                own["average"].copy_(trained)


def _updated(optimizer: Optimizer) -> Iterator[tuple[torch.nn.Parameter, dict[str, torch.Tensor]]]:
    """The parameters that the optimizer has updated so far, with their state."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if optimizer.state.get(parameter):
                yield parameter, optimizer.state[parameter]


class Scores(Protocol):
    """What is measured on held-out data."""

    def reduce(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """What is kept of the outputs for a batch."""

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """The metrics, from what was kept of all batches."""


class HoloTrainer(Trainer):
    """Trainer with exact metrics: `eval_loss` is the mean over all validation tokens, each counted once. With
    `ema_decay`, evaluation sees the averaged weights; checkpoints keep both.

    Args:
        scores: what is measured; default: a causal language model.
        ema_decay: decay of the weight average, 0 for none.
        states: that batches begin with; None: all begin empty.
    """

    model: PreTrainedModel  # transformers' own may be None, or another module
    processing_class: Any  # a tokenizer, or what else prepares the inputs

    def __init__(
        self,
        *args: Any,
        scores: Scores | None = None,
        ema_decay: float = 0.0,
        states: PassedStates | None = None,
        **kwargs: Any,
    ) -> None:
        self.saving, self.states = False, states
        self.average = WeightAverage(ema_decay) if ema_decay else None
        scores = LanguageScores() if scores is None else scores
        super().__init__(*args, compute_metrics=scores, preprocess_logits_for_metrics=scores.reduce, **kwargs)
        if self.average:
            self.add_callback(self.average)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in transformers, but a run that was cut off after its last step is only loaded, where Trainer would take
        another step, and early stopping continues to count, where Trainer would start again.

        Raises:
            HoloError: a file of the checkpoint to resume from is damaged, or belongs to another model.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = next(map(str, reversed(complete_checkpoints(str(self.args.output_dir)))), True)
        if isinstance(resume_from_checkpoint, str):
            state = read_checkpoint(Path(resume_from_checkpoint))
            self._restore_counters(state)
            if self._has_ended(state):
                return self._load_ended(resume_from_checkpoint, state)
        self._processor = self.processing_class
        if getattr(self._processor, "tokenizer", self._processor) is None:  # a processor of pictures and sounds, whose
            self.processing_class = None  # tokens transformers would look for; it comes back with the first step
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _inner_training_loop(self, batch_size: int | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """With the batch size that this run asks for, where transformers 4.57 keeps that of the checkpoint: the
        number of processes that share the batch may be another one now."""
        self.processing_class = self._processor
        if not self.args.auto_find_batch_size:
            batch_size = self.args.train_batch_size
        return super()._inner_training_loop(batch_size, *args, **kwargs)

    @property
    def _early_stopping(self) -> list[EarlyStoppingCallback]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, EarlyStoppingCallback)]

    def _restore_counters(self, state: TrainerState) -> None:
        """How often early stopping has seen no progress; how often it may, this run says."""
        for callback in self._early_stopping:
            kept: Any = state.stateful_callbacks  # a dictionary, whatever transformers declares
            saved = kept.get(type(callback).__name__)
            if isinstance(saved, dict):  # there is one of its kind
                vars(callback).update(saved["attributes"])

    def _has_ended(self, state: TrainerState) -> bool:
        if any(c.early_stopping_patience_counter >= c.early_stopping_patience for c in self._early_stopping):
            return True
        if self.args.max_steps > 0:
            return state.global_step >= self.args.max_steps
        return state.global_step >= state.max_steps and state.num_train_epochs >= self.args.num_train_epochs

    def _load_ended(self, checkpoint: str, state: TrainerState) -> TrainOutput:
        """Bring everything to where it was after the last step."""
        self.state = state
        self.create_optimizer_and_scheduler(state.max_steps)
        self._load_from_checkpoint(checkpoint)
        self._load_optimizer_and_scheduler(checkpoint)
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_model()
        return TrainOutput(state.global_step, float("nan"), {})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        with reading(resume_from_checkpoint, "the weights"):
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
            check_finite(self.model, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading(checkpoint, "optimizer.pt or scheduler.pt"):
            super()._load_optimizer_and_scheduler(checkpoint)

        if checkpoint is not None and self.states is not None:
            with reading(checkpoint, "states_*.safetensors"):
                self.states.load(Path(checkpoint), self.args.process_index, self.args.device)

    def _save_rng_state(self, output_dir: str) -> None:
        """What is random, and the states, for every process."""
        super()._save_rng_state(output_dir)
        if self.states is not None:
            self.states.save(Path(output_dir), self.args.process_index)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler | None:
        if self.states is None or not self.states.streams:
            return super()._get_train_sampler(*args, **kwargs)
        windows: Any = self.train_dataset
        sampler = StreamSampler(len(windows), self.args.train_batch_size, self.args.world_size)
        self.states.sampler = sampler
        return sampler

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """As in transformers; in training from the states that batches begin with, if there are any."""
        if self.states is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[arg-type]
        given = {**inputs, CACHE_NAME: self.states.begin(len(inputs["input_ids"]))}
        loss, outputs = super().compute_loss(model, given, True, num_items_in_batch)  # type: ignore[arg-type]
        self.states.end(outputs[CACHE_NAME])
        return (loss, outputs) if return_outputs else loss

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(checkpoint, "the random state, rng_state*.pth,"):
            super()._load_rng_state(checkpoint)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate the averaged weights if there are any, else the trained ones."""
        average, optimizer = self.average, self.optimizer
        with average.applied(optimizer) if average and optimizer else nullcontext():
            return super().evaluate(*args, **kwargs)

    def adopt_average(self) -> None:
        """Make the averages the weights of the model, for good; training cannot continue afterwards."""
        if self.average:
            self.average.swap(self.optimizer)  # type: ignore[arg-type]  # there is one after training
            self.average = None

    def gather_weights(self) -> None:
        """Where processes share out the weights (FSDP2), give the main one a model that has all of them, for good; all
        have to call this. Training cannot continue afterwards, and the other processes keep their shares."""
        if not self.is_fsdp_enabled:
            return
        weights = self.accelerator.get_state_dict(self.model)
        if self.is_world_process_zero():
            sharded = type(self.model)  # fully_shard has put a class of its own before that of the model
            kind: Any = next(cls for cls in sharded.__mro__[1:] if issubclass(cls, PreTrainedModel))
            self.model = kind(self.model.config).to(self.model.dtype)
            self.model.load_state_dict(weights)
            self.model.to(self.args.device).eval()  # type: ignore[arg-type]  # transformers wraps .to() without types

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder, UNFINISHED)) if self.saving else folder

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write the checkpoint into the folder `UNFINISHED` and rename it: under its own name it is whole, or not
        there, whenever the process is killed. What is deleted goes the other way. The code of the model is
        left out: only training is resumed from a checkpoint, and the final model has it."""
        folder, name = Path(self._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        final, unfinished = folder / name, folder / UNFINISHED
        if self.args.should_save:
            shutil.rmtree(unfinished, ignore_errors=True)  # a run that was killed may have left it
        self.accelerator.wait_for_everyone()
        self.saving = True
        bare = self.accelerator.unwrap_model(self.model)
        try:
            with without_code(bare, getattr(bare, "config", None), self.processing_class):
                super()._save_checkpoint(model, trial)
        finally:
            self.saving = False
        if self.state.best_model_checkpoint == str(unfinished / name):
            self.state.best_model_checkpoint = str(final)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.save_to_json(str(unfinished / name / "trainer_state.json"))
            if final.exists():  # of a run that was overtaken
                final.rename(unfinished / "replaced")
            (unfinished / name).rename(final)
            for path in self._superfluous(final):
                path.rename(unfinished / path.name)
            shutil.rmtree(unfinished)
        self.accelerator.wait_for_everyone()

    def _superfluous(self, newest: Path) -> list[Path]:
        """The checkpoints beyond `save_total_limit`, which spares the newest and the best."""
        checkpoints, limit = complete_checkpoints(newest.parent), self.args.save_total_limit
        spared = {newest, Path(self.state.best_model_checkpoint or newest)}
        if not limit or limit < 0:
            return []
        others = [path for path in checkpoints if path not in spared]
        return others[: max(0, len(checkpoints) - max(limit, len(spared)))]


@contextmanager
def without_code(*parts: object) -> Iterator[None]:
    """Save these models, configs and tokenizers without their code in this block, and without the `auto_map` that
    would name it."""
    kinds: Iterator[Any] = map(type, parts)
    classes = {cls: cls._auto_class for cls in kinds if getattr(cls, "_auto_class", None)}
    places = [vars(part) if hasattr(part, "auto_map") else getattr(part, "init_kwargs", {}) for part in parts]
    maps = [(place, place.pop("auto_map")) for place in places if "auto_map" in place]
    try:
        for cls in classes:
            cls._auto_class = None
        yield
    finally:
        for cls, auto_class in classes.items():
            cls._auto_class = auto_class
        for place, auto_map in maps:
            place["auto_map"] = auto_map


@contextmanager
def reading(checkpoint: str | Path | None, what: str) -> Iterator[None]:
    """Make whatever goes wrong in this block a HoloError that says where and with what.

    Args:
        checkpoint: that is read.
        what: part of it.
    """
    try:
        yield
    except HoloError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 240, placeholder=" ...")
        raise HoloError(f"resume_from_checkpoint: {what} of {str(checkpoint)!r} cannot be used: {reason}") from error


def read_checkpoint(folder: Path) -> TrainerState:
    """The state of the run that left a checkpoint; the other files are checked: whether they are whole, and hold
    values and no code. The values stay on the disk.

    Raises:
        HoloError: a file is damaged; the message names it.
    """
    for file in sorted(folder.glob("*.json")):
        with reading(folder, file.name):
            json.loads(file.read_text(encoding="utf-8"))
    for file in weight_files(folder):
        with reading(folder, file.name):
            check_files([file])
    for file in sorted([*folder.glob("*.pt"), *folder.glob("*.pth")]):
        with reading(folder, file.name), safe_globals():
            torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    with reading(folder, "trainer_state.json"):
        state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
        steps = state.global_step, state.max_steps
        if not isinstance(state.log_history, list) or not all(isinstance(step, int) and step > 0 for step in steps):
            raise ValueError(f"no state of a run: {steps[0]} of {steps[1]} steps")
    return state


def complete_checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints of a run that were written to the end, oldest first.

    Trainer writes `trainer_state.json` last: a checkpoint is complete when that file is there and is valid JSON. Others
    come from a plain Trainer, or from a copy that was cut off.
    """
    found = []
    for path in Path(folder).glob("checkpoint-*"):
        try:
            found.append((int(json.loads((path / "trainer_state.json").read_text())["global_step"]), path))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # half-written
    return [path for _, path in sorted(found)]
