"""`hf-holo chat`: the history is in the state, and what is said is what the whole conversation, read at once, gives."""

import io
import os
import signal

import pytest
import torch
from small_models import new_model
from transformers import StoppingCriteriaList

from hf_holo import Prefix, chat, cli
from hf_holo.chat import PLAIN_TEMPLATE, Answer, Conversation, main, stopping_at_ctrl_c
from hf_holo.data.tokenizers import byte_tokenizer, character_tokenizer

FAMILIES = ["hsn", "holo", "resonance"]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TRIMMING = TEMPLATE.replace("m['content']", "m['content'] | trim")
OPTIONS = {"do_sample": False, "max_new_tokens": 12}
LETTERS = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ<>/:?\n"


def talker(family: str = "hsn", template: str | None = TEMPLATE, seed: int = 0):
    """A model that says various things, and its tokenizer."""
    tokenizer = character_tokenizer([LETTERS])
    tokenizer.chat_template = template
    model = new_model(family, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.4)
    return model, tokenizer


def folder(path, **options) -> str:
    for part in talker(**options):
        part.save_pretrained(path)
    return str(path)


def said_at_once(model, tokenizer, conversation, question: str) -> str:
    """The answer to a question if the whole conversation is read again."""
    messages = [*conversation.messages, {"role": "user", "content": question}]
    template = tokenizer.chat_template or PLAIN_TEMPLATE
    text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer(text).input_ids])
    ends = {} if tokenizer.chat_template else {"stop_strings": ["\n\n"], "tokenizer": tokenizer}
    new = model.generate(ids, **OPTIONS, **ends, pad_token_id=0)[0, ids.shape[1] :]
    answer = tokenizer.decode(new, skip_special_tokens=True)
    return answer if tokenizer.chat_template else answer.partition("\n\n")[0]


@pytest.mark.feature("generation", "chat: history in the state")
@pytest.mark.parametrize("template", [TEMPLATE, None, TRIMMING], ids=["template", "plain", "trimming"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_answer_is_that_after_the_whole_conversation(family, template):
    model, tokenizer = talker(family, template)
    conversation = Conversation.continuing(tokenizer, Prefix.empty(model), "Be brief")
    for question in ("Hello", "And now?", "Go on"):
        expected = said_at_once(model, tokenizer, conversation, question)
        conversation = conversation.ask(question, OPTIONS)
        assert conversation.messages[-1] == {"role": "assistant", "content": expected}
    assert [m["role"] for m in conversation.messages] == ["system", *["user", "assistant"] * 3]
    assert conversation.again().messages == conversation.messages[:1]


def test_a_turn_reads_only_what_is_new():
    model, tokenizer = talker()
    conversation = Conversation.continuing(tokenizer, Prefix.empty(model)).ask("A long question " * 20, OPTIONS)
    read = []

    def note(module, args, kwargs):
        read.append(kwargs["input_ids"].shape[1])

    model.model.register_forward_pre_hook(note, with_kwargs=True)
    conversation.ask("Short", OPTIONS)
    assert max(read) < 30


def test_a_document_comes_before_the_conversation():
    model, tokenizer = talker()
    document = torch.tensor([tokenizer("Once there was a fox").input_ids])
    conversation = Conversation.continuing(tokenizer, Prefix.read(model, document))
    answer = conversation.ask("Who?", OPTIONS).messages[-1]["content"]
    ids = torch.tensor([tokenizer("Once there was a fox<user>Who?</><assistant>").input_ids])
    new = model.generate(ids, **OPTIONS, pad_token_id=0)[0, ids.shape[1] :]
    assert answer == tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("template", [TEMPLATE, TRIMMING], ids=["template", "trimming"])
def test_a_saved_conversation_continues(tmp_path, template):
    model, tokenizer = talker(template=template)
    document = torch.tensor([tokenizer("Once there was a fox").input_ids])
    talk = Conversation.continuing(tokenizer, Prefix.read(model, document)).ask("Who?", OPTIONS)
    talk.saved().save(tmp_path / "talk")
    loaded = Conversation.continuing(tokenizer, Prefix.load(tmp_path / "talk", model))
    assert loaded.messages == talk.messages
    assert loaded.ask("What?", OPTIONS).messages == talk.ask("What?", OPTIONS).messages


# ---------------------------------------------------------------------------------------------- the command
def converse(monkeypatch, capsys, argv: list[str], lines: str) -> str:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    main([*argv, "--max_new_tokens", "12", "--temperature", "0"])
    return capsys.readouterr().out


@pytest.mark.parametrize("template", [TEMPLATE, None], ids=["template", "plain"])
def test_lines_from_a_pipe_are_turns(tmp_path, monkeypatch, capsys, template):
    model, tokenizer = talker(template=template)
    path, talk = folder(tmp_path / "model", template=template), Conversation.continuing(tokenizer, Prefix.empty(model))
    answers = []
    for question in ("Hello", "And now?"):
        talk = talk.ask(question, OPTIONS)
        answers.append(talk.messages[-1]["content"].rstrip("\n"))
    out = converse(monkeypatch, capsys, [path], "Hello\n\nAnd now?\n/exit\nnever said\n")
    assert out == "".join(f"{answer}\n" for answer in answers)


def test_save_load_and_reset(tmp_path, monkeypatch, capsys):
    path, file = folder(tmp_path / "model"), tmp_path / "talk"
    first = converse(monkeypatch, capsys, [path], f"Hello\n/save {file}\nAnd now?\n")
    later = converse(monkeypatch, capsys, [path], f"/load {file}\nAnd now?\n")
    assert first.splitlines()[-1:] == later.splitlines()[-1:] and first.endswith(later)
    assert converse(monkeypatch, capsys, [path, "--prefix", str(file)], "And now?\n") == later
    again = converse(monkeypatch, capsys, [path], "Hello\n/reset\nHello\n")
    assert again == 2 * again[: len(again) // 2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/laod x", "'/laod x' is not a command; there are /save FILE, /load FILE, /reset and /exit"),
        ("/save", "'/save' is not a command"),
        ("/load no/such", "load: 'no/such' is not a file"),
        ("/save no/such", "save: 'no/such' is in a folder that does not exist"),
    ],
)
def test_errors_of_commands_are_one_line(tmp_path, monkeypatch, capsys, line, message):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{line}\n"))
    assert cli.main(["chat", folder(tmp_path / "model")]) == 2
    *_, last = capsys.readouterr().err.splitlines()  # transformers 5 shows how it loads weights before that
    assert last.startswith(f"hf-holo: error: {message}")


def test_a_template_that_refuses_says_so(tmp_path, monkeypatch, capsys):
    path = folder(tmp_path / "model", template="{{ raise_exception('no systems') }}")
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    assert cli.main(["chat", path]) == 2
    assert "the chat template of the tokenizer refuses these turns: no systems" in capsys.readouterr().err


def test_ctrl_c_ends_the_answer_and_keeps_the_turn(capsys):
    model, tokenizer = talker()
    talk = Conversation.continuing(tokenizer, Prefix.empty(model))
    whole = talk.ask("Hello", {**OPTIONS, "max_new_tokens": 40}).messages[-1]["content"]
    spoken = []

    class Interrupted(Answer):
        def put(self, value):
            super().put(value)
            spoken.append(value)
            if len(spoken) == 6:  # the question and five tokens
                os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    short = talk.ask("Hello", {**OPTIONS, "max_new_tokens": 40}, Interrupted(tokenizer))
    assert signal.getsignal(signal.SIGINT) is handler
    answer = short.messages[-1]["content"]
    assert len(answer) in (5, 6) and whole.startswith(answer) and capsys.readouterr().out == f"{answer}\n"
    assert short.ask("Go on", OPTIONS).messages[-1]["content"] == said_at_once(model, tokenizer, short, "Go on")


def test_a_second_ctrl_c_interrupts():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background ignores it
    try:
        _interrupt_twice()
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupt_twice() -> None:
    with pytest.raises(KeyboardInterrupt), stopping_at_ctrl_c() as stopping:
        assert isinstance(stopping, StoppingCriteriaList)
        os.kill(os.getpid(), signal.SIGINT)
        assert stopping(torch.zeros(2, 3).long(), None).tolist() == [True, True]
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()


def test_bytes_may_end_within_a_letter(capsys):
    """What cannot be decoded does not end the conversation."""
    tokenizer = byte_tokenizer()
    model = new_model("hsn", vocab_size=len(tokenizer))
    talk = Conversation.continuing(tokenizer, Prefix.empty(model))
    for _ in range(2):
        talk = talk.ask("é", {"do_sample": True, "max_new_tokens": 5}, Answer(tokenizer))
    assert len(talk.messages) == 4


def test_a_terminal_has_a_prompt(tmp_path, monkeypatch, capsys):
    """An error there does not end the conversation."""
    lines = iter(["/nonsense", "Hello"])

    def typed(prompt: str) -> str:
        assert prompt == "> "
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", typed)
    main([folder(tmp_path / "model"), "--temperature", "0", "--max_new_tokens", "3"])
    out, err = capsys.readouterr()
    assert chat.HELP in err and "error: '/nonsense' is not a command" in err and len(out) == 4
