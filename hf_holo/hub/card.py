"""The model card: what a checkpoint is, from the facts in its folder."""

import csv
import platform
import re
import struct
from collections.abc import Container
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
import transformers
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..errors import HoloError, first_line
from ..eval.conformance.causality import CausalityReport
from ..files import replacing
from ..modeling.checkpoint import values_on_disk
from ..modeling.remote_code import auto_classes_of
from ..modeling.versions import VERSION
from ..registry import architectures
from .code import is_converted, needed_packages, package_of, read_config

TAG = "hf-holo"
PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModel": "feature-extraction",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForAudioClassification": "audio-classification",
    "AutoBackbone": "image-feature-extraction",
}
PREPARERS = {  # what a card loads beside the model: the first that the family has of its own
    "AutoProcessor": "processor",
    "AutoImageProcessor": "image_processor",
    "AutoFeatureExtractor": "feature_extractor",
    "AutoTokenizer": "tokenizer",
}
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "num_channels",
    "image_size",
    "patch_size",
    "sampling_rate",
    "num_mel_bins",
)
CLASSES_NAMED = 20  # on a card
METRICS = {  # columns of metrics.csv: name and unit
    "validation_loss": ("validation loss", "nats per token"),
    "validation_bits_per_character": ("validation loss", "bits per character"),
}
CLASS_METRICS = {  # the same for classifiers, which have a column of F1
    "validation_loss": ("validation loss", "nats"),
    "validation_accuracy": ("accuracy", "of the held-out examples"),
    "validation_f1": ("F1", "mean of the classes"),
}
RECIPE = {  # of what a card says in words: whether a value is one
    "dataset_name": lambda value: isinstance(value, str),
    "train_file": lambda value: isinstance(value, str) or _are_names(value),
    "train_files": lambda value: isinstance(value, str) or _are_names(value),
    "validation_fraction": lambda value: all(isinstance(x, (int, float)) and 0 <= x <= 1 for x in _shares(value)),
}
UNREADABLE_YAML = (ValueError, TypeError, LookupError, AttributeError, RecursionError, yaml.YAMLError)

CARD = """---
{header}
---

# {name}

{summary}

| | |
|---|---|
{facts}

## Data

{data}

## Results

{results}

## Causality

{causality}

## How to load it

{loading}

## Recipe

{recipe}

## Versions

{versions}
"""
LOADING = """```python
{first}from transformers import {auto_class}, {preparer}

model = {auto_class}.from_pretrained("{name}"{trust})
{variable} = {preparer}.from_pretrained("{name}"{trust})
```"""


def write_card(folder: str | Path, causality: CausalityReport | None = None) -> None:
    """Write README.md into the folder of a checkpoint, in place of an earlier one.

    Args:
        folder: as `save_pretrained` leaves it; recipe and metrics of `hf-holo train` are used if they are there.
        causality: what `check_causality` found, if it was run.

    Raises:
        HoloError: as [`make_card`].
    """
    folder = Path(folder)
    with replacing(folder / "README.md") as temporary:
        make_card(folder, folder.resolve().name, causality).save(temporary)


def make_card(
    folder: Path, name: str, causality: CausalityReport | None = None, license: str | None = None
) -> ModelCard:
    """The card of the checkpoint in a folder.

    Args:
        folder: of the checkpoint.
        name: that loads it: of the folder or of a repository.
        causality: as in [`write_card`].
        license: identifier for the header, for example "apache-2.0"; default: none is named.

    Raises:
        HoloError: config.json, recipe.yaml, metrics.csv or the weights are not what they should be.
    """
    config, recipe, scores = read_config(folder), _recipe(folder), _scores(folder)
    auto_class = auto_class_of(config)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=None if preparer_of(config) == "AutoProcessor" else PIPELINES.get(auto_class),
        license=license,
        tags=[TAG, str(config.get("model_type"))],
        model_name=name,
        eval_results=_eval_results(auto_class, _data_name(recipe), scores),
    )
    text = CARD.format(
        header=data.to_yaml(),
        name=name,
        summary=_summary(config),
        facts="\n".join(f"| {what} | {value} |" for what, value in _facts(folder, config).items()),
        data=_data(recipe),
        results=_results(scores),
        causality=_causality(causality, config),
        loading=_loading(folder, config, auto_class, name),
        recipe=f"```yaml\n{yaml.safe_dump(recipe, sort_keys=False)}```" if recipe else "No recipe came with it.",
        versions=_versions(config),
    )
    return ModelCard(text)


def read_card(path: Path) -> ModelCard:
    """The card in a folder, whoever wrote it.

    Raises:
        HoloError: it is not a text, or its header is malformed.
    """
    try:
        return ModelCard(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise HoloError(f"DIR: {str(path)!r} is not a text in UTF-8") from None
    except UNREADABLE_YAML as error:
        raise HoloError(f"DIR: the Hub cannot read the header of {str(path)!r}: {first_line(error)}") from None


def header_of(card: ModelCard) -> Any:
    """What huggingface_hub reads into attributes, and declares none of."""
    return card.data


def is_own(card: ModelCard) -> bool:
    """Whether this package wrote the card."""
    tags = header_of(card).tags
    return isinstance(tags, list) and TAG in tags


def add_tags(card: ModelCard, path: Path) -> ModelCard:
    """The card with the tags of another one, too: those that a user gave to `push_to_hub`."""
    given, header = header_of(ModelCard.load(path)).tags or [], header_of(card)
    header.tags = [*header.tags, *(tag for tag in given if tag not in header.tags)]
    return card


def name_repository(card: ModelCard, folder: Path, repo: str) -> None:
    """Let a card of this package call the model by its repository, where it has the name of the folder, or of the one
    that it was written in: in its header, its title and its code."""
    header = header_of(card)
    for old in {folder.resolve().name, str(header.model_name or repo)}:
        card.text = card.text.replace(f'from_pretrained("{old}"', f'from_pretrained("{repo}"')
        card.text = re.sub(rf"^# {re.escape(old)}$", lambda _: f"# {repo}", card.text, count=1, flags=re.MULTILINE)
    header.model_name = repo


def auto_class_of(config: dict[str, Any]) -> str:
    """The Auto class that loads the head in a config.json; "AutoModel" if it names none that is known."""
    name = next(iter(config.get("architectures") or []), "")
    architecture = architectures().get(config.get("model_type", ""))
    if architecture is None:
        return next(iter(auto_classes_of(name)), "AutoModel")
    heads = {model.__name__: auto_class for auto_class, model in architecture.models.items()}
    return heads.get(name, "AutoModel")


def preparer_of(config: dict[str, Any]) -> str:
    """The Auto class of what prepares inputs for the model in a config.json."""
    architecture = architectures().get(config.get("model_type", ""))
    own = () if architecture is None else architecture.preprocessors
    return next((name for name in PREPARERS if name in own), "AutoTokenizer")


def _loading(folder: Path, config: dict[str, Any], auto_class: str, name: str) -> str:
    """How the model is loaded: with the package that has its classes and, if code goes along, without."""
    package, needed, parts = package_of(config), needed_packages(folder, config), []
    preparer = preparer_of(config)
    facts = {"auto_class": auto_class, "name": name, "preparer": preparer, "variable": PREPARERS[preparer]}
    if package is not None:
        names = "hf_holo" if package == "hf_holo" else f"hf_holo and `{package}`"
        first = LOADING.format(first="import hf_holo\n", trust="", **facts)
        parts = [f"With {names} installed:", first]
    if needed is not None:
        without = "Here" if package is None else f"Without {'hf_holo' if package == 'hf_holo' else f'`{package}`'}"
        needs = f", which needs {', '.join(needed)} installed" if needed else ""
        second = LOADING.format(first="", trust=", trust_remote_code=True", **facts)
        parts += [f"{without}, the code in this repository is used{needs}; read it before you trust it:", second]
    if not parts:
        parts = [LOADING.format(first="", trust="", **facts)]
    return "\n\n".join(parts)


def _summary(config: dict[str, Any]) -> str:
    name = next(iter(config.get("architectures") or []), "A model")
    if is_converted(config):
        return f"`{name}`, some of whose linear layers are holographic, made with hf_holo."
    return f"`{name}` of the family `{config.get('model_type')}`, made with hf_holo."


def _facts(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """The rows of the table of facts."""
    facts = {"architecture": next(iter(config.get("architectures") or []), "unknown")}
    if any(folder.glob("*.safetensors")):
        facts["values in the checkpoint"] = f"{_numbers(folder):,}"
    facts |= {name.replace("_", " "): f"{config[name]:,}" for name in SIZES if isinstance(config.get(name), int)}
    names = list(map(str, (config.get("id2label") or {}).values()))
    if names and preparer_of(config) != "AutoTokenizer":
        rest = f" and {len(names) - CLASSES_NAMED} more" if len(names) > CLASSES_NAMED else ""
        facts["classes"] = ", ".join(names[:CLASSES_NAMED]) + rest
    return facts


def _numbers(folder: Path) -> int:
    try:
        return values_on_disk(folder)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
        raise HoloError(
            f"DIR: the weights in {str(folder)!r} are not complete safetensors files: {first_line(error)}"
        ) from None


def _recipe(folder: Path) -> dict[str, Any]:
    """The recipe in the folder, without the paths of the machine it was made on.

    Raises:
        HoloError: it is malformed.
    """
    path = folder / "recipe.yaml"
    try:
        recipe = _shared(yaml.safe_load(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except UNREADABLE_YAML as error:
        raise HoloError(f"DIR: {str(path)!r} is not valid YAML: {first_line(error)}") from None
    if not isinstance(recipe, dict):
        raise HoloError(f"DIR: {str(path)!r} is not a mapping of argument names to values")
    for name, is_good in RECIPE.items():
        if recipe.get(name) is not None and not is_good(recipe[name]):
            raise HoloError(f"DIR: {str(path)!r} says {name}={repr(recipe[name])[:60]}, which is not a value for it")
    return recipe


def _shared(value: Any) -> Any:
    """A value of a recipe, in which paths are cut to their last part; repositories keep their names."""
    if isinstance(value, dict):
        return {key: _shared(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_shared(part) for part in value]
    return PureWindowsPath(value).name if isinstance(value, str) and _is_path(value) else value  # it knows both slashes


def _is_path(text: str) -> bool:
    """Whether it is a place on this machine; the name of a repository has a slash, too."""
    if not {"/", "\\"} & set(text):
        return False
    try:
        validate_repo_id(text)
    except HFValidationError:
        return True
    return Path(text).exists()


def _shares(value: Any) -> list[Any]:
    """The held-out share of each text, or the one of all; `hf-holo distill` takes either."""
    return value if isinstance(value, list) else [value]


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _data_name(recipe: dict[str, Any]) -> str | None:
    """The data set or the files of `hf-holo train` or `hf-holo distill`."""
    files = recipe.get("train_file") or recipe.get("train_files") or []  # the latter by earlier versions
    several = ", ".join(files if isinstance(files, list) else [files])
    digits = " and ".join(filter(None, (recipe.get("image_data"), recipe.get("audio_data"))))
    return recipe.get("dataset_name") or several or digits or None


def _data(recipe: dict[str, Any]) -> str:
    name = _data_name(recipe)
    if name is None:
        return "It is not known what it was trained on."
    share = recipe.get("validation_fraction")
    if share is None:
        return f"Trained on `{name}`."
    return f"Trained on `{name}`, of which {', '.join(f'{x:.0%}' for x in _shares(share))} was held out."


def _scores(folder: Path) -> dict[str, float]:
    """The last value of each metric in metrics.csv.

    Raises:
        HoloError: it is not a table of numbers.
    """
    path = folder / "metrics.csv"
    if not path.is_file():
        return {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        known = metrics_of(rows[0] if rows else {})
        found = {column: [float(row[column]) for row in rows if row.get(column)] for column in known}
    except (ValueError, csv.Error) as error:
        raise HoloError(f"DIR: {str(path)!r} is not a table of metrics: {first_line(error)}") from None
    return {column: values[-1] for column, values in found.items() if values}


def metrics_of(columns: Container[str]) -> dict[str, tuple[str, str]]:
    """Name and unit of what is measured where there are these columns."""
    return CLASS_METRICS if "validation_f1" in columns else METRICS


def _results(scores: dict[str, float]) -> str:
    if not scores:
        return "Nothing was measured."
    names = metrics_of(scores)
    lines = [f"| {names[column][0]} | {value:.4f} {names[column][1]} |" for column, value in scores.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _eval_results(auto_class: str, data_name: str | None, scores: dict[str, float]) -> list[EvalResult] | None:
    """The scores for the header; None where there is nothing to compare."""
    if not scores or auto_class not in PIPELINES or data_name is None:
        return None
    names = metrics_of(scores)
    return [
        EvalResult(
            task_type=PIPELINES[auto_class],
            dataset_type=data_name,
            dataset_name=f"held-out part of {data_name}",
            metric_type=column.removeprefix("validation_"),
            metric_name=", ".join(names[column]) if names is CLASS_METRICS else " in ".join(names[column]),
            metric_value=round(value, 4),
        )
        for column, value in scores.items()
    ]


def _causality(report: CausalityReport | None, config: dict[str, Any]) -> str:
    if report is None and preparer_of(config) != "AutoTokenizer":
        return "It predicts no tokens. `hf-holo check PATH` checks what applies to it."
    if report is None:
        return "Not judged here. `hf-holo check PATH` judges it."
    losses = report.teacher_forced_loss, report.stepwise_loss
    detail = ""
    if None not in losses:
        detail = " A random text costs {:.6f} nats per token when it is read at once, and {:.6f} by prefixes.".format(
            *losses
        )
    return f"Probed with `hf_holo.check_causality`: {report}.{detail}"


def _versions(config: dict[str, Any]) -> str:
    used = {
        "hf_holo": VERSION,
        "transformers": config.get("transformers_version", transformers.__version__),
        "torch": torch.__version__,
        "Python": platform.python_version(),
    }
    return ", ".join(f"{name} {version}" for name, version in used.items())
