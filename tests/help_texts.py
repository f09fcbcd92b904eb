"""Write what `hf-holo VERB --help` says to hf_holo/help, so that it can be said without importing torch."""

import importlib
import io
import os
from contextlib import redirect_stdout, suppress
from pathlib import Path
from unittest.mock import patch

import transformers

import hf_holo
import hf_holo_cli

COLUMNS = 100
OTHERS = {"serve"}  # whose parser is that of transformers 5
BY_RELEASE = {"train", "distill"}  # which take the arguments of transformers, other ones in each release
FOLDER = Path(hf_holo.__file__).with_name("help")


def help_of(verb: str) -> str:
    """What the parser of a verb says."""
    text = io.StringIO()
    with patch.dict(os.environ, COLUMNS=str(COLUMNS)), redirect_stdout(text), suppress(SystemExit):
        importlib.import_module(hf_holo_cli.VERBS[verb][0]).main(["--help"])
    return text.getvalue()


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for verb in hf_holo_cli.VERBS.keys() - OTHERS:
        release = f"-{transformers.__version__}" if verb in BY_RELEASE else ""
        (FOLDER / f"{verb}{release}.txt").write_text(help_of(verb), encoding="utf-8")
