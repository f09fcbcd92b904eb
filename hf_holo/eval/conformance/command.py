"""`hf-holo check`: run the conformance kit and print a table, one row for each check.

TARGET is a family (see `hf-holo list`), a preset, or the folder or Hub id of any causal language model. The command
exits with status 1 if a check fails.
"""

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm.auto import tqdm

from ...errors import HoloError, Parser, first_line, unknown
from ...registry import architectures
from . import CHECKS, GROUPS, Report, Result, Subject, run_check, select, zoo
from .targets import subjects_of

COLOURS = {"passed": "green", "failed": "red", "not applicable": "dim"}


def main(argv: list[str]) -> None:
    """Run `hf-holo check` with these arguments.

    Raises:
        HoloError: bad input; the message is one line that says what to do.
        SystemExit: with status 1 if a check failed.
    """
    args = _parse(argv)
    if args.transformers is not None:
        _visit_zoo(args)
        return
    targets = list(architectures()) if args.all else args.targets
    options = {"quick": args.quick, "seed": args.seed, "trust_remote_code": args.trust_remote_code}
    with usable_device(args.device):
        subjects = {target: subjects_of(target, **options) for target in targets}
        reports = {}
        for target, some in _only(subjects, args.models).items():
            reports[target] = run_checks(some, args.checks, args.quick)
            if not args.json:  # each as soon as it is known: all of them take half an hour
                print_report(target, reports[target])
    if args.json:
        merged = Report([result for report in reports.values() for result in report.results])
        print(merged.to_json())
    else:
        print_failures(reports, _repeated_options(args))
    if not all(report.passed for report in reports.values()):
        raise SystemExit(1)


def _visit_zoo(args: argparse.Namespace) -> None:
    """Check classes of transformers, and print or write the table; no failure is an error of this command."""
    folder = Path(args.records or f"runs/zoo/transformers-{transformers.__version__}")
    animals = list(zoo.visit(args.transformers, folder, args.limit))
    if args.page is None:
        print(zoo.table(animals))
    else:
        animals = zoo.write_page(animals, Path(args.page))
    print(f"{zoo.summary(animals)} Every result: {folder}")


def _only(subjects: dict[str, list[Subject]], names: Sequence[str] | None) -> dict[str, list[Subject]]:
    """Those of the models that are called so; all without names.

    Raises:
        HoloError: there is no model of a name.
    """
    if names is None:
        return subjects
    known = [subject.name for some in subjects.values() for subject in some]
    for name in names:
        if name not in known:
            raise unknown("model", name, known)
    chosen = {target: [subject for subject in some if subject.name in names] for target, some in subjects.items()}
    return {target: some for target, some in chosen.items() if some}


def usable_device(name: str) -> torch.device:
    """The device of this name, on which tensors are made under `with`.

    Raises:
        HoloError: there is no such device, or nothing can be computed on it.
    """
    try:
        torch.ones(1, device=name).item()
    except (RuntimeError, AssertionError) as error:  # the latter of a torch that was built without it
        raise HoloError(f"--device: {name!r} cannot be used: {first_line(error)}") from None
    return torch.device(name)


def run_checks(subjects: Sequence[Subject], names: Sequence[str] | None = None, quick: bool = False) -> Report:
    """Run checks on models, with a progress bar.

    Args:
        subjects: the models.
        names: names or groups of checks; default: all.
        quick: leave the slow ones out.
    """
    report = Report()
    pairs = [(subject, check) for subject in subjects for check in select(names, quick)]
    with tqdm(pairs, desc="checking", unit="check", leave=False, disable=not sys.stderr.isatty()) as progress:
        for subject, check in progress:
            progress.set_postfix_str(f"{subject.name}: {check.name}")
            report.results.append(run_check(check, subject))
    return report


def print_report(target: str, report: Report) -> None:
    """Print one row for each check, and one more for each further model that failed it."""
    models = len({result.subject for result in report.results})
    table = Table(title=f"{target}: {models} model{'s' * (models > 1)}")
    for column in ("check", "result", "what was seen"):
        table.add_column(column, overflow="fold")  # a long name continues on the next line and is not cut
    table.add_column("seconds", justify="right", no_wrap=True)
    for name in dict.fromkeys(result.check for result in report.results):
        _add_rows(table, [result for result in report.results if result.check == name])
    seconds = sum(result.seconds for result in report.results)
    counts = {status: sum(result.status == status for result in report.results) for status in COLOURS}
    console = Console()
    console.print(table)
    console.print(f"{', '.join(f'{count} {status}' for status, count in counts.items())}; {seconds:.0f} s")


def print_failures(reports: Mapping[str, Report], options: Sequence[str] = ()) -> None:
    """Print every failure with its reason, and the command that repeats it, with the options that matter."""
    failures = [(target, result) for target, report in reports.items() for result in report.failures]
    if failures:
        print(f"\n{len(failures)} failed:")
    for target, result in failures:
        several = len({other.subject for other in reports[target].results}) > 1
        model = ["--models", result.subject] if several else []
        repeat = shlex.join(["hf-holo", "check", target, "--checks", result.check, *model, *options])
        print(f"- {result.check}, {result.subject}: {result.detail}\n  again: {repeat}")


def _repeated_options(args: argparse.Namespace) -> list[str]:
    """Of the options of a run, those that a single check needs to be the same check on the same model."""
    seed = ["--seed", str(args.seed)] if args.seed else []
    device = ["--device", args.device] if args.device != "cpu" else []
    return [*seed, *device, *["--trust_remote_code"] * args.trust_remote_code]


def _add_rows(table: Table, results: list[Result]) -> None:
    """The rows of one check: every failure, or one row for all models that it applies to."""
    failures = [result for result in results if result.status == "failed"]
    seconds = f"{sum(result.seconds for result in results):.1f}"
    if failures:
        rows = [
            ("failed", f"{result.subject}: {result.detail}" if len(results) > 1 else result.detail)
            for result in failures
        ]
    else:
        rows = [_summary(results)]
    for number, (status, detail) in enumerate(rows):
        first = number == 0
        name, cost = (results[0].check, seconds) if first else ("", "")
        table.add_row(name, Text(status, style=COLOURS[status]), Text(detail), cost)


def _summary(results: list[Result]) -> tuple[str, str]:
    """Status and detail of a check that no model failed."""
    passed = [result for result in results if result.status == "passed"]
    if not passed:
        return "not applicable", "; ".join(dict.fromkeys(result.detail for result in results))
    if len(results) == 1:
        return "passed", passed[0].detail
    every = len(passed) == len(results)
    return "passed", "by all models" if every else f"by all that it applies to, {len(passed)} of {len(results)} models"


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="hf-holo check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", metavar="TARGET", nargs="*", help="family, preset, folder or Hub id")
    parser.add_argument("--all", action="store_true", help="check every registered family")
    parser.add_argument("--quick", action="store_true", help="leave out the slow checks and the rarer models")
    parser.add_argument(
        "--checks", nargs="+", metavar="NAME", help=f"only these checks or groups ({', '.join(GROUPS)})"
    )
    parser.add_argument("--models", nargs="+", metavar="NAME", help="only these of the models, as the table names them")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs")
    parser.add_argument("--device", default="cpu", help="where to run the models, for example cuda; default: cpu")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--trust_remote_code", action="store_true", help="let a checkpoint bring its own code")
    zoo_options = parser.add_argument_group("every causal language model of transformers, tiny and with random weights")
    add = zoo_options.add_argument
    add("--transformers", nargs="*", metavar="NAME", help="check these model types or classes; without names, all")
    add("--limit", type=float, default=zoo.LIMIT, help="seconds for a class; default: %(default).0f")
    add("--records", help="folder of the results; default: runs/zoo/transformers-VERSION")
    add("--page", help="page with marks for the table, such as docs/zoo.md; default: print it")
    args = parser.parse_args(argv)
    if bool(args.targets) + args.all + (args.transformers is not None) != 1:
        raise HoloError("TARGET: name at least one, or give --all or --transformers alone")
    for name in args.checks or ():
        if name not in GROUPS and name not in CHECKS:
            raise unknown("check", name, [*GROUPS, *CHECKS])
    return args
