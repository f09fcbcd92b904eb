"""transformers' common tests need their source, and marks that are declared there."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # for shipped

MARKS = (
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "is_training_test",
    "order",
    "torch_compile_test",
    "torch_export_test",
)


def pytest_configure(config):
    for mark in MARKS:
        config.addinivalue_line("markers", f"{mark}: of transformers")


def pytest_ignore_collect(collection_path, config):
    """All is slow here: where slow tests are left out, nothing is fetched."""
    return True if "not slow" in config.option.markexpr else None
