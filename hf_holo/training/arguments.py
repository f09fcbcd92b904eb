"""The arguments of `hf-holo train`: four dataclasses, filled from a YAML recipe and the command line."""

import os
from argparse import ArgumentParser
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from transformers import TrainingArguments

from ..errors import HoloError
from ..recipes import NOT_FOR_RECIPES, RecipeParser, add_recipe, described, given_words, load_recipe, suggestion

DEFAULT_RECIPE = "quickstart"
DESCRIPTION = (
    "Train a model as a recipe says, and as the options say that are given; by default a small one in minutes."
)
# Naming one of these on the command line puts the recipe's choice among them aside.
ALTERNATIVES = (("preset", "model_name_or_path"), ("train_file", "dataset_name"))


@dataclass
class ModelArguments:
    """Which model to train, and for what."""

    task: (
        Literal["causal", "masked", "image-classification", "audio-classification", "multimodal-classification"] | None
    ) = described(
        "Predict the next token, or masked ones, or tell classes; default: what the model is made for, and of a "
        "language model what the direction of its config asks for."
    )
    preset: str | None = described("Start a new model from this preset; `hf-holo list` shows them.")
    model_name_or_path: str | None = described("Start from this checkpoint instead, with its tokenizer.")
    model: list[str] = field(
        default_factory=list,
        metadata={"help": "Config values to change, as KEY=VALUE; in a recipe a mapping.", "metavar": "KEY=VALUE"},
    )


@dataclass
class DataArguments:
    """What to train it on."""

    train_file: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Text files, folders, or parquet, JSON, JSON-lines or CSV files, in this order. Of pictures and "
            "sounds a folder with one folder for each class, too."
        },
    )
    dataset_name: str | None = described("Dataset on the Hub, `python-help`, or `python-stdlib`.")
    dataset_config_name: str | None = described("Configuration of the Hub dataset.")
    text_column: str = described("Column of a table that holds the text.", "text")
    data_format: Literal["text", "alpaca"] = described("Plain text, or instructions in the Alpaca format.", "text")
    documents: Literal["joined", "apart"] = described(
        "joined: one text, whose end is held out. apart: no window holds parts of two, and whole ones are held out.",
        "joined",
    )
    image_column: str | None = described("Column of a table that holds pictures; default: the only one that does.")
    audio_column: str | None = described("Column of a table that holds sounds; default: the only one that does.")
    label_column: str | None = described(
        "Column of a table that holds the classes; default: the one whose type says so."
    )
    image_data: str | None = described("Pictures of digits, for the task multimodal-classification.")
    audio_data: str | None = described("Recordings of digits, for the task multimodal-classification.")
    question: Literal["digit", "sum"] = described(
        "The digit that picture, sound and sentence are about, or the last digit of the sum of picture and sound.",
        "digit",
    )
    augment: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Changes to pictures (crop, flip, rotate, erase, colour) or sounds (shift, noise, gain, speed, "
            "silence) in training, or none."
        },
    )
    hold_out: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Hold out the rows with this value in this column, such as speaker=theo, in place of a split.",
            "metavar": "COLUMN=VALUE",
        },
    )
    validation_fraction: float = described(
        "Share of the data that is held out; of pictures and sounds, where the data has no split for it.", 0.1
    )
    mlm_probability: float = described("Share of the tokens that the task `masked` hides.", 0.15)
    block_size: int = described("Tokens in a training window.", 256)
    stride: int | None = described("Distance between the starts of training windows; default: block_size.")
    eval_windows: int = described("Held-out windows that are scored, evenly spaced; 0: all.", 0)
    tokenizer: str | None = described(
        "Of a new model: characters (default), bytes, bpe, or the folder of a saved tokenizer."
    )
    vocab_size: int = described("Size of the vocabulary that bpe learns.", 4096)
    sample_prompt: str | None = described(
        "Start of the sample, or text to fill (at its end, or where it says <|mask|>); default: validation text."
    )
    sample_tokens: int = described("Tokens to generate for the sample and for each answer.", 400)
    num_answers: int = described("Held-out instructions to answer in answers.txt.", 8)

    def __post_init__(self) -> None:
        for name in ("train_file", "augment", "hold_out"):
            if isinstance(getattr(self, name), str):  # as in a recipe
                setattr(self, name, [getattr(self, name)])
        if self.augment == ["none"]:
            self.augment = []


@dataclass
class StateArguments:
    """What batches begin with, where a model keeps a state of constant size."""

    state_passing: float = described("Share of batches that begin with the final states of others.", 0.0)
    tbptt: bool = described("Continue the text of every row from window to window.", False)
    state_tuning: bool = described("Train the learned states alone.", False)

    def __post_init__(self) -> None:
        if not 0.0 <= self.state_passing <= 1.0:
            raise ValueError(f"state_passing: {self.state_passing} is not in [0, 1]")
        if self.state_passing and self.tbptt:
            raise ValueError("state_passing and tbptt: a batch begins with one state; choose one of them")


@dataclass
class HoloTrainingArguments(TrainingArguments):
    """How to train it: transformers' TrainingArguments with defaults for training from scratch, and a few more."""

    output_dir: str | None = described("Folder of the run; default: runs/<recipe>.")
    overwrite: bool = described("Delete the run that output_dir holds.", False)
    resume_from_checkpoint: str | None = described(
        "Resume from this checkpoint; without a value, from the last complete one in output_dir.",
        nargs="?",
        const="last",
    )
    optimizer: Literal["muon", "adamw"] = described("MuonAdamW, or the optimizer that --optim names.", "muon")
    muon_lr_ratio: float = described("Learning rate of Muon as a multiple of learning_rate.", 5.0)
    ema_decay: float = described("Decay of the average of the weights that is evaluated and saved; 0: none.", 0.0)
    context_parallel_size: int = described("Processes that share each text.", 1)
    causality_check: bool = described("Stop the run if the model sees tokens that it should predict.", True)
    learning_rate: float = described("Peak learning rate of AdamW.", 4e-3)
    weight_decay: float = described("Weight decay of matrices.", 0.1)
    adam_beta2: float = described("AdamW's second decay rate.", 0.95)
    save_total_limit: int | None = described("Checkpoints to keep.", 2)
    dataloader_pin_memory: bool = described("Pin memory in data loaders.", torch.cuda.is_available())
    report_to: str | None = described("Experiment trackers to report to.", "none")

    @property
    def device(self) -> torch.device:
        """As in transformers, but a CPU has no number: torch loads nothing to `cpu:0`, that of the first process."""
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

    @property
    def shards(self) -> bool:
        """Whether FSDP is asked for, here or by `accelerate launch`."""
        return bool(self.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optimizer == "muon" and self.muon_lr_ratio <= 0:
            raise ValueError(f"muon_lr_ratio: {self.muon_lr_ratio} is not positive")
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"ema_decay: {self.ema_decay} is not in [0, 1)")
        self._check_context_parallel()
        if self.shards and self.device.type == "cpu":
            raise ValueError(
                "fsdp: Accelerate does not shard on a CPU, where every process would keep the whole model without a "
                "word; leave it out, or shard with torch's fully_shard in your own code"
            )
        if self.prediction_loss_only or self.batch_eval_metrics:
            raise ValueError("prediction_loss_only and batch_eval_metrics: the exact validation loss needs both off")
        if self.ema_decay and self.load_best_model_at_end:
            raise ValueError("ema_decay: averages and load_best_model_at_end exclude each other; choose one")

    def _check_context_parallel(self) -> None:
        parallelism: Any = self.parallelism_config
        by_launcher = os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true"
        launched = os.environ.get("PARALLELISM_CONFIG_CP_SIZE", "1") if by_launcher else "1"
        if launched != "1" or (parallelism is not None and parallelism.cp_size > 1):
            raise ValueError(
                "parallelism_config: its context parallelism (cp_size) takes attention apart, which these models do "
                "not have; give --context_parallel_size in its place"
            )
        size, processes = self.context_parallel_size, self.world_size
        if size < 1 or processes % size:
            raise ValueError(
                f"context_parallel_size: {size} does not divide the number of processes, {processes}; start as many "
                "by torchrun or accelerate launch"
            )
        if size == 1:
            return
        refused = {
            "label_smoothing_factor": self.label_smoothing_factor,
            "torch_compile": self.torch_compile,
            "fsdp": self.fsdp,
            "deepspeed": self.deepspeed,
        }
        for name, value in refused.items():
            if value:
                raise ValueError(f"{name}: {value} does not go together with context_parallel_size; leave it out")
        given: Any = self.gradient_checkpointing_kwargs or {}  # a dictionary by now, whatever transformers declares
        self.gradient_checkpointing_kwargs = {"use_reentrant": False, **given}


ARGUMENTS = (ModelArguments, DataArguments, StateArguments, HoloTrainingArguments)


@dataclass
class Run:
    """All arguments of one run.

    Attributes:
        model, data, states, training: the arguments.
        model_overrides: config values to change.
        recipe: the run as a recipe: our own arguments, and those of transformers that are not at their defaults. What
            is not for a recipe to say is left out.
    """

    model: ModelArguments
    data: DataArguments
    states: StateArguments
    training: HoloTrainingArguments
    model_overrides: dict[str, Any]
    recipe: dict[str, Any]


def parse(argv: list[str]) -> Run:
    """Parse the command line on top of the recipe it names (default: the run that it resumes, or `quickstart`).

    Raises:
        HoloError: an unknown or malformed argument or recipe.
    """
    parser = RecipeParser(ARGUMENTS, prog="hf-holo train", description=DESCRIPTION, allow_abbrev=False)
    defaults = vars(parser.parse_known_args([])[0])
    add_recipe(parser, __package__, default=DEFAULT_RECIPE)
    named = given_words(parser, argv)
    recipe = named.get("recipe") or _resumed_recipe(named) or DEFAULT_RECIPE

    values = _without_replaced(load_recipe(recipe, __package__), named, recipe)
    overrides = values.pop("model", {})
    for name in values:
        if name not in defaults:
            raise HoloError(f"recipe: {recipe!r} sets the unknown argument {name!r}{suggestion(name, defaults)}")
    argv = [*_as_words(parser, recipe, values), *argv]
    parser.set_defaults(output_dir=f"runs/{Path(recipe).stem}", **values)

    given = parser.parse_args(argv)
    try:
        model, data, states, training, _ = parser.parse_args_into_dataclasses(argv)
    except ValueError as error:
        raise HoloError(str(error).partition("\n")[0]) from None
    overrides = {**overrides, **_key_values(model.model)}
    return Run(model, data, states, training, overrides, _resolved(vars(given), defaults, overrides))


def _as_words(parser: ArgumentParser, recipe: str, values: dict[str, Any]) -> list[str]:
    """Single values of a recipe as words of a command line, so that they meet the same checks.

    Raises:
        HoloError: there is a list or a mapping where a single value is expected.
    """
    actions = {action.dest: action for action in parser._actions}
    words = []
    for name, value in values.items():
        if isinstance(value, (str, int, float)):
            words.append(f"--{name}={value}")
        elif (isinstance(value, list) and actions[name].nargs != "+") or (
            isinstance(value, dict) and name not in TrainingArguments._VALID_DICT_FIELDS
        ):
            raise HoloError(f"recipe: {recipe!r} sets {name!r} to {value!r}, where a single value is expected")
    return words


def _without_replaced(recipe: dict[str, Any], named: dict[str, Any], name: str) -> dict[str, Any]:
    """The recipe of this name without those choices of a model, a data set or a stride that the command line replaces.

    Config values go with the model that they were meant for; a sentence says so.
    """
    replaced = {argument for group in ALTERNATIVES if named.keys() & set(group) for argument in group}
    own, other = ({key: some[key] for key in ALTERNATIVES[0] if key in some} for some in (recipe, named))
    if own and other and own != other and recipe.get("model"):
        replaced.add("model")
        values = " ".join(f"{key}={value}" for key, value in recipe["model"].items())
        of, instead = (", ".join(map(str, some.values())) for some in (own, other))
        print(f"model: {values} of the recipe {name!r} is for {of}, left out with {instead}; give --model to set it")
    if named.get("block_size", recipe.get("block_size")) != recipe.get("block_size"):
        replaced.add("stride")  # it was meant for the recipe's own windows
    return {argument: value for argument, value in recipe.items() if argument not in replaced}


def _resumed_recipe(named: dict[str, Any]) -> str | None:
    recipe = Path(named.get("output_dir", "")) / "recipe.yaml"
    return str(recipe) if "resume_from_checkpoint" in named and "output_dir" in named and recipe.is_file() else None


def _key_values(pairs: list[str]) -> dict[str, Any]:
    for pair in pairs:
        if "=" not in pair:
            raise HoloError(f"model: {pair!r} is not of the form KEY=VALUE")
    return {key: yaml.safe_load(value) for key, _, value in (pair.partition("=") for pair in pairs)}


def _resolved(given: dict[str, Any], defaults: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    own = {name for kind in ARGUMENTS for name in kind.__annotations__}
    values = {name: given[name] for name in defaults if name in own or given[name] != defaults[name]}
    values = {**values, "model": overrides}
    return {n: value for n, value in values.items() if value not in (None, []) and not n.startswith(NOT_FOR_RECIPES)}
