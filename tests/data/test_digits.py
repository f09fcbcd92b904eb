"""Digits of three senses: nothing is shared between training and test, and what is said of a digit is true."""

import numpy as np
import pytest

from hf_holo.data.senses import PROPERTIES, load_digits, sentences


@pytest.fixture(scope="module")
def digits(shared_data):
    return load_digits(f"{shared_data}/mnist", f"{shared_data}/fsdd", train_size=200, validation_size=100)


def test_sentences_are_held_out_and_true():
    train, held_out = sentences(False), sentences(True)
    assert not {s.text for s in train} & {s.text for s in held_out}
    assert {s.digits for s in train} == {s.digits for s in held_out} == {digits for digits, _ in PROPERTIES.values()}
    assert all(1 < len(s.digits) < 10 for s in train), "no sentence tells the digit"


@pytest.mark.slow
def test_all_senses_are_about_the_label(digits):
    part = digits.train
    assert np.bincount(part.labels).tolist() == [20] * 10
    for row in range(0, 200, 7):
        label = part[row]["labels"]
        assert part.pictures.labels[part._picture[row]] == part.sounds.labels[part._sound[row]] == label
        assert label in next(s for s in part.sentences if s.text == part[row]["text"]).digits


def test_nothing_is_shared_between_training_and_test(digits):
    train, test = digits.train, digits.validation
    assert train.pictures.table is not test.pictures.table and train.sounds.table is not test.sounds.table
    assert not {s.text for s in train.sentences} & {s.text for s in test.sentences}


def test_an_example_follows_from_its_row(digits):
    one, again = digits.train[5], digits.train[5]
    assert np.array_equal(np.asarray(one["image"]), np.asarray(again["image"]))
    assert np.array_equal(one["audio"], again["audio"]) and one["text"] == again["text"]
    only = digits.train.with_senses("audio")[5]
    assert only["image"] is only["text"] is None and np.array_equal(only["audio"], one["audio"])


def test_a_picture_is_hard_to_see_and_a_sound_at_zero_decibels(digits):
    clean = np.asarray(digits.train.pictures[digits.train._picture[0]]["image"], dtype=float)
    assert np.abs(np.asarray(digits.train[0]["image"], dtype=float) - clean).mean() > 40
    sound = digits.train.sounds[digits.train._sound[0]]["audio"]
    noise = digits.train[0]["audio"] - sound
    assert np.mean(noise**2) == pytest.approx(np.mean(sound**2), rel=0.1)


def test_the_sum_of_two_digits(shared_data):
    part = load_digits(f"{shared_data}/mnist", f"{shared_data}/fsdd", "sum", train_size=100, validation_size=50).train
    seen, heard = part.pictures.labels[part._picture], part.sounds.labels[part._sound]
    assert np.array_equal((seen + heard) % 10, part.labels) and (seen != heard).any()
    assert part[0]["text"] is None
