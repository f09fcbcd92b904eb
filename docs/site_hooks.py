"""What the site has in addition to the pages in this folder: README.md and its neighbours as pages, the reference of
the commands from their `--help`, and that of the names in Python from their docstrings.

Links between pages work in the repository and on the site: those that lead out of this folder are turned here.
"""

import contextlib
import html
import importlib
import io
import os
import posixpath
import re
from collections import defaultdict

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

# Where on the site a page of the repository is, if it is not where it is in docs.
PLACES = {
    "README.md": "index.md",
    "docs/README.md": "documentation.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "running-benchmarks.md",
}
LINK = re.compile(r"(?P<label>\[(?:[^\[\]]|\[[^\]]*\])*\])\((?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
SOURCES = {place: source for source, place in PLACES.items()}
API = {  # public names by subject: the modules that they are from
    "models": tuple(
        f"modeling.{start}" for start in ("modeling_", "backbone", "pretrained", "heads", "configuration_")
    ),
    "parts": ("modeling.",),
    "surgery": ("conversion.",),
    "training": ("training.", "peft_defaults"),
    "tools": ("",),
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The order of the pages: that of the list in docs/README.md, then the references."""
    from hf_holo.cli import VERBS

    with open("docs/README.md", encoding="utf-8") as file:
        rows = "".join(line for line in file if line.startswith("|"))
    listed = dict.fromkeys(re.findall(r"\]\(([\w/.-]+\.md)\)", rows))
    config.nav = [
        {"Start": "index.md"},
        {"Pages": ["documentation.md", *(page for page in listed if not page.startswith("../"))]},
        {"Commands": [f"commands/{verb}.md" for verb in VERBS]},
        {"Python": [f"reference/{subject}.md" for subject in API]},
        {"Project": ["running-benchmarks.md", "contributing.md", "changelog.md"]},
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made here."""
    for source, place in PLACES.items():
        old = files.get_file_from_path(source.removeprefix("docs/")) if source.startswith("docs/") else None
        if old is not None:
            files.remove(old)
        with open(source, encoding="utf-8") as file:
            files.append(File.generated(config, place, content=file.read()))
    for verb, text in commands().items():
        files.append(File.generated(config, f"commands/{verb}.md", content=text))
    for subject, text in references().items():
        files.append(File.generated(config, f"reference/{subject}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the links of a page to where their pages are on the site."""
    place = page.file.src_uri
    source = SOURCES.get(place, f"docs/{place}")

    def turned(match: re.Match) -> str:
        label, target, anchor = match["label"], match["target"], match["anchor"] or ""
        if re.match(r"[a-z]+:", target):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        path = PLACES.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(path) is None:
            return label.strip("[]")  # a file of the repository that is not a page
        return f"{label}({os.path.relpath(path, posixpath.dirname(place) or '.')}{anchor})"

    return LINK.sub(turned, markdown)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas as MathML, which browsers draw by themselves."""
    for kind, display in (("span", "inline"), ("div", "block")):
        formula = re.compile(rf'<{kind} class="arithmatex">\\[(\[](.*?)\\[)\]]</{kind}>', re.DOTALL)
        content = formula.sub(lambda match: convert(html.unescape(match[1]), display=display), content)  # noqa: B023
    return content


def commands() -> dict[str, str]:
    """A page for every verb of `hf-holo`, with what its `--help` says."""
    from hf_holo.cli import VERBS, main

    os.environ["COLUMNS"] = "100"
    pages = {}
    for verb, (module, summary) in VERBS.items():
        said = io.StringIO()
        with (
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.suppress(SystemExit),
        ):
            main([verb, "--help"])
        text = said.getvalue() or importlib.import_module(module).__doc__  # `serve` asks transformers 5 for its help
        pages[verb] = f"# hf-holo {verb}\n\n{summary[0].upper()}{summary[1:]}.\n\n```text\n{text}\n```\n"
    return pages


def references() -> dict[str, str]:
    """Pages with the public names of the package, by subject."""
    import hf_holo

    pages = defaultdict(list)
    for name in dir(hf_holo):
        origin = hf_holo._ORIGIN.get(name)
        if origin is not None:
            module = origin.removeprefix("hf_holo.")
            subject = next(s for s, starts in API.items() if module.startswith(starts))
            pages[subject].append(f"::: {origin}.{name}\n")
    return {s: f"# {s.capitalize()}\n\n" + "\n".join(pages[s]) for s in API if pages[s]}
