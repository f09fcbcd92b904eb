"""What the README says is so: its Python runs, its commands exist, and it is short."""

import re
from pathlib import Path

import pytest

from hf_holo import architectures, cli, registry

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", PYTHON, ids=lambda code: code.split("\n")[0])
def test_python_runs(monkeypatch, code):
    monkeypatch.setattr(registry, "_ARCHITECTURES", architectures())
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def test_commands_exist():
    verbs = re.findall(r"^hf-holo (\w+)", README, re.MULTILINE)
    assert set(verbs) == set(cli.VERBS)
    assert {"make quickstart", "make test"} <= set(re.findall(r"^make \w+", README, re.MULTILINE))


def test_it_can_be_read():
    lines = README.splitlines()
    assert len(lines) <= 150 and max(map(len, lines)) <= 200
