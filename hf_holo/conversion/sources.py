"""What a conversion starts from: the teacher, its tokenizer, and texts in windows."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..errors import UNREADABLE, HoloError, first_line
from ..training.data import read_documents
from ..training.tokenizers import saved_tokenizer
from .convert_arguments import ConvertArguments
from .evaluation import Windows, cut_windows, masked_token, next_token, spread

AUTO_CLASSES = {AutoModelForCausalLM: MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForMaskedLM: MODEL_FOR_MASKED_LM_MAPPING}


@dataclass(frozen=True)
class Source:
    """The teacher, as long as only its config is read.

    Attributes:
        name: folder or Hub name.
        config: its config.
        auto_class: that loads it with its head.
        trust_remote_code: run the code that it brings.
    """

    name: str
    config: PretrainedConfig
    auto_class: type
    trust_remote_code: bool = False

    @classmethod
    def find(cls, name: str, trust_remote_code: bool = False) -> "Source":
        """Raises HoloError if there is no dense causal or masked language model of this name."""
        try:
            config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        except (OSError, ValueError) as error:
            if not trust_remote_code and "trust_remote_code" in str(error):
                raise HoloError(
                    f"TEACHER: {name!r} brings code of its own; read it, and give --trust_remote_code to run it"
                ) from None
            raise HoloError(f"TEACHER: {name!r} holds no model of transformers: {first_line(error)}") from None
        if getattr(config, "quantization_config", None) is not None:
            raise HoloError(f"TEACHER: {name!r} is quantized or converted already; give the dense model")
        heads = {auto: mapping.get(type(config), None) for auto, mapping in AUTO_CLASSES.items()}
        named = config.architectures or []
        brought = getattr(config, "auto_map", {}) if trust_remote_code else {}
        for auto, head in heads.items():
            known = head is not None and (head.__name__ in named or not named)
            if (known or auto.__name__ in brought) and not config.is_encoder_decoder:
                return cls(name, config, auto, trust_remote_code)
        raise HoloError(
            f"TEACHER: {name!r} ({', '.join(named)}) is neither a causal nor a masked language model; `apply_surgery` "
            "converts others"
        )

    @property
    def causal(self) -> bool:
        return self.auto_class is AutoModelForCausalLM

    def without_weights(self) -> PreTrainedModel:
        """The model on the meta device."""
        with torch.device("meta"):
            trust = {"trust_remote_code": self.trust_remote_code}
            return self.auto_class.from_config(AutoConfig.from_pretrained(self.name, **trust), **trust)

    def load(self) -> PreTrainedModel:
        """The model with its weights, in the type that they are stored in.

        Raises:
            HoloError: it is not there, or could not be saved again.
        """
        model = load_weights(self.auto_class, self.name, "auto", trust_remote_code=self.trust_remote_code).eval()
        make_saveable(model.generation_config)
        return model


def make_saveable(config: GenerationConfig | None) -> None:
    """Take options that have no effect out of a generation config that transformers would not save with them, such as a
    temperature without sampling. A warning names them.

    Raises:
        HoloError: it would not save what is left either.
    """
    if config is None or _saving_fails(config) is None:
        return
    defaults = GenerationConfig()
    idle = [] if config.do_sample else [n for n in SAMPLING if getattr(config, n, None) != getattr(defaults, n, None)]
    for name in idle:
        setattr(config, name, getattr(defaults, name, None))
    reason = _saving_fails(config)
    if reason is not None:
        raise HoloError(f"TEACHER: its generation_config cannot be saved again: {reason}; correct it")
    warnings.warn(
        f"TEACHER: its generation_config sets {', '.join(idle)}, which has no effect without do_sample=True and cannot "
        "be saved; it is left out",
        stacklevel=3,
    )


SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


def _saving_fails(config: GenerationConfig) -> str | None:
    """Why transformers would not save a generation config; None if it would."""
    try:
        config.validate(strict=True)
    except ValueError as error:
        return first_line(error)
    return None


def load_weights(
    auto_class: type,
    name: str,
    dtype: torch.dtype | str,
    argument: str = "TEACHER",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model in a folder or on the Hub.

    Args:
        auto_class: of transformers.
        name: folder or Hub name.
        dtype: "auto": the type that the weights are stored in.
        argument: how the error calls it.
        trust_remote_code: run the code that it brings.

    Raises:
        HoloError: it is not there, or no such model.
    """
    try:
        return auto_class.from_pretrained(name, dtype=dtype, trust_remote_code=trust_remote_code)
    except UNREADABLE as error:
        raise HoloError(f"{argument}: cannot load {name!r}: {first_line(error)}") from None


def load_tokenizer(
    teacher: str, needed: bool = True, argument: str = "TEACHER", trust_remote_code: bool = False
) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the teacher; None if there is none and it is not `needed`.

    Raises:
        HoloError: there is none.
    """
    try:
        tokenizer = saved_tokenizer(teacher, argument, trust_remote_code=trust_remote_code)
        if not tokenizer("text", add_special_tokens=False).input_ids:
            raise HoloError(f"{argument}: {teacher!r} has no tokenizer to read the text with: it makes no tokens of it")
    except HoloError:
        if needed:
            raise
        return None
    return tokenizer


@dataclass(frozen=True)
class Text:
    """One text in windows: `calibration` `[N, T]`, as the model reads it, and `held_out`, to be measured on."""

    name: str
    calibration: torch.Tensor
    held_out: Windows


def load_texts(options: ConvertArguments, tokenizer: PreTrainedTokenizerBase | None, source: Source) -> list[Text]:
    """Read, split and encode the texts.

    Raises:
        HoloError: there is none, one cannot be read, one is too short, two have one name, or the windows are too long
            for the teacher.
    """
    if not options.text:
        if options.calibrated:
            raise HoloError("text: a calibrated conversion needs --text, best several of different kinds")
        return []
    names = [Path(name).name for name in options.text]
    for name in names:
        if names.count(name) > 1:  # the report tells them apart by their names
            raise HoloError(f"text: two are called {name!r}; rename one, or name it once")
    positions = getattr(source.config, "max_position_embeddings", None) or options.window
    if options.window > positions:
        raise HoloError(f"window={options.window} is longer than the {positions} positions of the teacher")
    return [
        load_text(name, share, options, tokenizer, source)
        for name, share in zip(options.text, options.held_out_shares, strict=True)
    ]


def load_text(
    name: str, share: float, options: ConvertArguments, tokenizer: PreTrainedTokenizerBase, source: Source
) -> Text:
    """One text: the last `share` of it is held out."""
    from_file = Path(name).exists() or bool(Path(name).suffix)  # a name with a suffix is a file that is missing
    try:
        document = "\n\n".join(read_documents(name) if from_file else read_documents(dataset_name=name))
    except HoloError as error:
        raise HoloError(f"text: {error}") from None
    cut = round((1 - share) * len(document))
    windows = cut_windows(tokenizer, document[:cut], options.window)
    wanted = max(options.tokens // options.window // len(options.text), 1)
    if options.calibrated and len(windows) < wanted:
        raise HoloError(
            f"text: {name!r} has {len(windows) * options.window:,} tokens to calibrate on, but its share of "
            f"tokens={options.tokens} is {wanted * options.window:,}; give more text, or fewer --tokens"
        )
    held_out = cut_windows(tokenizer, document[cut:], options.window)
    if not len(held_out):
        raise HoloError(f"text: the held-out part of {name!r} has less than one window of {options.window} tokens")
    if torch.cat([windows, held_out]).max() >= source.config.vocab_size:
        raise HoloError(f"TEACHER: its tokenizer has more tokens than the {source.config.vocab_size} of the model")
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(options.seed))
    calibration, held_out = windows[order[:wanted]], spread(held_out, options.eval_windows or len(held_out))
    if source.causal:
        return Text(Path(name).name, calibration, next_token(held_out))
    masked = masked_token(calibration, tokenizer, options.seed).inputs
    return Text(Path(name).name, masked, masked_token(held_out, tokenizer, options.seed))


def mixed(texts: Sequence[Text]) -> torch.Tensor:
    """The calibration windows `[N, T]` of all texts, in turn, so that every start of them is a mixture too."""
    return torch.stack([text.calibration for text in texts], dim=1).flatten(0, 1)
