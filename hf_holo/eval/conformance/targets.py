"""From what a user names (a family, a preset, a checkpoint) to the models to check."""

from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ...errors import UNREADABLE, HoloError, first_line, unknown
from ...registry import Architecture, architectures, preset_config, presets
from ..catalogue import catalogue
from .subject import Subject

VOCABULARY = 256  # tokens of a preset that leaves the size of its vocabulary open: it costs much and proves nothing


def subjects_of(target: str, quick: bool = False, seed: int = 0, trust_remote_code: bool = False) -> list[Subject]:
    """The models that a target stands for.

    Args:
        target: a family (all its variants and heads), a preset (its main model), or the folder or Hub id of a
            checkpoint.
        quick: of a family, take the main model of every variant, and the other heads of the first variant only.
        seed: of weights and inputs.
        trust_remote_code: allow a checkpoint to bring its own code.

    Raises:
        HoloError: it is not one of these, or the checkpoint cannot be loaded.
    """
    if target in architectures():
        return family_subjects(architectures()[target], quick, seed)
    if target in presets():
        open_size = {} if "vocab_size" in presets()[target].kwargs else {"vocab_size": VOCABULARY}
        config = preset_config(target, **open_size)
        return [Subject(architectures()[config.model_type].model_for(config), config, name=target, seed=seed)]
    if not (Path(target).is_dir() or "/" in target):
        raise unknown("family or preset", target, [*architectures(), *presets()])
    return [Subject(load_checkpoint(target, trust_remote_code), seed=seed)]


def family_subjects(architecture: Architecture, quick: bool = False, seed: int = 0) -> list[Subject]:
    """Every variant of a family with every head; quick: see [`subjects_of`].

    Raises:
        HoloError: the family has neither variants nor presets.
    """
    subjects = []
    variants = architecture.variants or _smallest_preset(architecture)
    for number, (variant, kwargs) in enumerate(variants.items()):
        for model_class in architecture.models.values():
            if number == 0 or not quick or model_class is architecture.main_model:
                name = f"{model_class.__name__}/{variant}"
                subjects.append(Subject(model_class, architecture.config(**kwargs), name=name, seed=seed))
    return subjects


def _smallest_preset(architecture: Architecture) -> dict[str, dict]:
    names = [row["preset"] for row in catalogue() if row["family"] == architecture.name]
    if not names:
        raise HoloError(
            f"TARGET: {architecture.name!r} names no model to check; register it with variants= or presets="
        )
    return {names[0]: architecture.presets[names[0]]}


def load_checkpoint(path: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model in a folder or on the Hub, in float32, as the class that it was saved from.

    Raises:
        HoloError: there is no model that can be loaded.
    """
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        model_class = _saved_class(config) or AutoModelForCausalLM
        options = {"trust_remote_code": True} if trust_remote_code else {}
        return model_class.from_pretrained(path, dtype=torch.float32, **options)
    except UNREADABLE as error:
        raise HoloError(f"{path!r} is not a checkpoint that can be loaded: {first_line(error)}") from error


def _saved_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """The class that the config names, of a registered family or of transformers."""
    name = next(iter(config.architectures or []), None)
    if config.model_type in architectures():
        classes = {model.__name__: model for model in architectures()[config.model_type].models.values()}
        return classes.get(name)
    return getattr(transformers, name, None) if name else None
