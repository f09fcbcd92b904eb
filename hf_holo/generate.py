"""`hf-holo generate`: continue a prompt with any causal language model in a folder."""

import sys
import time
from argparse import Namespace
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


def main(argv: list[str]) -> None:
    """Run `hf-holo generate` with these arguments: the text goes to stdout, its speed to stderr.

    Raises:
        HoloError: bad input; the message is one line that says what to do.
    """
    args = _parse(argv)
    try:
        model = AutoModelForCausalLM.from_pretrained(args.path)
    except UNREADABLE as error:
        raise HoloError(f"path: {args.path!r} is not a causal language model: {first_line(error)}") from None
    tokenizer = saved_tokenizer(args.path, "path")
    if args.seed is not None:
        set_seed(args.seed)

    streamer = None
    if args.num_beams == 1:  # transformers asks for an AutoTokenizer, of which there are none
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]
    sampling = {"do_sample": args.temperature > 0, "num_beams": args.num_beams}
    if args.temperature > 0:
        sampling |= {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    print(args.prompt, end="", flush=True)
    start = time.perf_counter()
    tokens = generate_tokens(model, tokenizer, args.prompt, args.max_new_tokens, streamer=streamer, **sampling)
    seconds = time.perf_counter() - start
    if streamer is None:  # beams are known only at the end
        print(tokenizer.decode(tokens, skip_special_tokens=True))
    print(f"{len(tokens)} tokens in {seconds:.2f} s: {len(tokens) / seconds:.1f} tokens/s", file=sys.stderr)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> torch.Tensor:
    """Token ids `[1, T]` of the prompt. An empty one becomes the begin- or end-of-text token, if there is one.

    Raises:
        HoloError: the prompt is empty, and the tokenizer has no such token.
    """
    ids = tokenizer(prompt).input_ids
    if not ids:
        border = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if border is None:
            raise HoloError("prompt: it is empty, and the tokenizer has no token to begin a text with; give a prompt")
        ids = [border]
    return torch.tensor([ids])


def generate_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int, **options: Any
) -> torch.Tensor:
    """Continue `prompt`; returns the ids `[T]` of what is new. `options` go to `model.generate`."""
    ids = prompt_ids(tokenizer, prompt).to(model.device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    tokens = model.eval().generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, pad_token_id=pad, **options
    )
    return tokens[0, ids.shape[1] :]


def generate_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int) -> str:
    """Prompt and a sampled continuation at temperature 0.8, as text."""
    tokens = generate_tokens(model, tokenizer, prompt, max_new_tokens, do_sample=True, temperature=0.8)
    return prompt + tokenizer.decode(tokens, skip_special_tokens=True)


def _parse(argv: list[str]) -> Namespace:
    parser = Parser(prog="hf-holo generate", description="Continue a prompt, and show how fast.")
    parser.add_argument("path", help="folder or Hub name of a causal language model with its tokenizer")
    parser.add_argument("--prompt", default="", help="text to continue")
    parser.add_argument("--max_new_tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token each time")
    parser.add_argument("--top_k", type=int, default=50, help="sample from this many most likely tokens; 0: from all")
    parser.add_argument("--top_p", type=float, default=1.0, help="sample from the most likely tokens of this mass")
    parser.add_argument("--num_beams", type=int, default=1, help="search with this many beams")
    parser.add_argument("--seed", type=int, help="makes sampling repeatable")
    args = parser.parse_args(argv)
    for name, value, good, accepted in (
        ("max_new_tokens", args.max_new_tokens, args.max_new_tokens > 0, "at least 1"),
        ("temperature", args.temperature, args.temperature >= 0, "0 or more"),
        ("top_k", args.top_k, args.top_k >= 0, "0 or more"),
        ("top_p", args.top_p, 0 < args.top_p <= 1, "above 0, at most 1"),
        ("num_beams", args.num_beams, args.num_beams > 0, "at least 1"),
    ):
        if not good:
            raise HoloError(f"{name}: {value} is out of range; {accepted}")
    return args
