"""Tokenizers: exact round trips, unseen characters, and loading by AutoTokenizer."""

import pytest
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

from hf_holo import HsnConfig, architectures, register_architecture, registry
from hf_holo.data.tokenizers import (
    TOKENIZERS,
    add_mask,
    bpe_tokenizer,
    character_tokenizer,
    default_kind,
    make_tokenizer,
)
from hf_holo.errors import HoloError
from hf_holo.modeling.tokenization_holo import HoloTokenizer

AWKWARD = "  two  spaces , a comma 's\n\n\ttab\r\nand é, 漢字, 🙂 \n"


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_round_trip_is_exact(kind):
    tokenizer = make_tokenizer(kind, [AWKWARD], vocab_size=300)
    ids = tokenizer(AWKWARD).input_ids
    assert tokenizer.decode(ids) == AWKWARD
    assert not set(ids) & set(tokenizer.all_special_ids)


@pytest.mark.parametrize("kind, count", [("characters", len(AWKWARD)), ("bytes", len(AWKWARD.encode()))])
def test_one_token_per_character_or_byte(kind, count):
    assert len(make_tokenizer(kind, [AWKWARD])(AWKWARD).input_ids) == count


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_bytes_and_bpe_know_every_text(kind):
    tokenizer = make_tokenizer(kind, ["only plain letters here"], vocab_size=300)
    assert tokenizer.decode(tokenizer(AWKWARD).input_ids) == AWKWARD


def test_unseen_characters_become_the_unknown_token():
    tokenizer = character_tokenizer(["abc"])
    assert tokenizer("aZb").input_ids[1] == tokenizer.unk_token_id
    assert len(tokenizer("aZ🙂b").input_ids) == 4


def test_bpe_learns_merges_up_to_the_size():
    tokenizer = bpe_tokenizer(["the theme then " * 50], vocab_size=262)
    assert len(tokenizer) == 262
    assert len(tokenizer("the theme").input_ids) < len("the theme")


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_auto_tokenizer_loads_it(kind, tmp_path):
    tokenizer = make_tokenizer(kind, [AWKWARD], vocab_size=300)
    tokenizer.save_pretrained(tmp_path)
    HsnConfig(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is HoloTokenizer
    assert loaded(AWKWARD).input_ids == tokenizer(AWKWARD).input_ids
    assert loaded.decode(loaded(AWKWARD).input_ids) == AWKWARD
    for token in ("pad", "eos", "unk", "bos"):
        assert getattr(loaded, f"{token}_token") == getattr(tokenizer, f"{token}_token")


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_mask_token_comes_last_and_is_saved(kind, tmp_path):
    plain, masked = (make_tokenizer(kind, [AWKWARD], vocab_size=300, masked=m) for m in (False, True))
    assert plain.mask_token is None and masked.mask_token_id == len(masked) - 1
    assert masked(AWKWARD).input_ids == plain(AWKWARD).input_ids or kind == "bpe"  # that has one merge fewer
    assert len(masked) == (300 if kind == "bpe" and len(plain) == 300 else len(plain) + 1)
    masked.save_pretrained(tmp_path)
    HsnConfig(vocab_size=len(masked)).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = f"two{loaded.mask_token} a"
    assert loaded.mask_token_id == masked.mask_token_id in loaded(text).input_ids
    assert loaded.decode(loaded(text).input_ids) == text
    assert add_mask(loaded).mask_token_id == masked.mask_token_id and len(loaded) == len(masked)


def test_padding_and_batches():
    tokenizer = character_tokenizer(["abc"])
    batch = tokenizer(["abc", "a"], padding=True, return_tensors="pt")
    assert batch.input_ids[1].tolist() == [*tokenizer("a").input_ids, tokenizer.pad_token_id, tokenizer.pad_token_id]
    assert batch.attention_mask.sum(1).tolist() == [3, 1]


def test_bad_requests():
    with pytest.raises(HoloError, match="characters, bytes, bpe"):
        make_tokenizer("words", ["a"])
    with pytest.raises(HoloError, match="vocab_size: 258"):
        bpe_tokenizer(["a"], vocab_size=258)


def test_a_family_with_its_own_tokenizer_gets_no_other_unasked(monkeypatch):
    class OwnConfig(GPT2Config):
        model_type = "own-tokenizer"

    class OwnLMHeadModel(GPT2LMHeadModel):
        config_class = OwnConfig

    monkeypatch.setattr(registry, "_ARCHITECTURES", architectures())
    register_architecture(
        "own-tokenizer", OwnConfig, {"AutoModelForCausalLM": OwnLMHeadModel}, tokenizer=GPT2TokenizerFast
    )
    assert default_kind("hsn") == default_kind("llama") == "characters"
    with pytest.raises(HoloError, match=r"'own-tokenizer' has its own, GPT2Tokenizer.*; name the folder"):
        default_kind("own-tokenizer")
