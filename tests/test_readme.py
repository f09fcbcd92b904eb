"""What the README says is so: its table of presets is counted, its Python runs, its commands exist."""

import re
from pathlib import Path

import pytest

from hf_holo import architectures, cli, preset_config, registry
from hf_holo.eval.catalogue import catalogue

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_table_of_presets_is_true():
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in README.splitlines() if "| `hsn-" in line]
    assert [row[0] for row in rows] == [record["preset"] for record in catalogue()]
    for (preset, *figures, _), counted in zip(rows, catalogue(vocab_size=65), strict=True):
        config, total = preset_config(preset), counted["parameters"]
        sizes = config.hidden_size, config.num_hidden_layers, config.rank
        assert figures == [f"{n:,}" for n in (*sizes, total, total - counted["embedding_parameters"])]
    assert f"hsn-tiny has {catalogue(vocab_size=32000)[0]['parameters']:,}" in README


@pytest.mark.parametrize("code", PYTHON, ids=lambda code: code.split("\n")[0])
def test_python_runs(monkeypatch, code):
    monkeypatch.setattr(registry, "_ARCHITECTURES", architectures())
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def test_commands_exist():
    verbs = re.findall(r"^hf-holo (\w+)", README, re.MULTILINE)
    assert set(verbs) == set(cli.VERBS)
