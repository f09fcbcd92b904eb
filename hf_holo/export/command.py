"""`hf-holo export`: write a trained model in other formats, one folder for each, and measure what was written.

Every folder holds the model, its tokenizer or processor, report.json (differences from PyTorch, size, speed) and a
model card. A format that fails leaves no folder; the others are still written, and the command exits with status 1.
"""

import argparse
import shutil
import sys
import traceback
from pathlib import Path

from tqdm.auto import tqdm

from ..errors import HoloError, Parser, first_line, unknown
from ..files import output_folder, replacing_folder
from . import standalone_script
from .formats import FORMATS, Source, continues
from .graph import TASKS, WITH_PAST, folded
from .report import measure, write_report


def main(argv: list[str]) -> None:
    """Run `hf-holo export` with these arguments.

    Raises:
        HoloError: bad input; the message is one line that says what to do.
        SystemExit: with status 1 if a format failed.
    """
    args = _parse(argv)
    text = None if args.text is None else _read(args.text)
    out = output_folder(args.out)
    source = Source(args.model, args.task)
    if text is not None and source.graph.task != "text-generation":
        raise HoloError(f"text={args.text!r}: the task {source.task!r} has no perplexity; leave --text out")
    failures = {}
    for name in (progress := tqdm(args.format, desc="exporting", unit="format", leave=False)):
        progress.set_postfix_str(name)
        try:
            export(source, name, out / name, text)
            progress.write(f"{name}: {out / name}")
        except HoloError as error:
            failures[name] = str(error)
        except Exception as error:  # an exporter may raise anything; the other formats go on
            if args.verbose:
                traceback.print_exc()
            failures[name] = f"{type(error).__name__}: {first_line(error)} (--verbose shows where)"
    for name, reason in failures.items():
        print(f"hf-holo: {name} failed: {reason}", file=sys.stderr)
    if failures:
        raise SystemExit(1)


def export(source: Source, name: str, folder: Path, text: str | None = None) -> dict:
    """Export to one format; `folder` appears complete or not at all, and replaces an older one.

    Args:
        source: the model.
        name: a key of `FORMATS`.
        folder: where to.
        text: a held-out text to measure the perplexity on; default: none.

    Returns:
        What report.json says.

    Raises:
        HoloError: what the format needs is not installed, the export does not compute the same, or `folder` is a file.
    """
    form = FORMATS[name]
    form.require()
    with replacing_folder(folder) as temporary:
        with folded(source.model):
            form.write(source, temporary)
        source.model.config.save_pretrained(temporary)
        if source.processor is not None:
            source.processor.save_pretrained(temporary)
        if name.startswith("onnx") and continues(source):
            shutil.copyfile(standalone_script(), temporary / "generate.py")
        record = measure(source, form, temporary, text)
        write_report(record, source, name, form, temporary)
    return record


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise HoloError(f"text={file!r} cannot be read: {first_line(error)}") from error


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="hf-holo export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of a trained model")
    parser.add_argument("out", help="folder for the folders of the formats")
    parser.add_argument("--format", nargs="+", default=["onnx"], help=f"{', '.join(FORMATS)}, or all; default: onnx")
    tasks = ", ".join([*TASKS, f"text-generation{WITH_PAST}"])
    parser.add_argument("--task", help=f"{tasks}; default: that of the saved head, with state if it generates")
    parser.add_argument("--text", help="held-out text file: its perplexity goes into the report")
    parser.add_argument("--verbose", action="store_true", help="show where a format failed")
    args = parser.parse_args(argv)
    if args.format == ["all"]:
        args.format = list(FORMATS)
    for name in args.format:
        if name not in FORMATS:
            raise unknown("format", name, [*FORMATS, "all"])
    return args
