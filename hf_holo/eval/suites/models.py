"""The models that suites measure: presets, folders, Hub ids, GGUF files, or models that are in memory."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ...data.tokenizers import byte_tokenizer, saved_tokenizer
from ...errors import UNREADABLE, HoloError, first_line, unknown
from ...modeling.state_file import checksum
from ...registry import capabilities_of, preset_model, presets
from ..conformance import CausalityReport, Subject
from ..conformance.causality import LENGTHS, probe_causality

LARGE = 20_000_000  # parameters from which on a leak is looked for in evaluation only, and not in every setting


@dataclass(frozen=True, eq=False)
class Evaluated:
    """A model under evaluation.

    Attributes:
        name: what tables call it.
        model: a causal language model, in evaluation mode.
        tokenizer: its own; None: none is needed by what is measured.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None = None

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


def load(
    name: str, device: str = "cpu", dtype: str = "float32", trust_remote_code: bool = False, seed: int = 0
) -> Evaluated:
    """The model of this name.

    Args:
        name: a preset (with random weights, and bytes as tokens), a folder, a Hub id, or a file that ends in `.gguf`.
        device: to put it on.
        dtype: of its weights; "auto": as they are stored.
        trust_remote_code: let it bring its own code.
        seed: of the weights of a preset.

    Raises:
        HoloError: there is no such causal language model.
    """
    if name in presets():
        tokenizer = byte_tokenizer()
        torch.manual_seed(seed)
        model = preset_model(name, vocab_size=len(tokenizer))
        if not model.can_generate():
            raise HoloError(f"MODEL: the preset {name!r} is not a causal language model")
        return _placed(name, model, tokenizer, device)
    path = Path(name)
    if not (path.exists() or "/" in name):
        raise unknown("preset", name, presets())
    from_gguf = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    source = str(path.parent) if from_gguf else name
    try:
        options = {"dtype": dtype, "trust_remote_code": trust_remote_code, **from_gguf}
        model = AutoModelForCausalLM.from_pretrained(source, **options)
    except (*UNREADABLE, ImportError) as error:
        raise HoloError(f"MODEL: {name!r} is not a causal language model that loads: {first_line(error)}") from None
    if from_gguf:
        return _placed(path.name, model, AutoTokenizer.from_pretrained(source, **from_gguf), device)
    saved = saved_tokenizer(name, "MODEL", trust_remote_code=trust_remote_code)
    return _placed(path.name or name, model, saved, device)


def _placed(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: str) -> Evaluated:
    return Evaluated(name, model.to(device).eval(), tokenizer)  # type: ignore[arg-type]  # transformers wraps `to`


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
        renamed.append(Evaluated(name, model.model, model.tokenizer))
    return renamed
