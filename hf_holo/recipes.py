"""Recipes: arguments of a command in a YAML file, and the parser that reads the command line on top of them."""

import copy
import difflib
import inspect
import sys
from argparse import (
    SUPPRESS,
    Action,
    ArgumentDefaultsHelpFormatter,
    ArgumentParser,
    Namespace,
    RawDescriptionHelpFormatter,
)
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser, TrainingArguments

from .errors import HoloError, Parser

# Where a run writes or publishes, and what it may delete, is said by whoever starts it: recipes come from others, too,
# and go to others, who should find no token in them. An argument whose name begins so is not for recipes.
NOT_FOR_RECIPES = (
    "output_dir",
    "overwrite",
    "resume_from_checkpoint",
    "logging_dir",
    "push_to_hub",
    "hub_",
    "trackio_",
)


def described(help: str, default: Any = None, **metadata: Any) -> Any:
    """A dataclass field with a help text for the command line."""
    return field(default=default, metadata={"help": help, **metadata})


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows one spelling of each option (`--block_size` works as `--block-size`, too), and defaults that say more than
    that nothing is set."""

    def _get_help_string(self, action: Action) -> str | None:
        says_it = "default" in (action.help or "")
        is_unset = action.default is None or action.default is False or action.default == []
        return action.help if says_it or is_unset else super()._get_help_string(action)

    def _format_action_invocation(self, action: Action) -> str:
        names, action = action.option_strings, copy.copy(action)
        twins = {name: f"--{name[2:].replace('-', '_')}" for name in names}
        action.option_strings = [name for name in names if twins[name] == name or twins[name] not in names]
        return super()._format_action_invocation(action)


class _HelpAll(Action):
    """`--help_all`: the help with those options that `--help` leaves out."""

    def __call__(self, parser: "RecipeParser", *args: Any) -> None:  # type: ignore[override]  # no other has it
        for action, text in parser.left_out.items():
            action.help = text
        parser.print_help()
        parser.exit()


class RecipeParser(Parser, HfArgumentParser):
    """HfArgumentParser with the errors of this package, and with a help in groups, our own options first.

    The fields of each dataclass form a group under the first words of its docstring. What one of them inherits from
    [`TrainingArguments`] forms the last group, which `--help_all` lists.
    """

    def __init__(self, dataclass_types: type | Sequence[type], **options: Any) -> None:
        self.left_out: dict[Action, str | None] = {}
        usage = "%(prog)s [RECIPE] [--OPTION VALUE ...]"
        options = {"formatter_class": _HelpFormatter, "usage": usage, **options}
        super().__init__(dataclass_types, **options)  # type: ignore[arg-type]  # its type of a dataclass is its own

    def _add_dataclass_arguments(self, dtype: type) -> None:
        before = len(self._actions)
        super()._add_dataclass_arguments(dtype)  # type: ignore[arg-type]  # as well
        added, own = self._actions[before:], _own_fields(dtype)
        for action in added:
            if action.nargs == 0 and action.const is False:  # the `--no_x` of an `--x` that is true by default
                action.help = SUPPRESS
        title = (inspect.getdoc(dtype) or "").partition(".")[0].partition(":")[0]
        self._group([action for action in added if action.dest in own], title)
        inherited = [action for action in added if action.dest not in own]
        if inherited:
            self._group(inherited, "TrainingArguments of transformers", "All of them work; --help_all lists them.")
            self.left_out |= {action: action.help for action in inherited}
            for action in inherited:
                action.help = SUPPRESS
            text = "show the options of TrainingArguments, too"
            names = ("--help_all", "--help-all")
            self.add_argument(*names, action=_HelpAll, nargs=0, dest=SUPPRESS, default=SUPPRESS, help=text)

    def _group(self, actions: Sequence[Action], title: str, description: str | None = None) -> None:
        """Show these options under a title of their own."""
        group = self.add_argument_group(title, description)
        for action in actions:
            self._optionals._group_actions.remove(action)
            group._group_actions.append(action)


def _own_fields(dtype: type) -> set[str]:
    """The fields of a dataclass that it does not have from [`TrainingArguments`] alone."""
    classes = [cls for cls in dtype.__mro__ if cls is not object and not issubclass(TrainingArguments, cls)]
    return {name for cls in classes for name in inspect.get_annotations(cls)}


def recipe_names(package: str, prefix: str = "") -> list[str]:
    """The recipes in a package whose names begin with `prefix`."""
    names = (path.name.removesuffix(".yaml") for path in files(package).joinpath("recipes").iterdir())
    return sorted(name for name in names if name.startswith(prefix))


def load_recipe(
    recipe: str, package: str, prefix: str = "", old_names: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Read a recipe of the package, by name, or a YAML file.

    Args:
        recipe: name or path.
        package: that has a folder `recipes`.
        prefix: with which the names of the recipes for this command begin.
        old_names: arguments under the names of earlier versions, and what they are called now.

    Raises:
        HoloError: there is no such recipe, it is not a mapping of argument names to values, or it sets what is not for
            a recipe to say (what begins with one of `NOT_FOR_RECIPES`).
    """
    known = recipe_names(package, prefix)
    if recipe in known:
        text = files(package).joinpath("recipes", f"{recipe}.yaml").read_text(encoding="utf-8")
    elif Path(recipe).is_file():
        text = Path(recipe).read_text(encoding="utf-8")
    else:
        raise HoloError(f"recipe: {recipe!r} is neither a file nor one of {', '.join(known)}")
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise HoloError(f"recipe: {recipe!r} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict) or not isinstance(values.get("model", {}), dict):
        raise HoloError(f"recipe: {recipe!r} is not a mapping of argument names to values")
    stages = values.get("stages")
    parts = [values, *filter(lambda part: isinstance(part, dict), stages if isinstance(stages, list) else [])]
    for name in chain.from_iterable(parts):
        if str(name).startswith(NOT_FOR_RECIPES):
            raise HoloError(f"recipe: {recipe!r} sets {name!r}, which is for the command line alone to say")
    if isinstance(stages, list):
        values["stages"] = [
            _with_names_of_today(stage, recipe, old_names or {}) if isinstance(stage, dict) else stage
            for stage in stages
        ]
    return _with_names_of_today(values, recipe, old_names or {})


def _with_names_of_today(values: dict[str, Any], recipe: str, old_names: Mapping[str, str]) -> dict[str, Any]:
    for old in values.keys() & old_names.keys():
        if old_names[old] in values:
            raise HoloError(f"recipe: {recipe!r} sets {old_names[old]!r} twice, also under its old name {old!r}")
        _say_new_name(old, old_names[old])
    return {old_names.get(name, name): value for name, value in values.items()}


class _Recipe(Action):
    """Takes the recipe from either place, and refuses two."""

    def __call__(self, parser: ArgumentParser, namespace: Namespace, values: Any, option_string: Any = None) -> None:
        named = getattr(namespace, self.dest, None)
        if isinstance(named, str) and named != values:
            raise HoloError(f"recipe: {named!r} and {values!r}; name one")
        setattr(namespace, self.dest, values)


def add_recipe(parser: ArgumentParser, package: str, prefix: str = "", default: str | None = None) -> None:
    """Let a command take its recipe as a last word without an option, or as `--recipe`."""
    text = f"{', '.join(recipe_names(package, prefix))}, or a YAML file of the options below"
    text += f"; default: {default}" if default else ""
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", action=_Recipe, default=SUPPRESS, help=f"{text}.")
    parser.add_argument("--recipe", metavar="RECIPE", action=_Recipe, help="the recipe, as an option")


def given_words(parser: ArgumentParser, argv: Sequence[str]) -> dict[str, Any]:
    """What a command line says, without what it leaves at its default.

    Raises:
        HoloError: an argument is unknown, or a value is not what it should be.
    """
    unsaid = object()
    namespace = Namespace(**{action.dest: unsaid for action in parser._actions})
    given, unknown = parser.parse_known_args(list(argv), namespace)
    if unknown:
        known = [action.dest for action in parser._actions]
        raise HoloError(f"unknown argument {unknown[0]}{suggestion(unknown[0].lstrip('-'), known)}")
    return {name: value for name, value in vars(given).items() if value is not unsaid}


def words_of_today(argv: Sequence[str], old_names: Mapping[str, str]) -> list[str]:
    """A command line in which options have the names of today.

    Args:
        argv: its words.
        old_names: names of earlier versions, and what they are called now.
    """
    words = []
    for word in argv:
        option, equals, value = word.partition("=")
        old = option.removeprefix("--").replace("-", "_")
        if option.startswith("--") and old in old_names:
            _say_new_name(old, old_names[old])
            word = f"--{old_names[old]}{equals}{value}"
        words.append(word)
    return words


def _say_new_name(old: str, new: str) -> None:
    print(f"hf-holo: {old} is called {new} now; the old name works until the next version", file=sys.stderr)


def suggestion(name: str, known: Iterable[str]) -> str:
    """What is added to the error for an unknown argument: the known one that is most like it, if any is."""
    nearest = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""
