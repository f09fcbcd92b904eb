"""The code that a checkpoint needs where hf_holo is not installed, for folders that were saved without it.

Models of this package take their code along when they are saved. Converted models (a `Phi3ForCausalLM` with holographic
layers) and the families of other packages are classes that know nothing of it: [`add_code`] completes their folders.
"""

import hashlib
import json
import sys
import warnings
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_imports, get_relative_import_files

from ..errors import HoloError, first_line
from ..files import write_text
from ..modeling import remote_code
from ..registry import architectures

CONVERTED = Path(remote_code.__file__).with_name("converted.py")
PRESENT = {"huggingface_hub", "numpy", "safetensors", "tokenizers", "torch", "transformers"}  # where any model runs
# Of what this package reads in a config.json.
CONFIG_TYPES = {"model_type": str, "architectures": list, "auto_map": dict, "quantization_config": dict}

_KNOWN_IMPORTS: dict[bytes, list[str]] = {}  # by the digest of a file


def add_code(folder: str | Path) -> list[str]:
    """Put code that is missing or out of date into the folder of a checkpoint, and return the names of the files
    written.

    Raises:
        HoloError: as [`missing_code`].
    """
    folder = Path(folder)
    files = missing_code(folder)
    for name, text in files.items():
        write_text(folder / name, text)
    return list(files)


def missing_code(folder: Path) -> dict[str, str]:
    """The files that the folder lacks to load without hf_holo, by name, and config.json with its `auto_map`, if it has
    none. Copies of this package's files that another version has left are replaced; those of plug-ins stay. Empty for
    the models of transformers itself. A warning says where the code cannot go along, and which packages it needs where
    it can.

    Raises:
        HoloError: the folder has no readable config.json.
    """
    config = read_config(folder)
    reason = obstacle(config)
    if reason is not None:
        warnings.warn(f"{folder} stays without code, and needs its packages installed: {reason}", stacklevel=2)
        return {}
    auto_map, files = _code_of(config)
    if packages := needed_packages(folder, config):
        names = ", ".join(packages)
        warnings.warn(f"the code of {folder} imports {names}: to be installed wherever it is loaded", stacklevel=2)
    own, missing = package_of(config) == "hf_holo", {}
    entries = {f"{reference.partition('.')[0]}.py" for reference in auto_map.values()}
    for path in files:
        there = folder / path.name
        text = remote_code.code_of(path) if path.name in entries else path.read_text(encoding="utf-8")
        if not there.is_file() or (own and there.read_bytes() != text.encode()):
            missing[path.name] = text
    if not auto_map.items() <= (config.get("auto_map") or {}).items():
        config["auto_map"] = auto_map
        missing["config.json"] = json.dumps(config, indent=2, sort_keys=True) + "\n"
    return missing


def needed_packages(folder: Path, config: dict[str, Any]) -> list[str] | None:
    """The packages, apart from those that any model of transformers needs, that the code of a checkpoint imports.

    Args:
        folder: of the checkpoint; code that is there counts, and so does what [`missing_code`] adds.
        config: as [`read_config`] reads it.

    Returns:
        Their names; None if the checkpoint has no code and gets none.

    Raises:
        HoloError: the code cannot be read.
    """
    files = [] if obstacle(config) is not None else _code_of(config)[1]
    files = [there if (there := folder / file.name).is_file() else file for file in files] or _code_in(folder, config)
    if not files:
        return None
    try:
        imported = {name for file in files for name in _imports(file)}
    except (OSError, ValueError, SyntaxError) as error:
        raise HoloError(f"DIR: the code in {str(folder)!r} cannot be read: {first_line(error)}") from None
    return sorted(imported - PRESENT - sys.stdlib_module_names)


def _imports(file: Path) -> list[str]:
    """What [`get_imports`] finds; once for all copies of a file, of which every checkpoint has some."""
    content = hashlib.sha256(file.read_bytes()).digest()
    if content not in _KNOWN_IMPORTS:
        _KNOWN_IMPORTS[content] = get_imports(file)
    return _KNOWN_IMPORTS[content]


def _code_in(folder: Path, config: dict[str, Any]) -> list[Path]:
    """The files in the folder that its `auto_map` leads to."""
    named = {value.partition(".")[0] for value in (config.get("auto_map") or {}).values() if isinstance(value, str)}
    files = [folder / f"{name}.py" for name in named]
    return _with_imports([file for file in files if file.is_file()])


def package_of(config: dict[str, Any]) -> str | None:
    """The package that has the classes of a checkpoint: "hf_holo", that of a plug-in, or None for one that is not
    registered here."""
    if is_converted(config):
        return "hf_holo"
    architecture = architectures().get(config.get("model_type", ""))
    return None if architecture is None else architecture.config.__module__.partition(".")[0]


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a checkpoint, in which what this package reads is of the kind that it should be.

    Raises:
        HoloError: there is none, it cannot be read, or a value is of another kind.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise HoloError(f"DIR: {str(folder)!r} has no config.json that can be read: {first_line(error)}") from None
    if not isinstance(config, dict):
        raise HoloError(f"DIR: {str(folder / 'config.json')!r} is not a mapping, so it is not a config")
    wrong = [key for key, kind in CONFIG_TYPES.items() if not isinstance(config.get(key), (kind, type(None)))]
    if not wrong and not all(isinstance(name, str) for name in config.get("architectures") or []):
        wrong = ["architectures"]
    if wrong:
        value = repr(config[wrong[0]])[:60]
        raise HoloError(f"DIR: {str(folder / 'config.json')!r} says {wrong[0]}={value}, which is not a value for it")
    return config


def is_converted(config: dict[str, Any]) -> bool:
    """Whether layer surgery made the model that this config describes."""
    return (config.get("quantization_config") or {}).get("quant_method") == "holo"


def obstacle(config: dict[str, Any]) -> str | None:
    """Why the code of this checkpoint cannot go along; None if it can, or need not."""
    architecture = architectures().get(config.get("model_type", ""))
    if is_converted(config):
        names = config.get("architectures") or ["a model without a name"]
        known = architecture is None and remote_code.auto_classes_of(names[0])
        return None if known else f"{names[0]} with holographic layers is not a class of transformers"
    classes = [] if architecture is None else [architecture.config, *architecture.models.values()]
    return next(filter(None, map(remote_code.obstacle, classes)), None)


def _code_of(config: dict[str, Any]) -> tuple[dict[str, str], list[Path]]:
    """The `auto_map` and the files that a checkpoint needs; nothing if transformers has all of it."""
    if is_converted(config):
        name = config["architectures"][0]
        auto_classes = remote_code.auto_classes_of(name)
        return dict.fromkeys(auto_classes, f"{CONVERTED.stem}.{name}"), _with_imports([CONVERTED])
    architecture = architectures().get(config.get("model_type", ""))
    if architecture is None:
        return {}, []
    classes = {"AutoConfig": architecture.config, **architecture.models}
    auto_map = {auto_class: remote_code.reference(cls) for auto_class, cls in classes.items()}
    files = map(remote_code.file_of, classes.values())
    return auto_map, _with_imports([file for file in files if file is not None])


def _with_imports(files: list[Path]) -> list[Path]:
    """These files and all that they import relatively, each once."""
    needed = [Path(name) for file in files for name in get_relative_import_files(file)]
    return sorted({*files, *needed})
