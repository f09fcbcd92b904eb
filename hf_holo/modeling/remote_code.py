"""The code that goes with a checkpoint, so that it loads with `trust_remote_code=True` where this package is missing.

transformers copies the file of a class and, recursively, the files that it imports as `from .sibling import name`. A
class takes part if it says which Auto class loads it (`_auto_class`).

From a local folder, transformers 4.57 fetches only what the file of the class itself imports. So the copies of the
files that Auto classes load (`configuration_*`, `modeling_*`, ...) import all that their siblings import, too:
[`code_of`].
"""

import ast
import functools
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files, get_relative_imports
from transformers.models.auto import modeling_auto

card_writers: list[Callable[..., bool]] = []  # hf_holo puts its own here; without it, models have transformers' cards


def obstacle(cls: type) -> str | None:
    """Why the code of a class cannot go with a checkpoint; None if it can."""
    file = file_of(cls)
    if file is None or cls.__module__ == "__main__" or vars(sys.modules[cls.__module__]).get(cls.__name__) is not cls:
        return f"{cls.__name__} cannot be imported from a file by its name"
    try:
        files = get_relative_import_files(file)
        missing = [path for path in files if not Path(path).is_file()]
    except OSError as error:
        missing = [error.filename]
    if missing:
        return f"{file.name} imports {Path(missing[0]).stem!r}, which is not a file next to it"
    return None


def file_of(cls: type) -> Path | None:
    """Where a class is defined; None if in no file."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return None if file is None else Path(file)


def code_of(file: Path) -> str:
    """The text of a file that an Auto class loads, as it goes with a checkpoint: it imports something from every file
    that the files which it imports need."""
    needed = {Path(path) for path in get_relative_import_files(file)} - {file}
    direct = get_relative_imports(file)
    further = sorted(path for path in needed if path.stem not in direct)
    names = [_first_name(path.read_text(encoding="utf-8")) for path in further]
    lines = [f"from .{path.stem} import {name}  # noqa: F401\n" for path, name in zip(further, names, strict=True)]
    why = "\n# what the files above import: transformers 4.57 copies only what this one names\n" if lines else ""
    return file.read_text(encoding="utf-8") + why + "".join(lines)


@functools.lru_cache  # the same files go with every checkpoint
def _first_name(code: str) -> str:
    """A name that a file with this text defines."""
    nodes = ast.parse(code).body
    return next(node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef)))


def complete_code(folder: Path, classes: Iterable[type]) -> None:
    """Write the files of these classes, which transformers has copied into a folder, as [`code_of`] gives them."""
    for file in {file_of(cls) for cls in classes}:
        if file is not None and (folder / file.name).is_file():
            (folder / file.name).write_text(code_of(file), encoding="utf-8")


def auto_map(model_class: type[PreTrainedModel]) -> dict[str, str]:
    """Which class each Auto class loads, as "file.Class": the config's, and every head in the file of `model_class`."""
    config_class: Any = model_class.config_class
    module = model_class.__module__
    heads: list[Any] = [
        value
        for value in vars(sys.modules[module]).values()
        if isinstance(value, type)
        and issubclass(value, PreTrainedModel)
        and (value.__module__, value.config_class) == (module, config_class)
        and value._auto_class is not None
    ]
    return {"AutoConfig": reference(config_class)} | {head._auto_class: reference(head) for head in heads}


def auto_classes_of(name: str) -> list[str]:
    """Names of the Auto classes through which transformers loads its own model class `name`, the most telling first."""
    found = []
    for auto_name in sorted(vars(modeling_auto)):  # those of transformers itself take half a second to list
        if not auto_name.startswith("AutoModel"):
            continue
        classes = getattr(modeling_auto, auto_name)._model_mapping._model_mapping.values()
        if any(name in (entry if isinstance(entry, (tuple, list)) else (entry,)) for entry in classes):
            found.append(auto_name)
    return sorted(found, key=lambda auto_name: auto_name in ("AutoModelForPreTraining", "AutoModelWithLMHead"))


def reference(cls: type) -> str:
    """A class as an `auto_map` names it."""
    return f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}"


@contextmanager
def with_code(cls: type[PreTrainedModel]) -> Iterator[bool]:
    """Whether a model of the class `cls` that is saved in this block takes its code along.

    If that is impossible a warning says why, and the model is saved without.
    """
    reason = None if cls._auto_class is None else obstacle(cls)
    if reason is None:
        yield cls._auto_class is not None
        return
    warnings.warn(f"saved without its code: {reason}; whoever loads it must have that code installed", stacklevel=4)
    auto_class, cls._auto_class = cls._auto_class, None
    try:
        yield False
    finally:
        cls._auto_class = auto_class
