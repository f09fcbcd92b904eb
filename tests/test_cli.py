"""The command: what it lists and measures, and one-line errors with exit status 2."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from help_texts import BY_RELEASE, OTHERS, help_of

import hf_holo
import hf_holo_cli
from hf_holo import cli
from hf_holo.eval import cost

ROOT = Path(hf_holo_cli.__file__).parent
LENGTHS = ["--lengths", "16", "64", "--json"]


def output(capsys, *argv: str) -> str:
    assert cli.main(list(argv)) == 0
    return capsys.readouterr().out


def test_help_and_version(capsys):
    text = output(capsys, "--help")
    assert all(verb in text for verb in cli.VERBS)
    assert output(capsys) == text
    assert hf_holo.__version__ in output(capsys, "--version")


@pytest.mark.parametrize("verb", sorted(hf_holo_cli.VERBS.keys() - OTHERS))
def test_the_written_help_is_that_of_the_parser(verb):
    written = hf_holo_cli.written_help(verb)
    if written is None and verb in BY_RELEASE:
        pytest.skip("no text was written with this release of transformers: the parser is asked")
    assert written == help_of(verb), "run `make help-texts`"


@pytest.mark.parametrize("argument", ["--help", "--version", "convert --help"])
def test_help_and_version_take_no_time(argument):
    """The script reads the verb before torch is imported: CPU time, and the best of three, as others work here too."""
    code = f"import sys, hf_holo_cli; hf_holo_cli.main({argument.split()!r}); sys.exit('hf_holo' in sys.modules)"
    times = []
    while len(times) < 3 and min(times, default=1) > 0.4:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, env=environment)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 0.4


def test_the_script_is_the_quick_module():
    assert '[project.scripts]\nhf-holo = "hf_holo_cli:main"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert cli.main is hf_holo_cli.main


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], f"unknown command 'trian': did you mean 'train'? known are {', '.join(sorted(cli.VERBS))}"),
        (["info", "hsn-tyni"], "unknown preset 'hsn-tyni': did you mean 'hsn-tiny'? known are"),
        (["info", "no/such/folder"], "'no/such/folder' has no config.json"),
        (["info", "hsn-tiny", "--lengths", "0"], "lengths: [0] are not all at least 1"),
        (["info"], "the following arguments are required: PRESET|PATH"),
        (["list", "--jsno"], "unrecognized arguments: --jsno"),
        (["list", "--vocab_size", "0"], "preset: 'hsn-base': vocab_size: 0 is not a positive integer"),
    ],
)
def test_errors_are_one_line_and_status_2(capsys, argv, message):
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"hf-holo: error: {message}") and captured.err.count("\n") == 1


def test_list_counts_what_a_real_model_has(capsys):
    rows = {row["preset"]: row for row in json.loads(output(capsys, "list", "--json", "--vocab_size", "65"))}
    assert set(rows) == set(hf_holo.presets())
    model = hf_holo.hsn_tiny(vocab_size=65)
    row = rows["hsn-tiny"]
    assert row["parameters"] == sum(p.numel() for p in model.parameters())
    assert row["embedding_parameters"] == 65 * 128
    assert (row["family"], row["capabilities"]) == ("hsn", sorted(model.capabilities))


@pytest.mark.slow
def test_list_prints_a_table(capsys):
    text = output(capsys, "list")
    assert all(preset in text for preset in hf_holo.presets()) and "constant_state" in text


def test_info_of_a_recurrent_model_has_the_same_state_at_every_length():
    record = cost.info(hf_holo.preset_config("hsn-tiny", num_hidden_layers=1), (16, 64))
    assert [row["length"] for row in record["costs"]] == [16, 64]
    assert {row["cache_bytes"] for row in record["costs"]} == {record["state_bytes"]}
    short, long = record["costs"]
    assert record["parameter_bytes"] < short["inference_bytes"] < long["inference_bytes"] < long["training_bytes"]


def test_info_of_attention_grows_with_the_length():
    config = hf_holo.preset_config("hsn-tiny", num_hidden_layers=1, mixer_types=["attention"])
    short, long = cost.info(config, (16, 64))["costs"]
    assert long["cache_bytes"] == 4 * short["cache_bytes"]


def test_info_of_a_model_that_fills_masks_says_nothing_of_decoding():
    record = cost.info(hf_holo.preset_config("hsn-tiny", num_hidden_layers=1, causal=False), (16,))
    (row,) = record["costs"]
    assert record["decode_flops"] is None is record["state_bytes"] and row["cache_bytes"] == 0
    assert record["parameter_bytes"] < row["inference_bytes"] < row["training_bytes"]


def test_info_of_a_checkpoint(capsys, tmp_path):
    hf_holo.hsn_tiny(vocab_size=33, num_hidden_layers=1).save_pretrained(tmp_path)
    record = json.loads(output(capsys, "info", str(tmp_path), *LENGTHS))
    assert (record["model_type"], record["vocab_size"]) == ("hsn", 33)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model_type": "hsn", "format_version": 99}', "format_version: 99 was written by a newer hf_holo"),
        ('{"model_type": "llama"}', "unknown architecture 'llama'"),
        ('{"model_type": "no-such-type"}', "no-such-type"),
        ("{", "not a valid JSON"),
    ],
)
def test_info_of_a_bad_checkpoint(capsys, tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    assert cli.main(["info", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.slow
def test_info_prints_a_table(capsys):
    text = output(capsys, "info", "hsn-tiny", "--lengths", "16")
    assert "parameters" in text and "per sequence, at any length" in text and "scan              " in text
    assert "scan    " not in output(capsys, "info", "holo-tiny", "--lengths", "16")


def test_flops_are_those_of_the_matrix_products():
    """Only the head differs between two vocabularies."""
    small, large = (cost.info(hf_holo.preset_config("hsn-tiny", vocab_size=v), ()) for v in (1000, 2000))
    assert large["decode_flops"] - small["decode_flops"] == 2 * 128 * 1000


def test_live_bytes_counts_shared_memory_once_and_sees_it_freed():
    with cost.LiveBytes() as live:
        a = torch.zeros(1000)
        view = a[:10]
        assert live.now == 4000
        b = a + 1
        assert live.now == 8000
        del a, b
        assert live.now == 4000 and view.numel() == 10
        del view
    assert (live.now, live.peak) == (0, 8000)


def test_ctrl_c_is_quiet(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(cost, "main", interrupted)
    assert cli.main(["info", "hsn-tiny"]) == 130
    assert capsys.readouterr().err == "hf-holo: interrupted\n"
