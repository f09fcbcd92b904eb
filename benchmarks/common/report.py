"""What all benchmarks share: fair timing, readable tables, and a result file that says where its figures come from."""

import ctypes
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
import transformers

from hf_holo.files import write_text

BENCHMARKS = Path(__file__).parents[1]
RESULTS = BENCHMARKS / "results"
IMAGES = BENCHMARKS.parent / "docs" / "images"


def machine() -> dict[str, str | int | float]:
    """Processor, cores, threads in use and memory: what a figure depends on, and nothing that names the machine."""
    return {
        "processor": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.system(),
    }


def _cpuinfo(field: str) -> str | None:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), None)


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


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
    """Processor, threads and versions of a result, in words."""
    machine = result["machine"]
    return f"{machine['processor']}, {in_threads(machine['threads'])}, {software(result)}"


def in_threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def software(result: Mapping) -> str:
    return f"torch {result['versions']['torch']}, transformers {result['versions']['transformers']}"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown. Columns whose name starts with ">" are aligned to the right."""
    names = [name.removeprefix(">") for name in head]
    rules = ["--:" if name.startswith(">") else "---" for name in head]
    lines = [_markdown_row(names), f"|{'|'.join(rules)}|"]
    return "\n".join([*lines, *map(_markdown_row, rows)])


def _markdown_row(cells: Sequence[object]) -> str:
    return "|" + "".join(f" {cell} |" if str(cell) else " |" for cell in cells)


def flags(arguments: Mapping[str, object]) -> list[str]:
    """Names and values as a command takes them; a list gives several values."""
    words = []
    for name, value in arguments.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list | tuple) else [value])]
    return words


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory for the next tensor, as torch does on a GPU.

    By default it returns large blocks to the system at once, and every new tensor of more than 32 MiB pays for page
    faults again: timings at long lengths would measure the system, not the model. Does nothing with another C library.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        trim_threshold, mmap_threshold, mmap_max = -1, -3, -4
        libc.mallopt(mmap_max, 0)
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, 2**31 - 1)


def interleaved_medians(tasks: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 2) -> dict[str, float]:
    """Median seconds of each task. They take turns, so that a slow moment of the machine hits all of them alike."""
    for task in tasks.values():
        for _ in range(warmup):
            task()
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(repeats):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


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
