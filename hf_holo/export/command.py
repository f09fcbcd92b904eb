"""`hf-holo export`: write a trained model in other formats, one folder for each, and measure what was written.

Every folder holds the model, its tokenizer or processor, report.json (differences from PyTorch, size, speed) and a
model card. A format that fails leaves no folder; the others are still written, and the command exits with status 1.
"""

import argparse
import copy
import shutil
import sys
import traceback
from pathlib import Path

from tqdm.auto import tqdm
from transformers import PretrainedConfig

from ..errors import HoloError, Parser, first_line, unknown
from ..files import output_folder, replacing_folder
from . import standalone_script
from .formats import FORMATS, Format, SavedModel, continues
from .graph import GENERATION, TASKS, folded
from .report import held_out, measure, summary, write_report


def main(argv: list[str]) -> None:
    """Run `hf-holo export` with these arguments.

    Raises:
        HoloError: bad input; the message is one line that says what to do.
        SystemExit: with status 1 if a format failed.
    """
    args = _parse(argv)
    text = None if args.text is None else _read(args.text)
    out = output_folder(args.out, "out")
    source = SavedModel(args.model, args.task)
    _check_text(source, args.text, text)
    failures = {}
    for name in (progress := tqdm(args.format, desc="exporting", unit="format", leave=False)):
        progress.set_postfix_str(name)
        try:
            record = export(source, name, out / name, text)
            progress.write(f"{name}: {out / name}: {summary(record)}")
        except HoloError as error:
            failures[name] = str(error)
        except Exception as error:  # an exporter may raise anything; the others follow all the same
            if args.verbose:
                traceback.print_exc()
            failures[name] = f"{type(error).__name__}: {first_line(error)} (--verbose shows where)"
    for name, reason in failures.items():
        print(f"hf-holo: {name} failed: {reason}", file=sys.stderr)
    if failures:
        raise SystemExit(1)


def export(source: SavedModel, name: str, folder: Path, text: str | None = None) -> dict:
    """Export to one format; `folder` appears complete or not at all, and replaces an older one.

    Args:
        source: the model.
        name: a key of `FORMATS`.
        folder: where to.
        text: a held-out text to measure the perplexity on; default: none.

    Returns:
        What report.json says.

    Raises:
        HoloError: what the format needs is not installed, the export does not compute the same, or `folder` is a file,
            the model, or a folder that no export has written.
    """
    form = FORMATS[name]
    form.require()
    _check_folder(source, form, folder)
    with replacing_folder(folder) as temporary:
        with folded(source.model):
            form.write(source, temporary)
        _without_code(source.model.config).save_pretrained(temporary)
        if source.processor is not None:
            source.processor.save_pretrained(temporary)
        if name.startswith("onnx") and continues(source):
            shutil.copyfile(standalone_script(), temporary / "generate.py")
        record = measure(source, form, temporary, text)
        write_report(record, source, name, form, temporary)
    return record


def _check_folder(source: SavedModel, form: Format, folder: Path) -> None:
    """Raise HoloError if the new folder would take the place of something that is not an older export."""
    if Path(source.folder).resolve().is_relative_to(folder.resolve()):
        raise HoloError(f"{str(folder)!r} is where the model is saved, and would be replaced; give another `out`")
    content = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if content and not content >= {"report.json", form.file}:
        raise HoloError(f"{str(folder)!r} holds files, but no earlier export; remove it or give another `out`")


def _without_code(config: PretrainedConfig) -> PretrainedConfig:
    """The config without references to the code of the model, which no export has or needs."""
    config = copy.deepcopy(config)
    auto_map = vars(config).pop("auto_map", None) or {}
    if kept := {auto: name for auto, name in auto_map.items() if not auto.startswith(("AutoConfig", "AutoModel"))}:
        config.auto_map = kept
    return config


def _check_text(source: SavedModel, file: str | None, text: str | None) -> None:
    """Raise HoloError before the work if what is to be read cannot be: by a damaged tokenizer, or for a perplexity."""
    tokenizer = source.processor
    if text is None:
        return
    if source.graph.task != "text-generation":
        raise HoloError(f"text: {file!r}: the task {source.task!r} has no perplexity; leave --text out")
    if tokenizer is None:
        raise HoloError(f"text: {file!r}: model={source.folder!r} has no tokenizer to read it with; leave --text out")
    try:
        held_out(source, text)
    except HoloError as error:
        raise HoloError(f"text: {file!r}: {error}") from error


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise HoloError(f"text: {file!r} cannot be read: {first_line(error)}") from error


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="hf-holo export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of a trained model")
    parser.add_argument("out", help="folder for the folders of the formats")
    parser.add_argument("--format", nargs="+", default=["onnx"], help=f"{', '.join(FORMATS)}, or all; default: onnx")
    tasks = ", ".join([*TASKS, GENERATION])
    parser.add_argument("--task", help=f"{tasks}; default: that of the saved head, with state if it generates")
    parser.add_argument("--text", help="held-out text file: its perplexity goes into the report")
    parser.add_argument("--verbose", action="store_true", help="show where a format failed")
    args = parser.parse_args(argv)
    for name in args.format:
        if name not in (*FORMATS, "all"):
            raise unknown("format", name, [*FORMATS, "all"])
    args.format = list(FORMATS if "all" in args.format else dict.fromkeys(args.format))
    return args
