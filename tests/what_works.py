"""The page "What works": which features of which families pass their tests, with which transformers.

A test that shows that a feature works is marked with a group and a name, which may refer to its parameters:

    @pytest.mark.feature("PEFT", "{method}")  # of the family in the parameter `family`
    @pytest.mark.feature("Hub", "push", family="hsn")  # or a list of families

`pytest --what-works=docs/what-works.md` counts the outcomes in a table next to that page and writes the page from it
(without the equals sign pytest takes the page for a place to look for tests in, and does not find this option). A
run of all tests replaces what was counted with the same major version of transformers, a run of some of them only the
cells that they show.
"""

import csv
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import pytest

OUTCOMES = ("passed", "skipped", "failed")  # a test with several parts is what the worst of them is
INTRODUCTION = """# What works

Features of every family and the tests that show them. `make test-all` runs them with both major versions of
transformers and writes this page: nothing here is written by hand. The checks of causality, equivalence, generation,
state, persistence and adapters are those of [the conformance kit](conformance.md).

| | |
|---|---|
| ✓ 3 | three tests, all passed; parts of a test suite that do not apply to a family are skipped and not counted |
| ✗ 1 of 3 | one of three failed |
| not run | something was missing that its tests need |
| – | does not apply: there is no such test |
"""


class Cell(NamedTuple):
    """A feature of a family with a release of transformers."""

    transformers: str
    group: str
    feature: str
    family: str

    @property
    def place(self) -> tuple[str, ...]:
        """Where it stands on the page: releases of one major version share a column."""
        return self.transformers.split(".")[0], *self[1:]


Table = dict[Cell, Counter[str]]  # outcomes to numbers of tests


def pytest_addoption(parser):
    parser.addoption("--what-works", type=Path, metavar="PAGE", help="count the marked tests and write PAGE from that")


def pytest_configure(config):
    config.addinivalue_line("markers", "feature(group, name, family): a feature that the test shows, see what_works.py")
    if config.option.what_works and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Count(config))


def pytest_itemcollected(item):
    """What a test shows goes into its report, which also comes from another process."""
    if mark := item.get_closest_marker("feature"):
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        families = mark.kwargs.get("family", "{family}")
        for family in [families] if isinstance(families, str) else families:
            try:
                shown = [text.format(**parameters) for text in (*mark.args, family)]
            except KeyError as missing:
                raise pytest.UsageError(f"{item.nodeid}: its feature speaks of the parameter {missing}") from missing
            item.user_properties.append(("feature", shown))


class Count:
    """What became of the marked tests of a run."""

    def __init__(self, config: pytest.Config):
        chosen = config.option.markexpr or config.option.keyword or config.option.maxfail
        self.everything = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not chosen
        self.page = config.option.what_works
        self.release = version("transformers")
        self.tests: dict[str, tuple[list[Cell], str]] = {}  # by id: what a test shows and its outcome

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        _, before = self.tests.get(report.nodeid, ([], "passed"))
        cells = [Cell(self.release, *shown) for name, shown in report.user_properties if name == "feature"]
        self.tests[report.nodeid] = cells, max(report.outcome, before, key=OUTCOMES.index)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            return
        counted: Table = {}
        for cells, outcome in self.tests.values():
            for cell in cells:
                counted.setdefault(cell, Counter())[outcome] += 1
        path = self.page.with_suffix(".csv")
        before = read(path) if path.exists() else {}
        places, major = {cell.place for cell in counted}, self.release.split(".")[0]
        out = {cell for cell in before if cell.place in places or (self.everything and cell.place[0] == major)}
        write({cell: counts for cell, counts in before.items() if cell not in out} | counted, path)
        self.page.write_text(page(read(path)), encoding="utf-8")


def read(path: Path) -> Table:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        Cell(*(row[name] for name in Cell._fields)): Counter({name: int(row[name]) for name in OUTCOMES})
        for row in rows
    }


def write(table: Table, path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*Cell._fields, *OUTCOMES])
        writer.writerows([*cell, *(counts[name] for name in OUTCOMES)] for cell, counts in sorted(table.items()))


def page(table: Table) -> str:
    """The page as Markdown, a table for each group of features."""
    found = {cell.place: counts for cell, counts in table.items()}
    families = sorted({cell.family for cell in table})
    releases = {cell.place[0]: cell.transformers for cell in sorted(table)}
    heads = [f"{family}, {release}" for family in families for release in releases.values()]
    lines = [INTRODUCTION]
    for group in sorted({cell.group for cell in table}, key=str.lower):
        lines += [f"## {group}", f"| | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
        for feature in sorted({cell.feature for cell in table if cell.group == group}, key=str.lower):
            texts = [shown(found.get((major, group, feature, family))) for family in families for major in releases]
            lines.append(f"| {feature} | {' | '.join(texts)} |")
        lines.append("")
    return "\n".join(lines)


def shown(counts: Counter[str] | None) -> str:
    """One cell of the page."""
    if counts is None:
        return "–"
    ran = counts["passed"] + counts["failed"]
    if counts["failed"]:
        return f"✗ {counts['failed']} of {ran}"
    return f"✓ {ran}" if ran else "not run"
