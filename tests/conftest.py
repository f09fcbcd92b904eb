"""What all tests share."""

import gc
import os
import random
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may depend on a network

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parent))
pytest_plugins = ["pytester", "what_works"]

SHARED_DATA = Path(__file__).resolve().parents[1] / "../shared/data"


def pytest_collection_finish():
    """The collector of garbage need not look again and again at what stays to the end: all tests and libraries."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed():
    """Every test starts from the same random state."""
    random.seed(0)
    np.random.seed(0)
    if torch.accelerator.is_available():
        torch.manual_seed(0)
    else:
        torch.default_generator.manual_seed(0)  # the other notes the stack for every device that there is not


@pytest.fixture(autouse=True)
def own_environment():
    """TrainingArguments tells the whole process by variables how to compile: the tests after it would, too."""
    before = {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_")}
    yield
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of data sets next to the repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the data sets in {SHARED_DATA}, which are not here")
    return SHARED_DATA.resolve()


@pytest.fixture
def quick_export(monkeypatch):
    """Fewer and shorter measurements in the reports of exports."""
    monkeypatch.setattr("hf_holo.export.report.LENGTHS", (1, 17))
    monkeypatch.setattr("hf_holo.export.report.BATCHES", (2,))
    monkeypatch.setattr("hf_holo.export.report.NEW_TOKENS", 8)
    monkeypatch.setattr("hf_holo.export.report.WINDOW", 40)
    monkeypatch.setattr("hf_holo.export.report.REPEATS", 4)
