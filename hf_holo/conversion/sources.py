"""What a conversion starts from: the teacher, its tokenizer, and texts in windows."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

from ..data.documents import read_named, split_documents
from ..data.masking import Masking, masked_splits
from ..data.scoring import held_out_loss
from ..data.tokenizers import saved_tokenizer
from ..data.windows import AnyWindows, Splits, text_splits
from ..errors import UNREADABLE, HoloError, first_line
from .convert.arguments import ConvertArguments

MASKED_SHARE = 0.15  # of the tokens that a masked language model is asked for
AutoClass = type[AutoModelForCausalLM] | type[AutoModelForMaskedLM]
AUTO_CLASSES: dict[AutoClass, Any] = {
    AutoModelForCausalLM: MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForMaskedLM: MODEL_FOR_MASKED_LM_MAPPING,
}


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
    auto_class: AutoClass
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
            raise HoloError(f"TEACHER: {name!r} is not a model of transformers: {first_line(error)}") from None
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
        make_saveable(getattr(model, "generation_config", None))  # transformers 5 has none for encoders
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
    auto_class: AutoClass,
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


def load_tokenizer(teacher: str, argument: str = "TEACHER", trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of the teacher.

    Raises:
        HoloError: there is none.
    """
    tokenizer = saved_tokenizer(teacher, argument, trust_remote_code=trust_remote_code)
    if not tokenizer("text", add_special_tokens=False).input_ids:
        raise HoloError(f"{argument}: {teacher!r} has no tokenizer that turns the text into tokens")
    return tokenizer


@dataclass(frozen=True)
class Text:
    """One text in windows.

    Attributes:
        name: of its file.
        calibration: `[N, T]`, as the model reads it.
        held_out: windows to be measured on, with labels.
        prompt: the start of the held-out part.
        causal: whether tokens are to be predicted from those before them, or masked ones from all others.
    """

    name: str
    calibration: torch.Tensor
    held_out: AnyWindows
    prompt: str
    causal: bool

    def perplexity(self, model: PreTrainedModel, description: str = "perplexity") -> float:
        """exp of the loss on the held-out windows, one at a time; processes of one run share them."""
        loss = held_out_loss(model, self.held_out, shift=self.causal, description=description, shared=True)
        return torch.tensor(loss, dtype=torch.float64).exp().item()  # infinite rather than an OverflowError


def calibration_texts(
    options: ConvertArguments, tokenizer: PreTrainedTokenizerBase | None, source: Source
) -> list[Text]:
    """Read, split and encode the texts of a conversion.

    Raises:
        HoloError: there is none, one cannot be read, one is too short, two have one name, or the windows are too long
            for the teacher.
    """
    if not options.train_file or tokenizer is None:
        if options.calibrated:
            raise HoloError("train_file: a calibrated conversion needs --train_file, ideally texts of several kinds")
        return []
    names = [Path(name).name for name in options.train_file]
    for name in names:
        if names.count(name) > 1:  # the report tells them apart by their names
            raise HoloError(f"train_file: two are called {name!r}; rename one, or name it once")
    positions = getattr(source.config, "max_position_embeddings", None) or options.block_size
    if options.block_size > positions:
        raise HoloError(f"block_size: {options.block_size} is longer than the {positions} positions of the teacher")
    return [
        calibration_text(name, share, options, tokenizer, source)
        for name, share in zip(options.train_file, options.validation_shares, strict=True)
    ]


def calibration_text(
    name: str, share: float, options: ConvertArguments, tokenizer: PreTrainedTokenizerBase, source: Source
) -> Text:
    """One text: the last `share` of it is held out."""
    splits = splits_of(name, share, tokenizer, options.block_size, masked=not source.causal)
    wanted = max(options.tokens // options.block_size // len(options.train_file), 1)
    if options.calibrated and len(splits.train) < wanted:
        raise HoloError(
            f"train_file: {name!r} has {len(splits.train) * options.block_size:,} tokens to calibrate on, but its "
            f"share of tokens={options.tokens} is {wanted * options.block_size:,}; give more text, or fewer --tokens"
        )
    order = torch.randperm(len(splits.train), generator=torch.Generator().manual_seed(options.seed))[:wanted]
    calibration = torch.stack([splits.train[i]["input_ids"] for i in order.tolist()])
    if not source.causal:
        calibration, _ = Masking(tokenizer, MASKED_SHARE, only_masks=True)(calibration, options.seed)
    held_out = splits.scored_on(options.eval_windows).validation
    largest = max(int(ids.max()) for ids in (calibration, *(held_out[i]["input_ids"] for i in range(len(held_out)))))
    if largest >= source.config.vocab_size:
        raise HoloError(f"TEACHER: its tokenizer has more tokens than the {source.config.vocab_size} of the model")
    return Text(Path(name).name, calibration, held_out, splits.prompt, source.causal)


def splits_of(
    name: str,
    share: float,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    stride: int | None = None,
    text_column: str = "text",
    masked: bool = False,
) -> Splits:
    """One text in windows, cut as `hf-holo train` cuts it, so that losses can be compared.

    Args:
        name: of a file, a folder, or a built-in or Hub dataset.
        share: of it that is held out, at its end.
        tokenizer: reads it.
        block_size, stride: tokens in a window, and from one training window to the next.
        text_column: of a table.
        masked: whether masked tokens are to be predicted.

    Raises:
        HoloError: it cannot be read, or is too short.
    """
    parts = split_documents(read_named(name, text_column), share)
    if masked and tokenizer.mask_token_id is None:
        raise HoloError("TEACHER: its tokenizer has no mask token, which a masked language model needs")
    try:
        return (masked_splits if masked else text_splits)(*parts, tokenizer, block_size, stride)
    except HoloError as error:
        raise HoloError(f"{error} ({name!r})") from None


def mixed(texts: Sequence[Text]) -> torch.Tensor:
    """The calibration windows `[N, T]` of all texts, in turn, so that every start of them is a mixture too."""
    return torch.stack([text.calibration for text in texts], dim=1).flatten(0, 1)
