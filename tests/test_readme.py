"""What the README says is so: its table of presets is counted, its Python runs, its commands exist."""

import re
from pathlib import Path

import pytest

from hf_holo import architectures, cli, preset_config, registry
from hf_holo.eval.catalogue import catalogue

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


SIZES = {"hsn": "rank", "holo": "harmonics", "resonance": "num_modes"}  # what the table shows beside width and layers


def test_the_tables_of_presets_are_true():
    cells = (line.split("|")[1:-1] for line in README.splitlines() if line.startswith("| `"))
    rows = {row[0].strip(" `"): [cell.strip() for cell in row[1:6]] for row in cells}
    for counted in catalogue(vocab_size=65):
        config, total = preset_config(counted["preset"]), counted["parameters"]
        sizes = config.hidden_size, config.num_hidden_layers, getattr(config, SIZES[counted["family"]])
        expected = [f"{n:,}" for n in (*sizes, total, total - counted["embedding_parameters"])]
        assert rows[counted["preset"]] == expected
    assert f"hsn-tiny has {catalogue(vocab_size=32000)[0]['parameters']:,}" in README


@pytest.mark.parametrize("code", PYTHON, ids=lambda code: code.split("\n")[0])
def test_python_runs(monkeypatch, code):
    monkeypatch.setattr(registry, "_ARCHITECTURES", architectures())
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def test_commands_exist():
    verbs = re.findall(r"^hf-holo (\w+)", README, re.MULTILINE)
    assert set(verbs) == set(cli.VERBS)
