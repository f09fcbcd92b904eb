"""The generated tasks ask what they say, and a model that learns one is measured beyond the lengths of its training."""

import csv
import itertools
import json

import pytest
import torch
from small_models import new_model

from hf_holo.data.tokenizers import byte_tokenizer
from hf_holo.eval.learning import accuracy, learn, over_length
from hf_holo.eval.tasks import (
    GroupProducts,
    Induction,
    Needles,
    Pairs,
    Passkey,
    QueriedPairs,
    Repeat,
    SelectiveCopy,
    Sums,
)
from hf_holo.modeling.losses import IGNORED

PROSE = ["It is the east, and Juliet is the sun. " * 3]
TOKENIZER = byte_tokenizer()
TASKS = [
    Sums(2),
    Sums(3),
    GroupProducts("S", 3),
    GroupProducts("A", 5),
    QueriedPairs(4, 32),
    Pairs(4, 8),
    Repeat(8),
    SelectiveCopy(4, 6),
    Induction(8),
    Needles(TOKENIZER, PROSE, 3),
    Passkey(TOKENIZER, PROSE),
]


def drawn(task, rows: int, length: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return task.batch(rows, length, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_batches_have_their_length_and_come_again_with_the_seed(task):
    for length in (task.shortest, task.shortest + 7):
        tokens, labels = drawn(task, 3, length)
        assert tokens.shape == labels.shape == (3, length)
        assert tokens.min() >= 0 and tokens.max() < task.vocab_size and labels.max() < task.vocab_size
        assert ((labels >= 0).sum(1) > 0).all() and labels[labels < 0].eq(IGNORED).all()
        assert all(a.equal(b) for a, b in zip((tokens, labels), drawn(task, 3, length), strict=True))
    assert not drawn(task, 3, length, seed=1)[0].equal(tokens)
    assert 0 < task.chance < 1
    with pytest.raises(ValueError, match=f"length: {task.shortest - 1} is too small for {task.name}"):
        drawn(task, 1, task.shortest - 1)


def test_sums_and_products_are_those_of_all_tokens_so_far():
    digits, sums = drawn(Sums(3), 2, 20)
    assert sums[0].tolist() == [sum(digits[0, : t + 1].tolist()) % 3 for t in range(20)]
    assert Sums(2).name == "parity"
    for task, size in ((GroupProducts("S", 3), 6), (GroupProducts("A", 5), 60)):
        tokens, products = drawn(task, 2, 21)
        assert task.vocab_size == size == round(1 / task.chance)
        for row, wanted in zip(tokens.tolist(), products.tolist(), strict=True):
            so_far = tuple(range(task.degree))
            for token, product in zip(row, wanted, strict=True):
                so_far = tuple(so_far[i] for i in task.elements[token])
                assert task.elements[product] == so_far
    with pytest.raises(ValueError, match="'C', 3 are not 'S' or 'A'"):
        GroupProducts("C", 3)


def test_the_value_of_every_queried_key_stands_behind_it():
    task = QueriedPairs(pairs=8, vocabulary=64)
    tokens, labels = drawn(task, 16, 64)
    for row, asked in zip(tokens.tolist(), labels.tolist(), strict=True):
        values = dict(zip(row[:16:2], row[1:16:2], strict=True))
        assert len(values) == 8 and 0 < max(values) < 32 <= min(values.values())
        places = [t for t, label in enumerate(asked) if label != IGNORED]
        assert sorted(row[t] for t in places) == sorted(values) and min(places) >= 16
        assert all(asked[t] == values[row[t]] for t in places)
    asked_at = (labels != IGNORED).nonzero()[:, 1]
    assert (asked_at < 40).sum() > (asked_at >= 40).sum()  # more often soon than late
    with pytest.raises(ValueError, match="pairs: 32 is not between 1 and 31"):
        QueriedPairs(32, 64)


def test_values_of_pairs_are_asked_behind_filler():
    task = Pairs(pairs=4, symbols=8)
    tokens, labels = drawn(task, 3, task.length(filler=5))
    assert tokens.shape == (3, 4 * 4 + 5 - 1)
    for row, scored in zip(tokens.tolist(), labels.tolist(), strict=True):
        named = dict(zip(row[:8:2], row[1:8:2], strict=True))
        assert len(named) == 4 and max(named) < 8 <= min(named.values()) < 16 <= min(row[8:13])
        assert [label for label in scored if label != IGNORED] == [named[row[i]] for i in range(13, 20, 2)]
        assert all(scored[i] != IGNORED for i in range(13, 20, 2))
    values = drawn(Pairs(8, 8, distinct=True), 4, 31)[0][:, 1:16:2]
    assert all(len(set(row)) == 8 for row in values.tolist())


def test_what_is_copied_comes_in_its_order():
    tokens, labels = drawn(SelectiveCopy(count=3, symbols=4), 4, 12)
    for row, asked in zip(tokens.tolist(), labels.tolist(), strict=True):
        assert [token for token in row[:-3] if token] == asked[-3:] and row[-3:] == [1, 1, 1]
        assert min(asked[-3:]) >= 2 and asked[:-3] == [IGNORED] * 9
    for length in (10, 11):
        tokens, labels = drawn(Repeat(8), 2, length)
        asked = (labels[0] != IGNORED).nonzero()[:, 0].tolist()
        assert asked == list(range(6, length))
        assert labels[:, asked].equal(tokens[:, 1 : length - 5]) and tokens[:, 6:].equal(tokens[:, : length - 6])


def test_induction_asks_what_followed_the_special_token():
    tokens, labels = drawn(Induction(symbols=8), 16, 9)
    for row, asked in zip(tokens.tolist(), labels.tolist(), strict=True):
        assert row.count(8) == 2 and row[-1] == 8 and asked == [IGNORED] * 8 + [row[row.index(8) + 1]]


@pytest.mark.parametrize("task", [Passkey(TOKENIZER, PROSE), Needles(TOKENIZER, PROSE, 3)], ids=lambda task: task.name)
def test_the_asked_number_is_in_the_prose(task):
    places = set()
    for tokens, labels in zip(*drawn(task, 8, 300), strict=True):
        answer = TOKENIZER.decode(labels[labels != IGNORED])
        text = TOKENIZER.decode(tokens)
        said, question = text.rsplit("\n", 1)
        assert answer.strip().isdigit() and len(answer) == 6
        asked = question.removesuffix(answer[:-1]).split(" is")[-2].split()[-1]  # "key", or a place
        assert f"{asked} is{answer}." in said and "Juliet" in said
        places.add(said.index(answer))
    assert len(places) > 4


def test_a_model_learns_a_task_and_is_measured_over_length(tmp_path):
    task = Sums(2)
    steps, lengths = [], []

    class Watched(Sums):
        def batch(self, rows, length, generator):
            lengths.append(length)
            return super().batch(rows, length, generator)

    def trained(**options) -> torch.nn.Module:
        model = new_model("hsn", vocab_size=2)
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        learn(model, Watched(2), optimizer, lengths=(1, 3), steps=60, on_step=lambda n, _: steps.append(n), **options)
        return model

    model, again = trained(growing=0.5), trained(growing=0.5)
    assert steps == [*range(1, 61), *range(1, 61)]
    assert set(lengths[:7]) == {1} and set(lengths[30:60]) == {1, 2, 3}
    assert all(a.equal(b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    rows = over_length({"hsn": model}, task, (2, 64), tmp_path, "parity", sequences=32)
    assert rows[0]["accuracy"] > 0.9 > rows[1]["accuracy"]
    assert rows[0]["accuracy"] == accuracy(model, task, 2, sequences=32)
    record = json.loads((tmp_path / "parity.json").read_text())
    assert record["rows"] == rows and record["chance"] == 0.5 and record["accuracy"] == "share of sums so far"
    table = list(csv.DictReader((tmp_path / "parity.csv").open()))
    assert [float(row["accuracy"]) for row in table] == [row["accuracy"] for row in rows]
    assert (tmp_path / "parity.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": 4}, "either steps or seconds"),
        ({"lengths": (5, 4), "steps": 1}, r"lengths: \(5, 4\)"),
        ({"lengths": 4, "steps": 1, "growing": 2}, "growing: 2"),
    ],
)
def test_what_cannot_be_learned_is_refused(options, message):
    model = new_model("hsn", vocab_size=2)
    with pytest.raises(ValueError, match=message):
        learn(model, Sums(2), torch.optim.AdamW(model.parameters()), **options)


def test_products_are_those_of_a_group():
    table = GroupProducts("S", 3).table
    for a, b, c in itertools.product(range(6), repeat=3):
        assert table[table[a, b], c] == table[a, table[b, c]]
    assert table[0].tolist() == list(range(6)) and not table.equal(table.T)
