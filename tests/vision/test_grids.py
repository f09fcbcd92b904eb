"""Filters over grids of patches: all forms against their naive twins, values and gradients in float64."""

import pytest
import torch

from hf_holo.modeling import grids
from hf_holo.modeling.grids import GridFilter, fast_length, grid_filter, grid_filter_naive, grid_kernel

FORMS = [grids.grid_filter_dense, grids.grid_filter_by_ffts, grids.grid_filter_by_products]
GRIDS = [(6, 6, 2), (5, 9, 4), (1, 2, 3), (7, 3, 7), (1, 1, 1)]  # height, width, reach
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def random_grid(height, width, reach, dim=3):
    x = torch.randn(2, height, width, dim, dtype=torch.float64, requires_grad=True)
    kernel = torch.randn(dim, 2 * reach + 1, 2 * reach + 1, dtype=torch.float64, requires_grad=True)
    return x, kernel


def values_and_gradients(function, *inputs, weight):
    value = function(*inputs)
    return value, *torch.autograd.grad((value * weight).sum(), inputs)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", GRIDS)
def test_every_form_computes_the_sum_of_the_definition(form, sizes):
    x, kernel = random_grid(*sizes)
    weight = torch.randn_like(x)
    got = values_and_gradients(form, x, kernel, weight=weight)
    expected = values_and_gradients(grid_filter_naive, x, kernel, weight=weight)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("reach", [1, 4])
def test_kernels_come_from_magnitude_and_phase(reach):
    shape = (3, 2 * reach + 1, reach + 1)
    magnitude, phase = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(3, 2 * reach + 1, 2 * reach + 1, dtype=torch.float64)
    got = values_and_gradients(grid_kernel, magnitude, phase, weight=weight)
    expected = values_and_gradients(grids.grid_kernel_naive, magnitude, phase, weight=weight)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_the_response_of_a_kernel_is_what_was_set():
    """At the given frequencies; the column of frequency 0 holds some of them twice, which must agree."""
    reach = 3
    magnitude = 0.1 + torch.rand(2, 2 * reach + 1, reach + 1, dtype=torch.float64)
    phase = torch.randn_like(magnitude)
    magnitude[:, reach + 1 :, 0] = magnitude[:, 1 : reach + 1, 0].flip(1)
    phase[:, reach + 1 :, 0] = -phase[:, 1 : reach + 1, 0].flip(1)
    phase[:, 0, 0] = 0
    response = torch.fft.rfft2(grid_kernel(magnitude, phase).roll((-reach, -reach), (1, 2)))
    torch.testing.assert_close(response, torch.polar(magnitude, phase), **EXACT)


def test_the_way_that_is_taken_does_not_change_the_result(monkeypatch):
    taken = []
    for name in ("grid_filter_dense", "grid_filter_by_ffts"):
        form = getattr(grids, name)
        monkeypatch.setattr(grids, name, lambda x, k, form=form, name=name: taken.append(name) or form(x, k))
    for rows, side in ((1, 12), (5, 12), (16, 17)):  # few rows, enough rows, a large grid
        x, kernel = torch.randn(rows, side, side, 2, dtype=torch.float64), random_grid(1, 1, 3, dim=2)[1]
        torch.testing.assert_close(grid_filter(x, kernel), grid_filter_naive(x, kernel), **EXACT)
    assert taken == ["grid_filter_by_ffts", "grid_filter_dense", "grid_filter_by_ffts"]


def test_a_larger_grid_of_zeros_around_changes_nothing():
    """Not so with circular filters, whose period is the grid."""
    x, kernel = random_grid(5, 6, 4)
    larger = torch.nn.functional.pad(x, (0, 0, 0, 5, 0, 11))
    torch.testing.assert_close(grid_filter(larger, kernel)[:, :5, :6], grid_filter(x, kernel), **EXACT)


def test_an_impulse_shows_the_kernel_and_does_not_come_around():
    kernel = torch.randn(1, 5, 5, dtype=torch.float64)
    x = torch.zeros(1, 20, 20, 1, dtype=torch.float64)
    x[0, 1, 1] = 1
    y = grid_filter(x, kernel)[0, ..., 0]
    torch.testing.assert_close(y[:4, :4], kernel[0, 1:, 1:], **EXACT)
    assert y[4:].abs().max() < 1e-12 and y[:, 4:].abs().max() < 1e-12


def test_filters_keep_their_precision_under_autocast():
    layer, x = GridFilter(4, 2), torch.randn(1, 4, 4, 4)
    expected = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(layer(x), expected)
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_kernels_start_with_unit_size_and_fade_with_the_distance():
    kernel = GridFilter(200, 7).kernel()
    torch.testing.assert_close(kernel.square().sum((1, 2)), torch.ones(200))
    power = kernel.square().mean(0)
    assert power[7, 7] > 5 * power[7, 0] and power[7, 7] > 5 * power[14, 7]


@pytest.mark.parametrize(("least", "length"), [(1, 1), (7, 8), (11, 12), (17, 18), (31, 32), (127, 128), (131, 135)])
def test_fast_lengths_have_small_factors(least, length):
    assert fast_length(least) == length
