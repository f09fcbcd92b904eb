"""The arguments of `hf-holo distill`: a recipe with stages, and the command line on top of it."""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from ...errors import HoloError
from ...recipes import (
    NOT_FOR_RECIPES,
    RecipeParser,
    add_recipe,
    described,
    given_words,
    load_recipe,
    recipe_names,
    suggestion,
    words_of_today,
)
from ...training.arguments import HoloTrainingArguments

DESCRIPTION = "A student learns from its teacher, in the stages of a recipe."
PREFIX = "distill-"  # of the recipes in the package
OLD_NAMES = {"train_files": "train_file", "evaluation_windows": "eval_windows"}
NOT_SAVED = (*NOT_FOR_RECIPES, "start_stage")


@dataclass
class ModelArguments:
    """Who learns from whom."""

    teacher: str | None = described("Folder or Hub name of the teacher, with its tokenizer.")
    student: str | None = described("Folder of the student, as `hf-holo convert` or an earlier distillation wrote it.")
    trust_remote_code: bool = described("Run the code that teacher and student bring with their weights.", False)
    lora_rank: int = described("Train LoRA adapters of this rank, and nothing else; 0: none.", 0)
    lora_modules: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "Names of the modules that get an adapter."}
    )
    start_stage: str | None = described("Begin with this stage, from what the one before it has saved.")


@dataclass
class TextArguments:
    """What the student learns on, and what both are scored on."""

    train_file: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Texts, mixed in equal parts, shorter ones repeat: files, folders, `python-help` or Hub data sets."
        },
    )
    validation_fraction: list[float] = field(
        default_factory=lambda: [0.1],
        metadata={"help": "Share at the end of a text that is held out; one for all, or one each."},
    )
    text_column: str = described("Column of a table that holds the text.", "text")
    block_size: int = described("Tokens in a window.", 256)
    stride: int | None = described("Distance between the starts of training windows; default: block_size.")
    eval_windows: int = described("Held-out windows of each text that are scored; 0: all.", 0)
    sample_tokens: int = described("Tokens of the sample in the report; 0: none.", 100)

    def __post_init__(self) -> None:
        self.train_file, self.validation_fraction = _listed(self.train_file), _listed(self.validation_fraction)
        self.eval_windows = self.eval_windows or 0  # a recipe of an earlier version says null for all
        if len(self.validation_fraction) == 1:
            self.validation_fraction *= max(len(self.train_file), 1)
        if not self.train_file:
            raise ValueError("train_file: name at least one text")
        if len(self.validation_fraction) != len(self.train_file):
            raise ValueError(
                f"validation_fraction: {len(self.validation_fraction)} shares for {len(self.train_file)} texts; "
                "give one, or one for each"
            )


@dataclass
class StageArguments:
    """What one stage aligns."""

    match: Literal["layers", "blocks", "hidden_states", "logits"] = described(
        "layers: outputs of the converted layers; blocks: outputs of the blocks, both with the teacher's inputs; "
        "hidden_states: what leaves the blocks; logits: distributions over the next token.",
        "logits",
    )
    temperature: float = described("Of the soft labels; for logits.", 1.0)
    hard_labels: float = described("Share of the loss that is the cross-entropy with the text; for logits.", 0.0)
    cache_logits: int | None = described(
        "Compute the teacher's logits once and keep this many a token on disk; for logits; default: none."
    )
    trainable: list[str] = field(
        default_factory=list,
        metadata={"help": "Regular expressions of parameters that train; default: those that conversion made."},
    )

    def __post_init__(self) -> None:
        self.trainable = _listed(self.trainable)
        for pattern in self.trainable:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"trainable: {pattern!r} is not a regular expression: {error}") from None
        if not self.temperature > 0:
            raise ValueError(f"temperature: {self.temperature} is not positive")
        if not 0 <= self.hard_labels <= 1:
            raise ValueError(f"hard_labels: {self.hard_labels} is not in [0, 1]")
        if self.cache_logits is not None and self.cache_logits < 1:
            raise ValueError(f"cache_logits: {self.cache_logits} is not positive")


@dataclass
class DistillTrainingArguments(HoloTrainingArguments):
    """How to train it: the arguments of `hf-holo train`, with defaults for a student already near its teacher."""

    resume_from_checkpoint: str | None = described(
        "Resume where the run in output_dir was cut off.", nargs="?", const="last"
    )
    optimizer: Literal["whitened", "muon", "adamw"] = described(  # type: ignore[assignment]  # one more choice
        "whitened: the coefficients of fitted holographic layers take steps relative to their size (WhitenedAdamW), "
        "all else those of AdamW; muon: MuonAdamW; adamw: the optimizer that --optim names.",
        "adamw",
    )
    context_parallel_size: int = field(default=1, init=False)  # parts are compared on whole texts
    causality_check: bool = described("Stop the run if the student sees tokens that it should predict.", False)
    learning_rate: float = described("Peak learning rate of AdamW.", 1e-3)
    weight_decay: float = described("Weight decay of matrices.", 0.0)
    lr_scheduler_type: str = described("Schedule of the learning rate.", "cosine")
    logging_steps: float = described("Steps between two entries of the losses.", 5)


ARGUMENTS = (ModelArguments, TextArguments, StageArguments, DistillTrainingArguments)


@dataclass
class Stage:
    """One stage of a distillation."""

    name: str
    what: StageArguments
    training: DistillTrainingArguments


@dataclass
class Distillation:
    """All arguments of one run.

    Attributes:
        stages: in their order.
        recipe: the run as a recipe, without where to write and whether to overwrite or resume.
    """

    models: ModelArguments
    texts: TextArguments
    stages: list[Stage]
    training: DistillTrainingArguments
    recipe: dict[str, Any]


def parse(argv: list[str]) -> Distillation:
    """Parse the command line on top of the recipe it names.

    A recipe holds arguments for all stages, and under `stages` a list of mappings with what differs; a stage is called
    by its `name`, or else by what it matches. What the command line gives holds for all stages.

    Raises:
        HoloError: an unknown or malformed argument or recipe, or no stage.
    """
    parser = RecipeParser(ARGUMENTS, prog="hf-holo distill", description=DESCRIPTION, allow_abbrev=False)
    known = set(vars(parser.parse_known_args([])[0]))
    add_recipe(parser, __package__, PREFIX)
    given = given_words(parser, words_of_today(argv, OLD_NAMES))
    recipe = given.pop("recipe", None)
    if recipe is None:
        raise HoloError(f"recipe: name one of {', '.join(recipe_names(__package__, PREFIX))}, or a YAML file")
    values = load_recipe(recipe, __package__, PREFIX, OLD_NAMES)
    stages = values.pop("stages", None)
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        raise HoloError(f"stages: {recipe!r} has no list of stages, such as `stages: [{{match: logits}}]`")
    for name in (name for part in (values, *stages) for name in part):
        if name not in known and name != "name":
            raise HoloError(f"recipe: {recipe!r} sets the unknown argument {name!r}{suggestion(name, known)}")
    values |= given
    stages = [{name: value for name, value in stage.items() if name not in given} for stage in stages]
    common = {"output_dir": f"runs/{recipe.rpartition('/')[2].removesuffix('.yaml')}", **values}
    models, texts, _, training = _dataclasses(common)
    saved = {name: value for name, value in values.items() if not name.startswith(NOT_SAVED)}
    return Distillation(models, texts, _stages(stages, common), training, saved | {"stages": stages})


def _dataclasses(values: dict[str, Any]) -> tuple:
    parser = RecipeParser(ARGUMENTS, allow_abbrev=False)
    for action in parser._actions:  # argparse does not check defaults
        value = values.get(action.dest)
        if action.choices and isinstance(value, str) and value not in action.choices:
            raise HoloError(f"{action.dest}: {value!r} is not one of {', '.join(map(str, action.choices))}")
    parser.set_defaults(**values)
    try:
        return parser.parse_args_into_dataclasses([])
    except ValueError as error:
        raise HoloError(str(error).partition("\n")[0]) from None


def _stages(stages: list[dict[str, Any]], common: dict[str, Any]) -> list[Stage]:
    found: list[Stage] = []
    for number, stage in enumerate(stages, 1):
        name = str(stage.get("name", stage.get("match", common.get("match", "logits"))))
        if not re.fullmatch(r"\w[\w .-]*", name):  # a stage has a folder of its name
            raise HoloError(f"stages: {name!r} is not a plain name; letters, digits, `.` and `-` make one")
        if name in [other.name for other in found]:
            raise HoloError(f"stages: two are called {name!r}; give each a `name` of its own")
        values = {**common, **{key: value for key, value in stage.items() if key != "name"}}
        values["output_dir"] = f"{common['output_dir']}/{number}-{name}"
        _, _, what, training = _dataclasses(values)
        found.append(Stage(name, what, training))
    return found


def _listed(value: Any) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value]
