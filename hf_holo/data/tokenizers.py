"""Tokenizers made from the training text: characters, bytes, byte-level BPE, none of which adds tokens to plain text;
and those that were saved."""

from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import TypeVar

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..errors import HoloError, first_line
from ..modeling.tokenization_holo import HoloTokenizer
from ..registry import architectures

PAD, UNKNOWN, END, MASK = "<|pad|>", "<|unk|>", "<|end|>", "<|mask|>"
TOKENIZERS = ("characters", "bytes", "bpe")
AnyTokenizer = TypeVar("AnyTokenizer", bound=PreTrainedTokenizerBase)


def character_tokenizer(texts: Iterable[str]) -> HoloTokenizer:
    """One token per character of `texts`; other characters become the unknown token. Decoding is exact otherwise."""
    alphabet = sorted(set(chain.from_iterable(texts)))
    vocabulary = {token: index for index, token in enumerate([PAD, UNKNOWN, END, *alphabet])}
    # BPE without merges splits text into characters, and is the fastest model in `tokenizers` to do so.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN))
    tokenizer.decoder = decoders.Fuse()
    return _wrap(tokenizer, unk_token=UNKNOWN)


def byte_tokenizer() -> HoloTokenizer:
    """One token per UTF-8 byte: nothing is unknown, decoding is exact."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([PAD, END, *alphabet])}
    tokenizer = _byte_level(models.BPE(vocab=vocabulary, merges=[]), use_regex=False)
    return _wrap(tokenizer)


def bpe_tokenizer(texts: Iterable[str], vocab_size: int = 4096) -> HoloTokenizer:
    """Byte-level BPE trained on `texts`: nothing is unknown, decoding is exact.

    Raises:
        HoloError: `vocab_size` leaves no room for merges.
    """
    smallest = 256 + len((PAD, END))
    if vocab_size <= smallest:
        raise HoloError(f"vocab_size: {vocab_size} leaves no room for merges; it must exceed {smallest}")
    tokenizer = _byte_level(models.BPE(), use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrap(tokenizer)


def make_tokenizer(kind: str, texts: Iterable[str], vocab_size: int = 4096, masked: bool = False) -> HoloTokenizer:
    """Make a tokenizer of `kind` ("characters", "bytes" or "bpe") for `texts`.

    Args:
        vocab_size: number of tokens of BPE, the mask token included.
        masked: with a mask token, after all others.
    """
    if kind == "characters":
        tokenizer = character_tokenizer(texts)
    elif kind == "bytes":
        tokenizer = byte_tokenizer()
    elif kind == "bpe":
        tokenizer = bpe_tokenizer(texts, vocab_size - masked)
    else:
        raise HoloError(
            f"tokenizer: {kind!r} is unknown; give {', '.join(TOKENIZERS)} or the folder of a saved tokenizer"
        )
    return add_mask(tokenizer) if masked else tokenizer


def default_kind(model_type: str) -> str:
    """The kind of a new tokenizer where none is named: characters.

    Args:
        model_type: of the family that it is for.

    Raises:
        HoloError: the family has a tokenizer class of its own, and only a saved one fits.
    """
    architecture = architectures().get(model_type)
    own = None if architecture is None else architecture.tokenizer
    if own not in (None, HoloTokenizer):
        raise HoloError(
            f"tokenizer: the family {model_type!r} has its own, {own.__name__}; name the folder of a saved one, or one "
            f"of {', '.join(TOKENIZERS)} for a new one in its place"
        )
    return "characters"


def saved_tokenizer(
    name: str | Path, argument: str, local_files_only: bool = False, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or on the Hub.

    Args:
        name: folder or Hub name.
        argument: how the error calls it.
        local_files_only: do not look on the Hub.
        trust_remote_code: run the code that it brings.

    Raises:
        HoloError: there is none, it is damaged, or it has no tokens.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(name), local_files_only=local_files_only, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # of a damaged file, `tokenizers` raises no narrower one
        reason = first_line(error)
    else:
        if len(tokenizer):
            return tokenizer
        reason = "it has no tokens"
    raise HoloError(f"{argument}: {str(name)!r} has no tokenizer, or a damaged one: {reason}")


def add_mask(tokenizer: AnyTokenizer) -> AnyTokenizer:
    """The tokenizer with a mask token; in a text, `<|mask|>` stands for one token with the space before it."""
    if tokenizer.mask_token is None:
        tokenizer.add_special_tokens({"mask_token": MASK})
    return tokenizer


def _byte_level(model: models.BPE, use_regex: bool) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _wrap(tokenizer: Tokenizer, **special_tokens: str) -> HoloTokenizer:
    return HoloTokenizer(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        clean_up_tokenization_spaces=False,
        **special_tokens,
    )
