"""What other tests show with HSN alone, with the other families: training, resuming, instructions, pushing."""

import json
import math
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_holo.cli import main
from hf_holo.training.train import find_checkpoint
from hf_holo.training.train import main as train

from .test_resume import same_weights

OTHERS = ["holo", "resonance"]
pytestmark = pytest.mark.parametrize("family", OTHERS)


@pytest.fixture
def tiny_flags(family) -> tuple[str, ...]:
    return "--preset", f"{family}-tiny"


@pytest.mark.feature("training", "hf-holo train")
def test_training_learns(tiny_run, tiny_flags):
    """HOLO has no dense matrices for Muon: it is trained with AdamW, and says so."""
    short = ("--max_steps", "40", "--logging_steps", "20", "--eval_steps", "20", "--ema_decay", "0")
    trainer = tiny_run(*tiny_flags, *short)
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[-1] < losses[0] < math.log(trainer.model.config.vocab_size)


@pytest.mark.slow
@pytest.mark.feature("training", "resuming to the bit")
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_resuming_is_exact(tiny_run, tiny_flags, tmp_path, optimizer):
    flags = [*tiny_flags, "--optimizer", optimizer, "--save_steps", "2", "--max_steps", "4"]
    tiny_run(*flags, folder="whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "part" / "checkpoint-2")
    tiny_run(*flags, "--resume_from_checkpoint", folder="part")
    assert same_weights(tmp_path / "whole", tmp_path / "part")


@pytest.mark.slow
@pytest.mark.feature("training", "instructions in Alpaca's format")
def test_instructions_lower_the_held_out_loss(tiny_run, tiny_flags, tmp_path, capsys):
    tiny_run(*tiny_flags, folder="base")
    records = [{"instruction": f"Say {word}.", "input": "", "output": word} for word in ("wave", "key", "value") * 20]
    (tmp_path / "records.json").write_text(json.dumps(records))
    flags = f"--recipe alpaca --train_file {tmp_path}/records.json --model_name_or_path {tmp_path}/base"
    train(f"{flags} --output_dir {tmp_path}/tuned --num_train_epochs 2 --sample_tokens 8 --use_cpu".split())
    said = capsys.readouterr().out
    before, after = (
        float(said.split(f"held-out response loss {when} training: ")[1].split()[0]) for when in ("before", "after")
    )
    assert after < before


@pytest.mark.feature("training", "a damaged checkpoint to resume from is refused")
def test_a_damaged_checkpoint_is_refused(tiny_run, tiny_flags, tmp_path):
    tiny_run(*tiny_flags, folder="run")
    weights = find_checkpoint(tmp_path / "run", "last") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=weights.parent.name):
        tiny_run(*tiny_flags, "--max_steps", "8", "--resume_from_checkpoint", folder="run")


@pytest.mark.feature("Hub", "hf-holo push")
def test_what_a_push_would_send_loads(tiny_run, tiny_flags, tmp_path, capsys):
    trainer = tiny_run(*tiny_flags, folder="run")
    assert main(["push", str(tmp_path / "run"), "me/tiny", "--dry-run"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in ("model.safetensors", "config.json", "README.md", "heads.py"))
    ids = torch.arange(5)[None]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, trainer.model.eval()(ids).logits)
