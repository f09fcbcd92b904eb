"""`hf-holo train`: the course of a run, from its arguments to the saved model. What differs by task is in the tasks."""

import os
import shutil
from pathlib import Path
from typing import Any, NoReturn

import yaml
from accelerate import PartialState
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, set_seed

from ..distributed.processes import by_main
from ..errors import UNREADABLE, HoloError, first_line
from ..files import write_text
from ..modeling.checkpoint import within_memory
from ..modeling.initial_state import InitialState
from ..registry import preset_config
from .arguments import Run, parse
from .context_trainer import ContextTrainer
from .language import CausalTask, MaskedTask
from .optim import MuonAdamW, split_parameters
from .progress import say_what_comes, show_progress
from .report import RunReport, folder_of, plot_losses, write_metrics
from .senses import AudioTask, ImageTask, MultimodalTask
from .states import passed_states
from .task import Task
from .trainer import UNFINISHED, HoloTrainer, complete_checkpoints

TASKS: dict[str, type[Task]] = {  # where the arguments leave it open, the first that the model can learn
    "causal": CausalTask,
    "masked": MaskedTask,
    "image-classification": ImageTask,
    "audio-classification": AudioTask,
    "multimodal-classification": MultimodalTask,
}
RUN_FILES = (
    "recipe.yaml",
    "metrics.csv",
    "loss.png",
    "sample.txt",
    "answers.txt",
    "confusion.*",
    "predictions.*",
    "senses.*",
    "README.md",
    "config.json",
    "model*.safetensors*",
    "checkpoint-*",
    UNFINISHED,
)


def main(argv: list[str]) -> None:
    """Run `hf-holo train` with these arguments.

    Raises:
        HoloError: bad input; the message is one line that says what to do.
    """
    run = parse(argv)
    try:
        train(run)
    except KeyboardInterrupt:
        again = f"hf-holo train --output_dir {run.training.output_dir} --resume_from_checkpoint"
        PartialState().print(f"\nInterrupted. Continue with: {again}")
        raise SystemExit(130) from None


def train(run: Run) -> HoloTrainer:
    """Train as `run` says, write everything into its output folder, and return the trainer with the final model."""
    folder = folder_of(run.training)
    checkpoint = find_checkpoint(folder, run.training.resume_from_checkpoint)
    remains = [] if run.training.resume_from_checkpoint else remains_of_a_run(folder)
    if remains and not run.training.overwrite:
        refuse_run_folder(folder)
    set_seed(run.training.seed)
    task = make_task(run)
    task.load(checkpoint)
    model = load_model(run, task)
    use_cache = getattr(model.config, "use_cache", None)
    trainer = make_trainer(run, model, task)
    say_what_comes(trainer, task)

    # Only now, when all input has proved good and every process has seen the folder, does the old run go.
    by_main(lambda: begin_folder(folder, remains, run))
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if use_cache is not None:
        model.config.use_cache = use_cache  # transformers 5 turns it off, and would save it so
    finish(trainer, task)
    return trainer


def refuse_run_folder(folder: Path) -> NoReturn:
    """Say what can be done about a folder that holds a run.

    Raises:
        HoloError: always.
    """
    if (folder / "config.json").is_file():  # the last file of the final model
        state, remedy = "a run, which is complete", f"`hf-holo generate {folder}` uses its model; train again with"
    else:
        state, remedy = "a run, which is not complete", "continue it with --resume_from_checkpoint, replace it with"
    raise HoloError(
        f"output_dir: {str(folder)!r} already holds {state}: {remedy} --overwrite, or name another --output_dir"
    )


def begin_folder(folder: Path, remains: list[Path], run: Run) -> None:
    """Delete what remains of an earlier run, and write the recipe of this one."""
    for path in [*remains, *folder.glob("*.tmp[0-9]*")]:  # the latter where a run was killed while it wrote a file
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "recipe.yaml", yaml.safe_dump(run.recipe, sort_keys=False))


def find_checkpoint(folder: Path, resume: str | None) -> Path | None:
    """The checkpoint to resume from: the named one, or for "last" the last complete one in `folder`, if any.

    Raises:
        HoloError: the named checkpoint is missing or incomplete.
    """
    if resume is None:
        return None
    if resume != "last":
        if Path(resume) not in complete_checkpoints(Path(resume).parent):
            raise HoloError(f"resume_from_checkpoint: {resume!r} is not a complete checkpoint")
        return Path(resume)
    checkpoints = complete_checkpoints(folder)
    if not checkpoints:
        PartialState().print(f"No complete checkpoint in {folder}: starting from the beginning.")
    return checkpoints[-1] if checkpoints else None


def remains_of_a_run(folder: Path) -> list[Path]:
    """The files and checkpoints of an earlier run in `folder`.

    Raises:
        HoloError: it is a file.
    """
    if folder.is_file():
        raise HoloError(f"output_dir: {str(folder)!r} is a file; name a folder")
    return [path for pattern in RUN_FILES for path in folder.glob(pattern)]


def load_config(run: Run) -> PretrainedConfig:
    """The config of the preset or the checkpoint that the run names.

    Raises:
        HoloError: none is named, or there is none.
    """
    preset, source = run.model.preset, run.model.model_name_or_path
    if not preset and not source:
        raise HoloError("preset: name a --preset for a new model, or a checkpoint with --model_name_or_path")
    if preset and not source:
        return preset_config(preset)
    try:
        return AutoConfig.from_pretrained(str(source))
    except (OSError, ValueError) as error:
        raise HoloError(f"model_name_or_path: {source!r} is not a model: {first_line(error)}") from None


def make_task(run: Run) -> Task:
    """The task of the run, chosen by the model where it is left open.

    Raises:
        HoloError: the model's family has no head for it.
    """
    config = load_config(run)
    known = [task for task, kind in TASKS.items() if type(config) in kind.auto_class._model_mapping]
    if run.model.task is None:
        causal = run.model_overrides.get("causal", getattr(config, "causal", None))
        wanted = "masked" if causal is False else "causal"
        run.model.task = wanted if wanted in known or not known else known[0]  # type: ignore[assignment]  # of TASKS
    if run.model.task not in known:
        raise HoloError(
            f"task: {config.model_type!r} has no model for the task {run.model.task!r}, only for "
            f"{', '.join(map(repr, known)) or 'others'}"
        )
    return TASKS[run.model.task](run, config)


def load_model(run: Run, task: Task) -> PreTrainedModel:
    """The checkpoint's model, or a new one made from the preset, with the config values changed that the run names.

    Raises:
        HoloError: a config value is unknown or does not suit the task, the model does not fit the data, or there are
            more weights than this machine has memory for.
    """
    preset, source, overrides = run.model.preset, run.model.model_name_or_path, run.model_overrides
    for name in overrides:
        if name.startswith("_") or not hasattr(task.config, name):
            raise HoloError(f"model: the config of {source or preset} has no value {name!r}")
    try:
        if source:
            model = task.auto_class.from_pretrained(source, **task.loading_options(), **overrides)
        else:
            config = preset_config(str(preset), **task.config_values())
            with within_memory(True):
                model = task.auto_class.from_config(config)
    except UNREADABLE as error:
        values = ", ".join(f"{name}={value}" for name, value in overrides.items())
        where = f"model_name_or_path: cannot load {source!r}" if source else f"preset: cannot make {preset!r}"
        raise HoloError(f"{where}{values and f' with {values}'}: {first_line(error)}") from None
    task.check_model(model)
    if run.states.state_tuning:
        freeze_all_but_states(model)
    return model


def freeze_all_but_states(model: PreTrainedModel) -> None:
    """Leave nothing to be trained but the states that texts begin with.

    Raises:
        HoloError: the model learns none.
    """
    learned = [module for module in model.modules() if isinstance(module, InitialState)]
    if not learned:
        raise HoloError("state_tuning: the model learns no states; give hsn or resonance --model learned_state=true")
    model.requires_grad_(False)
    for module in learned:
        module.requires_grad_(True)


def make_trainer(run: Run, model: PreTrainedModel, task: Task) -> HoloTrainer:
    """Put model, data and optimizer together."""
    args = run.training
    args.eval_on_start |= run.data.data_format == "alpaca"  # the loss before training is part of the report
    optimizer, uses_muon = None, args.optimizer == "muon"
    if uses_muon and not split_parameters(model)["hidden"]:
        uses_muon = False
        PartialState().print("The blocks have no dense nn.Linear for Muon: everything is trained with AdamW (--optim).")
    if uses_muon:
        betas = (args.adam_beta1, args.adam_beta2)
        optimizer = MuonAdamW.for_model(
            model, args.learning_rate, args.muon_lr_ratio, args.weight_decay, betas, args.adam_epsilon
        )
    shared = args.context_parallel_size > 1
    trainer = (ContextTrainer if shared else HoloTrainer)(
        model,
        args,
        data_collator=task.collator(),
        train_dataset=task.train,
        eval_dataset=task.validation,
        processing_class=task.processor,
        optimizers=(optimizer, None),
        callbacks=[RunReport(task.loss_unit), *task.callbacks()],
        scores=task.scores(),
        ema_decay=args.ema_decay,
        states=passed_states(run, model),
    )
    show_progress(trainer)
    return trainer


def finish(trainer: HoloTrainer, task: Task) -> None:
    """Score the final weights; the first of several processes then leaves them and all that belongs to them."""
    trainer.adopt_average()
    metrics = trainer.evaluate()
    task.score_more(trainer)
    trainer.gather_weights()
    by_main(lambda: write_results(trainer, task, metrics))


def write_results(trainer: HoloTrainer, task: Task, metrics: dict[str, float]) -> None:
    """Save the model next to its processor, write the results, and say how to load it.

    Args:
        metrics: of the final weights.
    """
    folder = folder_of(trainer.args)
    save_final(trainer.model, trainer.processing_class, folder)
    write_metrics(trainer.state.log_history, folder / "metrics.csv")
    plot_losses(trainer.state.log_history, folder / "loss.png", task.loss_unit)
    task.write_results(trainer, metrics)
    auto_class = task.auto_class.__name__
    print(f"\nThe model is saved in {folder}. To load it:\n")
    print("    import hf_holo")
    print(f"    from transformers import {auto_class}")
    print(f'    model = {auto_class}.from_pretrained("{folder}")')


def save_final(model: PreTrainedModel, processor: Any, folder: Path) -> None:
    """Save both directly in `folder`: into a temporary folder first, then file by file under the final names."""
    temporary = folder / UNFINISHED
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    processor.save_pretrained(temporary)
    for file in sorted(temporary.iterdir(), key=lambda file: file.name == "config.json"):
        os.replace(file, folder / file.name)  # the config last: without it the folder is not a model
    temporary.rmdir()
