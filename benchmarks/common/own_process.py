"""Measurements in processes of their own: the most memory that a process ever had is then that of one measurement."""

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence


def peak_gib() -> float:
    """The most memory that this process has had so far, in GiB."""
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def parsed(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, measure: Callable[..., dict]
) -> argparse.Namespace:
    """The arguments of a script; in a process of its own print what `measure` gives for what it was told, and end."""
    parser.add_argument("--own_process", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.own_process is not None:
        print(json.dumps(measure(**args.own_process)))
        raise SystemExit
    del args.own_process
    return args


def in_own_process(script: str, **arguments) -> dict:
    """What `script --own_process ARGUMENTS` prints as JSON, run in a process of its own.

    A process starts with the peak of the one that started it, so the one that calls should do nothing large itself.
    """
    command = [sys.executable, script, "--own_process", json.dumps(arguments)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def in_own_processes(script: str, each: list[dict]) -> list[dict]:
    """The same for several processes at a time, which may talk to each other, each with arguments of its own.

    Raises:
        subprocess.CalledProcessError: one of them has failed.
    """
    commands = [[sys.executable, script, "--own_process", json.dumps(arguments)] for arguments in each]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    outputs = [process.communicate()[0] for process in processes]
    for process in processes:
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, process.args)
    return [json.loads(output) for output in outputs]
