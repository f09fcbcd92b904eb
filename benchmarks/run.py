"""Run the benchmarks whose results are missing, one after another.

    python benchmarks/run.py quick
    python benchmarks/run.py all --results MINE --tinyshakespeare tinyshakespeare.txt

`quick` are those that need no input and at most two minutes each; `all` are all. First the plan is shown: what is
measured already, which input is missing, and how long the rest took where the kept results were measured. A failure
does not stop the others; what failed is listed at the end, and the exit status is then 1. A run that was interrupted
is continued the next time. To measure again, remove a result or name another folder for the results. Inputs are options
or environment variables (TINYSHAKESPEARE=...).
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from common.suite import INPUTS, SUITE, Benchmark, duration, input_path, recorded_seconds

BENCHMARKS = Path(__file__).parent


def missing_inputs(benchmark: Benchmark) -> list[str]:
    """The inputs that are not there, each with what to do about it."""
    missing = []
    for name in benchmark.inputs:
        path = input_path(name)
        if path is None:
            missing.append(f"{name}: {INPUTS[name].what}")
        elif not Path(path).exists():
            missing.append(f"{name}: {INPUTS[name].what}; there is no {path}")
    return missing


def command(benchmark: Benchmark, results: Path) -> list[str]:
    """The command line, with the paths of the inputs."""
    words = [input_path(word) if word in INPUTS else word for word in shlex.split(benchmark.arguments)]
    return [sys.executable, str(BENCHMARKS / f"{benchmark.script}.py"), *words, "--results", str(results)]


def unfinished(name: str, results: Path) -> Path:
    """A file that is there while a benchmark runs, and afterwards if it has failed: its result may lack rows."""
    return results / f"{name}.unfinished"


def is_measured(name: str, results: Path) -> bool:
    return (results / f"{name}.json").exists() and not unfinished(name, results).exists()


def show_plan(names: Sequence[str], results: Path) -> list[str]:
    """Say what will happen with each benchmark; returns those that are to be run."""
    wanted, total = [], 0.0
    for name in names:
        seconds = recorded_seconds(name)
        if is_measured(name, results):
            said = "measured already"
        else:
            wanted.append(name)
            said = f"about {duration(seconds)}" if seconds else "never measured, so the time is not known"
            said += "".join(f"\n    needs {lack}" for lack in missing_inputs(SUITE[name]))
            total += 0 if missing_inputs(SUITE[name]) else seconds
        print(f"{name}: {said}")
    print(f"{len(wanted)} of {len(names)} to measure, about {duration(total)} for those that have all they need\n")
    return wanted


def measure(name: str, results: Path) -> str | None:
    """Run a benchmark; returns why it gave no result, or None."""
    words = command(SUITE[name], results)
    print(f"$ {shlex.join(words)}", flush=True)
    results.mkdir(parents=True, exist_ok=True)
    unfinished(name, results).touch()
    status = subprocess.run(words, check=False).returncode
    if status:
        return f"failed with exit status {status}"
    unfinished(name, results).unlink()
    return None if is_measured(name, results) else f"failed: it has not written {name}.json"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=("quick", "all"))
    parser.add_argument("--results", type=Path, default=BENCHMARKS / "results", help="folder of the result files")
    parser.add_argument("--only", nargs="+", choices=tuple(SUITE), metavar="NAME", help="of the suite")
    parser.add_argument("--plan", action="store_true", help="show the plan and stop")
    for name, given in INPUTS.items():
        parser.add_argument(f"--{name.lower()}", metavar="PATH", help=given.what.replace("%", "%%"))
    args = parser.parse_args(argv)
    os.environ |= {name: path for name in INPUTS if (path := getattr(args, name.lower()))}

    names = [n for n, b in SUITE.items() if (args.suite == "all" or b.quick) and n in (args.only or SUITE)]
    wanted, left_out, failed = show_plan(names, args.results), {}, {}
    if args.plan:
        return
    for number, name in enumerate(wanted, 1):
        if missing := missing_inputs(SUITE[name]):  # an earlier benchmark may have made them
            left_out[name] = f"left out, needs {' and '.join(missing)}"
            continue
        print(f"{number} of {len(wanted)}: {name}", flush=True)
        start = time.perf_counter()
        if reason := measure(name, args.results):
            failed[name] = reason
        print(f"{name}: {failed.get(name, 'done')} after {duration(time.perf_counter() - start)}\n", flush=True)
    for name, reason in (left_out | failed).items():
        print(f"{name}: {reason}")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
