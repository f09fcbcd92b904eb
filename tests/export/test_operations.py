"""What takes the place of FFTs, of substitution and of loops over chunks in a graph computes the same."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_holo.modeling import binding, filters, recording, scans


@pytest.fixture
def in_a_graph(monkeypatch):
    """The operations take the form that they have in a graph."""
    for module in (binding, filters, recording, scans):
        monkeypatch.setattr(module, "exporting", lambda: True)


@pytest.mark.parametrize("dim", [1, 2, 7, 32])
@pytest.mark.parametrize("name", ["bind", "unbind"])
def test_binding_by_products(in_a_graph, name, dim):
    a, b = torch.randn(3, 2, dim, dtype=torch.float64), torch.randn(2, dim, dtype=torch.float64)
    expected = getattr(binding, f"{name}_naive")(a, b)
    torch.testing.assert_close(getattr(binding, name)(a, b), expected, rtol=0, atol=1e-12)


def test_inverse_of_a_triangle_is_stable():
    """The same key again and again, written at full strength, is the worst case: powers of `lower` reach 1e8."""
    lower = torch.ones(32, 32).tril(-1)
    expected = torch.eye(32) - torch.ones(31).diag(-1)
    torch.testing.assert_close(scans._unit_lower_inverse(lower, 32), expected, rtol=0, atol=1e-6)


def scan_inputs(length: int, groups: int = 1):
    keys = torch.nn.functional.normalize(torch.randn(2, 2, length, 6, dtype=torch.float64), dim=-1)
    q = torch.randn(2, 2 * groups, length, 6, dtype=torch.float64)
    v = torch.randn(2, 2, length, 5, dtype=torch.float64)
    log_decay = -0.1 * torch.rand(2, 2, length, dtype=torch.float64)
    return q, keys, v, log_decay, torch.rand(2, 2, length, dtype=torch.float64)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 100])
@pytest.mark.parametrize("scan", ["interference_scan", "cancelling_scan"])
def test_scans_without_a_loop(in_a_graph, scan, length):
    """Values and, for a compiler takes this form too, gradients."""
    inputs = [*scan_inputs(length, groups=2), torch.randn(2, 2, 6, 5, dtype=torch.float64)]
    for tensor in inputs:
        tensor.requires_grad_()
    found = getattr(scans, scan)(*inputs)
    expected = getattr(scans, f"{scan}_naive")(*inputs)
    weights = [torch.randn_like(output) for output in expected]
    gradients = (torch.autograd.grad(outputs, inputs, weights, materialize_grads=True) for outputs in (found, expected))
    for given, wanted in zip((*found, *next(gradients)), (*expected, *next(gradients)), strict=True):
        torch.testing.assert_close(given, wanted, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("scan", ["interference_scan", "cancelling_scan"])
def test_a_long_text_costs_neither_precision_nor_the_square_of_its_length(in_a_graph, scan):
    """2,048 chunks of two tokens in float32, against the loop over tokens in float64; some tokens forget everything."""
    torch.manual_seed(0)
    inputs = list(scan_inputs(4096))
    inputs[3][:, :, ::512] = -1000.0
    expected, state = getattr(scans, f"{scan}_naive")(*inputs)
    with Sizes() as sizes:
        found, last = getattr(scans, scan)(*(x.float() for x in inputs), chunk=2)
    for got, wanted in ((found, expected), (last, state)):
        assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert sizes.largest <= 2 * 2 * (1 + 2048) * 6 * 6  # no [N, N]


class Sizes(TorchDispatchMode):
    """Notes how many values the largest tensor has that an operation gives."""

    largest = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        sizes = [tensor.numel() for tensor in tree_leaves(result) if isinstance(tensor, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        return result


@pytest.mark.parametrize("scan", ["interference_scan", "cancelling_scan"])
def test_a_short_text_does_not_pay_for_the_longest(in_a_graph, scan):
    with Sizes() as sizes:
        getattr(scans, scan)(*scan_inputs(2))
    assert sizes.largest == 2 * 2 * scans.CHUNK**2


@pytest.mark.parametrize("scan", ["interference_scan", "cancelling_scan"])
def test_too_many_chunks_give_nan_and_no_wrong_number(in_a_graph, monkeypatch, scan):
    monkeypatch.setattr(scans, "DOUBLINGS", 2)
    y, state = getattr(scans, scan)(*scan_inputs(4 * scans.CHUNK))
    assert y.isfinite().all()  # the output of chunk 4 reads the state after chunk 3
    assert state.isnan().all()


@pytest.mark.parametrize("taps", [1, 2, 5])
def test_short_filters_without_a_function_of_their_own(in_a_graph, taps):
    x, kernel = torch.randn(2, 7, 3, dtype=torch.float64), torch.randn(3, taps, dtype=torch.float64)
    state = torch.randn(2, taps - 1, 3, dtype=torch.float64)
    expected = filters.short_causal_conv_naive(x, kernel, state)
    torch.testing.assert_close(filters.short_causal_conv(x, kernel, state), expected, rtol=0, atol=1e-12)
