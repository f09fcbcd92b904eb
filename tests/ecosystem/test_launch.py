"""`hf-holo train` in two processes, as torchrun and `accelerate launch` start them, and from two to one and back: with
texts of their own, and with a part of every text."""

import csv
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from hf_holo import cli

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),  # every process starts Python again, which takes minutes where the machine is busy
    pytest.mark.feature("Accelerate", "`hf-holo train` in two processes", family="hsn"),
]
FLAGS = shlex.split(
    "--preset hsn-tiny --model hidden_size=16 num_hidden_layers=1 hidden_dropout_prob=0 --block_size 16 --stride 8 "
    "--max_steps 50 --save_steps 25 --eval_steps 50 --logging_steps 1 --optimizer adamw --learning_rate 0.001 "
    "--warmup_steps 2 --ema_decay 0.9 --sample_tokens 4 --use_cpu --disable_tqdm true --causality_check false"
)
LAUNCHERS = {
    "torchrun": "torch.distributed.run --standalone --nproc_per_node 2",
    "accelerate launch": "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 "
    "--mixed_precision no --dynamo_backend no --main_process_port 0",
}


def arguments(folder: Path, rows: int, *flags: str) -> list[str]:
    """Of a run in this folder, in which each process sees this many rows at a time; the text is next to it."""
    text = folder.parent / "text.txt"
    text.parent.mkdir(parents=True, exist_ok=True)
    text.write_text("the wave binds a key to a value, " * 100)
    places = ["--train_file", str(text), "--output_dir", str(folder)]
    return ["train", *FLAGS, *places, "--per_device_train_batch_size", str(rows), *flags]


def together(launcher: str, folder: Path, *flags: str) -> str:
    """Train in two processes; what they have printed."""
    command = [sys.executable, "-m", *LAUNCHERS[launcher].split(), "-m", "hf_holo.cli", *arguments(folder, 2, *flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.returncode == 0, process.stdout[-4000:]
    return process.stdout


def losses(folder: Path) -> list[float]:
    """Of every step, rounded to four places by Trainer, and of the evaluations."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [float(row[column]) for column in ("train_loss", "validation_loss") for row in rows if row[column]]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """The run of one process, with the same global batch."""
    folder = tmp_path_factory.mktemp("one") / "run"
    assert cli.main(arguments(folder, 4)) == 0
    assert len(losses(folder)) > 50 and losses(folder)[49] < losses(folder)[0] - 0.1
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Path, str]:
    """The run of two processes in place of an older one, and what they have printed."""
    folder = tmp_path_factory.mktemp("two") / "run"
    for old in ("checkpoint-99", "unfinished"):
        (folder / old).mkdir(parents=True)
    (folder / "recipe.yaml").write_text("{}")
    return folder, together("torchrun", folder, "--overwrite")


def test_two_processes_train_as_one(one, two):
    folder, printed = two
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= names(folder / "checkpoint-25")
    assert losses(folder) == pytest.approx(losses(one), abs=1.01e-4)
    assert names(folder) == names(one)
    for line in ("parameters, ", "A sample (", "The model is saved in"):
        assert printed.count(line) == 1


def test_what_two_have_begun_one_ends(one, two, tmp_path):
    shutil.copytree(two[0] / "checkpoint-25", tmp_path / "run" / "checkpoint-25")
    assert cli.main(arguments(tmp_path / "run", 4, "--resume_from_checkpoint")) == 0
    assert losses(tmp_path / "run") == pytest.approx(losses(one), abs=1.01e-4)


def test_what_one_has_begun_two_end(one, tmp_path):
    shutil.copytree(one / "checkpoint-25", tmp_path / "run" / "checkpoint-25")
    together("accelerate launch", tmp_path / "run", "--resume_from_checkpoint")
    assert "rng_state_1.pth" in names(tmp_path / "run" / "checkpoint-50")
    assert losses(tmp_path / "run") == pytest.approx(losses(one), abs=1.01e-4)


@pytest.mark.feature("Accelerate", "states in training, in two processes", family="hsn")
def test_every_process_continues_its_own_streams(tmp_path):
    streams = ("--tbptt", "true", "--stride", "16", "--max_steps", "8", "--save_steps", "4", "--eval_steps", "8")
    together("torchrun", tmp_path / "whole" / "run", *streams)
    checkpoint = tmp_path / "whole" / "run" / "checkpoint-4"
    one, two = (load_file(checkpoint / f"states_{process}.safetensors")["0.memory"] for process in (0, 1))
    assert len(one) == len(two) == 2 and not one.equal(two)
    shutil.copytree(checkpoint, tmp_path / "part" / "run" / "checkpoint-4")
    together("torchrun", tmp_path / "part" / "run", *streams, "--resume_from_checkpoint")
    ends = [load_file(tmp_path / name / "run" / "model.safetensors") for name in ("whole", "part")]
    assert all(ends[0][name].equal(ends[1][name]) for name in ends[0])
    shutil.copytree(checkpoint, tmp_path / "alone" / "run" / "checkpoint-4")
    assert cli.main(arguments(tmp_path / "alone" / "run", 2, *streams, "--resume_from_checkpoint")) == 2


@pytest.mark.feature("Accelerate", "`hf-holo train`, texts shared by two processes", family="hsn")
def test_two_processes_that_share_every_text_train_as_one(one, tmp_path):
    shared = shlex.split(
        "--context_parallel_size 2 --per_device_train_batch_size 2 --gradient_accumulation_steps 2 "
        "--gradient_checkpointing true --causality_check true"
    )
    printed = together("torchrun", tmp_path / "run", *shared)
    assert "50 steps of 4 windows" in printed
    assert losses(tmp_path / "run") == pytest.approx(losses(one), abs=1.01e-4)
    assert names(tmp_path / "run") == names(one)
