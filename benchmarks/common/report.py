"""What all benchmarks share: fair timing, readable tables, and a result file that says where its figures come from."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from hf_holo.eval.machine import machine, versions
from hf_holo.eval.markdown import markdown_table  # noqa: F401  (the scripts take these from here)
from hf_holo.eval.timing import interleaved_medians, keep_freed_memory  # noqa: F401
from hf_holo.files import write_text

BENCHMARKS = Path(__file__).parents[1]
RESULTS = BENCHMARKS / "results"
IMAGES = BENCHMARKS.parent / "docs" / "images"


def write_report(name: str, figures: Mapping, *, seed: int, seconds: float, folder: Path = RESULTS) -> Path:
    """Writes `folder/name.json` under a temporary name first, so that a reader never meets half a file."""
    report = {
        "benchmark": name,
        "figures": figures,
        "seed": seed,
        "seconds": round(seconds, 1),
        "machine": machine(),
        "versions": versions(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    write_text(path, json.dumps(report, indent=2) + "\n")
    return path


def report_name(benchmark: str, family: str) -> str:
    """One report a family; that of hsn, which came first, has the name of the benchmark."""
    return benchmark if family == "hsn" else f"{benchmark}_{family}"


def read_report(name: str, folder: Path = RESULTS) -> dict:
    """The report written earlier under this name, or an empty one."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"figures": {}, "seconds": 0.0}


def earlier_rows(name: str, settings: Mapping, folder: Path = RESULTS, key: str = "rows") -> tuple[list[dict], float]:
    """The rows that an earlier run with these settings has left under `key`, and the seconds that they took."""
    earlier = read_report(name, folder)
    if settings.items() <= earlier["figures"].items():
        return earlier["figures"][key], earlier["seconds"]
    return [], 0.0


def best_runs(runs: Sequence[dict], names: Sequence[str], score: Callable[[dict], float]) -> list[dict]:
    """Of the runs that agree in `names` the one with the highest score, in the order in which they first appear."""

    def group(run: dict) -> tuple:
        return tuple(run[name] for name in names)

    chosen = {group(run): run for run in sorted(runs, key=score)}
    return [chosen[key] for key in dict.fromkeys(map(group, runs))]


def image_path(name: str, folder: Path) -> Path:
    """Where the picture of a benchmark belongs: in the documentation if its result is kept, else next to the result."""
    return (IMAGES if folder == RESULTS else folder) / f"{name}.png"


def measured_on(result: Mapping) -> str:
    """Processors, threads and versions of a result, in words."""
    return f"{processors_of(result)}, {software(result)}"


def processors_of(result: Mapping) -> str:
    """Processors and threads of a result, in words; runs that were made at other times may be of other processors."""
    machine, runs = result["machine"], result["figures"].get("runs", [])
    names = [run.get("processor", machine["processor"]) for run in runs] or [machine["processor"]]
    return f"{' and '.join(dict.fromkeys(names))}, {in_threads(machine['threads'])}"


def in_threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def software(result: Mapping) -> str:
    return f"torch {result['versions']['torch']}, transformers {result['versions']['transformers']}"


def flags(arguments: Mapping[str, object]) -> list[str]:
    """Names and values as a command takes them; a list gives several values."""
    words = []
    for name, value in arguments.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list | tuple) else [value])]
    return words


def print_table(rows: Sequence[Mapping[str, object]]) -> None:
    """Prints rows with the same keys as aligned columns."""
    cells = [list(rows[0])] + [[_cell(value) for value in row.values()] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_footer(path: Path, seconds: float) -> None:
    """Says where the figures were measured, how long it took, and where they are saved."""
    here = machine()
    where = f"{here['processor']}, {here['cores']} cores, {here['threads']} threads, {here['memory_gib']} GiB"
    print(f"{where}: {seconds:.0f} s")
    print(f"written to {path}")
