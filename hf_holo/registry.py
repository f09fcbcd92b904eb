"""The registry of architectures: one call makes a family known to hf_holo and to the Auto classes of transformers.

Everything that lists families, presets or model classes (the command line, the public names of the package, the tests)
is derived from here. Third-party packages add their own through the entry-point group `hf_holo.architectures`.
"""

import importlib
import inspect
import json
import warnings
from collections import UserDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from .errors import HoloError, unknown

ENTRY_POINT_GROUP = "hf_holo.architectures"
PRESETS = Path(__file__).parent / "presets"  # one folder for each family of this package
PROCESSOR_MAPPINGS = {"AutoFeatureExtractor": FEATURE_EXTRACTOR_MAPPING, "AutoProcessor": PROCESSOR_MAPPING}
VARIANTS = Path(__file__).parent / "variants"  # one JSON file for each family of this package


class Classes(UserDict):
    """Keys to classes, where a class may also be written "module:Class"; such a one is imported when it is looked up.

    That keeps `import hf_holo` fast: no modeling file is read before one of its models is needed. A value may also be a
    tuple or a dictionary of classes, as transformers has them for image processors.
    """

    def __getitem__(self, key: Any) -> Any:
        return _imported(self.data[key])


def _imported(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_imported, value))
    if isinstance(value, dict):
        return {key: _imported(part) for key, part in value.items()}
    if not isinstance(value, str):
        return value
    module, _, name = value.partition(":")
    return getattr(importlib.import_module(module), name)


@dataclass(frozen=True)
class Architecture:
    """A registered family.

    Args:
        name: the `model_type` of the config.
        config: the config class.
        models: names of Auto classes ("AutoModel", "AutoModelForCausalLM", ...) to model classes.
        presets: names to config arguments.
        variants: names to config arguments of small models that the conformance kit checks.
        preprocessors: "AutoTokenizer", "AutoImageProcessor", "AutoFeatureExtractor" and "AutoProcessor" to the classes
            that the family has of its own.
        declared_capabilities: flags given on registration; None leaves it to the model classes.
    """

    name: str
    config: type[PretrainedConfig]
    models: Classes
    presets: Mapping[str, dict[str, Any]]
    variants: Mapping[str, dict[str, Any]]
    preprocessors: Classes
    declared_capabilities: frozenset[str] | None = None

    @property
    def tokenizer(self) -> type | None:
        """The tokenizer class of its own, if it has one."""
        return self.preprocessors.get("AutoTokenizer")

    @property
    def image_processor(self) -> Any:
        """The image processor class of its own, if it has one."""
        return self.preprocessors.get("AutoImageProcessor")

    @property
    def feature_extractor(self) -> Any:
        """The feature extractor class of its own, if it has one."""
        return self.preprocessors.get("AutoFeatureExtractor")

    @property
    def processor(self) -> Any:
        """The processor class of its own, if it has one."""
        return self.preprocessors.get("AutoProcessor")

    @property
    def capabilities(self) -> frozenset[str]:
        """The flags given on registration, else those in the attribute `capabilities` of the model classes."""
        if self.declared_capabilities is not None:
            return self.declared_capabilities
        return frozenset().union(*(getattr(model, "capabilities", ()) for model in self.models.values()))

    @property
    def main_model(self) -> type[PreTrainedModel]:
        """The causal language model if there is one, else the first model class."""
        return self.models["AutoModelForCausalLM" if "AutoModelForCausalLM" in self.models else next(iter(self.models))]

    def model_for(self, config: PretrainedConfig) -> type[PreTrainedModel]:
        """The model class that a preset with this config is made of: where `causal` is False, the masked language model
        if there is one, else the main model."""
        bidirectional = getattr(config, "causal", None) is False and "AutoModelForMaskedLM" in self.models
        return self.models["AutoModelForMaskedLM"] if bidirectional else self.main_model


class Preset(NamedTuple):
    """A named set of config arguments and the family that it belongs to."""

    architecture: Architecture
    kwargs: dict[str, Any]


_ARCHITECTURES: dict[str, Architecture] = {}


def register_architecture(
    name: str,
    config: type[PretrainedConfig],
    models: Mapping[str, type[PreTrainedModel] | str],
    presets: Mapping[str, dict[str, Any]] | Path | None = None,
    variants: Mapping[str, dict[str, Any]] | Path | None = None,
    tokenizer: type[PreTrainedTokenizerBase] | None = None,
    processor: type | str | None = None,
    capabilities: Iterable[str] | None = None,
    image_processor: type | str | None = None,
    feature_extractor: type | str | None = None,
) -> Architecture:
    """Register a family with hf_holo and with AutoConfig, the AutoModel classes, AutoTokenizer, AutoImageProcessor,
    AutoFeatureExtractor and AutoProcessor.

    Registering the same thing twice is fine. Nothing is registered when an error is raised.

    Args:
        name: the `model_type` of `config`.
        config: a subclass of `PretrainedConfig`.
        models: names of Auto classes to subclasses of `PreTrainedModel`, or to strings "module:Class" that are
            imported when first needed.
        presets: names to config arguments, or a folder with one JSON file for each; default: none.
        variants: names to config arguments of small models that together reach every part of the code, or a JSON file
            with them: what `hf-holo check` and the tests run over. The first gives the sizes, each of the others says
            what it changes. Default: the smallest preset.
        tokenizer: the tokenizer class of the family; default: none.
        processor: the class that joins the ones above and below, or a string "module:Class"; default: none.
        capabilities: flags such as "causal", "bidirectional", "constant_state", "packing", "rollback"; default: the
            attribute `capabilities` of the model classes.
        image_processor: the image processor class of the family, or a string "module:Class"; default: none.
        feature_extractor: the class that prepares sounds, or a string "module:Class"; default: none.

    Returns:
        The registered family.

    Raises:
        HoloError: an argument has the wrong type, or a name is taken by another family here or in transformers.
    """
    _check_class("config", config, PretrainedConfig)
    if name != config.model_type:
        raise HoloError(f"name: {name!r} differs from {config.__name__}.model_type={config.model_type!r}: use one name")
    _check_models(models, config)
    preprocessors = {
        "AutoTokenizer": _check_part("tokenizer", tokenizer, "PreTrainedTokenizerBase"),
        "AutoImageProcessor": _check_part("image_processor", image_processor, "ImageProcessingMixin"),
        "AutoFeatureExtractor": _check_part("feature_extractor", feature_extractor, "FeatureExtractionMixin"),
        "AutoProcessor": _check_part("processor", processor, "ProcessorMixin"),
    }
    architecture = Architecture(
        name=name,
        config=config,
        models=Classes(models),
        presets=_read_presets(presets),
        variants=_read_variants(variants),
        preprocessors=Classes({name: part for name, part in preprocessors.items() if part is not None}),
        declared_capabilities=None if capabilities is None else frozenset(capabilities),
    )
    if _ARCHITECTURES.get(name) == architecture:
        return architecture
    _check_clashes(architecture)
    _register_with_transformers(architecture)
    _ARCHITECTURES[name] = architecture
    return architecture


def architectures() -> dict[str, Architecture]:
    """All registered families by name."""
    return dict(_ARCHITECTURES)


def get_architecture(name: str) -> Architecture:
    """The family `name`.

    Raises:
        HoloError: there is none; the message names the nearest.
    """
    if name not in _ARCHITECTURES:
        raise unknown("architecture", name, _ARCHITECTURES)
    return _ARCHITECTURES[name]


def presets() -> dict[str, Preset]:
    """All presets of all families by name."""
    return {
        preset: Preset(architecture, dict(kwargs))
        for architecture in _ARCHITECTURES.values()
        for preset, kwargs in architecture.presets.items()
    }


def preset_config(preset: str, **overrides: Any) -> PretrainedConfig:
    """The config of a preset.

    Args:
        preset: its name, for example "hsn-tiny".
        overrides: config arguments that replace or add to those of the preset.

    Raises:
        HoloError: there is no such preset (the message names the nearest), or the config refuses a value.
    """
    known = presets()
    if preset not in known:
        raise unknown("preset", preset, known)
    architecture, kwargs = known[preset]
    try:
        return architecture.config(**{**kwargs, **overrides})
    except ValueError as error:
        raise HoloError(f"preset: {preset!r}: {error}") from error


def preset_model(preset: str, **overrides: Any) -> PreTrainedModel:
    """A new model of a preset with random weights; arguments and errors as in [`preset_config`]."""
    config = preset_config(preset, **overrides)
    return get_architecture(config.model_type).model_for(config)(config)


def capabilities_of(model_class: type[PreTrainedModel], config: PretrainedConfig) -> frozenset[str] | None:
    """What a model class claims for a config: what its method `capabilities_of` says, else its registration, else its
    attribute `capabilities`; None if nothing says it."""
    if hasattr(model_class, "capabilities_of"):
        return model_class.capabilities_of(config)
    architecture = _ARCHITECTURES.get(config.model_type)
    if architecture is not None:
        return architecture.capabilities
    return getattr(model_class, "capabilities", None)


def load_plugins() -> None:
    """Load every entry point of the group `hf_holo.architectures`.

    An entry point names a module that registers at import, or a function that does so when called. A broken one must
    not break `import hf_holo`, whatever it raises: it is left out with a warning that names it.
    """
    for entry_point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            loaded = entry_point.load()
            if callable(loaded):
                loaded()
        except Exception as error:
            reason = " ".join(str(error).split())
            warnings.warn(
                f"the hf_holo plug-in {entry_point.name!r} ({entry_point.value}) was left out: "
                f"{type(error).__name__}: {reason}",
                stacklevel=2,
            )


def _check_class(argument: str, value: Any, base: type) -> type[Any]:
    if not (isinstance(value, type) and issubclass(value, base)):
        raise HoloError(f"{argument}: {value!r} is not a subclass of {base.__name__}")
    return value


def _check_part(argument: str, value: type | str | None, base: str) -> type | str | None:
    """A class that prepares inputs; `base`: the class of transformers that it must be of."""
    if value is None or (isinstance(value, str) and ":" in value):
        return value
    return _check_class(argument, value, getattr(transformers, base))


def _check_models(models: Mapping[str, type[PreTrainedModel] | str], config: type[PretrainedConfig]) -> None:
    if not models:
        raise HoloError(f"models: {models!r} does not name a model class; at least one is needed")
    for auto_name, model in models.items():
        if not hasattr(getattr(transformers, auto_name, None), "_model_mapping"):
            raise HoloError(f"models: {auto_name!r} is not an Auto class for models; one is 'AutoModelForCausalLM'")
        if isinstance(model, str) and ":" in model:
            continue
        known = _check_class(f"models[{auto_name!r}]", model, PreTrainedModel)
        if known.config_class is not config:
            raise HoloError(f"models[{auto_name!r}]: {known.__name__}.config_class must be {config.__name__}")


def _read_presets(source: Mapping[str, dict[str, Any]] | Path | None) -> dict[str, dict[str, Any]]:
    if isinstance(source, Path):
        if not source.is_dir():
            raise HoloError(f"presets: {str(source)!r} is not a folder; give one with a JSON file for each preset")
        source = {path.stem: _read_json(path) for path in sorted(source.glob("*.json"))}
    return _check_mappings("presets", source or {})


def _read_variants(source: Mapping[str, dict[str, Any]] | Path | None) -> dict[str, dict[str, Any]]:
    if isinstance(source, Path):
        if not source.is_file():
            raise HoloError(f"variants: {str(source)!r} is not a file; give a JSON file")
        source = _read_json(source)
    source = _check_mappings("variants", source or {})
    first = next(iter(source.values()), {})
    return {name: {**first, **kwargs} for name, kwargs in source.items()}


def _check_mappings(argument: str, source: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(source, Mapping):
        raise HoloError(f"{argument}: {source!r} is not a mapping of names to config arguments")
    for name, kwargs in source.items():
        if not isinstance(kwargs, Mapping):
            raise HoloError(f"{argument}: {name!r} is {kwargs!r}, not a mapping of config arguments")
    return dict(source)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise HoloError(f"{str(path)!r} is not valid JSON: {error}") from error


def _check_clashes(new: Architecture) -> None:
    if new.name in _ARCHITECTURES:
        raise HoloError(f"name: {new.name!r} is already registered with other parts; choose another name")
    if new.name in CONFIG_MAPPING and CONFIG_MAPPING[new.name] is not new.config:
        taken = CONFIG_MAPPING[new.name].__name__
        raise HoloError(f"name: {new.name!r} is taken by {taken} in transformers; choose another name")
    for preset, (owner, _) in presets().items():
        if preset in new.presets:
            raise HoloError(f"presets: {preset!r} of {new.name!r} is taken by architecture {owner.name!r}; rename it")


def _register_with_transformers(architecture: Architecture) -> None:
    config = architecture.config
    AutoConfig.register(architecture.name, config, exist_ok=True)
    for auto_name, model in architecture.models.data.items():
        _register_model(getattr(transformers, auto_name), config, model)
    for auto_name, part in architecture.preprocessors.data.items():
        if auto_name == "AutoTokenizer":
            fast = issubclass(part, PreTrainedTokenizerFast)
            kind = "fast_tokenizer_class" if fast else "slow_tokenizer_class"
            AutoTokenizer.register(config, **{kind: part}, exist_ok=True)
        elif auto_name == "AutoImageProcessor":
            _register_lazily(IMAGE_PROCESSOR_MAPPING, config, _by_backend(part))
        else:
            _register_lazily(PROCESSOR_MAPPINGS[auto_name], config, part)


def _by_backend(image_processor: type | str) -> Any:
    """An image processor as transformers keeps it: (slow, fast) in 4.57, by the name of its backend in 5."""
    if "image_processor_classes" in inspect.signature(AutoImageProcessor.register).parameters:
        return {"pil": image_processor}
    return image_processor, None


def _register_model(auto_class: Any, config: type[PretrainedConfig], model: type | str) -> None:
    """What `auto_class.register` does, for classes that are still to be imported too."""
    _register_lazily(auto_class._model_mapping, config, model)
    if auto_class is AutoModelForCausalLM:  # Trainer shifts the labels of label smoothing for the classes named here
        name = model.rpartition(":")[2] if isinstance(model, str) else model.__name__
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type] = name


def _register_lazily(mapping: Any, config: type[PretrainedConfig], value: Any) -> None:
    """Register with a mapping of transformers what may still have to be imported."""
    if not isinstance(mapping._extra_content, Classes):
        mapping._extra_content = Classes(mapping._extra_content)
    mapping.register(config, value, exist_ok=True)
