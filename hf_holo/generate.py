"""`hf-holo generate`: continue a prompt with any causal language model in a folder, after a text that is read once."""

import sys
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
    set_seed,
)

from .data.tokenizers import saved_tokenizer
from .errors import UNREADABLE, HoloError, Parser, first_line
from .prefix import Prefix


def main(argv: list[str]) -> None:
    """Run `hf-holo generate` with these arguments: the text goes to stdout, its speed to stderr.

    Raises:
        HoloError: bad input; the message is one line that says what to do.
    """
    args = _parse(argv)
    model, tokenizer = load(args.path)
    if args.seed is not None:
        set_seed(args.seed)
    prompt = args.prompt if args.prompt_file is None else read_text("prompt_file", args.prompt_file)
    prefix = None if args.prefix is None else load_prefix("prefix", args.prefix, model)
    start = time.perf_counter()
    if args.save_prefix is not None:
        saved = save_prefix("save_prefix", args.save_prefix, _read(model, tokenizer, prompt, prefix))
        seconds = time.perf_counter() - start
        print(f"{saved.input_ids.shape[1]:,} tokens in {args.save_prefix}, in {seconds:.2f} s", file=sys.stderr)
        return

    streamer = None
    if args.num_beams == 1:  # transformers asks for an AutoTokenizer, of which there are none
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]
    print(prompt, end="", flush=True)
    options = {**sampling(args), "num_beams": args.num_beams, "streamer": streamer}
    tokens = generate_tokens(model, tokenizer, prompt, args.max_new_tokens, prefix, **options)
    seconds = time.perf_counter() - start
    if streamer is None:  # beams are known only at the end
        print(tokenizer.decode(tokens, skip_special_tokens=True))
    print(f"{len(tokens)} tokens in {seconds:.2f} s: {len(tokens) / seconds:.1f} tokens/s", file=sys.stderr)


def load(path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal language model of a folder or of the Hub, ready to generate, and its tokenizer.

    Raises:
        HoloError: `path` is something else.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(path).eval()
    except UNREADABLE as error:
        raise HoloError(f"path: {path!r} is not a causal language model: {first_line(error)}") from None
    return model, saved_tokenizer(path, "path")


def load_prefix(argument: str, path: str, model: PreTrainedModel) -> Prefix:
    """The prefix in a file that an argument names.

    Raises:
        HoloError: it is not one of this model.
    """
    try:
        return Prefix.load(path, model)
    except (OSError, ValueError) as error:
        raise HoloError(f"{argument}: {first_line(error).removeprefix('path: ')}") from None


def save_prefix(argument: str, path: str, prefix: Prefix) -> Prefix:
    """Write a prefix to a file that an argument names; returns it.

    Raises:
        HoloError: it cannot be written.
    """
    try:
        prefix.save(path)
    except (OSError, ValueError) as error:
        raise HoloError(f"{argument}: {first_line(error).removeprefix('path: ')}") from None
    return prefix


def read_text(argument: str, path: str) -> str:
    """The text of a file that an argument names.

    Raises:
        HoloError: it cannot be read as text.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise HoloError(f"{argument}: {path!r} cannot be read as a text in UTF-8: {first_line(error)}") from None


def _read(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, prefix: Prefix | None) -> Prefix:
    """The prefix of a text, or of one that continues another prefix."""
    if prefix is not None:
        return prefix.extended(prompt_ids(tokenizer, text, begins=False))
    return Prefix.read(model, prompt_ids(tokenizer, text))


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, begins: bool = True) -> torch.Tensor:
    """Token ids `[1, T]` of the prompt. An empty one becomes the begin- or end-of-text token, if there is one; after a
    prefix (`begins=False`) it stays empty, and no such token is added.

    Raises:
        HoloError: the prompt begins a text, it is empty, and the tokenizer has no such token.
    """
    ids = tokenizer(prompt, add_special_tokens=begins).input_ids
    if not ids and begins:
        border = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if border is None:
            raise HoloError("prompt: it is empty, and the tokenizer has no token to begin a text with; give a prompt")
        ids = [border]
    return torch.tensor([ids], dtype=torch.long)


def generate_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int,
    prefix: Prefix | None = None,
    **options: Any,
) -> torch.Tensor:
    """Continue `prompt`, after a prefix if one is given; returns the ids `[T]` of what is new. `options` go to
    `model.generate`."""
    ids = prompt_ids(tokenizer, prompt, begins=prefix is None)
    inputs = (Prefix.empty(model) if prefix is None else prefix).followed_by(ids)
    tokens: Any = model.eval().generate(
        **inputs, max_new_tokens=max_new_tokens, pad_token_id=padding_id(tokenizer), **options
    )
    return tokens[0, inputs["input_ids"].shape[1] :]


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """What `generate` fills rows with that have ended; named, it says no word about it."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def generate_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int) -> str:
    """Prompt and a sampled continuation at temperature 0.8, as text."""
    tokens = generate_tokens(model, tokenizer, prompt, max_new_tokens, do_sample=True, temperature=0.8)
    return prompt + tokenizer.decode(tokens, skip_special_tokens=True)


def _parse(argv: list[str]) -> Namespace:
    parser = Parser(prog="hf-holo generate", description="Continue a prompt, and show how fast.")
    parser.add_argument("path", help="folder or Hub name of a causal language model with its tokenizer")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", default="", help="text to continue")
    prompt.add_argument("--prompt_file", help="file with the text to continue, in UTF-8")
    parser.add_argument("--prefix", help="file of --save_prefix: the prompt continues the text that was read then")
    parser.add_argument("--save_prefix", help="read the prompt, write the state after it to this file, and no text")
    parser.add_argument("--num_beams", type=int, default=1, help="search with this many beams")
    add_sampling(parser, max_new_tokens=200)
    args = parser.parse_args(argv)
    check_sampling(args)
    if args.num_beams < 1:
        raise HoloError(f"num_beams: {args.num_beams} is out of range; at least 1")
    if args.prefix is not None and args.num_beams > 1:
        raise HoloError(f"num_beams: {args.num_beams} does not go with --prefix, which is one row; give 1")
    return args


def add_sampling(parser: ArgumentParser, max_new_tokens: int) -> None:
    """The options that say how text is written."""
    parser.add_argument("--max_new_tokens", type=int, default=max_new_tokens)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token each time")
    parser.add_argument("--top_k", type=int, default=50, help="sample from this many most likely tokens; 0: from all")
    parser.add_argument("--top_p", type=float, default=1.0, help="sample from the most likely tokens of this mass")
    parser.add_argument("--seed", type=int, help="makes sampling repeatable")


def check_sampling(args: Namespace) -> None:
    """Raise HoloError where one of these options is out of range."""
    for name, value, good, accepted in (
        ("max_new_tokens", args.max_new_tokens, args.max_new_tokens > 0, "at least 1"),
        ("temperature", args.temperature, args.temperature >= 0, "0 or more"),
        ("top_k", args.top_k, args.top_k >= 0, "0 or more"),
        ("top_p", args.top_p, 0 < args.top_p <= 1, "above 0, at most 1"),
    ):
        if not good:
            raise HoloError(f"{name}: {value} is out of range; {accepted}")


def sampling(args: Namespace) -> dict[str, Any]:
    """These options as `model.generate` takes them."""
    if args.temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
