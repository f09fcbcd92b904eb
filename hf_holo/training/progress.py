"""What a run says: at the start what it will do, then a bar with the loss, and a line for each evaluation."""

import os
import time
from typing import Any

from accelerate import PartialState
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from .task import Task
from .trainer import HoloTrainer

TIMED_STEPS = 4  # after the first, which also warms up


class RunProgress(ProgressCallback):
    """The bars of transformers, with the loss next to them, in place of a printed dictionary for each log.

    With `disable_tqdm`, a line for each log takes the place of the bars. After the first steps it says how long the
    others will take.
    """

    step_seconds: list[float]
    training = False  # an evaluation after the training is reported by whoever asks for it

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not args.disable_tqdm:
            super().on_train_begin(args, state, control, **kwargs)
        self.training, self.step_seconds = True, []

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.step_began = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)
        self.step_seconds.append(time.perf_counter() - self.step_began)
        left = state.max_steps - state.global_step
        if len(self.step_seconds) == 1 + TIMED_STEPS and left > 0 and state.is_world_process_zero:
            seconds = sum(self.step_seconds[1:]) / TIMED_STEPS
            self._say(f"{seconds:.2g} s a step: about {duration(left * seconds)} to go, without the evaluations")

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if not args.disable_tqdm:
            super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or not state.is_world_process_zero:
            return
        if "eval_loss" in logs and self.training:
            right = f", {logs['eval_accuracy']:.1%} right" if "eval_f1" in logs else ""
            self._say(f"step {state.global_step} of {state.max_steps}: validation loss {logs['eval_loss']:.4f}{right}")
        elif "train_runtime" in logs:
            self._say(f"{state.global_step} steps in {duration(logs['train_runtime'])}")
        elif "loss" in logs and self.training_bar is not None:
            self.training_bar.set_postfix_str(f"loss {float(logs['loss']):.4f}")
        elif "loss" in logs:
            self._say(f"step {state.global_step} of {state.max_steps}: loss {float(logs['loss']):.4f}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.training = False
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)

    def _say(self, line: str) -> None:
        if self.training_bar is None:
            print(line, flush=True)
        else:
            self.training_bar.write(line)


def show_progress(trainer: HoloTrainer) -> None:
    """Put [`RunProgress`] in the place of transformers' own; that of a notebook stays."""
    replaced = [trainer.pop_callback(kind) for kind in (PrinterCallback, ProgressCallback)]
    if any(replaced):
        trainer.add_callback(RunProgress())


def say_what_comes(trainer: HoloTrainer, task: Task) -> None:
    """Print what the run learns from and is scored on, with which model and optimizer, for how long, and where to."""
    say = PartialState().print
    model, args = trainer.model, task.run.training
    for line in task.description():
        say(line)
    say(f"model: {model.config.model_type}, {model.num_parameters():,} parameters, {task.model_knows()}")
    steps = steps_of(trainer, task.unit)
    say(f"training: {steps}, {name_of_optimizer(trainer)}, learning rate {args.learning_rate:g}")
    say(f"output: {args.output_dir}", flush=True)
    busy = busy_line()
    if busy:
        say(busy, flush=True)


def name_of_optimizer(trainer: HoloTrainer) -> str:
    """What trains the weights; Trainer makes its own later."""
    return trainer.args.optim if trainer.optimizer is None else type(trainer.optimizer).__name__


def steps_of(trainer: HoloTrainer, unit: str) -> str:
    """How many optimizer steps of how many windows or other examples, or how many epochs."""
    args: Any = trainer.args
    groups = args.world_size // args.context_parallel_size
    batch = args.train_batch_size * args.gradient_accumulation_steps * groups
    length = f"{args.max_steps:,} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    return f"{length} of {batch} {unit}" if args.max_steps > 0 else f"{length} in steps of {batch} {unit}"


def busy_line() -> str | None:
    """A line where other work fills this machine; None where it does not, or the system does not say."""
    try:
        load, cores = os.getloadavg()[0], os.cpu_count() or 1
    except (AttributeError, OSError):
        return None
    if load <= cores:
        return None
    return f"This machine is busy (load average {load:.1f} on {cores} cores): steps take longer than they need to."


def duration(seconds: float) -> str:
    """Such as "45 s", "3 min", "2.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
