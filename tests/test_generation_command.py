"""`hf-holo generate`: any causal model in a folder, streamed, with its speed."""

import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_holo import hsn_tiny
from hf_holo.data.tokenizers import byte_tokenizer, character_tokenizer
from hf_holo.errors import HoloError
from hf_holo.generate import generate_text, main

TEXT = "abcdefgh \n"


def save(folder: Path, family: str) -> str:
    torch.manual_seed(0)
    tokenizer = character_tokenizer([TEXT])
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 16, "num_hidden_layers": 2}
    if family == "hsn":
        model = hsn_tiny(**sizes, eos_token_id=tokenizer.eos_token_id)
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=32, num_attention_heads=2, eos_token_id=None))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", ["hsn", "llama"])
@pytest.mark.parametrize("flags", ["", "--temperature 0", "--num_beams 3 --temperature 0", "--top_k 0 --top_p 0.5"])
def test_it_continues_the_prompt_and_shows_the_speed(tmp_path, capsys, family, flags):
    path = save(tmp_path, family)
    main([path, "--prompt", "abc", "--max_new_tokens", "12", "--seed", "1", *flags.split()])
    out, err = capsys.readouterr()
    assert out.startswith("abc")
    speed = re.search(r"(\d+) tokens in [\d.]+ s: [\d.]+ tokens/s", err)
    assert 1 <= int(speed[1]) <= 12
    assert len(out) > len("abc")


def test_a_seed_repeats_the_text(tmp_path, capsys):
    path = save(tmp_path, "hsn")
    texts = []
    for seed in ("1", "1", "2"):
        main([path, "--prompt", "a", "--max_new_tokens", "40", "--seed", seed])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_an_empty_prompt_starts_with_the_end_token(tmp_path, capsys):
    main([save(tmp_path, "hsn"), "--max_new_tokens", "5", "--seed", "3"])
    assert capsys.readouterr().out.strip("\n") != ""


def test_generate_text_starts_with_its_prompt():
    tokenizer = byte_tokenizer()
    model = hsn_tiny(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2)
    assert generate_text(model, tokenizer, "a\n b", 4).startswith("a\n b")


@pytest.mark.parametrize("family", ["hsn", "llama"])
def test_a_text_is_read_once_and_continued(tmp_path, capsys, family):
    path, text, prefix = save(tmp_path / "model", family), tmp_path / "text", str(tmp_path / "prefix")
    text.write_text("abc abc gfe\n")
    main([path, "--prompt_file", str(text), "--save_prefix", prefix])
    out, err = capsys.readouterr()
    assert out == "" and re.match(
        r"(Loading.*)?12 tokens in .*prefix, in [\d.]+ s\n$", err.splitlines(keepends=True)[-1]
    )
    greedy = ["--temperature", "0", "--max_new_tokens", "9"]
    main([path, "--prompt", "abc abc gfe\nfa", *greedy])
    whole = capsys.readouterr().out
    main([path, "--prefix", prefix, "--prompt", "fa", *greedy])
    assert "abc abc gfe\n" + capsys.readouterr().out == whole
    main([path, "--prefix", prefix, "--prompt", "fa", "--save_prefix", prefix])  # a longer one in its place
    capsys.readouterr()
    main([path, "--prefix", prefix, *greedy])
    assert "abc abc gfe\nfa" + capsys.readouterr().out == whole


@pytest.mark.parametrize(
    "flags, message",
    [
        ("nowhere/at/all", "path: 'nowhere/at/all' is not a causal language model"),
        ("{path} --max_new_tokens 0", "max_new_tokens: 0"),
        ("{path} --temperature -1", "temperature: -1.0"),
        ("{path} --top_p 2", "top_p: 2.0"),
        ("{path} --num_beams 0", "num_beams: 0"),
        ("{path} --top_k x", "invalid int value"),
        ("{path} --prefix no/such", "prefix: 'no/such' is not a file"),
        ("{path} --prefix {path}/config.json", "prefix: .*config.json' is not a complete safetensors file"),
        ("{path} --prefix {path}/model.safetensors", "prefix: .*model.safetensors' is not the state after a text"),
        ("{path} --prefix x --num_beams 2", "num_beams: 2 does not go with --prefix"),
        ("{path} --prompt a --save_prefix no/such", "save_prefix: 'no/such' is in a folder that does not exist"),
        ("{path} --prompt_file no/such", "prompt_file: 'no/such' cannot be read as a text"),
        ("{path} --prompt_file {path}/model.safetensors", "prompt_file: .* cannot be read as a text in UTF-8"),
        ("{path} --prompt a --prompt_file b", "not allowed with argument"),
        ("{path} --nonsense", "unrecognized arguments"),
        ("", "path"),
    ],
)
def test_bad_input(tmp_path, flags, message):
    with pytest.raises(HoloError, match=message) as error:
        main(flags.format(path=save(tmp_path, "hsn")).split())
    assert "\n" not in str(error.value)
