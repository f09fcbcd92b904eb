"""`hf-holo distill` in two processes does what it does in one, with half the batch in each."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from several_processes import in_processes
from small_distillations import arguments, write_models

from hf_holo_cli import main

BLOCKS = {"match": "blocks"}
LOGITS = {"match": "logits", "temperature": 2.0, "hard_labels": 0.3}
CACHED = {"match": "logits", "name": "cached", "cache_logits": 7, "gradient_accumulation_steps": 2, "max_steps": 3}
# 50 windows, in steps of 8: step 7 has only two, which one of the two processes has alone; step 8 begins an epoch
LONG = {"block_size": 64, "max_steps": 8, "learning_rate": 3e-3, "eval_steps": 4, "eval_strategy": "steps"}
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}
PRINTED = {"rtol": 1e-4, "atol": 1.01e-4}  # transformers 4.57 rounds what it logs to four places


def in_one(folder, stages, *flags, out="one", **changes):
    main(["distill", *arguments(folder, stages, *flags, out=out, per_device_train_batch_size=8, **changes)])
    return folder / out


def in_two(folder, stages, *flags, out="two", **changes):
    codes, said = in_processes(2, folder, main, ["distill", *arguments(folder, stages, *flags, out=out, **changes)])
    assert codes == [0, 0], "\n".join(said)
    return folder / out


def report_of(out):
    return json.loads((out / "report.json").read_text())


def losses(out):
    logs = [log for stage in report_of(out)["stages"] for log in stage["history"]]
    return [log.get("loss", log.get("eval_loss")) for log in logs]


def scores(out):
    report = report_of(out)
    return [entry["scores"]["text"]["loss"] for entry in (report["teacher"], report["student"], *report["stages"])]


def assert_same(one, two, name="model.safetensors"):
    torch.testing.assert_close(load_file(two / name), load_file(one / name), **ROUNDING)
    torch.testing.assert_close(scores(two), scores(one), **ROUNDING)
    torch.testing.assert_close(losses(two), losses(one), **PRINTED)
    tokens = [[stage["tokens"] for stage in report_of(out)["stages"]] for out in (one, two)]
    assert tokens[0] == tokens[1]


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path):
    """With an epoch that ends in the middle of a batch, and every file once."""
    folder = write_models("hsn", tmp_path)
    stages = [BLOCKS, CACHED]
    one, two = in_one(folder, stages, **LONG), in_two(folder, stages, **LONG)
    assert_same(one, two)
    files = [sorted(path.relative_to(out) for path in out.rglob("*")) for out in (one, two)]
    assert [path for path in files[1] if "rng_state" not in path.name] == [
        path for path in files[0] if "rng_state" not in path.name
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hsn", "surgery"])
@pytest.mark.parametrize("stage", [{"match": "layers"}, BLOCKS, {"match": "hidden_states"}, LOGITS, CACHED])
def test_every_objective(kind, stage, tmp_path):
    folder = write_models(kind, tmp_path)
    assert_same(in_one(folder, [stage], **LONG), in_two(folder, [stage], **LONG))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"lora_rank": 2},  # the adapters of what was not converted have no part in `layers`
        {"optimizer": "whitened"},
        {"optimizer": "adamw", "ema_decay": 0.9, "trainable": [".*"]},  # the last blocks and the head have no part
        {"causality_check": True},
    ],
    ids=["adapters", "whitened", "average", "causality"],
)
@pytest.mark.parametrize("match", ["layers", "logits"])
def test_every_way_to_train(changes, match, tmp_path):
    folder = write_models("surgery", tmp_path)
    one, two = (run(folder, [{"match": match}], **LONG, **changes) for run in (in_one, in_two))
    assert_same(one, two, "adapter_model.safetensors" if "lora_rank" in changes else "model.safetensors")


@pytest.mark.slow
def test_a_run_that_was_cut_off_ends_where_an_uninterrupted_one_does(tmp_path):
    folder = write_models("hsn", tmp_path)
    stages = [BLOCKS, {**LOGITS, "cache_logits": 7}]
    whole = in_two(folder, stages, **LONG)
    shutil.copytree(whole, folder / "cut")
    for name in ("2-logits/stage.json", "2-logits/model.safetensors", "model.safetensors"):
        (folder / "cut" / name).unlink()
    shutil.rmtree(folder / "cut/2-logits/checkpoint-8")  # 6 is left: the batch that is not full comes after it
    cut = in_two(folder, stages, "--resume_from_checkpoint", out="cut", **LONG)
    assert report_of(cut)["stages"][1]["resumed"]
    expected = load_file(whole / "model.safetensors")
    for name, value in load_file(cut / "model.safetensors").items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("where", ["both", "one"])
def test_bad_input_ends_all_with_one_message(where, tmp_path):
    folder = write_models("hsn", tmp_path)
    words = ["distill", *arguments(folder, [BLOCKS])]

    def command():
        import os

        missing = where == "both" or os.environ["RANK"] == "1"
        return main([*words, *(["--student", str(folder / "nowhere")] if missing else [])])

    codes, said = in_processes(2, folder, command)
    assert 2 in codes and 0 not in codes  # who is late is ended
    assert "".join(said).count("hf-holo: error: student: cannot load") == 1
    assert not (folder / "out").exists()
