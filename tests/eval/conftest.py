"""The models that the kit is tested on: wrong ones, and right ones that it must not accuse."""

import importlib
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from hf_holo.eval.conformance import CHECKS

sys.path.append(str(Path(__file__).parent))  # the benchmarks import it too
WRONG_MODELS = importlib.import_module("wrong_models")

SEEDS = range(20)
QUICK = ("toy", "llama")  # of the right models
ALIKE = ("cheats in texts of more", "cheats with positions", "cheats in training steps", "cheats by statistics")  # slow


def some_first(values: Iterable, quick: int) -> list:
    """All values as parameters of a fixture; those after the first `quick` are slow."""
    return [pytest.param(value, marks=[pytest.mark.slow] * (i >= quick)) for i, value in enumerate(values)]


@pytest.fixture(name="wrong_models", scope="session")
def wrong_models_fixture():
    return WRONG_MODELS


@pytest.fixture(params=some_first(SEEDS, quick=1))
def wrong_seed(request) -> int:
    return request.param


@pytest.fixture(params=some_first(SEEDS, quick=1))
def right_seed(request) -> int:
    return request.param


def is_slow(name: str) -> bool:
    caught_by = WRONG_MODELS.FAULTS[name].caught_by
    return name.startswith(ALIKE) or any(CHECKS[check].slow for check in caught_by)


@pytest.fixture(params=[pytest.param(n, marks=[pytest.mark.slow] * is_slow(n)) for n in WRONG_MODELS.FAULTS])
def fault(request):
    """Every wrong model, and who must notice it."""
    return WRONG_MODELS.FAULTS[request.param]


@pytest.fixture(params=some_first(WRONG_MODELS.FAULTS, quick=2))
def important_fault(request):
    """The wrong models again, the most important ones first."""
    return WRONG_MODELS.FAULTS[request.param]


@pytest.fixture(params=[name for name, fault in WRONG_MODELS.FAULTS.items() if fault.lookahead > 0])
def leak(request):
    """The wrong models that look ahead."""
    return WRONG_MODELS.FAULTS[request.param]


@pytest.fixture(params=[pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in WRONG_MODELS.RIGHT])
def right(request):
    """Every right model."""
    return WRONG_MODELS.RIGHT[request.param]
