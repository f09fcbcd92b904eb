"""Interrupted runs: resuming gives bitwise the weights of an uninterrupted run, and never a half-written state."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback

from hf_holo.errors import HoloError
from hf_holo.training import train as training
from hf_holo.training.train import main
from hf_holo.training.trainer import HoloTrainer, complete_checkpoints

from .conftest import TINY


def same_weights(one: Path, other: Path) -> bool:
    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.feature("training", "resuming to the bit", family="hsn")
@pytest.mark.parametrize(
    ("optimizer", "checkpoint"),
    [
        ("muon", "checkpoint-2"),
        pytest.param("adamw", "checkpoint-4", marks=pytest.mark.slow),
        pytest.param("muon", "checkpoint-4", marks=pytest.mark.slow),
        pytest.param("adamw", "checkpoint-2", marks=pytest.mark.slow),
    ],
)
def test_resume_is_bitwise_exact(tiny_run, tmp_path, optimizer, checkpoint):
    # 4 x 4 = 16 windows a step: the second epoch begins within the run.
    flags = ["--optimizer", optimizer, "--save_steps", "2", "--save_total_limit", "9", "--stride", "32"]
    tiny_run(*flags, "--gradient_accumulation_steps", "4", "--max_steps", "8", folder="whole")
    shutil.copytree(tmp_path / "whole" / checkpoint, tmp_path / "part" / checkpoint)
    tiny_run(
        *flags, "--gradient_accumulation_steps", "4", "--max_steps", "8", "--resume_from_checkpoint", folder="part"
    )
    assert same_weights(tmp_path / "whole", tmp_path / "part")
    assert same_weights(tmp_path / "whole" / "checkpoint-8", tmp_path / "part" / "checkpoint-8")
    for name in ("metrics.csv", "sample.txt"):
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "part" / name).read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)  # it starts Python again, which takes minutes where other work fills the machine
def test_a_killed_run_loses_only_the_steps_since_its_last_checkpoint(tiny_run, text_file, tmp_path):
    flags = ["--max_steps", "40", "--save_steps", "4", "--eval_steps", "40"]
    command = [*TINY, "--train_file", str(text_file), "--output_dir", str(tmp_path / "killed"), *flags]
    code = f"from hf_holo.training.train import main; main({command!r})"
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.DEVNULL)
    try:
        while not complete_checkpoints(tmp_path / "killed"):
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    reached = complete_checkpoints(tmp_path / "killed")
    assert len(reached) >= 1
    assert not (tmp_path / "killed" / "model.safetensors").exists()

    resumed = tiny_run(*flags, "--resume_from_checkpoint", folder="killed")
    assert resumed.state.global_step == 40
    tiny_run(*flags, folder="whole")
    assert same_weights(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
def test_a_run_that_was_cut_off_behind_its_last_step_is_only_loaded(tiny_run, tmp_path):
    tiny_run(folder="whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-6", tmp_path / "part" / "checkpoint-6")
    tiny_run("--resume_from_checkpoint", folder="part")
    assert same_weights(tmp_path / "whole", tmp_path / "part")
    for name in ("metrics.csv", "sample.txt"):
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "part" / name).read_text()
    longer = tiny_run("--resume_from_checkpoint", "--max_steps", "8", folder="part")
    assert longer.state.global_step == 8


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1, 2])
def test_the_newest_and_the_best_checkpoint_are_kept(tiny_run, tmp_path, limit):
    best = ["--load_best_model_at_end", "--metric_for_best_model", "accuracy", "--greater_is_better", "false"]
    flags = ["--save_steps", "1", "--eval_steps", "1", "--ema_decay", "0", "--save_total_limit", str(limit)]
    trainer = tiny_run(*flags, *best, "--eval_strategy", "steps", "--learning_rate", "0.02")
    left = {path.name for path in (tmp_path / "run").glob("checkpoint-*")}
    best_name = Path(trainer.state.best_model_checkpoint).name
    assert best_name in left and len(left) <= 2 and not (tmp_path / "run" / "unfinished").exists()
    assert same_weights(tmp_path / "run" / best_name, tmp_path / "run")


@pytest.fixture
def stopping_run(tiny_run, monkeypatch):
    """Runs that stop when the loss has fallen this many times in a row: `stopping_run(2, folder="a")`."""
    best = ["--load_best_model_at_end", "--metric_for_best_model", "loss", "--greater_is_better", "true"]
    every = ["--ema_decay", "0", "--eval_strategy", "steps", "--eval_steps", "1", "--save_steps", "1"]
    make_trainer = training.make_trainer

    def run(patience: int, *flags: str, folder: str) -> HoloTrainer:
        def with_patience(*args) -> HoloTrainer:
            trainer = make_trainer(*args)
            trainer.add_callback(EarlyStoppingCallback(patience))
            return trainer

        monkeypatch.setattr(training, "make_trainer", with_patience)
        return tiny_run(*best, *every, "--save_total_limit", "9", *flags, folder=folder)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("left", [2, 3])
def test_a_run_that_stopped_early_and_was_killed_stops_there_again(stopping_run, tmp_path, monkeypatch, left):
    """It keeps counting from the checkpoint that is left; after the last one it only finishes."""
    assert stopping_run(2, folder="whole").state.global_step == 3 < stopping_run(9, folder="longer").state.global_step
    with monkeypatch.context() as killed, pytest.raises(SystemExit):
        killed.setattr(training, "finish", lambda *_: sys.exit("killed"))
        stopping_run(2, folder="part")
    for checkpoint in complete_checkpoints(tmp_path / "part")[left:]:
        shutil.rmtree(checkpoint)
    assert stopping_run(2, "--resume_from_checkpoint", folder="part").state.global_step == 3
    assert same_weights(tmp_path / "whole", tmp_path / "part")
    for name in ("metrics.csv", "sample.txt"):
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "part" / name).read_text()
    assert stopping_run(3, "--resume_from_checkpoint", folder="part").state.global_step == 4  # it was more patient


def test_an_interrupt_says_how_to_go_on(monkeypatch, text_file, tmp_path, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(HoloTrainer, "train", interrupted)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main([*TINY, "--train_file", str(text_file), "--output_dir", "run"])
    assert stop.value.code == 130
    assert "hf-holo train --output_dir run --resume_from_checkpoint" in capsys.readouterr().out


@pytest.mark.parametrize(
    "damage", ["half a state", *(pytest.param(d, marks=pytest.mark.slow) for d in ("no state", "no folder content"))]
)
def test_half_written_checkpoints_are_passed_over(tiny_run, tmp_path, damage):
    tiny_run(folder="whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "part", ignore=shutil.ignore_patterns("model.safetensors"))
    shutil.copy(tmp_path / "whole" / "checkpoint-3" / "model.safetensors", tmp_path / "part" / "checkpoint-3")
    broken = tmp_path / "part" / "checkpoint-6"
    state = broken / "trainer_state.json"
    if damage == "half a state":
        state.write_text(state.read_text()[:100])
    else:
        state.unlink()
    if damage == "no folder content":
        shutil.rmtree(broken)
        broken.mkdir()
    (broken / "left.over").touch()

    assert [path.name for path in complete_checkpoints(tmp_path / "part")] == ["checkpoint-3"]
    tiny_run("--resume_from_checkpoint", folder="part")
    assert same_weights(tmp_path / "whole", tmp_path / "part")
    assert not (broken / "left.over").exists()
    assert json.loads(state.read_text())["global_step"] == 6


def test_a_folder_with_a_run_is_left_alone(tiny_run, tmp_path):
    tiny_run("--max_steps", "3")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with pytest.raises(HoloError, match=r"already holds a run, which is complete: .* --overwrite"):
        tiny_run("--max_steps", "3")
    with pytest.raises(HoloError, match="nowhere"):  # bad input does not cost the old run either
        tiny_run("--overwrite", "--train_file", "nowhere")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}


@pytest.mark.slow
def test_overwrite_deletes_the_old_run(tiny_run, tmp_path):
    tiny_run("--max_steps", "6")
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        (tmp_path / "run" / name).touch()
    tiny_run("--max_steps", "3", "--overwrite")
    assert {path.name for path in (tmp_path / "run").glob("model*.safetensors*")} == {"model.safetensors"}
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-3"}


def test_resuming_needs_no_recipe_and_may_find_nothing(tiny_run, tmp_path, capsys):
    from hf_holo.training.arguments import parse

    tiny_run("--max_steps", "3", "--resume_from_checkpoint")
    assert "starting from the beginning" in capsys.readouterr().out
    resumed = parse(["--output_dir", str(tmp_path / "run"), "--resume_from_checkpoint"])
    assert resumed.training.max_steps == 3
    assert resumed.model_overrides["hidden_size"] == 16
