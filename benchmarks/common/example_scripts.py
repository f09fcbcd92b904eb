"""The scripts in examples, for benchmarks that report what they find."""

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> ModuleType:
    sys.path.append(str(EXAMPLES))
    return import_module(name)
