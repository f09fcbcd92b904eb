"""A text, a tiny model's arguments and a way to run `hf-holo train`, for all tests of training."""

import random
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_holo.training.arguments import parse
from hf_holo.training.train import train
from hf_holo.training.trainer import HoloTrainer

WORDS = shlex.split("the of and wave phase memory binds a key to value then recalls it from noise , with care . Again")
TINY = shlex.split(
    "--preset hsn-tiny --model hidden_size=16 num_hidden_layers=2 hidden_dropout_prob=0.1 --block_size 32 --stride 16 "
    "--max_steps 6 --eval_steps 3 --save_steps 3 --logging_steps 1 --per_device_train_batch_size 4 --warmup_steps 2 "
    "--ema_decay 0.9 --sample_tokens 8 --use_cpu --disable_tqdm true --causality_check false"
)


def prose(words: int, seed: int = 0) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(prose(600), encoding="utf-8")
    return path


@pytest.fixture
def tiny_run(tmp_path: Path, text_file: Path) -> Callable[..., HoloTrainer]:
    """Run `hf-holo train` on a tiny model: `tiny_run("--max_steps", "2", folder="a")` writes to `tmp_path / "a"`."""

    def run(*flags: str, folder: str = "run") -> HoloTrainer:
        return train(parse([*TINY, "--train_file", str(text_file), "--output_dir", str(tmp_path / folder), *flags]))

    return run
