"""The site that `make docs` builds: without a warning, and every link in it leads somewhere."""

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from hf_holo import architectures
from hf_holo.cli import VERBS

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow


class Links(HTMLParser):
    """What a page links to, and what can be linked to in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in ("href", "src") and value and not urlsplit(value).scheme:
                self.targets.add(value)
            if name in ("id", "name") and value:
                self.anchors.add(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_every_link_leads_somewhere(site):
    pages = {path: Links(path.read_text(encoding="utf-8")) for path in site.rglob("*.html") if path.name != "404.html"}
    broken = []
    for page, links in pages.items():
        for target in links.targets:
            parts = urlsplit(target)
            path = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            path = path / "index.html" if path.is_dir() else path
            anchor = unquote(parts.fragment)
            if not path.exists() or (anchor and path in pages and anchor not in pages[path].anchors):
                broken.append(f"{page.relative_to(site)}: {target}")
    assert not broken


def test_nothing_comes_from_elsewhere(site):
    """No font, script or style sheet is fetched from another host: the site can be read without the internet."""
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not [word for word in ("fonts.googleapis", "unpkg.com", "cdn.", "cdnjs") if f"//{word}" in text]


def test_commands_and_names_have_their_pages(site):
    for verb in VERBS:
        assert f"hf-holo {verb} " in (site / "commands" / f"{verb}.html").read_text(encoding="utf-8")
    models = (site / "reference" / "models.html").read_text(encoding="utf-8")
    for family in architectures().values():
        if family.config.__module__.startswith("hf_holo."):
            assert family.main_model.__name__ in models
