"""What the pages in docs say is so: their Python runs, their commands and images exist."""

import re
from pathlib import Path

import pytest
from small_models import new_model

from hf_holo import HoloError, cli, preset_config
from hf_holo.data.tokenizers import make_tokenizer
from hf_holo.eval.catalogue import catalogue
from hf_holo.eval.conformance import checks
from hf_holo.export.formats import FORMATS, SavedModel
from hf_holo.registry import presets

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
ROOT = DOCS.parent
TEXTS = [*PAGES, *(path for path in sorted(ROOT.glob("*.md")) if path.is_file())]
MADE = {"exported/onnx/generate.py"}  # scripts that a command writes
SIZES = {"hsn": "rank", "holo": "harmonics", "resonance": "num_modes"}  # what tables of presets show as a third size
LONG = {
    "code",
    "conformance",
    "how-a-causal-model-cheats",
    "evaluation",
    "surgery",
    "tour",
    "export/onnx",
    "export/torch-export",
}  # their Python takes seconds
ODD = r"anew|likeliest|commonest|lies in|may not be|goes on|is no [a-z]+ (?:file|folder|model|checkpoint)"


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
    source = SavedModel(str(model))
    FORMATS[name].write(source, exported)
    source.model.config.save_pretrained(exported)


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.slow] * (name_of(page) in LONG), id=name_of(page)) for page in PAGES]
)
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


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    """Relative ones, with their anchors; pictures are links too."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{link}: there is no {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), f"{link}: {target.name} has no such heading"


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_english_is_plain(page):
    assert not re.findall(ODD, page.read_text(encoding="utf-8"), re.IGNORECASE)


def test_the_english_of_the_package_is_plain():
    """Messages, docstrings, comments and recipes."""
    files = [path for path in (ROOT / "hf_holo").rglob("*") if path.suffix in (".py", ".yaml", ".json")]
    odd = {path.name: re.findall(ODD, path.read_text(encoding="utf-8"), re.IGNORECASE) for path in files}
    assert len(odd) > 50 and {name: words for name, words in odd.items() if words} == {}


@pytest.fixture(scope="module")
def with_few_tokens():
    return {row["preset"]: row for row in catalogue(vocab_size=65)}


@pytest.mark.parametrize("preset", [name for name, (family, _) in presets().items() if family.name in SIZES])
def test_the_tables_of_presets_are_true(preset, with_few_tokens):
    config, counted = preset_config(preset), with_few_tokens[preset]
    family, total = counted["family"], counted["parameters"]
    sizes = config.hidden_size, config.num_hidden_layers, getattr(config, SIZES[family])
    cells = [f"{n:,}" for n in (*sizes, total, total - counted["embedding_parameters"])]
    page = (DOCS / f"{family}.md").read_text(encoding="utf-8")
    assert f"| `{preset}` | {' | '.join(cells)} |" in page


@pytest.mark.slow
def test_the_counts_beside_those_of_the_reference_are_true():
    page = (DOCS / "hsn.md").read_text(encoding="utf-8")
    for counted in catalogue(vocab_size=32000)[:3]:
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{counted['preset']}`")]
        assert f" {counted['parameters']:,} |" in row
