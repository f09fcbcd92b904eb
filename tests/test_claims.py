"""The ledger of claims: its verdicts follow from result files, and from nothing else."""

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_holo import cli

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.exists(), reason="the benchmarks live in the repository only")


@pytest.fixture
def ledger(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("common.ledger")


@pytest.fixture
def results(tmp_path) -> Path:
    folder = tmp_path / "results"
    shutil.copytree(BENCHMARKS / "results", folder)
    return folder


def change(folder: Path, name: str, alter: Callable[[dict], None]) -> None:
    path = folder / f"{name}.json"
    report = json.loads(path.read_text(encoding="utf-8"))
    alter(report["figures"])
    path.write_text(json.dumps(report), encoding="utf-8")


def test_there_are_enough_claims_and_each_has_its_verdict(ledger):
    found = ledger.verdicts()
    assert len(found) >= 25 and {claim.project for claim in ledger.CLAIMS.values()} == set(ledger.PROJECTS)
    assert set(found.values()) >= {"true", "true with conditions", "false", "cannot be tested"}
    for name, claim in ledger.CLAIMS.items():
        assert claim.says and claim.source, name
        if found[name] == "cannot be tested":
            assert claim.untestable and not claim.results, name
        elif found[name] != "not measured yet":
            assert claim.told() and claim.command, name


@pytest.mark.parametrize(
    ("claim", "result", "alter", "before", "after"),
    [
        ("hsn-causal", "leaking_gate", lambda f: f["models"][0].update(lookahead=0), "false", "true"),
        ("hsn-muon", "leaking_gate", lambda f: f["models"][0].update(teacher_forced=3.7), "false", "true"),
        ("resonance-time", "long_context", lambda f: f["speed"][-1].update(relative=2.0), "true", "false"),
        ("holo-4096", "claims", lambda f: f["holo_layers"]["4096 to 4096"].update(trained=9), "true", "false"),
        ("hsn-tiny", "claims", lambda f: f["hsn_sizes"]["tiny"].update(all=410_000), "true with conditions", "true"),
    ],
)
def test_another_figure_is_another_verdict(ledger, results, claim, result, alter, before, after):
    assert ledger.CLAIMS[claim].verdict(results) == before
    told = ledger.CLAIMS[claim].told(results)
    change(results, result, alter)
    assert ledger.CLAIMS[claim].verdict(results) == after
    assert ledger.CLAIMS[claim].told(results) != told


def test_what_is_not_measured_is_not_judged(ledger, results):
    (results / "leaking_gate.json").unlink()
    assert ledger.CLAIMS["hsn-causal"].verdict(results) == "not measured yet"
    change(results, "surgery", lambda figures: figures.update(rows=[]))
    assert ledger.CLAIMS["holo-no-conversion"].verdict(results) == "not measured yet"


def test_the_page_is_what_the_command_writes(ledger, results, tmp_path, capsys):
    page = tmp_path / "claims.md"
    claims = importlib.import_module("claims")
    claims.main(["--ledger_only", "--results", str(results), "--page", str(page)])
    assert page.read_text(encoding="utf-8") == ledger.PAGE.read_text(encoding="utf-8")
    assert "hsn-causal" in capsys.readouterr().out
    change(results, "leaking_gate", lambda figures: figures["models"][0].update(lookahead=0))
    claims.main(["--ledger_only", "--results", str(results), "--page", str(page)])
    assert page.read_text(encoding="utf-8") != ledger.PAGE.read_text(encoding="utf-8")


def test_theorem_1_is_judged_by_autograd(ledger):
    found = importlib.import_module("claims").theorem_1()
    assert found["magnitude"] < 1e-10 and found["phase"] > 0.1


def test_counts_do_not_depend_on_the_day(ledger):
    """What is counted, not timed, is what the kept result says; sums, up to the order of a processor's additions."""
    claims = importlib.import_module("claims")
    kept = json.loads((BENCHMARKS / "results" / "claims.json").read_text(encoding="utf-8"))["figures"]
    for name in ("hsn_sizes", "hsn_layers", "holo_layers", "phi3", "determination", "long_tensors"):
        found, expected = (
            flattened(some) for some in (json.loads(json.dumps(claims.MEASUREMENTS[name]())), kept[name])
        )
        assert found == pytest.approx(expected, rel=1e-12), name


def flattened(figures: Any, name: str = "") -> dict[str, Any]:
    """Every figure by its path."""
    if not isinstance(figures, dict | list):
        return {name: figures}
    parts = figures.items() if isinstance(figures, dict) else enumerate(figures)
    return {path: x for key, part in parts for path, x in flattened(part, f"{name}/{key}").items()}


def test_the_command_needs_a_checkout(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["eval", "claims"]) == 2
    assert "run it in a checkout of the repository" in capsys.readouterr().err
