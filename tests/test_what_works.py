"""The page "What works" is what the tests showed, and nothing on it failed or was left out."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from what_works import Cell, page, read, shown

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/what-works.md"

ONE_MAJOR = "onnx"  # in the name of a feature: Optimum's exporter holds transformers at 4.57

TESTS = """
import pytest

pytestmark = pytest.mark.feature("heads", "all heads")
FAMILIES = pytest.mark.parametrize("family", ["hsn", "holo"])

@FAMILIES
def test_both(family):
    assert family == "hsn"

@FAMILIES
@pytest.mark.parametrize("head", ["causal", "masked"])
@pytest.mark.feature("heads", "{head} head")
def test_heads(family, head):
    pass

@pytest.mark.feature("elsewhere", "load", family=["hsn", "resonance"])
def test_one():
    pytest.skip("no Hub here")
"""


@pytest.fixture
def count(pytester, monkeypatch):
    """Runs tests with `--what-works`; returns what pytest says."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # those of other packages take their time
    pytester.makeini("[pytest]\ntestpaths = .")

    def run(tests: str, *options: str) -> pytest.RunResult:
        pytester.makepyfile(test_some=tests)
        return pytester.runpytest_inprocess("-p", "what_works", "--what-works", "page.md", *options)

    return run


def test_the_page_is_made_of_the_outcomes():
    assert PAGE.read_text(encoding="utf-8") == page(read(PAGE.with_suffix(".csv")))


@pytest.mark.slow
def test_pytest_understands_the_command_of_the_makefile():
    (options,) = re.findall(r"\$\(TEST\) (.*what-works.*) \$\(PYTEST_FLAGS\)", (ROOT / "Makefile").read_text())
    command = [sys.executable, "-m", "pytest", *options.split(), "--markers"]  # lists the markers and runs nothing
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr


def test_every_cell_was_run_with_both_and_none_failed(request):
    if request.config.option.what_works:
        pytest.skip("the page is being made")
    table = read(PAGE.with_suffix(".csv"))
    assert not [cell for cell, counts in table.items() if counts["failed"] or not counts["passed"]]
    first, second = ({cell[1:] for cell in table if cell.place[0] == major} for major in ("4", "5"))
    assert not [cell for cell in first ^ second if ONE_MAJOR not in cell[1].lower()]


def test_marked_tests_are_counted(count, pytester):
    count(TESTS).assert_outcomes(passed=5, failed=1, skipped=1)
    table = {cell[1:]: counts for cell, counts in read(pytester.path / "page.csv").items()}
    assert table["heads", "all heads", "hsn"] == Counter(passed=1)
    assert table["heads", "all heads", "holo"] == Counter(failed=1)
    assert table["heads", "masked head", "holo"] == Counter(passed=1)
    assert table["elsewhere", "load", "resonance"] == Counter(skipped=1)
    assert "| all heads | ✗ 1 of 1 | ✓ 1 | – |" in (pytester.path / "page.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("part", ["test_some.py", "-ktest"])
def test_some_tests_replace_what_they_show_and_all_replace_everything(count, pytester, part):
    def groups() -> set[str]:
        return {cell.group for cell in read(pytester.path / "page.csv")}

    count(TESTS)
    fewer = TESTS.split('@pytest.mark.feature("elsewhere"')[0].replace('== "hsn"', "")
    count(fewer, part).assert_outcomes(passed=6)
    assert groups() == {"heads", "elsewhere"}
    assert "✗ 1 of 1" not in (pytester.path / "page.md").read_text(encoding="utf-8")
    count(fewer)
    assert groups() == {"heads"}


def test_an_interrupted_run_changes_nothing(count, pytester):
    assert count(TESTS + "\nraise OSError").ret == pytest.ExitCode.INTERRUPTED
    assert not (pytester.path / "page.csv").exists()


def test_a_mark_that_speaks_of_another_parameter_is_named(count):
    said = count(TESTS.replace("{head} head", "{heads} head"))
    assert said.ret == pytest.ExitCode.USAGE_ERROR
    said.stderr.fnmatch_lines("*test_some.py::test_heads*its feature speaks of the parameter 'heads'")


def test_columns_are_families_and_releases():
    table = {
        Cell("4.57.6", "PEFT", "LoRA", "hsn"): Counter(passed=2, skipped=1),
        Cell("5.23.0", "PEFT", "LoRA", "holo"): Counter(skipped=1),
    }
    head, _, row = page(table).splitlines()[-3:]
    assert head == "| | holo, 4.57.6 | holo, 5.23.0 | hsn, 4.57.6 | hsn, 5.23.0 |"
    assert row == "| LoRA | – | not run | ✓ 2 | – |"
    assert shown(Counter(failed=1, passed=2)) == "✗ 1 of 3"
