"""Data: what is read, how it is split, that each token is scored once, and that only responses carry loss."""

import inspect
import json
import textwrap

import numpy as np
import pytest
import torch

from hf_holo.data.documents import (
    hold_out_documents,
    python_help,
    python_stdlib,
    read_documents,
    split_documents,
    stdlib_sources,
)
from hf_holo.data.instructions import Responses, alpaca_prompt, instruction_splits, read_records
from hf_holo.data.tokenizers import byte_tokenizer, character_tokenizer
from hf_holo.data.windows import (
    Collator,
    document_splits,
    document_starts,
    encode,
    scoring_windows,
    text_splits,
    training_windows,
)
from hf_holo.errors import HoloError
from hf_holo.modeling.losses import IGNORED

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


def test_a_column_of_numbers_is_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": null, "label": 1}\n{"text": "one", "label": 0}\n')
    assert read_documents(str(tmp_path / "a.jsonl")) == ["one"]
    with pytest.raises(HoloError, match=r"text_column: 'label' .* holds int, where text is expected"):
        read_documents(str(tmp_path / "a.jsonl"), text_column="label")


def test_python_help_is_prose():
    (text,) = python_help()
    assert len(text) > 200_000
    assert text.count(" the ") > 1_000


@pytest.mark.slow
def test_the_standard_library_is_written_code_in_a_fixed_order():
    sources = stdlib_sources()
    names = list(sources)
    assert names == sorted(names) and len(names) > 300
    assert {"json/decoder.py", "textwrap.py"} <= set(names)
    assert sources["textwrap.py"] == inspect.getsource(textwrap)
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("/"))]
    assert python_stdlib() == list(sources.values()) == read_documents(dataset_name="python-stdlib")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "contains no text"),
        (b" \n\n ", "contains no text"),
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
    for source, message in (
        (None, "name a text file"),
        ("nowhere.txt", "no file or folder"),
        (tmp_path, "contains no file"),
    ):
        with pytest.raises(HoloError, match=message):
            read_documents(str(source) if source else None)


def test_broken_tables(tmp_path):
    (tmp_path / "a.json").write_text('{"text": "unfinished')
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    for name, form in (("a.json", "json"), ("a.parquet", "parquet")):
        with pytest.raises(HoloError, match=f"is not a valid {form} file") as error:
            read_documents(str(tmp_path / name))
        assert "\n" not in str(error.value)


def test_records_need_the_alpaca_columns(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"instruction": "x", "answer": "y"}]))
    with pytest.raises(HoloError, match="no column output"):
        read_records(str(tmp_path / "a.json"))
    (tmp_path / "b.json").write_text(json.dumps(RECORDS))
    assert read_records(str(tmp_path / "b.json")) == RECORDS


def test_a_record_without_an_answer_is_named(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"instruction": "a", "output": "b"}, {"instruction": "c"}]))
    with pytest.raises(HoloError, match="record 1 has no text as its instruction or its output"):
        read_records(str(tmp_path / "a.json"))


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


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_whole_documents_are_held_out_the_same_ones_each_time(fraction):
    documents = [f"{number} " * (1 + number % 7) for number in range(60)]
    train, validation = hold_out_documents(documents, fraction)
    assert sorted(train + validation) == sorted(documents) and train == [t for t in documents if t in train]
    share = sum(map(len, validation)) / sum(map(len, documents))
    assert fraction <= share <= fraction + 0.1
    assert hold_out_documents(documents, fraction) == (train, validation)
    assert train[-1] != documents[len(train) - 1]  # not simply the last ones


def test_whole_documents_cannot_be_held_out_of_one():
    with pytest.raises(HoloError, match=r"0\.1 of 1 whole documents leaves none"):
        hold_out_documents(["text"], 0.1)
    with pytest.raises(HoloError, match="validation_fraction: 0"):
        hold_out_documents(["text", "more"], 0)


@pytest.mark.parametrize("length, starts", [(3, [0]), (8, [0]), (9, [0, 1]), (16, [0, 8]), (21, [0, 8, 13])])
def test_windows_of_a_document_reach_its_end(length, starts):
    assert document_starts(length, 8, 8) == starts
    covered = {i for start in document_starts(length, 8, 5) for i in range(start, min(start + 8, length))}
    assert covered == set(range(length))


def test_documents_are_joined_by_the_end_token():
    tokenizer = character_tokenizer(["abc"])
    ids = encode(tokenizer, ["ab", "c"])
    assert ids.tolist() == [*tokenizer("ab").input_ids, tokenizer.eos_token_id, *tokenizer("c").input_ids]
    assert tokenizer.eos_token_id not in encode(tokenizer, ["abc"])
    assert encode(tokenizer, [""]).tolist() == [] == encode(tokenizer, []).tolist()


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


def test_documents_kept_apart_have_windows_of_their_own_between_end_tokens():
    train, validation = ["ab" * 20, "c"], ["ba" * 9, "d"]
    tokenizer = character_tokenizer(["abcd"])
    end = tokenizer.eos_token_id
    splits = document_splits(train, validation, tokenizer, block_size=16, stride=8)
    shown = [splits.train[i]["input_ids"].tolist() for i in range(len(splits.train))]
    assert shown[0][0] == shown[-2][-1] == end and shown[-1] == [end, *tokenizer("c").input_ids, end]
    assert all(end not in window[1:-1] for window in shown)
    scored = [label for window in splits.validation for label in window["labels"].tolist() if label != IGNORED]
    assert scored == [*tokenizer(validation[0]).input_ids, end, *tokenizer("d").input_ids, end]
    assert splits.tokens == len(scored) and splits.characters == len(scored) - 2 and splits.prompt == validation[0]


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
