"""The models that suites measure: presets, folders, Hub ids, GGUF files, or models that are in memory."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ...data.processors import new_processor, saved_processor
from ...data.tokenizers import byte_tokenizer, saved_tokenizer
from ...errors import UNREADABLE, HoloError, first_line, unknown
from ...modeling.state_file import checksum
from ...registry import capabilities_of, get_architecture, preset_config, preset_model, presets
from ..conformance import CausalityReport, Subject
from ..conformance.causality import LENGTHS, probe_causality

LARGE = 20_000_000  # parameters from which on a leak is looked for in evaluation only, and not in every setting
CLASSIFIERS: dict[str, tuple[Any, str]] = {  # by the suite that scores them: Auto class, and that of the processor
    "vision": (AutoModelForImageClassification, "AutoImageProcessor"),
    "audio": (AutoModelForAudioClassification, "AutoFeatureExtractor"),
    "multimodal": (AutoModelForSequenceClassification, "AutoProcessor"),
}
TEXT = "text"  # what language models are for


@dataclass(frozen=True, eq=False)
class Evaluated:
    """A model under evaluation.

    Attributes:
        name: what tables call it.
        model: a causal language model or a classifier, in evaluation mode.
        tokenizer: its own; None: none is needed by what is measured.
        processor: what prepares pictures and sounds for a classifier; None: none is needed.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None = None
    processor: Any = None

    @property
    def sense(self) -> str:
        """What it is for: "text", "vision", "audio" or "multimodal"."""
        return sense_of(self.model.config, type(self.model).__name__)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @property
    def vocab_size(self) -> int:
        return self.model.config.get_text_config().vocab_size

    @property
    def max_length(self) -> int | None:
        """The longest text that it takes, in tokens; None: any."""
        config = self.model.config.get_text_config()
        constant = "constant_state" in (capabilities_of(type(self.model), self.model.config) or ())
        return None if constant else getattr(config, "max_position_embeddings", None)

    @cached_property
    def fingerprint(self) -> str:
        """Equal for equal configs and weights."""
        told = f"{self.model.config.to_json_string()} {checksum(self.model.state_dict())}"
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    def needed_tokenizer(self) -> PreTrainedTokenizerBase:
        """Raises HoloError if it has none."""
        if self.tokenizer is None:
            raise HoloError(f"MODEL: {self.name!r} has no tokenizer, which this suite needs; give (model, tokenizer)")
        return self.tokenizer

    def needed_processor(self) -> Any:
        """Raises HoloError if it has none."""
        if self.processor is None:
            raise HoloError(f"MODEL: {self.name!r} has no processor, which this suite needs; give (model, processor)")
        return self.processor


def sense_of(config: PretrainedConfig, class_name: str) -> str:
    """Which sense a model class with this config is for; "text" for all that is no classifier of pictures or sounds."""
    for sense, (auto_class, _) in CLASSIFIERS.items():
        known = auto_class._model_mapping.get(type(config), ())
        names = {model.__name__ for model in (known if isinstance(known, tuple) else (known,))}
        if class_name in names and (sense != "multimodal" or hasattr(config, "modalities")):
            return sense
    return TEXT


def load(
    name: str, device: str = "cpu", dtype: str = "float32", trust_remote_code: bool = False, seed: int = 0
) -> Evaluated:
    """The model of this name.

    Args:
        name: a preset (with random weights, and bytes as tokens), a folder, a Hub id, or a file that ends in `.gguf`.
            What it is, a causal language model or a classifier, follows from its config.
        device: to put it on.
        dtype: of its weights; "auto": as they are stored.
        trust_remote_code: let it bring its own code.
        seed: of the weights of a preset.

    Raises:
        HoloError: there is no such causal language model or classifier.
    """
    if name in presets():
        return _preset(name, device, seed)
    path = Path(name)
    if not (path.exists() or "/" in name):
        raise unknown("preset", name, presets())
    if path.suffix == ".gguf":
        return _gguf(path, device, dtype, trust_remote_code)
    options = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        sense = sense_of(config, next(iter(config.architectures or ()), ""))
        auto_class, processor = CLASSIFIERS.get(sense, (AutoModelForCausalLM, ""))
        model = auto_class.from_pretrained(name, **options)
    except (*UNREADABLE, ImportError) as error:
        raise HoloError(
            f"MODEL: {name!r} is neither a causal language model nor a classifier that loads: {first_line(error)}"
        ) from None
    shown = path.name or name
    if sense != TEXT:
        return _placed(shown, model, None, device, saved_processor(processor, name, "MODEL"))
    return _placed(shown, model, saved_tokenizer(name, "MODEL", trust_remote_code=trust_remote_code), device)


def _preset(name: str, device: str, seed: int) -> Evaluated:
    """A preset with random weights; one that reads has bytes as tokens."""
    config = preset_config(name)
    sense = sense_of(config, get_architecture(config.model_type).model_for(config).__name__)
    torch.manual_seed(seed)
    if sense == TEXT:
        tokenizer = byte_tokenizer()
        model = preset_model(name, vocab_size=len(tokenizer))
        if not model.can_generate():
            raise HoloError(f"MODEL: the preset {name!r} is not a causal language model")
        return _placed(name, model, tokenizer, device)
    processor = None if sense == "multimodal" else new_processor(CLASSIFIERS[sense][1], config)
    return _placed(name, preset_model(name), None, device, processor)


def _gguf(path: Path, device: str, dtype: str, trust_remote_code: bool) -> Evaluated:
    source, file = str(path.parent), {"gguf_file": path.name}
    try:
        options = {"dtype": dtype, "trust_remote_code": trust_remote_code}
        model = AutoModelForCausalLM.from_pretrained(source, **options, **file)
    except (*UNREADABLE, ImportError) as error:
        raise HoloError(
            f"MODEL: {str(path)!r} is not a causal language model that loads: {first_line(error)}"
        ) from None
    return _placed(path.name, model, AutoTokenizer.from_pretrained(source, **file), device)


def _placed(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    device: str,
    processor: Any = None,
) -> Evaluated:
    return Evaluated(name, model.to(device).eval(), tokenizer, processor)  # type: ignore[arg-type]  # `to` is wrapped


def causality_of(model: Evaluated, block_size: int) -> CausalityReport:
    """Whether it sees the future, at the usual lengths and at that of the windows that it will be scored on.

    Args:
        model: that is to be evaluated. The weights stay where they are: it is these that are scored.
        block_size: tokens in such a window.
    """
    subject = Subject(model.model, move_weights=False)
    with torch.random.fork_rng(range(torch.cuda.device_count())), model.device:
        subject.require("text", "token outputs")
        lengths = subject.lengths(*sorted({*LENGTHS, block_size}))
        return probe_causality(subject, lengths, settings=() if model.parameters > LARGE else None)


def refuse_leaks(model: Evaluated, report: CausalityReport, allow: bool) -> None:
    """Raise HoloError for a model that leaks, with what the report says, unless that is allowed."""
    if not report.passed and not allow:
        raise HoloError(
            f"MODEL: {model.name!r} {report}; its losses and answers would be copied from what is to be predicted. "
            "--allow-leaks evaluates it all the same"
        )


def unique_names(models: Sequence[Evaluated]) -> list[Evaluated]:
    """The same models, with a number after a name that has been taken."""
    taken: dict[str, int] = {}
    renamed = []
    for model in models:
        taken[model.name] = taken.get(model.name, 0) + 1
        name = model.name if taken[model.name] == 1 else f"{model.name} ({taken[model.name]})"
        renamed.append(replace(model, name=name))
    return renamed
