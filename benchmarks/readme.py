"""Write what results/*.json say between the marks of the README, of the pages of docs, and of README.md in this folder.

    python benchmarks/readme.py

The scripts themselves say what their results mean: `sentence` in a line, `table` for a page, `headline` in the README.
"""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from common.ledger import PAGE as CLAIMS
from common.ledger import PROJECTS, summary
from common.ledger import table as claims
from common.report import BENCHMARKS, RESULTS, markdown_table, processors_of, read_report, software
from common.suite import GROUPS, HEADLINES, INPUTS, SUITE, TABLES, duration

from hf_holo.eval.markdown import filled

ROOT = BENCHMARKS.parent
DOCS, PAGE = ROOT / "docs", ROOT / "docs" / "benchmarks.md"


def measured(names: Iterable[str], folder: Path) -> dict[str, dict]:
    """The results in `folder`, by name; benchmarks that have not run are left out."""
    return {name: read_report(name, folder) for name in names if (folder / f"{name}.json").exists()}


def table(folder: Path = RESULTS, names: Iterable[str] = SUITE) -> str:
    """What each benchmark measured, in how much time and on what (memory_recall does not say)."""
    rows = [
        (
            f"`{name}`",
            SUITE[name].module.sentence(result),
            duration(result["seconds"]),
            processors_of(result) if "machine" in result else "",
        )
        for name, result in measured(names, folder).items()
    ]
    return markdown_table(("benchmark", "measured", ">time", "on"), rows)


def machines(folder: Path = RESULTS) -> str:
    """Where all this was measured."""
    results = [result for result in measured(SUITE, folder).values() if "machine" in result]
    places = (f"{r['machine']['processor']}, {r['machine']['cores']} cores, {software(r)}" for r in results)
    return f"Measured on: {'; '.join(dict.fromkeys(places))}."


def headlines(folder: Path = RESULTS) -> str:
    """The few results of the README."""
    rows = [
        (title, SUITE[names[0]].module.headline(*(read_report(name, folder) for name in names)))
        for title, names in HEADLINES.items()
    ]
    return markdown_table(("", "measured"), rows)


def own_table(names: Iterable[str], folder: Path = RESULTS) -> str:
    """What a script shows of its results on a page."""
    first, *_ = names
    for name in names:
        if not (folder / f"{name}.json").exists():
            return f"Not measured yet: `{SUITE[name].command}`."
    return SUITE[first].module.table(*(read_report(name, folder) for name in names))


def suite(folder: Path = RESULTS) -> str:
    """How each result is measured, what that needs, and how long it took."""
    times = {name: duration(result["seconds"]) for name, result in measured(SUITE, folder).items()}
    rows = [
        (f"`{name}`", f"`{b.command}`", "quick" if b.quick else "all", times.get(name, "not measured yet"))
        for name, b in SUITE.items()
    ]
    head = ("result", "command; words in capitals are inputs", "suite", ">time")
    return f"{markdown_table(head, rows)}\n\n{machines(folder)}"


def inputs() -> str:
    """What the benchmarks read."""
    rows = ((f"`{name}`", i.what, f"`{i.default}`" if i.default else "") for name, i in INPUTS.items())
    return markdown_table(("input", "what it is", "default"), rows)


PAGES: dict[tuple[Path, str], Callable[[], str]] = {
    (ROOT / "README.md", "measured"): headlines,
    (BENCHMARKS / "README.md", "suite"): suite,
    (BENCHMARKS / "README.md", "inputs"): inputs,
    (PAGE, "machines"): machines,
    **{(PAGE, group): partial(table, names=tuple(members)) for group, members in GROUPS.items()},
    **{(DOCS / f"{page}.md", mark): partial(own_table, names) for (page, mark), names in TABLES.items()},
    (CLAIMS, "summary"): summary,
    **{(CLAIMS, project): partial(claims, project) for project in PROJECTS},
    (DOCS / "conformance.md", "checks"): lambda: SUITE["conformance"].module.table_of_checks(),
}


def main() -> None:
    for (page, mark), make in PAGES.items():
        page.write_text(filled(page.read_text(encoding="utf-8"), mark, make()), encoding="utf-8")
        print(f"{page.relative_to(ROOT)}: {mark}")


if __name__ == "__main__":
    main()
