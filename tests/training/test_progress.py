"""What `hf-holo train` says and leaves: its plan, its progress, its help, and checkpoints without code."""

import os
import re

import pytest
from transformers import AutoModelForCausalLM

from hf_holo.conversion.distill import arguments as distill_arguments
from hf_holo.errors import HoloError
from hf_holo.training import progress
from hf_holo.training.arguments import parse
from hf_holo.training.train import main

from .conftest import TINY

FIRST_STEP = "step 1 of 6"


def test_a_run_says_at_the_start_what_it_will_do(tiny_run, text_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (0.1, 0, 0))
    trainer = tiny_run()
    plan, _, rest = capsys.readouterr().out.partition(FIRST_STEP)
    tokenizer, plan = plan.split("\n", 1)
    assert tokenizer.startswith("tokenizer: characters")
    text = text_file.read_text()
    learned = int(0.9 * len(text))
    held_out = len(text) - learned - 1  # the first one has nothing before it
    windows = len(trainer.train_dataset)
    assert plan.splitlines() == [
        f"data: {text_file}, 1 document",
        f"      {learned:,} tokens to learn from, in {windows:,} windows of up to 32; {held_out:,} held-out tokens are "
        f"scored ({held_out / (learned + held_out):.1%})",
        f"model: hsn, {trainer.model.num_parameters():,} parameters, {len(trainer.processing_class):,} tokens known",
        "training: 6 steps of 4 windows, MuonAdamW, learning rate 0.004",
        f"output: {tmp_path / 'run'}",
    ]
    assert re.search(r"^[\d.e-]+ s a step: about \d+ s to go, without the evaluations$", rest, re.MULTILINE)
    assert re.search(r"^step 3 of 6: validation loss \d\.\d{4}$", rest, re.MULTILINE)
    assert re.search(r"^6 steps in \d+ s$", rest, re.MULTILINE)


@pytest.mark.parametrize("bar", [True, False])
def test_no_dictionary_breaks_the_progress_bar(tiny_run, capsys, bar):
    tiny_run("--disable_tqdm", str(not bar), "--max_steps", "2", "--eval_steps", "1")
    out, err = capsys.readouterr()
    assert "{" not in out + err
    assert ("loss " in err) == bar and out.count("validation loss") == 2 + 1


def test_a_busy_machine_is_said(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    for load, expected in ((1.9, None), (7.25, "This machine is busy (load average 7.2 on 2 cores)")):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0, 0))
        line = progress.busy_line()
        assert line is expected or line.startswith(expected)


@pytest.mark.parametrize(("seconds", "said"), [(0.2, "0 s"), (89, "89 s"), (150, "2 min"), (9000, "2.5 h")])
def test_durations_are_read_at_a_glance(seconds, said):
    assert progress.duration(seconds) == said


@pytest.mark.parametrize("preset", ["hsn-tiny", pytest.param("resonance-tiny", marks=pytest.mark.slow)])
def test_checkpoints_hold_no_code_and_the_final_model_does(tiny_run, tmp_path, preset):
    sizes = ["--model", "hidden_size=16", "num_hidden_layers=1"]
    trainer = tiny_run("--preset", preset, *sizes)
    folder, checkpoint = tmp_path / "run", tmp_path / "run" / "checkpoint-6"
    assert not list(checkpoint.glob("*.py"))
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in (checkpoint / name).read_text()
        assert "auto_map" in (folder / name).read_text()
    family = preset.partition("-")[0]
    assert {f"modeling_{family}.py", f"configuration_{family}.py", "tokenization_holo.py"} <= {
        path.name for path in folder.glob("*.py")
    }
    assert AutoModelForCausalLM.from_pretrained(checkpoint).num_parameters() == trainer.model.num_parameters()
    longer = tiny_run("--preset", preset, *sizes, "--max_steps", "8", "--resume_from_checkpoint")
    assert longer.state.global_step == 8


def test_a_folder_with_a_run_is_refused_with_what_can_be_done(tiny_run, tmp_path):
    tiny_run("--max_steps", "1")
    with pytest.raises(
        HoloError, match=r"a run, which is complete: `hf-holo generate .*` uses its model; .* --overwrite"
    ):
        tiny_run("--max_steps", "1")
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(HoloError, match="not complete: continue it with --resume_from_checkpoint"):
        tiny_run("--max_steps", "1")


def test_some_held_out_windows_can_stand_for_all(tiny_run):
    trainer = tiny_run("--eval_windows", "3", "--max_steps", "1")
    assert len(trainer.eval_dataset) == 3
    assert "eval_bits_per_character" not in trainer.evaluate()
    with pytest.raises(HoloError, match="eval_windows: -1 is negative"):
        tiny_run("--eval_windows", "-1", "--overwrite")


@pytest.mark.parametrize("command", [parse, distill_arguments.parse])
def test_the_help_comes_in_groups_our_own_options_first(command, capsys):
    def said(word: str) -> str:
        with pytest.raises(SystemExit):
            command([word])
        return capsys.readouterr().out

    short, whole = said("--help"), said("--help_all")
    groups = re.findall(r"^(\S.*):$", whole, re.MULTILINE)
    assert groups.index("How to train it") < groups.index("TrainingArguments of transformers") == len(groups) - 1
    assert "--block_size" in short and "--warmup_steps" not in short and len(short.splitlines()) < 150
    assert whole.index("--block_size") < whole.index("--warmup_steps")
    assert "--block-size" not in whole and "default: None" not in whole
    assert "--warmup_steps" in said("--help-all")


def test_both_spellings_of_an_option_work():
    assert parse(["--block-size", "32"]).data.block_size == parse(["--block_size", "32"]).data.block_size == 32


def test_a_mistaken_option_is_named_whatever_stands_behind_it(tmp_path):
    with pytest.raises(HoloError, match="unknown argument --learning_rat; did you mean learning_rate"):
        main([*TINY, "--learning_rat", "1"])
