"""`hf-holo check`: what it takes, what it prints, and its exit status. And the kit as somebody's pytest tests."""

import json
import shlex
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel

import hf_holo
from hf_holo import cli, registry
from hf_holo.eval.conformance import CHECKS, GROUPS, Report, Result, Subject, check, command, run_check
from hf_holo.eval.conformance.command import print_failures, print_report, run_checks
from hf_holo.eval.conformance.targets import family_subjects, subjects_of

SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
QUICK = ("--checks", "suffix exchange", "left padding")


class PeekingConfig(LlamaConfig):
    model_type = "peeking"


class PeekingForCausalLM(LlamaForCausalLM):
    """Adds to every output what the last token of the text says."""

    config_class = PeekingConfig

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + output.logits[:, -1:]
        return output


class OpenModel(LlamaModel):
    config_class = PeekingConfig


class OpenForCausalLM(LlamaForCausalLM):
    """Hands everything on, as many plug-ins do."""

    config_class = PeekingConfig

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class OpenForSequenceClassification(LlamaForSequenceClassification):
    config_class = PeekingConfig


@pytest.fixture
def peeking(monkeypatch):
    """A registered family that sees the future; forgotten after the test."""
    monkeypatch.setattr(registry, "_ARCHITECTURES", registry.architectures())
    models = {"AutoModelForCausalLM": PeekingForCausalLM}
    registry.register_architecture("peeking", PeekingConfig, models, presets={"peeking-mini": SIZES})


def run(capsys, *argv: str) -> tuple[int, str]:
    """Exit status and output of `hf-holo check`; the command leaves with SystemExit when a check fails."""
    try:
        status = cli.main(["check", *argv])
    except SystemExit as left:
        status = left.code
    return status, capsys.readouterr().out


def test_an_honest_preset_passes(capsys):
    status, text = run(capsys, "hsn-tiny", *QUICK)
    assert status == 0
    assert "suffix exchange" in text and "left padding" in text and "2 passed, 0 failed" in text


def test_the_device_can_be_named(capsys):
    status, text = run(capsys, "hsn-tiny", *QUICK, "--device", "cpu")
    assert status == 0 and "2 passed, 0 failed" in text


@pytest.mark.parametrize("device", ["nowhere", "meta"])
def test_a_device_that_cannot_be_used_is_refused(device, capsys):
    status = cli.main(["check", "hsn-tiny", *QUICK, "--device", device])
    assert status == 2 and f"--device: {device!r} cannot be used" in capsys.readouterr().err


def test_each_table_is_printed_as_soon_as_it_is_known(capsys, monkeypatch):
    known_before_the_last = []

    def checks(subjects, *_):
        known_before_the_last[:] = [capsys.readouterr().out]
        return Report([Result(subjects[0].name, "loss", "equivalence", "passed", "")])

    monkeypatch.setattr(command, "run_checks", checks)
    assert cli.main(["check", "hsn-tiny", "holo-tiny"]) == 0
    assert "hsn-tiny: 1 model" in known_before_the_last[0]


@pytest.mark.slow
def test_a_leaking_family_fails_with_status_1(capsys, peeking):
    status, text = run(capsys, "peeking", *QUICK)
    assert status == 1
    assert "failed" in text and "1 failed" in text


@pytest.mark.slow
def test_failures_are_listed_at_the_end_with_their_reason_and_how_to_repeat_them(capsys, peeking):
    options = ("--checks", "suffix exchange", "left padding", "--seed", "3")
    text = run(capsys, "peeking", *options)[1].partition("failed:\n")[2]
    assert "- suffix exchange, PeekingForCausalLM/peeking-mini: the model looks " in text
    repeat = next(line for line in text.splitlines() if "'suffix exchange'" in line)
    assert repeat == "  again: hf-holo check peeking --checks 'suffix exchange' --seed 3"
    status, again = run(capsys, *shlex.split(repeat)[3:])
    assert status == 1 and "1 failed:" in again


def test_one_of_several_models_can_be_repeated(capsys):
    report = Report(
        [Result("A", "loss", "equivalence", "failed", "wrong"), Result("B", "loss", "equivalence", "passed", "")]
    )
    print_failures({"hsn": report})
    assert "again: hf-holo check hsn --checks loss --models A\n" in capsys.readouterr().out
    text = run(capsys, "hsn", "--quick", "--checks", "left padding", "--models", "HsnForCausalLM/cancel")[1]
    assert "hsn: 1 model" in text


def test_names_are_wrapped_and_not_cut(capsys):
    name = "Very" * 30 + "LongForCausalLM"
    wrong = Result(name, "loss", "equivalence", "failed", "wrong")
    print_report("hsn", Report([wrong, replace(wrong, subject="B", status="passed")]))
    text = capsys.readouterr().out
    assert "…" not in text and text.count("Very") + text.count("Ver\n") >= 25


def test_a_check_that_applies_to_some_models_only_says_so(capsys):
    passed = Result("A", "loss", "equivalence", "passed", "")
    print_report("hsn", Report([passed, replace(passed, subject="B", status="not applicable")]))
    assert "by all that it applies to, 1 of 2 models" in " ".join(capsys.readouterr().out.replace("│", " ").split())


@pytest.mark.slow
def test_every_head_of_a_third_party_family_is_checked(monkeypatch, capsys):
    monkeypatch.setattr(registry, "_ARCHITECTURES", registry.architectures())
    heads = {"AutoModel": OpenModel, "AutoModelForCausalLM": OpenForCausalLM}
    heads["AutoModelForSequenceClassification"] = OpenForSequenceClassification
    registry.register_architecture("peeking", PeekingConfig, heads, presets={"open-mini": SIZES | {"pad_token_id": 0}})
    status, text = run(capsys, "peeking", "--quick", "--json")
    results = json.loads(text)["results"]
    assert status == 0, [result for result in results if result["status"] == "failed"]
    ran = {result["check"] for result in results if result["status"] == "passed"}
    assert {"any chunking", "left padding", "greedy decoding", "padding of whole texts", "loss"} <= ran


@pytest.mark.slow
def test_all_covers_every_family(capsys, peeking):
    status, text = run(capsys, "--all", "--quick", "--checks", "suffix exchange", "--json")
    assert status == 1  # one of them leaks
    results = json.loads(text)["results"]
    assert {result["subject"].split("/")[0] for result in results} >= {"HsnForCausalLM", "PeekingForCausalLM"}
    assert {r["subject"] for r in results if r["status"] == "failed"} == {"PeekingForCausalLM/peeking-mini"}


def test_json_says_what_the_table_says(capsys):
    status, text = run(capsys, "hsn-tiny", *QUICK, "--json")
    report = json.loads(text)
    assert status == 0 and report["passed"]
    assert [result["check"] for result in report["results"]] == ["suffix exchange", "left padding"]
    assert {"subject", "check", "group", "status", "detail", "seconds"} == report["results"][0].keys()


def test_a_foreign_checkpoint_is_checked_as_the_class_it_was_saved_from(tmp_path, capsys):
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    (subject,) = subjects_of(str(tmp_path))
    assert subject.model_class is LlamaForCausalLM
    assert run(capsys, str(tmp_path), *QUICK)[0] == 0


def test_a_checkpoint_of_a_head_is_checked_with_its_head(tmp_path):
    hf_holo.HsnForTokenClassification(hf_holo.HsnConfig(vocab_size=11, hidden_size=32)).save_pretrained(tmp_path)
    (subject,) = subjects_of(str(tmp_path))
    assert subject.model_class is hf_holo.HsnForTokenClassification


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "TARGET: name at least one, or give --all or --transformers alone"),
        (["hsn", "--all"], "TARGET: name at least one, or give --all or --transformers alone"),
        (["hsm"], "unknown family or preset 'hsm': did you mean 'hsn'?"),
        (["no/such/model"], "'no/such/model' is not a checkpoint that can be loaded"),
        (["hsn", "--checks", "causalty"], "unknown check 'causalty': did you mean 'causality'?"),
        (["hsn-tiny", "--models", "hsn-tinny"], "unknown model 'hsn-tinny': did you mean 'hsn-tiny'?"),
    ],
)
def test_bad_input_is_one_line_and_status_2(capsys, argv, message):
    assert cli.main(["check", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"hf-holo: error: {message}") and error.count("\n") == 1


def test_quick_takes_every_variant_and_every_head_once():
    hsn = registry.get_architecture("hsn")
    quick, full = family_subjects(hsn, quick=True), family_subjects(hsn)
    assert len(full) == len(hsn.variants) * len(hsn.models)
    assert {s.name.split("/")[0] for s in quick} == {model.__name__ for model in hsn.models.values()}
    assert {s.name.split("/")[1] for s in quick} == set(hsn.variants)
    assert len(quick) == len(hsn.variants) + len(hsn.models) - 1


@pytest.mark.slow
def test_a_family_without_models_to_check_is_refused(monkeypatch):
    monkeypatch.setattr(registry, "_ARCHITECTURES", registry.architectures())
    bare = registry.register_architecture("peeking", PeekingConfig, {"AutoModelForCausalLM": PeekingForCausalLM})
    with pytest.raises(hf_holo.HoloError, match="register it with variants= or presets="):
        family_subjects(bare)


# ---------------------------------------------------------------------------------------------- the checks as a list
def test_every_check_says_what_holds_and_belongs_to_a_group():
    for name, entry in CHECKS.items():
        assert entry.group in GROUPS and entry.function.__doc__, name


def test_a_check_of_ones_own_runs_with_the_others(capsys):
    before = dict(CHECKS)

    @check("state", "text")
    def outputs_are_finite(subject: Subject) -> None:
        """No output is infinite."""
        assert torch.isfinite(subject.run(subject.ids(1, 8))).all()

    try:
        subject = Subject(LlamaForCausalLM, LlamaConfig(**SIZES))
        result = run_check(CHECKS["outputs are finite"], subject)
        assert (result.status, result.detail) == ("passed", "")
        print_report("llama", run_checks([subject], ["outputs are finite"]))
        assert "outputs are finite" in capsys.readouterr().out
    finally:
        CHECKS.clear()
        CHECKS.update(before)


# ---------------------------------------------------------------------------------------------- as pytest tests
THIRD_PARTY = """
from transformers import LlamaConfig, LlamaForCausalLM

from hf_holo import register_architecture
from hf_holo.testing import ConformanceTests


class MineConfig(LlamaConfig):
    model_type = "mine"


class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        PEEK
        return output


register_architecture("mine", MineConfig, {"AutoModelForCausalLM": MineForCausalLM}, presets={"mine-mini": SIZES})


class TestMine(ConformanceTests):
    architecture = "mine"
"""


@pytest.mark.slow
@pytest.mark.parametrize("honest", [True, False], ids=["honest", "leaking"])
def test_three_lines_test_a_third_party_architecture(tmp_path, honest):
    peek = "pass" if honest else "output.logits = output.logits + output.logits[:, -1:]"
    code = THIRD_PARTY.replace("SIZES", repr(SIZES)).replace("PEEK", peek)
    (tmp_path / "test_mine.py").write_text(code)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "zero", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert done.returncode == (0 if honest else 1), done.stdout
    assert ("passed" in done.stdout) == honest
    assert ("tokens ahead" in done.stdout) != honest
