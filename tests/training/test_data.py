"""Data: what is read, how it is split, that each token is scored once, and that only responses carry loss."""

import json

import numpy as np
import pytest
import torch

from hf_holo.errors import HoloError
from hf_holo.training.data import (
    IGNORED,
    Collator,
    Responses,
    alpaca_prompt,
    encode,
    instruction_splits,
    python_help,
    read_documents,
    read_records,
    scoring_windows,
    split_documents,
    text_splits,
    training_windows,
)
from hf_holo.training.tokenizers import byte_tokenizer, character_tokenizer

RECORDS = [{"instruction": f"Say {n}.", "input": "loud" if n % 2 else "", "output": str(n) * 3} for n in range(20)]


# Reading


def test_text_is_read_to_the_letter(tmp_path):
    text = "a\r\nb\n\n é  "
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert read_documents(str(tmp_path / "a.txt")) == [text]


def test_a_folder_gives_its_texts_and_tables_in_order(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b.jsonl").write_text('{"text": "second"}\n{"text": "third"}\n')
    (tmp_path / "sub" / "c.md").write_text("fourth")
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    assert read_documents(str(tmp_path)) == ["first", "second", "third", "fourth"]


def test_parquet_with_another_column(tmp_path):
    from datasets import Dataset

    Dataset.from_dict({"body": ["one", "two"]}).to_parquet(tmp_path / "a.parquet")
    assert read_documents(str(tmp_path / "a.parquet"), text_column="body") == ["one", "two"]
    with pytest.raises(HoloError, match=r"text_column: .* only body"):
        read_documents(str(tmp_path / "a.parquet"))


def test_python_help_is_prose():
    (text,) = python_help()
    assert len(text) > 200_000
    assert text.count(" the ") > 1_000


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "holds no text"),
        (b" \n\n ", "holds no text"),
        (b"fine until \xff\xfe here", "is not UTF-8 text .byte 11 is 0xff"),
    ],
)
def test_bad_text(tmp_path, content, message):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(HoloError, match=message) as error:
        read_documents(str(path))
    assert "\n" not in str(error.value)


def test_missing_and_empty_sources(tmp_path):
    for source, message in ((None, "name a text file"), ("nowhere.txt", "no file or folder"), (tmp_path, "holds no")):
        with pytest.raises(HoloError, match=message):
            read_documents(str(source) if source else None)


def test_broken_tables(tmp_path):
    (tmp_path / "a.json").write_text('{"text": "unfinished')
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    for name, form in (("a.json", "json"), ("a.parquet", "parquet")):
        with pytest.raises(HoloError, match=f"is no valid {form} file") as error:
            read_documents(str(tmp_path / name))
        assert "\n" not in str(error.value)


def test_records_need_the_alpaca_columns(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"instruction": "x", "answer": "y"}]))
    with pytest.raises(HoloError, match="no column output"):
        read_records(str(tmp_path / "a.json"))
    (tmp_path / "b.json").write_text(json.dumps(RECORDS))
    assert read_records(str(tmp_path / "b.json")) == RECORDS


# Text


@pytest.mark.parametrize("documents", [["0123456789"], ["012", "34", "56789"], ["0"] * 10])
@pytest.mark.parametrize("fraction", [0.1, 0.35, 0.5])
def test_the_split_keeps_all_text_in_order(documents, fraction):
    train, validation = split_documents(documents, fraction)
    assert "".join(train + validation) == "".join(documents)
    assert len("".join(train)) == int((1 - fraction) * 10)
    assert all(train + validation)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0])
def test_bad_fraction(fraction):
    with pytest.raises(HoloError, match="validation_fraction"):
        split_documents(["text"], fraction)


def test_documents_are_joined_by_the_end_token():
    tokenizer = character_tokenizer(["abc"])
    ids = encode(tokenizer, ["ab", "c"])
    assert ids.tolist() == [*tokenizer("ab").input_ids, tokenizer.eos_token_id, *tokenizer("c").input_ids]
    assert tokenizer.eos_token_id not in encode(tokenizer, ["abc"])


def test_long_texts_are_cut_without_loss():
    text = "a line of text\n" * 20_000  # 300,000 characters
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(encode(tokenizer, [text])) == text


def test_what_looks_like_a_special_token_is_text():
    tokenizer = byte_tokenizer()
    ids = encode(tokenizer, ["a<|end|>b"])
    assert len(ids) == 9
    assert tokenizer.eos_token_id not in ids


@pytest.mark.parametrize("count", [2, 7, 8, 9, 15, 16, 50])
def test_every_token_is_scored_exactly_once(count):
    block_size = 8
    scored = []
    for window in scoring_windows(np.arange(count, dtype=np.int32), block_size):
        assert 2 <= len(window["input_ids"]) <= block_size
        assert window["labels"][0] == IGNORED
        assert torch.equal(window["labels"][1:], window["input_ids"][1:])
        scored += window["labels"][1:].tolist()
    assert scored == list(range(1, count))


@pytest.mark.parametrize("stride, starts", [(8, [0, 8]), (4, [0, 4, 8, 12]), (1, range(13))])
def test_training_windows_start_every_stride(stride, starts):
    windows = training_windows(np.arange(20, dtype=np.int32), 8, stride)
    assert [window["input_ids"].tolist() for window in windows] == [list(range(s, s + 8)) for s in starts]


def test_splits_count_tokens_and_characters():
    text = "".join(chr(97 + n % 26) for n in range(1000))
    tokenizer = character_tokenizer([text])
    splits = text_splits([text[:900]], [text[900:]], tokenizer, block_size=32)
    assert splits.tokens == splits.characters == 99
    assert sum((w["labels"] != IGNORED).sum().item() for w in splits.validation) == 99
    assert splits.prompt == text[900:932]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"block_size": 1}, "block_size: 1 is too small"),
        ({"block_size": 64}, "has 50 tokens, fewer than one block of 64"),
        ({"block_size": 8, "stride": 9}, "stride: 9 is not between 1 and block_size = 8"),
        ({"block_size": 8, "stride": 0}, "stride: 0"),
    ],
)
def test_bad_sizes(arguments, message):
    with pytest.raises(HoloError, match=message):
        text_splits(["x" * 50], ["x" * 9], character_tokenizer(["x"]), **arguments)


# Instructions


def test_only_the_response_and_its_end_carry_loss():
    tokenizer = byte_tokenizer()
    responses = Responses(RECORDS[:2], tokenizer, block_size=256)
    for record, example in zip(RECORDS, responses, strict=False):
        labels, ids = example["labels"], example["input_ids"]
        prompt = len(alpaca_prompt(record).encode())
        assert (labels[:prompt] == IGNORED).all()
        assert torch.equal(labels[prompt:], ids[prompt:])
        assert tokenizer.decode(labels[prompt:-1]) == record["output"]
        assert labels[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[:prompt]) == alpaca_prompt(record)
    assert responses.characters == sum(len(record["output"]) for record in RECORDS[:2])


def test_the_prompt_shows_the_input_only_where_there_is_one():
    assert "Input" not in alpaca_prompt(RECORDS[0])
    assert "### Input:\nloud\n" in alpaca_prompt(RECORDS[1])
    assert alpaca_prompt({"instruction": "x", "input": None, "output": ""}).endswith("### Response:\n")


def test_long_responses_are_cut_and_long_prompts_left_out():
    tokenizer = byte_tokenizer()
    short, long = RECORDS[0], {"instruction": "x" * 100, "output": "y"}
    room = len(alpaca_prompt(short).encode()) + 2
    responses = Responses([short, long], tokenizer, block_size=room)
    assert len(responses) == 1
    assert len(responses[0]["input_ids"]) == room
    assert responses.characters == 2
    with pytest.raises(HoloError, match="block_size"):
        Responses([long], tokenizer, block_size=50)


def test_a_tenth_is_held_out():
    splits = instruction_splits(RECORDS, byte_tokenizer(), 256, 0.1)
    assert (len(splits.train), len(splits.validation)) == (18, 2)
    seen = [r["instruction"] for part in (splits.train, splits.validation) for r in part.records]
    assert sorted(seen) == sorted(r["instruction"] for r in RECORDS)
    assert splits.tokens == sum((e["labels"] != IGNORED).sum().item() for e in splits.validation)
    with pytest.raises(HoloError, match="validation_fraction"):
        instruction_splits(RECORDS[:2], byte_tokenizer(), 256, 0.1)


def test_the_collator_pads_on_the_right_with_a_mask_only_where_needed():
    def example(length):
        return {"input_ids": torch.ones(length, dtype=torch.long), "labels": torch.ones(length, dtype=torch.long)}

    batch = Collator(pad_token_id=7)([example(3), example(1)])
    assert batch["input_ids"].tolist() == [[1, 1, 1], [1, 7, 7]]
    assert batch["labels"].tolist() == [[1, 1, 1], [1, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert "attention_mask" not in Collator(7)([example(3), example(3)])
