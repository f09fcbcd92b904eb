"""The way to fla-core's kernels: layout, groups, documents, padding and states, with fla's own naive forms as kernels.

Where a GPU is, tests/cuda runs the kernels themselves.
"""

import importlib.util
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from small_models import new_model

from hf_holo import get_architecture
from hf_holo.modeling import kernels, scans

ROWS, HEADS, FEATURES, WIDTH = 3, 2, 6, 5
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def naive(family: str):
    """A naive form of fla-core, read from its file: the package around it needs Triton."""
    pytest.importorskip("einops", reason="fla-core needs einops")
    try:
        file = distribution("fla-core").locate_file(f"fla/ops/{family}/naive.py")
    except PackageNotFoundError:
        pytest.skip("fla-core is not installed")
    spec = importlib.util.spec_from_file_location(f"fla_naive_{family}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, f"naive_recurrent_{family}")


def as_kernel(function):
    """A naive form, which knows equal lengths only, called as the kernel is: also with sequences end to end."""

    def kernel(*, cu_seqlens=None, initial_state, **inputs):
        assert initial_state.dtype == torch.float32
        if cu_seqlens is None:
            return function(**inputs, initial_state=initial_state)
        options = {name: x for name, x in inputs.items() if not isinstance(x, torch.Tensor)}
        tensors = {name: x for name, x in inputs.items() if isinstance(x, torch.Tensor)}
        assert all(len(x) == 1 for x in tensors.values()) and len(initial_state) == len(cu_seqlens) - 1
        parts = [
            function(**{name: x[:, a:b] for name, x in tensors.items()}, **options, initial_state=state[None])
            for (a, b), state in zip(pairwise(cu_seqlens.tolist()), initial_state, strict=True)
        ]
        return torch.cat([y for y, _ in parts], 1), torch.cat([state for _, state in parts])

    return kernel


@pytest.fixture
def stand_ins(monkeypatch):
    """fla's naive forms in place of its kernels, and no obstacle to using them."""
    found = kernels.Kernels(*(as_kernel(naive(name)) for name in kernels.Kernels._fields))
    monkeypatch.setattr(kernels, "load_kernels", lambda: found)
    monkeypatch.setattr(kernels, "obstacle", lambda device, dtype, features: None)


def inputs(length: int, groups: int, cancel: bool, padding: bool) -> list[torch.Tensor]:
    torch.manual_seed(0)
    q = torch.randn(ROWS, HEADS * groups, length, FEATURES)
    k = torch.nn.functional.normalize(torch.randn(ROWS, HEADS, length, FEATURES), dim=-1)
    v = torch.randn(ROWS, HEADS, length, WIDTH)
    log_decay = -torch.rand(ROWS, HEADS, length)
    write = torch.rand(ROWS, HEADS, length) if cancel else -torch.rand(ROWS, HEADS, length)
    if padding:  # the last row has three real tokens
        log_decay[-1, :, 3:] = 0.0
        write[-1, :, 3:] = 0.0 if cancel else float("-inf")
    return [q, k, v, log_decay, write]


def documents(length: int) -> torch.Tensor:
    """The first row begins with a new one, the second has none, the third has several."""
    document = torch.zeros(ROWS, length, dtype=torch.long)
    document[0] = 1
    document[2, length // 3 :] = 1
    document[2, length // 2 :] = 4
    return document


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("cancel", [False, True], ids=["interference", "cancelling"])
def test_values_and_gradients_are_those_of_the_naive_twin(stand_ins, cancel, groups, carried, packed, padding):
    length = 13
    given = inputs(length, groups, cancel, padding)
    state = torch.randn(ROWS, HEADS, FEATURES, WIDTH) if carried else None
    document = documents(length) if packed else None
    twin = scans.cancelling_scan_naive if cancel else scans.interference_scan_naive
    fast = scans.cancelling_scan if cancel else scans.interference_scan
    results = []
    for function in (fast, twin):
        leaves = [x.clone().requires_grad_() for x in [*given, *([state] if carried else [])]]
        y, final = function(*leaves[:5], leaves[5] if carried else None, document)
        torch.manual_seed(1)
        sum((x * torch.randn(x.shape)).sum() for x in (y, final)).backward()
        results.append([y, final, *(leaf.grad for leaf in leaves)])
    for got, expected in zip(*results, strict=True):
        assert got.shape == expected.shape and got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, **CLOSE)


VARIANTS = get_architecture("hsn").variants


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_models_are_what_they_are_without_kernels(monkeypatch, request, variant):
    """With padding on the left, packed documents, and in two pieces; a single token takes the step."""
    causal = get_architecture("hsn").config(**VARIANTS[variant]).is_causal
    model = new_model("hsn", "AutoModelForCausalLM" if causal else "AutoModelForMaskedLM", variant)
    ids = torch.randint(1, 61, (2, 14), generator=torch.Generator().manual_seed(0))
    mask, seq_idx = torch.ones_like(ids), torch.zeros_like(ids)
    mask[1, :4], seq_idx[0, 6:], seq_idx[1, 9:] = 0, 1, 1

    def run() -> list[torch.Tensor]:
        logits = [model(ids, attention_mask=mask).logits[mask.bool()], model(ids, seq_idx=seq_idx).logits]
        if causal:
            cache = model.model.new_cache()
            logits += [model(piece, past_key_values=cache).logits for piece in (ids[:, :9], ids[:, 9:10], ids[:, 10:])]
        return logits

    expected = run()
    request.getfixturevalue("stand_ins")
    called = []
    for name in ("interference_by_kernel", "cancelling_by_kernel"):
        function = getattr(kernels, name)
        monkeypatch.setattr(scans, name, lambda *args, f=function: called.append(1) or f(*args))
    for got, wanted in zip(run(), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
    scanning = "holographic" in model.config.mixer_types
    assert bool(called) == scanning


# ---------------------------------------------------------------------------------------------- the choice
GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def available(monkeypatch):
    """As on a machine with fla-core that may round."""
    monkeypatch.delenv(kernels.SWITCH, raising=False)
    monkeypatch.setattr(kernels, "load_kernels", lambda: kernels.Kernels(None, None))
    monkeypatch.setattr(kernels, "may_round_to_tf32", lambda: True)


@pytest.mark.parametrize(
    ("device", "dtype", "features", "expected"),
    [
        (GPU, torch.float32, 256, "fla-core triton"),
        (GPU, torch.bfloat16, 64, "fla-core triton"),
        (CPU, torch.float32, 64, "torch (no GPU)"),
        (GPU, torch.float64, 64, "torch (float64)"),
        (GPU, torch.float32, 258, "torch (258 features, and the kernels take 256)"),
    ],
)
def test_they_are_chosen_where_they_fit(available, device, dtype, features, expected):
    assert kernels.backend(device, dtype, features) == expected


def test_a_variable_switches_them_off(available, monkeypatch):
    monkeypatch.setenv(kernels.SWITCH, "torch")
    assert kernels.backend(GPU, torch.float32, 64) == "torch (HF_HOLO_KERNELS=torch)"


def test_exact_products_stay_exact(available, monkeypatch):
    monkeypatch.setattr(kernels, "may_round_to_tf32", lambda: False)
    assert "torch (float32 products are exact" in kernels.backend(GPU, torch.float32, 64)
    assert kernels.backend(GPU, torch.bfloat16, 64) == "fla-core triton"


@pytest.mark.slow
def test_torch_says_whether_it_may_round():
    code = "import torch; from hf_holo.modeling.kernels import may_round_to_tf32 as may; print(may()); "
    code += "torch.set_float32_matmul_precision('high'); print(may())"
    environment = {**os.environ, "PYTHONPATH": str(Path(kernels.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True"]


def test_a_missing_package_is_a_reason(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(kernels.importlib, "import_module", missing)
    assert kernels.load_kernels.__wrapped__().startswith("fla-core cannot be imported: ModuleNotFoundError")


def test_the_choice_is_said_once_in_the_log(caplog):
    kernels._say.cache_clear()
    with caplog.at_level("INFO", logger=kernels.logger.name):
        for _ in range(3):
            kernels.fits(torch.zeros(1, 1, 5, 4))
    assert [record.getMessage() for record in caplog.records] == ["scan: torch (no GPU)"]
