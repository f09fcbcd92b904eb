"""What the pages in docs say is so: their Python runs, their commands and images exist."""

import re
from pathlib import Path

import pytest

from hf_holo import cli
from hf_holo.eval.conformance import checks

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_runs(page, monkeypatch, tmp_path):
    """All of a page in one go: later pieces use what earlier ones define."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checks, "CHECKS", dict(checks.CHECKS))  # a page may add one
    code = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
    exec(compile(code, page.name, "exec"), {"__name__": "page"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_and_images_exist(page):
    text = page.read_text(encoding="utf-8")
    assert set(re.findall(r"\bhf-holo (\w+)", text)) <= set(cli.VERBS)
    for image in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (DOCS / image).is_file(), image
    for script in re.findall(r"python (\S+\.py)", text):
        assert (DOCS.parent / script).is_file(), script
