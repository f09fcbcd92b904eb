"""What the tests on a GPU share: where they run, and models and inputs there."""

from collections.abc import Callable, Iterator

import pytest
import torch
from accelerate.state import AcceleratorState
from small_models import new_model
from transformers import PreTrainedModel

VOCABULARY = 61


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda")


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """Full float32 instead of TF32, and no state of Accelerate from another test."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    torch.set_float32_matmul_precision(precision)
    AcceleratorState._reset_state(reset_partial_state=True)


def random_ids(rows: int, length: int) -> torch.Tensor:
    """Token ids `[rows, length]` without the padding id 0."""
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.fixture(name="small", scope="session")
def small_fixture() -> Callable[..., PreTrainedModel]:
    return new_model


@pytest.fixture(name="random_ids", scope="session")
def random_ids_fixture() -> Callable[..., torch.Tensor]:
    return random_ids
