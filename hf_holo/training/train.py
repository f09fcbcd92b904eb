"""`hf-holo train`: data, tokenizer, model, Trainer, report; one function each."""

import os
import shutil
import tempfile
from pathlib import Path

import yaml
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from ..errors import HoloError, first_line
from ..files import write_text
from ..generation import generate_text
from ..registry import preset_config
from .arguments import DataArguments, Run, parse
from .callbacks import CausalityCallback
from .data import (
    Collator,
    Responses,
    Splits,
    alpaca_prompt,
    instruction_splits,
    read_documents,
    read_records,
    split_documents,
    text_splits,
)
from .optim import MuonAdamW
from .report import RunReport, loss_line, plot_losses, write_metrics
from .tokenizers import KINDS, make_tokenizer
from .trainer import HoloTrainer, complete_checkpoints

RUN_FILES = ("recipe.yaml", "metrics.csv", "loss.png", "sample.txt", "answers.txt", "config.json", "model.safetensors")


def main(argv: list[str]) -> None:
    """Run `hf-holo train` with these arguments.

    Raises:
        HoloError: bad input; the message is one line that says what to do.
    """
    run = parse(argv)
    try:
        train(run)
    except KeyboardInterrupt:
        print(
            f"\nInterrupted. Go on with: hf-holo train --output_dir {run.training.output_dir} --resume_from_checkpoint"
        )
        raise SystemExit(130) from None


def train(run: Run) -> HoloTrainer:
    """Train as `run` says, write everything into its output folder, and return the trainer with the final model."""
    folder = Path(run.training.output_dir)
    checkpoint = find_checkpoint(folder, run.training.resume_from_checkpoint)
    remains = [] if run.training.resume_from_checkpoint else remains_of_a_run(folder)
    if remains and not run.training.overwrite:
        raise HoloError(
            f"output_dir: {str(folder)!r} already holds a run; add --resume_from_checkpoint to go on with it, "
            "--overwrite to delete it, or name another --output_dir"
        )
    set_seed(run.training.seed)
    tokenizer, data = load_data(run, checkpoint)
    model = load_model(run, tokenizer)
    use_cache = model.config.use_cache
    trainer = make_trainer(run, model, tokenizer, data)
    print(
        f"{model.config.model_type}: {model.num_parameters():,} parameters, {len(tokenizer):,} tokens in the vocabulary"
    )

    # Only now, when all input has proved good, does the old run go.
    for path in remains:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "recipe.yaml", yaml.safe_dump(run.recipe, sort_keys=False))
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    model.config.use_cache = use_cache  # transformers 5 turns it off, and would save it so
    finish(trainer, run, data)
    return trainer


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
        print(f"There is no complete checkpoint in {folder}: starting from the beginning.")
    return checkpoints[-1] if checkpoints else None


def remains_of_a_run(folder: Path) -> list[Path]:
    """The files and checkpoints of an earlier run in `folder`."""
    if folder.is_file():
        raise HoloError(f"output_dir: {str(folder)!r} is a file; name a folder")
    return [folder / name for name in RUN_FILES if (folder / name).exists()] + list(folder.glob("checkpoint-*"))


def load_data(run: Run, checkpoint: Path | None) -> tuple[PreTrainedTokenizerBase, Splits]:
    """Read, split and encode the data, with the tokenizer of the checkpoint if there is one, else a new one."""
    data = run.data
    saved = checkpoint or run.model.model_name_or_path
    if data.data_format == "alpaca":
        records = read_records(data.train_file, data.dataset_name, data.dataset_config_name)
        tokenizer = load_tokenizer(data, saved, [alpaca_prompt(r) + r["output"] for r in records])
        return tokenizer, instruction_splits(records, tokenizer, data.block_size, data.validation_fraction)
    documents = read_documents(data.train_file, data.dataset_name, data.dataset_config_name, data.text_column)
    train_texts, validation_texts = split_documents(documents, data.validation_fraction)
    tokenizer = load_tokenizer(data, saved, train_texts)
    return tokenizer, text_splits(train_texts, validation_texts, tokenizer, data.block_size, data.stride)


def load_tokenizer(data: DataArguments, saved: str | Path | None, texts: list[str]) -> PreTrainedTokenizerBase:
    """The tokenizer in the folder `saved`, or else the one that the arguments ask for, made from `texts`."""
    if saved is None and (data.tokenizer is None or data.tokenizer in KINDS):
        return make_tokenizer(data.tokenizer or "characters", texts, data.vocab_size)
    folder = str(saved or data.tokenizer)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=saved is None)
    except (OSError, ValueError):
        if saved:
            raise HoloError(f"model_name_or_path: {folder!r} holds no model with a tokenizer") from None
        raise HoloError(
            f"tokenizer: {folder!r} is none of {', '.join(KINDS)}, nor the folder of a saved tokenizer"
        ) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(run: Run, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The checkpoint's model, or a new one made from the preset, with the config values changed that the run names.

    Raises:
        HoloError: no model is named, there is none, a config value is unknown, or the vocabulary is too small.
    """
    preset, source, overrides = run.model.preset, run.model.model_name_or_path, run.model_overrides
    if not preset and not source:
        raise HoloError("preset: name a --preset for a new model, or a checkpoint with --model_name_or_path")
    try:
        config = AutoConfig.from_pretrained(source) if source else preset_config(preset)
        for name in overrides:
            if not hasattr(config, name):
                raise HoloError(f"model: the config of {source or preset} has no value {name!r}")
        if source:
            model = AutoModelForCausalLM.from_pretrained(source, **overrides)
        else:
            tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
            config = preset_config(preset, **{"vocab_size": len(tokenizer), **tokens, **overrides})
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        where = f"model_name_or_path: cannot load {source!r}: " if source else ""
        raise HoloError(where + first_line(error)) from None
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
    optimizer = None
    if args.optimizer == "muon":
        betas = (args.adam_beta1, args.adam_beta2)
        optimizer = MuonAdamW.for_model(
            model, args.learning_rate, args.muon_lr_ratio, args.weight_decay, betas, args.adam_epsilon
        )
    return HoloTrainer(
        model,
        args,
        data_collator=Collator(tokenizer.pad_token_id or 0),
        train_dataset=data.train,
        eval_dataset=data.validation,
        processing_class=tokenizer,
        optimizers=(optimizer, None),
        callbacks=[RunReport(), *([CausalityCallback()] if args.causality_check else [])],
        characters=data.characters,
        ema_decay=args.ema_decay,
    )


def finish(trainer: HoloTrainer, run: Run, data: Splits) -> None:
    """Score the final weights, save them beside their tokenizer, write the samples, and say how to load the model."""
    folder = Path(run.training.output_dir)
    trainer.adopt_average()
    metrics = trainer.evaluate()
    save_final(trainer.model, trainer.processing_class, folder)
    write_metrics(trainer.state.log_history, folder / "metrics.csv")
    plot_losses(trainer.state.log_history, folder / "loss.png")

    set_seed(run.training.seed)
    if isinstance(data.validation, Responses):
        write_answers(trainer, run.data, data.validation, folder / "answers.txt")
        before = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
        print("\n" + loss_line(before, data.tokens, "held-out response loss before training"))
        print(loss_line(metrics, data.tokens, "held-out response loss after training"))
    else:
        prompt = data.prompt if run.data.sample_prompt is None else run.data.sample_prompt
        sample = generate_text(trainer.model, trainer.processing_class, prompt, run.data.sample_tokens)
        write_text(folder / "sample.txt", sample)
        print(f"\nA sample ({folder / 'sample.txt'}):\n{sample[:400]}\n")
        print(loss_line(metrics, data.tokens, "validation loss"))
    print(f"\nThe model lies in {folder}. To load it:\n")
    print("    import hf_holo")
    print("    from transformers import AutoModelForCausalLM")
    print(f'    model = AutoModelForCausalLM.from_pretrained("{folder}")')


def write_answers(trainer: HoloTrainer, data: DataArguments, held_out: Responses, path: Path) -> None:
    """Let the model answer the first held-out instructions, beside the answers in the data."""
    parts = []
    for record in held_out.records[: data.num_answers]:
        prompt = alpaca_prompt(record)
        text = generate_text(trainer.model, trainer.processing_class, prompt, data.sample_tokens)
        parts.append(f"{text}\n\n--- answer in the data:\n{record['output']}\n")
    write_text(path, f"\n{'=' * 80}\n".join(parts))


def save_final(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save both directly in `folder`: into a temporary folder first, then file by file under the final names."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        for file in Path(temporary).iterdir():
            os.replace(file, folder / file.name)
