"""The command `hf-holo`: verbs only; the work is done in the module that a verb names.

This file is not part of the package, whose import takes torch and transformers along: help and the version are said
without them.
"""

import importlib
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

# Every module has a function `main(argv)` and is imported only when its verb is used.
VERBS = {
    "train": ("hf_holo.training.train", "train a model; without arguments the recipe `quickstart`"),
    "generate": ("hf_holo.generate", "write text with a trained model"),
    "chat": ("hf_holo.chat", "talk with a trained model; the history is in its state"),
    "serve": ("hf_holo.serve", "the server of transformers, which speaks the OpenAI protocol, for all families"),
    "check": ("hf_holo.eval.conformance.command", "test that a model does what it claims: causality, caches, saving"),
    "eval": ("hf_holo.eval.command", "measure models: language, zero-shot, recall, long context, speed; one report"),
    "convert": (
        "hf_holo.conversion.convert.command",
        "make linear layers or attention of a model holographic",
    ),
    "distill": ("hf_holo.conversion.distill.command", "a student learns from its teacher, in stages"),
    "export": ("hf_holo.export.command", "ONNX, torch.export, TorchScript and int8, each measured against PyTorch"),
    "scope": ("hf_holo.eval.scope", "decision boundaries of a ReLU and a holographic network on two spirals"),
    "recall": ("hf_holo.eval.recall", "how many pairs a holographic memory recalls, against theory"),
    "push": ("hf_holo.hub.push", "bring a checkpoint to the Hub, with its code and a model card"),
    "list": ("hf_holo.eval.catalogue", "families, presets, parameters and capabilities"),
    "info": ("hf_holo.eval.cost", "state, FLOPs and memory of a preset or a checkpoint"),
}


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments; default: those of the process.

    Returns:
        The exit status: 0, 2 after an error that the user can fix, 130 after Ctrl-C.
    """
    verb, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if verb in ("-h", "--help"):
        print(usage())
        return 0
    if verb == "--version":
        print(f"hf-holo {version('hf-holo')}")
        return 0
    if verb in VERBS and rest in (["-h"], ["--help"]) and (text := written_help(verb)):
        print(text, end="")
        return 0
    try:
        return _run(verb, rest)
    except KeyboardInterrupt:
        print("hf-holo: interrupted", file=sys.stderr)
        return 130


def _run(verb: str, argv: list[str]) -> int:
    from hf_holo.errors import HoloError, unknown  # late: it takes seconds

    try:
        if verb not in VERBS:
            raise unknown("command", verb, VERBS)
        importlib.import_module(VERBS[verb][0]).main(argv)
    except HoloError as error:
        from hf_holo.distributed.processes import first_to_say

        if first_to_say(str(error)):
            print(f"hf-holo: error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def written_help(verb: str) -> str | None:
    """What the parser of a verb would say, from a file: to import it takes seconds. (`make help-texts` writes them.)"""
    package = find_spec("hf_holo")
    folders = (package.submodule_search_locations or ()) if package else ()
    names = (f"{verb}.txt", f"{verb}-{version('transformers')}.txt")  # the second: with the arguments of that release
    files = [file for folder in folders for name in names if (file := Path(folder, "help", name)).is_file()]
    return files[0].read_text(encoding="utf-8") if files else None


def usage() -> str:
    """The text of `hf-holo --help`."""
    verbs = "\n".join(f"  {verb:<9} {text}" for verb, (_, text) in VERBS.items())
    return f"usage: hf-holo [--version] COMMAND ...\n\n{verbs}\n\n`hf-holo COMMAND --help` says what a command takes."


if __name__ == "__main__":
    sys.exit(main())
