"""`hf-holo eval`: measure causal language models, and classifiers of pictures, sounds and several senses.

Writes JSON, CSV, pictures and report.md into one folder. MODEL is a preset (with random weights), a folder, a Hub id,
or a GGUF file; each is measured by the suites for its kind. What is measured is saved at once: the same command
continues where it was stopped, and measures nothing twice. A model that sees later tokens is refused, because
its losses would be those of copying. `hf-holo eval claims`, in a checkout of the repository, writes docs/claims.md.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..errors import HoloError, Parser, unknown
from ..files import output_folder, write_text
from .conformance.command import usable_device
from .machine import machine, versions
from .markdown import markdown_table
from .suites import GROUPS, OF_SENSES, SUITES, Options, Part, Run
from .suites.models import CLASSIFIERS, TEXT, Evaluated, causality_of, load, refuse_leaks, unique_names
from .suites.options import LENGTHS, QUICK
from .suites.run import Outcome

Given = str | PreTrainedModel | tuple[PreTrainedModel, Any]  # a model alone, or with its tokenizer or processor
UNITS = {"s": 1, "m": 60, "h": 3600}
LEDGER = Path("benchmarks", "claims.py")


def main(argv: list[str]) -> None:
    """Run `hf-holo eval` with these arguments.

    Raises:
        HoloError: bad input, or a model that leaks; the message is one line that says what to do.
    """
    if argv[:1] == ["claims"]:
        _ledger(argv[1:])
        return
    args = vars(_parse(argv))
    names = ("models", "suite", "output_dir", "budget", "allow_leaks", "device", "dtype", "trust_remote_code")
    report = evaluate(**{name: args.pop(name) for name in names}, **{k: v for k, v in args.items() if v is not None})
    Console().print(report.read_text(encoding="utf-8"), markup=False, highlight=False)
    print(f"written to {report}, with JSON, CSV and pictures next to it")


def evaluate(
    models: Given | list[Given],
    suite: str = "quick",
    output_dir: str | Path = "runs/eval",
    budget: float | str | None = None,
    allow_leaks: bool = False,
    device: str = "cpu",
    dtype: str = "float32",
    trust_remote_code: bool = False,
    **options: Any,
) -> Path:
    """Measure causal language models, and classifiers of pictures, sounds and several senses.

    Args:
        models: presets, folders, Hub ids, GGUF files; or models, alone or each with its tokenizer or its processor.
        suite: one of `SUITES`; "quick" or "all" are those for the kinds of the models.
        output_dir: folder of the results; what is measured there already is not measured again.
        budget: seconds, or text such as "30m", after which nothing new is begun; parts are cut short to keep it.
        allow_leaks: measure models that see later tokens, too.
        device: for models that are loaded here.
        dtype: likewise; "auto": as they are stored.
        trust_remote_code: let checkpoints bring their own code.
        options: fields of [`Options`].

    Returns:
        The path of report.md.

    Raises:
        HoloError: bad input, or a model that leaks.
    """
    if suite not in SUITES and suite not in GROUPS:
        raise unknown("suite", suite, [*SUITES, *GROUPS])
    seconds = seconds_of(budget)
    usable_device(device)
    chosen = Options(**{**(QUICK if suite == "quick" else {}), **options}, timed=seconds is not None)
    run = Run(output_folder(str(output_dir)), seconds)
    given: list[Given] = models if isinstance(models, list) else [models]
    evaluated = unique_names([_loaded(one, device, dtype, trust_remote_code, chosen.seed) for one in given])
    names = [suite] if suite in SUITES else GROUPS[suite]
    own = {name: [model for model in evaluated if model.sense == _sense(name)] for name in names}
    if suite in SUITES and not own[suite]:
        raise HoloError(f"suite: {suite!r} is not for {evaluated[0].name!r}, whose kind is {evaluated[0].sense!r}")
    lacking = {name: reason for name in names if own[name] and suite != name and (reason := _lacking(name, chosen))}
    plan = {name: list(SUITES[name].parts(own[name], chosen)) for name in names if own[name] and name not in lacking}
    read = [model for model in evaluated if model.sense == TEXT]
    causality = Outcome()
    if read:
        causality = run.measure("causality", [_causality_part(model, chosen, allow_leaks) for model in read])
    for name, reason in causality.left_out.items():
        raise HoloError(f"MODEL: {name} cannot be evaluated: {reason}")
    left_out = {name: Outcome(left_out={name: reason}) for name, reason in lacking.items()}
    return _measure(run, plan, evaluated, {"causality": causality, **left_out})


def _sense(suite: str) -> str:
    """What the models of a suite are for."""
    return suite if suite in OF_SENSES else TEXT


def _lacking(name: str, options: Options) -> str | None:
    """Why a suite of a group must be left out, if it must."""
    if name == "zero-shot" and options.zero_shot_data is None:
        return "no zero_shot_data"
    if name in OF_SENSES and not (options.eval_file or (options.image_data and options.audio_data)):
        return "no eval_file"
    return None


def _measure(
    run: Run, plan: Mapping[str, Sequence[Part]], models: Sequence[Evaluated], outcomes: dict[str, Outcome]
) -> Path:
    """Measure suite by suite, and write what is known after each."""
    report = run.folder / "report.md"
    write_text(report, told(run.folder, models, outcomes))
    with tqdm(plan.items(), desc="suites", unit="suite", leave=False) as progress:
        for number, (name, parts) in enumerate(progress):
            progress.set_postfix_str(name)
            outcomes[name] = run.measure(name, parts, share=1 / (len(plan) - number))
            run.write(name, outcomes[name])
            write_text(report, told(run.folder, models, outcomes))
    return report


def _loaded(given: Given, device: str, dtype: str, trust_remote_code: bool, seed: int) -> Evaluated:
    if isinstance(given, str):
        return load(given, device, dtype, trust_remote_code, seed)
    model, reader = given if isinstance(given, tuple) else (given, None)
    classifies = Evaluated(type(model).__name__, model).sense in CLASSIFIERS
    parts = {"processor" if classifies else "tokenizer": reader}
    return Evaluated(type(model).__name__, model.eval(), **parts)


def _causality_part(model: Evaluated, options: Options, allow_leaks: bool) -> Part:
    """Whether the model sees the future; it raises HoloError if it does and must not."""

    def measure(seconds: float | None) -> list[dict[str, Any]]:
        report = causality_of(model, options.block_size)
        refuse_leaks(model, report, allow_leaks)
        return [{"model": model.name, "passed": report.passed, "lookahead": report.lookahead, "report": str(report)}]

    settings = {"model": model.fingerprint, "block_size": options.block_size, "allow_leaks": allow_leaks}
    return Part("models", model.name, settings, measure)


def told(folder: Path, models: Sequence[Evaluated], outcomes: dict[str, Outcome]) -> str:
    """The text of report.md."""
    here, software = machine(), versions()
    seen = {row["model"]: row["report"] for row in outcomes["causality"].tables.get("models", [])}
    rows = [(m.name, type(m.model).__name__, f"{m.parameters:,}", seen.get(m.name, "")) for m in models]
    where = f"{here.get('gpu', here['processor'])}, {here['threads']} threads"
    pieces = [
        "# Evaluation",
        markdown_table(("model", "class", ">parameters", "causality"), rows),
        f"Measured on: {where}, torch {software['torch']}, transformers {software['transformers']}. One seed.",
    ]
    for name, outcome in outcomes.items():
        if name == "causality":
            continue
        pieces += [f"## {name.capitalize()}", *([SUITES[name].told(outcome.tables, folder)] if outcome.tables else [])]
        pieces += [f"- left out: {part}: {reason}" for part, reason in outcome.left_out.items()]
        pieces.append(f"{outcome.seconds:,.1f} seconds; all figures: `{name}.json`.")
    return "\n\n".join(pieces) + "\n"


def seconds_of(budget: float | str | None) -> float | None:
    """Seconds of a budget such as "90", "90s", "30m" or "1.5h"; None for none.

    Raises:
        HoloError: it is not understood, or not above 0.
    """
    if budget is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", str(budget))
    seconds = float(match[1]) * UNITS[match[2] or "s"] if match else 0.0
    if not seconds:
        raise HoloError(f"budget: {budget!r} is not a time; accepted are 90s, 30m, 1.5h")
    return seconds


def _ledger(argv: list[str]) -> None:
    """Run the script of the repository that measures claims and writes docs/claims.md."""
    if not LEDGER.is_file():
        raise HoloError(f"claims: there is no {LEDGER} here; run it in a checkout of the repository")
    status = subprocess.run([sys.executable, str(LEDGER), *argv], check=False).returncode
    if status:
        raise HoloError(f"claims: {LEDGER} has failed with status {status}")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="hf-holo eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("models", metavar="MODEL", nargs="+", help="preset, folder, Hub id or GGUF file; several are compared")
    add("--suite", default="quick", help=f"{', '.join([*SUITES, *GROUPS])}; default: quick")
    add("--output_dir", default="runs/eval", help="folder of the results; default: runs/eval")
    add("--budget", help="for example 30m: nothing new is begun after it, and parts are cut short to keep it")
    add(
        "--allow_leaks",
        "--allow-leaks",
        action="store_true",
        help="measure a model that sees later tokens all the same",
    )
    add("--device", default="cpu", help="for example cuda; default: cpu")
    add("--dtype", default="float32", help="of the weights; auto: as they are stored; default: float32")
    add("--trust_remote_code", action="store_true", help="let a checkpoint bring its own code")
    add("--eval_file", nargs="+", help="files or folders to score: texts, or labelled pictures, sounds or both")
    add("--dataset_name", help="dataset to score where no file is named; default: python-help")
    add("--text_column", help="of tables; default: text")
    for name in ("image_column", "audio_column", "label_column"):
        add(f"--{name}", help="of tables; default: the only one of its kind")
    add("--image_data", help="pictures of digits, for digits of three senses in place of --eval_file")
    add("--audio_data", help="recordings of digits, likewise")
    add("--question", choices=("digit", "sum"), help="about digits of three senses; default: digit")
    add("--block_size", type=int, help="tokens in a window; default: 512")
    add("--eval_windows", type=int, help="windows scored, at equal distances; default: 0, all")
    add("--batch_size", type=int, help="windows, questions or examples at a time; default: 4")
    add("--lengths", type=int, nargs="+", help=f"tokens, for long and speed; default: {' '.join(map(str, LENGTHS))}")
    add("--repeats", type=int, help="of every timing; default: 5")
    add("--peers", nargs="*", help="models of equal size to time in turns; default: llama gpt2 mamba")
    add("--zero_shot_data", help="folder with the questions: lambada.jsonl, blimp.parquet, piqa.jsonl, ...")
    add("--limit", type=int, help="questions of a task, or labelled examples; default: 0, all")
    add("--seed", type=int, help="of weights, inputs and choices; default: 0")
    args = parser.parse_args(argv)
    for name in ("block_size", "batch_size", "repeats"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise HoloError(f"{name}: {value} must be at least 1")
    if args.lengths is not None and min(args.lengths) < 2:
        raise HoloError(f"lengths: {args.lengths} must all be at least 2")
    for name in ("eval_file", "lengths", "peers"):
        if (values := getattr(args, name)) is not None:
            setattr(args, name, tuple(values))
    return args
