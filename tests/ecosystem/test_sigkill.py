"""SIGKILL at any moment costs the steps since the last checkpoint, and nothing else."""

import json
import multiprocessing
import os
import random
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401 (so that no run has to import it)
import pytest
import torch
from safetensors.torch import load_file

from hf_holo import cli
from hf_holo.modeling import modeling_hsn  # noqa: F401 (likewise)
from hf_holo.training import train  # noqa: F401 (likewise)

pytestmark = pytest.mark.feature("training", "resuming after SIGKILL", family="hsn")
WRITING = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}  # audit events, and `open` to write
FLAGS = shlex.split(
    "--preset hsn-tiny --model hidden_size=16 num_hidden_layers=1 hidden_dropout_prob=0.1 --block_size 16 --stride 8 "
    "--max_steps 12 --save_steps 2 --eval_steps 4 --logging_steps 1 --per_device_train_batch_size 4 --warmup_steps 2 "
    "--ema_decay 0.9 --sample_tokens 4 --use_cpu --disable_tqdm true --causality_check false"
)
FORK = multiprocessing.get_context("fork")  # everything is imported already: a run takes a second


class Runs:
    """Runs of `hf-holo train` in one folder, each in a process of its own that resumes where the last was killed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder.parent / "text.txt").write_text("the wave binds a key to a value, " * 20)

    def start(self, watch: Callable[[], None] = lambda: None) -> multiprocessing.Process:
        """Start a run that calls `watch` before whatever it writes, moves or deletes in the folder."""
        argv = ["train", *FLAGS, "--train_file", f"{self.folder.parent}/text.txt", "--output_dir", str(self.folder)]

        def run() -> None:
            for stream in (1, 2):
                os.dup2(os.open(self.folder.parent / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
            torch.set_num_threads(1)

            def hook(event: str, arguments: tuple) -> None:
                writes = event == "open" and isinstance(arguments[1], str) and arguments[1][:1] in "wax"
                if (writes or event in WRITING) and str(arguments[0]).startswith(str(self.folder)):
                    watch()

            sys.addaudithook(hook)
            sys.exit(cli.main([*argv, "--resume_from_checkpoint"]))

        process = FORK.Process(target=run)
        process.start()
        return process

    def to_the_end(self, watch: Callable[[], None] = lambda: None) -> None:
        process = self.start(watch)
        process.join()
        assert process.exitcode == 0, (self.folder.parent / "log.txt").read_text()[-2000:]

    def check_checkpoints(self) -> None:
        """Whatever has the name of a checkpoint can be read."""
        for checkpoint in self.folder.glob("checkpoint-*"):
            assert load_file(checkpoint / "model.safetensors")
            assert torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
            assert torch.load(checkpoint / "scheduler.pt", weights_only=True)
            state = json.loads((checkpoint / "trainer_state.json").read_text())
            assert checkpoint.name == f"checkpoint-{state['global_step']}"

    def result(self) -> dict[str, torch.Tensor | str | list[str]]:
        """The weights that a finished run has left, its losses, and the names of its files."""
        weights = load_file(self.folder / "model.safetensors")
        files = sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*"))
        return {**weights, "losses": (self.folder / "metrics.csv").read_text(), "files": files}


def same(one: dict, other: dict) -> bool:
    def equal(a, b) -> bool:
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

    return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)


def ends_as(runs: Runs, expected: dict) -> bool:
    """Whether the run, resumed and finished, leaves what is expected."""
    runs.to_the_end()
    return same(runs.result(), expected)


@pytest.fixture
def undisturbed(tmp_path) -> tuple[dict, int, float]:
    """What a run leaves that nobody kills, how often it writes, and its seconds."""
    (tmp_path / "undisturbed").mkdir()
    runs, writes = Runs(tmp_path / "undisturbed" / "run"), FORK.Value("i", 0)
    start = time.perf_counter()
    runs.to_the_end(lambda: setattr(writes, "value", writes.value + 1))
    return runs.result(), writes.value, time.perf_counter() - start


@pytest.fixture
def runs(tmp_path) -> Runs:
    (tmp_path / "killed").mkdir()
    return Runs(tmp_path / "killed" / "run")


def kill_at_write(runs: Runs, number: int) -> None:
    """Let a run kill itself before its write of this number; its checkpoints are whole nevertheless."""
    left = [number]

    def watch() -> None:
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    process = runs.start(watch)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    runs.check_checkpoints()


@pytest.mark.slow
def test_killed_while_it_writes(runs, undisturbed):
    """Twice, where a run writes, moves or deletes files; the random numbers are seeded."""
    expected, writes, _ = undisturbed
    for number in random.Random(0).sample(range(writes // 2), 2):  # the second has less to write
        kill_at_write(runs, number)
    assert ends_as(runs, expected)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_every_third_write(runs, undisturbed):
    """Of the first half of a run, in which checkpoints are written and deleted; now and then it runs to the end."""
    expected, writes, _ = undisturbed
    for number in range(0, writes // 2, 3):
        shutil.rmtree(runs.folder, ignore_errors=True)
        kill_at_write(runs, number)
        if number % 12 == 0:
            assert ends_as(runs, expected)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_twenty_times_at_random_moments(runs, undisturbed):
    expected, _, seconds = undisturbed
    moments, kills = random.Random(0), 0
    while kills < 20:
        process = runs.start()
        process.join(moments.uniform(0, seconds))
        if process.is_alive():
            process.kill()
            process.join()
            kills += 1
            runs.check_checkpoints()
        else:  # it was faster: the next one starts from the beginning
            assert process.exitcode == 0 and same(runs.result(), expected)
            shutil.rmtree(runs.folder)
    assert ends_as(runs, expected)
