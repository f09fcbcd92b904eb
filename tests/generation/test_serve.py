"""`hf-holo serve`: transformers' server answers clients of the OpenAI protocol, each by its own text."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers
from small_models import new_model

import hf_holo_cli
from hf_holo import cli, serve
from hf_holo.data.tokenizers import character_tokenizer

CLIENTS, TURNS = 8, 3
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
LETTERS = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ<>/:?0123456789\n"
IS_4 = transformers.__version__.startswith("4.")


def saved(folder: Path, family: str):
    """A model that says various things, in a folder, and its tokenizer."""
    tokenizer = character_tokenizer([LETTERS])
    tokenizer.chat_template = TEMPLATE
    model = new_model(family, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.4)
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    return model, tokenizer


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def answers(port: int, process: subprocess.Popen, seconds: float = 120) -> bool:
    """Whether the server is there."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as reply:
                return reply.status == 200
        except OSError:
            time.sleep(0.5)
    return False


@pytest.fixture
def server(tmp_path, family):
    """A server of one model in a process of its own: base address, model, tokenizer and process."""
    pytest.importorskip("openai", reason="needs hf-holo[serve]")
    pytest.importorskip("uvicorn", reason="needs hf-holo[serve]")
    model, tokenizer = saved(tmp_path / "model", family)
    port = free_port()
    command = [sys.executable, "-m", "hf_holo.cli", "serve", str(tmp_path / "model"), "--host", "127.0.0.1"]
    environment = {**os.environ, "PYTHONPATH": str(Path(hf_holo_cli.__file__).parent), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*command, "--port", str(port)], env=environment, stdout=log, stderr=log)
        try:
            assert answers(port, process), (tmp_path / "log").read_text()
            yield f"http://127.0.0.1:{port}/v1", str(tmp_path / "model"), model, tokenizer, process
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def expected(model, tokenizer, messages: list[dict]) -> str:
    """What the model says after these messages, on its own."""
    ids = torch.tensor([tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)])
    new = model.generate(ids, do_sample=False, max_new_tokens=16, pad_token_id=0)[0, ids.shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True)


def resident(process: subprocess.Popen) -> float:
    """Memory of a process in MiB."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024


@pytest.mark.slow
@pytest.mark.skipif(IS_4, reason="transformers 4.57 has no server of its own that keeps clients apart")
@pytest.mark.feature("serving", "the openai client: streaming, eight clients at once, each with its own conversation")
@pytest.mark.parametrize("family", ["hsn", "holo", "resonance"])
def test_clients_get_what_the_model_says_to_them_alone(server):
    """`HF_HOLO_SERVE_SECONDS` lets them talk for longer."""
    import openai

    address, name, model, tokenizer, process = server
    client = openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=120)
    assert [listed.id for listed in client.models.list()] == [name]
    end = time.monotonic() + float(os.environ.get("HF_HOLO_SERVE_SECONDS", 0))

    def talk(number: int) -> int:
        """A conversation; every other client streams. Returns the number of answers."""
        messages: list[dict] = []
        for turn in range(10**6):
            if turn >= TURNS and time.monotonic() > end:
                return turn
            messages = messages[-2:] if turn % TURNS else []
            messages.append({"role": "user", "content": f"I am {number}, turn {turn}?"})
            options = {"model": name, "messages": messages, "max_tokens": 16, "temperature": 0.0}
            if number % 2:
                parts = client.chat.completions.create(stream=True, **options)
                said = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
            else:
                said = client.chat.completions.create(**options).choices[0].message.content
            assert said == expected(model, tokenizer, messages), (number, turn)
            messages.append({"role": "assistant", "content": said})
        raise AssertionError

    talk(0)
    before = resident(process)
    with ThreadPoolExecutor(CLIENTS) as clients:
        counts = list(clients.map(talk, range(CLIENTS)))
    grown = resident(process) - before
    print(f"{sum(counts)} answers to {CLIENTS} clients; memory of the server grew by {grown:.1f} MiB")
    assert min(counts) >= TURNS and grown < 100


@pytest.mark.slow
@pytest.mark.skipif(IS_4, reason="transformers 4.57 has no server of its own that keeps clients apart")
@pytest.mark.parametrize("family", ["hsn"])
def test_plain_completions(server):
    import openai

    address, name, model, tokenizer, _ = server
    client = openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=120)
    said = client.completions.create(model=name, prompt="Hello", max_tokens=16, temperature=0.0).choices[0].text
    ids = torch.tensor([tokenizer("Hello").input_ids])
    new = model.generate(ids, do_sample=False, max_new_tokens=16, pad_token_id=0)[0, ids.shape[1] :]
    assert said == tokenizer.decode(new, skip_special_tokens=True)


def test_families_are_made_known(monkeypatch):
    from hf_holo import HsnForCausalLM

    module = sys.modules["transformers"]
    monkeypatch.setattr(module, "HsnForCausalLM", None, raising=False)  # gone again after this test
    del module.HsnForCausalLM
    serve.make_known()
    assert module.HsnForCausalLM is HsnForCausalLM
    assert module.LlamaForCausalLM.__module__.startswith("transformers.")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["no/such/model"], "serve: "),
        (["--prot", "1"], "serve: No such option"),
    ],
)
@pytest.mark.skipif(IS_4, reason="refused altogether")
def test_errors_are_one_line(capsys, argv, message):
    pytest.importorskip("uvicorn", reason="needs hf-holo[serve]")
    assert cli.main(["serve", *argv]) == 2
    err = capsys.readouterr().err
    assert f"hf-holo: error: {message}" in err and err.count("\n") == 1


@pytest.mark.skipif(not IS_4, reason="there is a server")
def test_transformers_4_is_refused(capsys):
    assert cli.main(["serve", "anything"]) == 2
    assert capsys.readouterr().err.startswith("hf-holo: error: serve: transformers 4.57.6 keeps one cache for all")
