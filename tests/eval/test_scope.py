"""`hf-holo scope`: what it writes, and that the two networks are fairly compared."""

import json

import pytest
import torch
from torch import nn

from hf_holo import HoloError
from hf_holo.eval.scope import compare, count, dense_network, holographic_network, main, spirals
from hf_holo.modeling.harmonics import HoloLinear, SineActivation


@pytest.mark.slow
def test_it_writes_a_picture_and_its_figures(tmp_path, capsys):
    folder = tmp_path / "new" / "scope"
    for _ in range(2):  # an older picture is replaced
        main(["--output_dir", str(folder), "--steps", "5"])
    assert (folder / "scope.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((folder / "scope.json").read_text())
    assert record["steps"] == 5 and record["seed"] == 0
    assert [row["network"] for row in record["networks"]] == ["ReLU", "holographic, sine", "dense, sine"]
    assert all(0 <= row["accuracy"] <= 1 for row in record["networks"])
    assert sorted(path.name for path in folder.iterdir()) == ["scope.json", "scope.png"]
    printed = capsys.readouterr().out
    assert "ReLU" in printed and "holographic" in printed and str(folder / "scope.png") in printed


def test_the_networks_have_as_many_parameters():
    holographic = holographic_network()
    assert sum(isinstance(module, HoloLinear) for module in holographic) == 3
    for activation in (nn.ReLU(), SineActivation(12.0)):
        dense = dense_network(count(holographic), activation)
        assert count(holographic) <= count(dense) <= 1.1 * count(holographic)


@pytest.mark.slow
def test_the_holographic_network_learns_the_spirals():
    relu, holographic, _ = compare(seed=0, steps=150)
    assert holographic.train_accuracy > 0.9 > relu.train_accuracy
    assert holographic.picture.shape == (240, 240)


def test_a_seed_gives_the_same_again():
    first, second, other = (compare(seed, steps=3) for seed in (0, 0, 1))
    for a, b, c in zip(first, second, other, strict=True):
        assert torch.equal(a.picture, b.picture) and not torch.equal(a.picture, c.picture)


def test_the_seed_makes_the_points():
    (points, labels), (again, _), (other, _) = spirals(100, 0), spirals(100, 0), spirals(100, 1)
    assert torch.equal(points, again) and not torch.equal(points, other)
    assert labels.double().mean() == 0.5 and points.norm(dim=-1).max() < 1.15


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--steps", "0"], "steps: 0 is not at least 1"),
        (["--seed", "-1"], "seed: -1 is not in"),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_bad_input(argv, message):
    with pytest.raises(HoloError, match=message):
        main(argv)


def test_a_file_is_no_folder(tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(HoloError, match=r"output_dir: .* cannot be a folder: File exists"):
        main(["--output_dir", str(path), "--steps", "1"])
    assert path.read_text() == "mine"
