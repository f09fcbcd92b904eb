"""Matrices in small integers: how far off they are, what they take, and that the fast products say the same."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_holo.modeling.harmonics import HoloLinear
from hf_holo.modeling.integers import FEW, GROUP, LARGEST, IntegerLinear, IntegerMatrix

KINDS = ("int8", "int4")


def matrix(outputs: int, inputs: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch.manual_seed(0)
    return (torch.randn(outputs, inputs) * 10 ** torch.randn(outputs, 1)).to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(5, 7), (33, 64), (1, 1), (48, 100)])
def test_no_value_is_off_by_more_than_half_a_scale(kind, size):
    exact = matrix(*size)
    stored = IntegerMatrix.of(exact, kind)
    found = stored.matrix()
    assert found.shape == exact.shape and found.dtype == exact.dtype
    groups = [exact] if kind == "int8" else exact.split(GROUP, dim=1)
    # the largest value of each group, and 2⁻⁷ for a scale that is rounded up to bfloat16
    steps = [group.abs().amax(1, keepdim=True).expand_as(group) / LARGEST[kind] * (1 + 2**-7) for group in groups]
    assert ((found - exact).abs() <= torch.cat(steps, 1) / 2 * (1 + 1e-6)).all()


@pytest.mark.parametrize("kind, bits", [("int8", 8), ("int4", 4)])
def test_it_takes_the_bits_that_it_says(kind, bits):
    stored = IntegerMatrix.of(matrix(64, 128), kind)
    assert stored.values.nbytes == 64 * 128 * bits // 8
    assert stored.scales.nbytes == 2 * 64 * (1 if kind == "int8" else 128 // GROUP)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_on_the_grid_is_stored_exactly(kind):
    integers = torch.randint(-LARGEST[kind], LARGEST[kind] + 1, (9, 64))
    integers[:, ::GROUP] = LARGEST[kind]
    exact = integers * torch.tensor([2.0**-k for k in range(9)])[:, None]
    assert torch.equal(IntegerMatrix.of(exact, kind).matrix(), exact)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (2, 3), (FEW,), (FEW + 1,), (1, 40)])
def test_products_are_those_of_the_matrix(kind, dtype, shape):
    """Few tokens go through the kernels, in bfloat16; more of them are multiplied with the matrix."""
    stored = IntegerMatrix.of(matrix(37, 50), kind)
    x, bias = torch.randn(*shape, 50).to(dtype), torch.randn(37).to(dtype)
    with torch.no_grad():
        y = stored(x, bias)
    right = x.double() @ stored.matrix(torch.float64).T + bias.double()
    assert y.dtype == dtype and y.shape == right.shape
    rounding = 2**-7 if x[..., 0].numel() <= FEW or dtype == torch.bfloat16 else 2**-9
    assert (y.double() - right).norm() < rounding * right.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_tensors_at_any_address_are_read(kind):
    """The int8 kernel crashes at addresses that are not multiples of 32, where files put tensors."""
    stored = IntegerMatrix.of(matrix(8, 64), kind)
    room = torch.empty(stored.values.numel() + 9, dtype=stored.values.dtype)
    room[9:] = stored.values.flatten()
    whole = torch.randn(3, 70).bfloat16()
    with torch.no_grad():
        right = stored(whole[:, 5:69].contiguous())
        stored.values = room[9:].view_as(stored.values)
        assert torch.equal(stored(whole[:, 5:69]), right)


@pytest.mark.parametrize("kind", KINDS)
def test_casts_keep_what_is_stored(kind):
    stored = IntegerMatrix.of(matrix(8, 40), kind)
    before = stored.matrix(torch.float64)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        cast = copy.deepcopy(stored).to(dtype)
        assert cast.matrix().dtype == dtype and cast.scales.dtype == torch.bfloat16
        assert torch.allclose(cast.matrix(torch.float64), before, rtol=1e-2)
    assert torch.equal(stored.to(torch.bfloat16).matrix(torch.float64), before)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_values_that_are_not_finite_are_refused(bad):
    broken = matrix(3, 5)
    broken[1, 2] = bad
    with pytest.raises(ValueError, match="not finite"):
        IntegerMatrix.of(broken, "int8")
    with pytest.raises(ValueError, match="'int3' is unknown"):
        IntegerMatrix(3, 5, "int3")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dense", [nn.Linear(40, 24), nn.Linear(40, 24, bias=False), Conv1D(24, 40)])
def test_a_layer_passes_gradients_to_its_input_alone(kind, dense):
    layer = IntegerLinear.like(dense, kind)
    x = torch.randn(2, 3, 40, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    right = layer.dense_matrix().sum(0).expand(2, 3, 40)
    assert torch.allclose(x.grad, right, atol=1e-5) and list(dict(layer.named_parameters())) in (["bias"], [])
    assert layer.weight.shape == (24, 40) and isinstance(layer, nn.Linear)
    assert (y - dense(x)).norm() < (0.02 if kind == "int8" else 0.2) * dense(x).norm()
    with pytest.raises(TypeError, match="cannot be changed in place"):
        layer.weight.data.zero_()


@pytest.mark.parametrize("kind", KINDS)
def test_a_holographic_layer_in_integers_counts_and_computes_as_before(kind):
    torch.manual_seed(0)
    layer = HoloLinear(40, 24, 20, "data", folded=True, pivoted=True)
    layer.load_factors(torch.randn(24, 20), torch.randn(20, 40))
    x, before = torch.randn(30, 40), layer.count_numbers()
    with torch.no_grad():
        right = layer(x)
        layer.to_integers(kind)
        assert layer.kind == kind and layer.folded and layer.dtype == torch.float32
        assert (layer(x) - right).norm() < (0.05 if kind == "int8" else 0.6) * right.norm()
        assert torch.allclose(layer(x), x @ layer.weight.T + layer.bias, atol=1e-3)
        layer.merge()
        assert torch.allclose(layer(x), x @ layer.weight.T + layer.bias, atol=1e-3)
    counted = layer.count_numbers()
    assert {**counted, "trained": 0} == {**before, "trained": 0} and counted["trained"] == 24  # the bias
    with pytest.raises(TypeError, match=f"in {kind} they cannot be trained"):
        layer.unfold()
