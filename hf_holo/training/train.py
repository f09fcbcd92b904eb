"""`hf-holo train`: data, tokenizer, model, Trainer, report; one function each."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import yaml
from accelerate import PartialState
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from ..data.documents import hold_out_documents, read_documents, split_documents
from ..data.instructions import Responses, alpaca_prompt, instruction_splits, read_records
from ..data.masking import Masking, MaskingCollator, filled_sample, masked_splits
from ..data.tokenizers import TOKENIZERS, add_mask, default_kind, make_tokenizer, saved_tokenizer
from ..data.windows import Collator, Splits, document_splits, text_splits
from ..errors import UNREADABLE, HoloError, first_line
from ..eval.conformance.causality import CausalityReport, check_causality
from ..eval.conformance.checks import Violation
from ..files import write_text
from ..generate import generate_text
from ..hub.card import write_card
from ..modeling.checkpoint import within_memory
from ..registry import preset_config
from .arguments import DataArguments, Run, parse
from .callbacks import PROBED_LENGTHS, CausalityCallback
from .optim import MuonAdamW, split_parameters
from .progress import say_what_comes, show_progress
from .report import RunReport, folder_of, loss_line, plot_losses, write_metrics
from .trainer import UNFINISHED, HoloTrainer, complete_checkpoints

TASKS: dict[str | None, Any] = {"causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM}
RUN_FILES = (
    "recipe.yaml",
    "metrics.csv",
    "loss.png",
    "sample.txt",
    "answers.txt",
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
    settle_task(run)
    tokenizer, data = load_data(run, checkpoint)
    model = load_model(run, tokenizer)
    use_cache = model.config.use_cache
    trainer = make_trainer(run, model, tokenizer, data)
    say_what_comes(trainer, run, data, tokenizer)

    # Only now, when all input has proved good and every process has seen the folder, does the old run go.
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        begin_folder(folder, remains, run)
    trainer.accelerator.wait_for_everyone()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    model.config.use_cache = use_cache  # transformers 5 turns it off, and would save it so
    finish(trainer, run, data)
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


def settle_task(run: Run) -> None:
    """Choose the task that the run leaves open, and refuse one that the model's family has no head for.

    Raises:
        HoloError: there is no such head, or the data is of another kind.
    """
    config = load_config(run)
    if run.model.task is None:
        causal = run.model_overrides.get("causal", getattr(config, "causal", None))
        run.model.task = "masked" if causal is False else "causal"
    known = [task for task, auto_class in TASKS.items() if type(config) in auto_class._model_mapping]
    if run.model.task not in known:
        raise HoloError(
            f"task: {config.model_type!r} has no model for the task {run.model.task!r}, only for "
            f"{', '.join(map(repr, known)) or 'others'}"
        )
    if run.model.task == "masked" and run.data.data_format == "alpaca":
        raise HoloError("task: 'masked' hides tokens of plain text; instructions are learned with --task causal")


def load_data(run: Run, checkpoint: Path | None) -> tuple[PreTrainedTokenizerBase, Splits]:
    """Read, split and encode the data, with the tokenizer of the checkpoint if there is one, else a new one."""
    data, masked, apart = run.data, run.model.task == "masked", run.data.documents == "apart"
    if data.data_format == "alpaca":
        if data.eval_windows:
            raise HoloError(f"eval_windows: {data.eval_windows} has no meaning for instructions; all are scored")
        records = read_records(data.train_file, data.dataset_name, data.dataset_config_name)
        tokenizer = load_tokenizer(run, checkpoint, [alpaca_prompt(r) + r["output"] for r in records])
        splits = instruction_splits(records, tokenizer, data.block_size, data.validation_fraction)
        return tokenizer, replace(splits, documents=len(records))
    documents = read_documents(data.train_file, data.dataset_name, data.dataset_config_name, data.text_column)
    parts = (hold_out_documents if apart else split_documents)(documents, data.validation_fraction)
    tokenizer = load_tokenizer(run, checkpoint, parts[0])
    if masked:
        splits = masked_splits(*parts, tokenizer, data.block_size, data.stride, apart, data.mlm_probability)
    else:
        splits = (document_splits if apart else text_splits)(*parts, tokenizer, data.block_size, data.stride)
    return tokenizer, replace(splits.scored_on(data.eval_windows), documents=len(documents))


def load_tokenizer(run: Run, checkpoint: Path | None, texts: list[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of the checkpoint or of the model that the run starts from, or else the one that the arguments ask
    for, made from `texts`; for the task "masked", it has a mask token.

    Raises:
        HoloError: there is none, or it is damaged.
    """
    data, source, masked = run.data, run.model.model_name_or_path, run.model.task == "masked"
    if checkpoint:
        tokenizer = saved_tokenizer(checkpoint, "resume_from_checkpoint")
    elif source:
        tokenizer = saved_tokenizer(source, "model_name_or_path")
    elif data.tokenizer is None or data.tokenizer in TOKENIZERS:
        kind = data.tokenizer or default_kind(load_config(run).model_type)
        PartialState().print(f"tokenizer: {kind}, made from the training text (--tokenizer names another)")
        return make_tokenizer(kind, texts, data.vocab_size, masked)
    else:
        argument = f"tokenizer: none of {', '.join(TOKENIZERS)}"
        tokenizer = saved_tokenizer(data.tokenizer, argument, local_files_only=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return add_mask(tokenizer) if masked else tokenizer


def load_model(run: Run, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The checkpoint's model, or a new one made from the preset, with the config values changed that the run names.

    Raises:
        HoloError: a config value is unknown or does not suit the task, the vocabulary is too small, or there are more
            weights than this machine has memory for.
    """
    preset, source, overrides = run.model.preset, run.model.model_name_or_path, run.model_overrides
    config, auto_class = load_config(run), TASKS[run.model.task]
    for name in overrides:
        if name.startswith("_") or not hasattr(config, name):
            raise HoloError(f"model: the config of {source or preset} has no value {name!r}")
    try:
        if source:
            model = auto_class.from_pretrained(source, **overrides)
        else:
            tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
            config = preset_config(str(preset), **{"vocab_size": len(tokenizer), **tokens, **overrides})
            with within_memory(True):
                model = auto_class.from_config(config)
    except UNREADABLE as error:
        values = ", ".join(f"{name}={value}" for name, value in overrides.items())
        where = f"model_name_or_path: cannot load {source!r}" if source else f"preset: cannot make {preset!r}"
        raise HoloError(f"{where}{values and f' with {values}'}: {first_line(error)}") from None
    if len(tokenizer) > model.config.vocab_size:
        raise HoloError(
            f"vocab_size: the tokenizer has {len(tokenizer)} tokens, the model only {model.config.vocab_size}; "
            "use the tokenizer that belongs to the model, or a larger vocab_size"
        )
    return model


def make_trainer(run: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Splits) -> HoloTrainer:
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
    causal, pad = run.model.task == "causal", tokenizer.pad_token_id or 0
    if causal:
        collator = Collator(pad)
    else:
        collator = MaskingCollator(Masking(tokenizer, run.data.mlm_probability), pad, args.seed)
    trainer = HoloTrainer(
        model,
        args,
        data_collator=collator,
        train_dataset=data.train,
        eval_dataset=data.validation,
        processing_class=tokenizer,
        optimizers=(optimizer, None),
        callbacks=[RunReport(), *([CausalityCallback()] if causal and args.causality_check else [])],
        characters=data.characters,
        ema_decay=args.ema_decay,
        shift=causal,
    )
    show_progress(trainer)
    return trainer


def finish(trainer: HoloTrainer, run: Run, data: Splits) -> None:
    """Score the final weights; the first of several processes then leaves them and all that belongs to them."""
    trainer.adopt_average()
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        write_results(trainer, run, data, metrics)
    trainer.accelerator.wait_for_everyone()


def write_results(trainer: HoloTrainer, run: Run, data: Splits, metrics: dict[str, float]) -> None:
    """Save the model next to its tokenizer, write the samples, and say how to load it.

    Args:
        metrics: of the final weights.
    """
    folder = folder_of(run.training)
    save_final(trainer.model, trainer.processing_class, folder)
    write_metrics(trainer.state.log_history, folder / "metrics.csv")
    plot_losses(trainer.state.log_history, folder / "loss.png")
    write_card(folder, judge_causality(trainer.model, run))

    set_seed(run.training.seed)
    if isinstance(data.validation, Responses):
        write_answers(trainer, run.data, data.validation, folder / "answers.txt")
        before = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
        print("\n" + loss_line(before, data.tokens, "held-out response loss before training"))
        print(loss_line(metrics, data.tokens, "held-out response loss after training"))
    else:
        sample = write_sample(trainer, run, data, folder / "sample.txt")
        print(f"\nA sample ({folder / 'sample.txt'}):\n{sample[:400]}\n")
        print(loss_line(metrics, data.tokens, "validation loss"))
    auto_class = TASKS[run.model.task].__name__
    print(f"\nThe model is saved in {folder}. To load it:\n")
    print("    import hf_holo")
    print(f"    from transformers import {auto_class}")
    print(f'    model = {auto_class}.from_pretrained("{folder}")')


def judge_causality(model: PreTrainedModel, run: Run) -> CausalityReport | None:
    """What the probes say of the final weights; None where they do not apply, were turned off, or cannot judge."""
    if run.model.task != "causal" or not run.training.causality_check:
        return None
    try:
        return check_causality(model, PROBED_LENGTHS)
    except Violation as violation:
        print(f"The causality of the final weights cannot be judged: {violation}")
        return None


def write_sample(trainer: HoloTrainer, run: Run, data: Splits, path: Path) -> str:
    """Let the model continue the prompt or fill it; without one, the start of the validation text."""
    model, tokenizer, prompt = trainer.model, trainer.processing_class, run.data.sample_prompt
    if run.model.task == "causal":
        sample = generate_text(model, tokenizer, data.prompt if prompt is None else prompt, run.data.sample_tokens)
    elif prompt is None:
        sample = filled_sample(model, tokenizer, **data.validation[0])
    else:
        prompt = prompt if tokenizer.mask_token in prompt else prompt + tokenizer.mask_token
        sample = filled_sample(model, tokenizer, tokenizer(prompt, return_tensors="pt").input_ids[0])
    write_text(path, sample)
    return sample


def write_answers(trainer: HoloTrainer, data: DataArguments, held_out: Responses, path: Path) -> None:
    """Let the model answer the first held-out instructions, next to the answers in the data."""
    parts = []
    for record in held_out.records[: data.num_answers]:
        prompt = alpaca_prompt(record)
        text = generate_text(trainer.model, trainer.processing_class, prompt, data.sample_tokens)
        parts.append(f"{text}\n\n--- answer in the data:\n{record['output']}\n")
    write_text(path, f"\n{'=' * 80}\n".join(parts))


def save_final(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save both directly in `folder`: into a temporary folder first, then file by file under the final names."""
    temporary = folder / UNFINISHED
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    for file in sorted(temporary.iterdir(), key=lambda file: file.name == "config.json"):
        os.replace(file, folder / file.name)  # the config last: without it the folder is not a model
    temporary.rmdir()
