"""`hf-holo recall`: what it writes, and that its figures are those of the memory and of theory."""

import csv
import json

import pytest

from hf_holo import HoloError
from hf_holo.eval.recall import main, measure
from hf_holo.modeling.memory import recall_theory

SMALL = ("--dimensions", "32", "64", "--pairs", "1", "6", "--codes", "20", "--rounds", "3", "--reads", "12")


def test_it_writes_a_picture_and_its_figures(tmp_path, capsys):
    folder = tmp_path / "new" / "recall"
    for _ in range(2):  # an older picture is replaced
        main(["--output_dir", str(folder), *SMALL])
    assert sorted(path.name for path in folder.iterdir()) == ["recall.csv", "recall.json", "recall.png"]
    assert (folder / "recall.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((folder / "recall.json").read_text())
    assert (record["codes"], record["rounds"], record["seed"]) == (20, 3, 0) and record["seconds"] >= 0
    points = record["points"]
    assert [(point["dimension"], point["pairs"]) for point in points] == [(32, 1), (32, 6), (64, 1), (64, 6)]
    assert points[1]["one_shot_theory"] == recall_theory(32, 6, 20)
    assert points[1]["cancelled_theory"] == recall_theory(32, 6, 20, rounds=3)
    rows = list(csv.DictReader((folder / "recall.csv").open()))
    assert [{name: float(value) for name, value in row.items()} for row in rows] == points
    printed = capsys.readouterr().out
    assert "phasors" in printed and "95%" in printed and str(folder / "recall.png") in printed


def test_measured_recall_follows_theory():
    points = measure([64, 128], [2, 10, 20, 40], codes=50, rounds=8, reads=1000)
    for point in points:
        assert point.one_shot_reads >= 1000 and point.cancelled_reads >= 125
        assert abs(point.one_shot - point.one_shot_theory) < 0.04, point
        assert abs(point.cancelled - point.cancelled_theory) < 0.15, point  # theory is that of large dimensions
        assert point.cancelled >= point.one_shot - 0.04, point
    shares = {(point.dimension, point.pairs): (point.one_shot, point.cancelled) for point in points}
    assert shares[128, 20][0] < 0.95 < shares[128, 20][1]  # cancellation carries what one-shot does not


def test_a_seed_gives_the_same_again():
    first, second, other = (measure([32], [8], 20, 2, 40, seed) for seed in (0, 0, 1))
    assert first == second != other


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--pairs", "4", "0"], r"pairs: \[4, 0\] is not at least 1"),
        (["--rounds", "0"], "rounds: 0 is not at least 1"),
        (["--seed", "-1"], "seed: -1 is not in"),
        (["--dimensions", "wide"], "invalid int value: 'wide'"),
    ],
)
def test_bad_input(argv, message):
    with pytest.raises(HoloError, match=message):
        main(argv)


def test_a_file_is_no_folder(tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(HoloError, match=r"output_dir: .* cannot be a folder: File exists"):
        main(["--output_dir", str(path), *SMALL])
    assert path.read_text() == "mine"
