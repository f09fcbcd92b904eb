"""`hf-holo chat`: talk with any causal language model in a folder.

The history is in the state: a turn reads only what is new, however long the conversation.

Turns are written by the tokenizer's chat template. A tokenizer without one gets a plain form, in which a name and a
colon begin a turn and an empty line ends it:

    User:
    Who are you?

    Assistant:
    ...
"""

import importlib
import json
import signal
import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
    set_seed,
)

from .errors import HoloError, Parser, first_line
from .generate import add_sampling, check_sampling, load, load_prefix, padding_id, prompt_ids, sampling, save_prefix
from .modeling.cache import CACHE_NAME
from .prefix import Prefix

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}:\n{{ message['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)
PLAIN_END = "\n\n"
HELP = """/save FILE  write the conversation to a file, state included
/load FILE  continue a conversation, or talk about a text that `hf-holo generate --save_prefix` has read
/reset      begin again
/exit       leave; so does Ctrl-D. Ctrl-C ends an answer, and what has been said stays in the conversation"""
Message = dict[str, str]


def main(argv: list[str]) -> None:
    """Run `hf-holo chat` with these arguments: answers go to stdout, all else to stderr. Where stdin is not a terminal,
    each of its lines is a turn.

    Raises:
        HoloError: bad input; the message is one line that says what to do.
    """
    args = _parse(argv)
    model, tokenizer = load(args.path)
    if args.seed is not None:
        set_seed(args.seed)
    start = Prefix.empty(model) if args.prefix is None else load_prefix("prefix", args.prefix, model)
    conversation = Conversation.continuing(tokenizer, start, args.system)
    options = {"max_new_tokens": args.max_new_tokens, **sampling(args)}
    for line in _lines():
        if line.strip() == "/exit":
            return
        try:
            conversation = _turn(conversation, line, options)
        except HoloError as error:  # a mistyped name must not end the conversation
            if not sys.stdin.isatty():
                raise
            print(f"error: {error}", file=sys.stderr)


@dataclass(frozen=True, eq=False)
class Conversation:
    """What has been said, and the state after it.

    Args:
        tokenizer: with or without a chat template.
        start: what was read before it; it begins again from here.
        state: after all that has been said.
        messages: all turns, as chat templates take them; first of all, that of the system, if there is one.
        said: the text of the tokens of `state` after those of `start`, special tokens included.
    """

    tokenizer: PreTrainedTokenizerBase
    start: Prefix
    state: Prefix
    messages: tuple[Message, ...] = ()
    said: str = ""

    @classmethod
    def continuing(
        cls, tokenizer: PreTrainedTokenizerBase, prefix: Prefix, system: str | None = None
    ) -> "Conversation":
        """The conversation that [`saved`] has put into a prefix, or a new one after any other prefix."""
        if "messages" not in prefix.notes:
            messages = () if system is None else ({"role": "system", "content": system},)
            return cls(tokenizer, prefix, prefix, messages)
        if system is not None:
            raise HoloError(f"system: {system!r} comes too late for a conversation that was begun; leave it out")
        notes = prefix.notes
        start = Prefix.empty(prefix.model)
        if before := int(notes["before"]):  # read only if the template rewrites what was said
            start = Prefix(prefix.model, prefix.input_ids[:, :before], prefix.attention_mask[:, :before], None)
        return cls(tokenizer, start, prefix, tuple(json.loads(notes["messages"])), notes["said"])

    def saved(self) -> Prefix:
        """The state, with the conversation in its notes."""
        notes = {
            "messages": json.dumps(self.messages),
            "said": self.said,
            "before": str(self.start.input_ids.shape[1]),
        }
        return replace(self.state, notes=notes)

    def again(self) -> "Conversation":
        """From its start, with the message of the system."""
        return replace(self, state=self.start, said="", messages=self.messages[:1] if self._has_system else ())

    @property
    def _has_system(self) -> bool:
        return bool(self.messages) and self.messages[0]["role"] == "system"

    def ask(self, text: str, options: dict[str, Any], streamer: TextStreamer | None = None) -> "Conversation":
        """The conversation after a question and its answer. Ctrl-C ends the answer where it is.

        Args:
            text: the question.
            options: for `model.generate`.
            streamer: hears the answer token by token.
        """
        messages = (*self.messages, {"role": "user", "content": text})
        whole, state, said = self._render(messages), self.state, self.said
        if not whole.startswith(said):  # the template changes what was said: trims it, or leaves thoughts out
            state, said = self.start, ""
        inputs = state.followed_by(self._encode(whole[len(said) :], begins=state.input_ids.shape[1] == 0))
        model: Any = state.model
        with stopping_at_ctrl_c() as stopping:
            output = model.generate(
                **inputs,
                **options,
                **self._ends(model),
                streamer=streamer,
                stopping_criteria=stopping,
                pad_token_id=padding_id(self.tokenizer),
                return_dict_in_generate=True,
            )
        ids, before = output.sequences, inputs["input_ids"].shape[1]
        if self._is_plain and ids[0, -1] == self.tokenizer.eos_token_id:
            ids = ids[:, :-1]  # the form ends a turn otherwise; the model has not read it yet
        answer = self.tokenizer.decode(ids[0, before:], skip_special_tokens=True)
        if self._is_plain:
            answer = answer.partition(PLAIN_END)[0]
        return replace(
            self,
            state=Prefix(model, ids, torch.ones_like(ids), output[CACHE_NAME]),
            messages=(*messages, {"role": "assistant", "content": answer}),
            said=whole + self.tokenizer.decode(ids[0, before:]),
        )

    @property
    def _is_plain(self) -> bool:
        return self.tokenizer.chat_template is None

    def _render(self, messages: tuple[Message, ...]) -> str:
        """The text of a conversation up to where the next answer begins."""
        template = PLAIN_TEMPLATE if self._is_plain else None
        try:
            text: Any = self.tokenizer.apply_chat_template(
                list(messages), chat_template=template, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise HoloError(f"the chat template of the tokenizer refuses these turns: {first_line(error)}") from None
        return text

    def _encode(self, text: str, begins: bool) -> torch.Tensor:
        """Token ids `[1, T]`; a chat template writes the special tokens itself."""
        return prompt_ids(self.tokenizer, text, begins=begins and self._is_plain)

    def _ends(self, model: PreTrainedModel) -> dict[str, Any]:
        """What ends an answer, as `model.generate` takes it."""
        ends: dict[str, Any] = {"stop_strings": [PLAIN_END], "tokenizer": self.tokenizer} if self._is_plain else {}
        config = model.generation_config
        if (config is None or config.eos_token_id is None) and self.tokenizer.eos_token_id is not None:
            ends["eos_token_id"] = self.tokenizer.eos_token_id
        return ends


class Answer(TextStreamer):
    """Prints an answer as it comes; the empty lines at its end are left out."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]
        self.held = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.held += text
        shown = self.held.rstrip("\n")
        self.held = self.held[len(shown) :]
        print(shown, end="\n" if stream_end else "", flush=True)


class _Asked(StoppingCriteria):
    """Ends the generation after the present token once it was asked to."""

    asked = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), self.asked, dtype=torch.bool, device=input_ids.device)


@contextmanager
def stopping_at_ctrl_c() -> Iterator[StoppingCriteriaList]:
    """A criterion for `generate` that Ctrl-C meets inside the block: between two tokens, so that the state is whole. A
    second Ctrl-C interrupts as ever."""
    criterion = _Asked()

    def ask(number: int, frame: FrameType | None) -> None:
        criterion.asked = True
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield StoppingCriteriaList([criterion])
    finally:
        signal.signal(signal.SIGINT, before)


def _lines() -> Iterator[str]:
    """What the user says, line by line, up to `/exit`."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    with suppress(ImportError):  # not on every system
        importlib.import_module("readline")  # lets input() edit its line
    print(f"{HELP}\n", file=sys.stderr)
    while True:
        try:
            yield input("> ")
        except EOFError:
            print(file=sys.stderr)
            return


def _turn(conversation: Conversation, line: str, options: dict[str, Any]) -> Conversation:
    """The conversation after a line: a command, or something said.

    Raises:
        HoloError: there is no such command, or its file cannot be read or written.
    """
    command, _, name = line.strip().partition(" ")
    name = name.strip()
    if not command:
        return conversation
    if command[0] != "/":
        return conversation.ask(line, options, Answer(conversation.tokenizer))
    if command == "/reset":
        return conversation.again()
    if command == "/save" and name:
        save_prefix("save", name, conversation.saved())
    elif command == "/load" and name:
        return Conversation.continuing(conversation.tokenizer, load_prefix("load", name, conversation.state.model))
    else:
        raise HoloError(f"{line.strip()!r} is not a command; there are /save FILE, /load FILE, /reset and /exit")
    return conversation


def _parse(argv: list[str]) -> Namespace:
    parser = Parser(prog="hf-holo chat", description=__doc__, epilog=HELP, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("path", help="folder or Hub name of a causal language model with its tokenizer")
    parser.add_argument("--system", help="what the model is told first, where its chat template has a place for it")
    parser.add_argument("--prefix", help="file of `hf-holo generate --save_prefix` or of /save to begin with")
    add_sampling(parser, max_new_tokens=512)
    args = parser.parse_args(argv)
    check_sampling(args)
    return args
