"""The zoo: every causal language model class of the installed transformers under the kit, as a tiny random model.

`hf-holo check --transformers [NAME ...]` builds each class, runs the quick checks in a process of its own with a time
limit, and tells in one table what came of it. A failed check is a reason to look, not a verdict on a model: what the
kit says is confirmed in plain transformers before it is published.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import transformers
from tqdm.auto import tqdm
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ...errors import HoloError, first_line, unknown
from ...files import write_text
from ...registry import architectures
from ..markdown import filled, markdown_table
from .checks import run_check, select
from .quiet import quiet
from .subject import Subject
from .tiny_models import tiny_arguments, tiny_model, usual_config

MAJOR = transformers.__version__.partition(".")[0]
NOTHING_SEEN = "nothing seen"  # what the scripts say then
LIMIT = 120.0  # seconds for a class
COLUMNS: Mapping[str, tuple[str, ...]] = {  # of the table, and the checks or groups that it sums up
    "sees no later token": ("causality",),
    "cache": (
        "any chunking",
        "greedy decoding",
        "sampling from the cache",
        "continuation from a returned cache",
        "generation from embeddings",
    ),
    "beams": ("beam search from the cache",),
    "taking back": ("assisted decoding", "prompt lookup", "taking tokens back"),
    "padding": (
        "left padding",
        "right padding",
        "padding anywhere",
        "rows with different padding",
        "continuation after padding",
        "second turns of different length",
        "left padded batch",
    ),
    "precision": ("half precision", "autocast"),
    "saving": ("persistence",),
}


@dataclass(frozen=True)
class Animal:
    """What came of a class.

    Attributes:
        model_type, model_class: its names.
        parameters: of the tiny model; 0 if it was not built.
        results: records of the checks, see [`Result`](checks.Result).
        trouble: why it could not be built or was not finished; empty if all went well.
        confirmed: of columns with failures, what the script in plain transformers saw; empty if it saw nothing.
    """

    model_type: str
    model_class: str
    parameters: int = 0
    results: list[dict[str, Any]] = field(default_factory=list)
    trouble: str = ""
    confirmed: dict[str, str] = field(default_factory=dict)

    def failed(self, column: str) -> list[str]:
        """Names of the failed checks of a column."""
        return [r["check"] for r in self._of(column) if r["status"] == "failed"]

    def cell(self, column: str) -> str:
        """✓ if all that apply have passed, ✗ for a failure that a script has shown (? if it has not, or with the failed
        checks if none was asked), – if none applies."""
        failed = self.failed(column)
        if failed and column not in self.confirmed:
            return "? " + ", ".join(failed)
        if failed:
            return "✗" if self.confirmed[column] else "?"
        return "✓" if any(r["status"] == "passed" for r in self._of(column)) else "–"

    def _of(self, column: str) -> list[dict[str, Any]]:
        wanted = COLUMNS[column]
        return [r for r in self.results if r["check"] in wanted or r["group"] in wanted]


def classes() -> dict[str, str]:
    """The model types of transformers with a causal language model, and the name of its class; each class once."""
    own, public = architectures(), set(dir(transformers))  # which imports nothing
    named = ((kind, names) for kind, names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if kind not in own)
    single = {kind: names if isinstance(names, str) else names[0] for kind, names in named}
    first = {single[kind]: kind for kind in sorted(single, key=len, reverse=True)}  # of several types the shortest
    return {kind: name for kind, name in single.items() if name in public and first[name] == kind}


def chosen(names: Sequence[str]) -> dict[str, str]:
    """Those of the classes that are named by model type or class; all without names.

    Raises:
        HoloError: there is none of a name.
    """
    known = classes()
    for name in names:
        if name not in known and name not in known.values():
            raise unknown("model of transformers", name, [*known, *known.values()])
    return {kind: name for kind, name in known.items() if not names or kind in names or name in names}


def visit(names: Sequence[str], folder: Path, limit: float = LIMIT) -> Iterator[Animal]:
    """Check classes one after another, each in a process of its own; what is in the folder is not done again.

    Args:
        names: model types or classes; all if empty.
        folder: of the records, one file for each class; those of another transformers belong elsewhere.
        limit: seconds for a class.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tqdm(chosen(names).items(), desc="classes", unit="class", leave=False) as progress:
        for kind, name in progress:
            progress.set_postfix_str(name)
            record = folder / f"{kind}.jsonl"
            lines = _lines(record)
            if not lines or "finished" not in lines[-1]:
                lines = _in_own_process(kind, record, limit)
            yield _animal(kind, name, lines)


def _in_own_process(kind: str, record: Path, limit: float) -> list[dict[str, Any]]:
    """Let a process write its results line by line, so that those before its end are known whatever ends it."""
    record.unlink(missing_ok=True)
    command = [sys.executable, "-m", __name__, kind, str(record)]
    trouble = ""
    try:
        process = subprocess.run(command, timeout=limit, capture_output=True, text=True, check=False)
        if process.returncode:
            last = process.stderr.strip().rpartition("\n")[2]
            trouble = f"its process ended with status {process.returncode}: {last}"
    except subprocess.TimeoutExpired:
        trouble = f"not finished in {limit:.0f} s"
    with record.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"finished": not trouble, "trouble": trouble}) + "\n")
    return _lines(record)


def _lines(record: Path) -> list[dict[str, Any]]:
    if not record.is_file():
        return []
    return [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines() if line.endswith("}")]


def _animal(kind: str, name: str, lines: list[dict[str, Any]]) -> Animal:
    results = [line for line in lines if "check" in line]
    parameters = next((line["parameters"] for line in lines if "parameters" in line), 0)
    trouble = next((line["trouble"] for line in lines if line.get("trouble")), "")
    return Animal(kind, name, parameters, results, trouble)


# In the process of one class ------------------------------------------------------------------------------------------
def check_class(kind: str, record: Path) -> None:
    """Build a model and write what each check says of it, a line each."""
    with record.open("w", encoding="utf-8", buffering=1) as file:

        def write(**values: Any) -> None:
            file.write(json.dumps(values) + "\n")

        try:
            with quiet():
                model = tiny_model(getattr(transformers, classes()[kind]))
                model.config.modalities = ["text"]  # pictures and sounds have layouts of their own
                subject = Subject(model)
        except HoloError as error:
            write(trouble=f"not built: {error}")
            return
        write(parameters=sum(p.numel() for p in model.parameters()))
        try:
            subject.run(subject.ids(1, 9))
        except RuntimeError as error:
            write(trouble=f"not checked: in float64 it raises {type(error).__name__}: {first_line(error)}")
            return
        for check in select(None, quick=True):
            result = run_check(check, subject)
            write(check=result.check, group=result.group, status=result.status, detail=result.detail)


# What is told ---------------------------------------------------------------------------------------------------------
def table(animals: Sequence[Animal]) -> str:
    """One row for each class that was checked, and one below for each that was not, or not to the end."""
    rows = [(f"`{a.model_class}`", *map(a.cell, COLUMNS)) for a in animals if a.results]
    others = [(f"`{a.model_class}`", a.trouble) for a in animals if a.trouble]
    tables = [markdown_table(("class", *COLUMNS), rows)] if rows else []
    tables += [markdown_table(("class", "why it was not checked"), others)] if others else []
    return "\n\n".join(tables)


def failures(animals: Sequence[Animal]) -> str:
    """One row for each failure that a script has shown, with its words."""
    rows = [
        (f"`{a.model_class}`", column, said)
        for column in COLUMNS
        for a in animals
        if a.failed(column) and (said := a.confirmed.get(column))
    ]
    return markdown_table(("class", "column", "what its script sees"), rows)


def summary(animals: Sequence[Animal]) -> str:
    """How many were checked, and how many have a confirmed failure in each column."""
    built = [a for a in animals if a.results]
    counts = ", ".join(f"{column} {sum(a.cell(column).startswith('✗') for a in built)}" for column in COLUMNS)
    return (
        f"{len(built)} of {len(animals)} classes of transformers {transformers.__version__} checked; "
        f"confirmed failures: {counts}."
    )


def confirm(animals: Sequence[Animal], scripts: Path) -> list[Animal]:
    """Ask the scripts in plain transformers about every failure: a column's is called like the column.

    What they say goes to `confirmed-MAJOR.json` beside them, and the sizes of the models to `configs-MAJOR.json`.

    Args:
        animals: as [`visit`] gives them.
        scripts: the folder of the scripts, docs/zoo of the repository.
    """
    failing = {column: [a.model_class for a in animals if a.failed(column)] for column in COLUMNS}
    named = dict.fromkeys(name for names in failing.values() for name in names)
    with quiet():
        sizes = {name: tiny_arguments(usual_config(getattr(transformers, name))) for name in named}
    write_text(scripts / f"configs-{MAJOR}.json", json.dumps(sizes, indent=1) + "\n")
    said: dict[str, dict[str, str]] = {name: {} for name in named}
    for column, names in failing.items():
        for name, sentence in _ask(scripts / f"{column.replace(' ', '_')}.py", names):
            said[name][column] = sentence
    write_text(scripts / f"confirmed-{MAJOR}.json", json.dumps(said, indent=1) + "\n")
    return [replace(a, confirmed=said.get(a.model_class, {})) for a in animals]


def _ask(script: Path, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What a script says of each class; nothing where it sees nothing."""
    if not names:
        return
    command = [sys.executable, str(script), *names]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    pairs = (line.partition(": ")[::2] for line in process.stdout.splitlines())
    lines = {name: said for name, said in pairs if name in names}  # there are models that print, too
    if set(lines) != set(names):
        raise HoloError(f"{script} ended before it was done: {process.stderr.strip().rpartition(chr(10))[2]}")
    yield from ((name, "" if said == NOTHING_SEEN else said) for name, said in lines.items())


def write_page(animals: Sequence[Animal], page: Path) -> list[Animal]:
    """Put the table of this major version of transformers between its marks on a page, after asking the scripts in the
    folder that is called like the page.

    Raises:
        HoloError: the page has no such marks, or a script did not run.
    """
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    filled(text, f"transformers-{MAJOR}", "")  # before the scripts run
    animals = confirm(animals, page.with_suffix(""))
    content = "\n\n".join((summary(animals), failures(animals), table(animals)))
    write_text(page, filled(text, f"transformers-{MAJOR}", content))
    return animals


if __name__ == "__main__":
    check_class(sys.argv[1], Path(sys.argv[2]))
