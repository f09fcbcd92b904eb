"""What the pages in docs say is so: their Python runs, their commands and images exist."""

import re
from pathlib import Path

import pytest
from small_models import new_model

from hf_holo import HoloError, cli
from hf_holo.data.tokenizers import make_tokenizer
from hf_holo.eval.conformance import checks
from hf_holo.export.formats import FORMATS, Source

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
MADE = {"exported/onnx/generate.py"}  # scripts that a command writes


def name_of(page: Path) -> str:
    return str(page.relative_to(DOCS).with_suffix(""))


def prepare_export(name: str, folder: Path) -> None:
    """A model and its export to a format, where the pages on formats have them."""
    FORMATS[name].require()
    model, exported = folder / "runs" / "shakespeare", folder / "exported" / name
    new_model("hsn", vocab_size=100).save_pretrained(model)
    make_tokenizer("characters", ["To be, or not to be. Friends, Romans"]).save_pretrained(model)
    if name.startswith("onnx"):
        return  # the page makes it
    exported.mkdir(parents=True)
    source = Source(str(model))
    FORMATS[name].write(source, exported)
    source.model.config.save_pretrained(exported)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_runs(page, monkeypatch, tmp_path):
    """All of a page in one go: later pieces use what earlier ones define."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checks, "CHECKS", dict(checks.CHECKS))  # a page may add one
    code = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
    if code and page.stem in FORMATS:
        try:
            prepare_export(page.stem, tmp_path)
        except HoloError as error:
            pytest.skip(str(error))
    exec(compile(code, page.name, "exec"), {"__name__": "page"})


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_images_exist(page):
    text = page.read_text(encoding="utf-8")
    assert set(re.findall(r"\bhf-holo (\w+)", text)) <= set(cli.VERBS)
    for image in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (page.parent / image).is_file(), image
    for script in re.findall(r"python (\S+\.py)", text):
        assert (DOCS.parent / script).is_file() or script in MADE, script
