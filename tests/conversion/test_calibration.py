"""The mathematics of calibrated surgery, on tiny models in float64."""

import copy
import math

import pytest
import torch

import hf_holo  # noqa: F401, registers the quantizer
from hf_holo import HoloError
from hf_holo.conversion import HoloSurgeryConfig
from hf_holo.conversion.surgery.calibration import (
    Site,
    Statistics,
    allocate,
    collect,
    factorise,
    find_sites,
    install,
    stacked_weight,
    surgery_plan,
)

SHARED = HoloSurgeryConfig(shared=True)


def token_windows(count: int = 8, length: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 80, (count, length), generator=torch.Generator().manual_seed(seed))


def projected(site: Site, weight: torch.Tensor, factors, rank: int) -> torch.Tensor:
    """W′ from the definition."""
    projection = factors.synthesis[:, :rank] @ factors.analysis[:rank]
    return projection @ weight if site.projects_outputs else weight @ projection


def output_error(difference: torch.Tensor, second_moment: torch.Tensor) -> float:
    """E‖ΔW x‖²."""
    return float((difference @ second_moment @ difference.T).trace())


def input_moments(model, sites, windows) -> list[torch.Tensor]:
    """Σ at every site, from the inputs themselves."""
    inputs = {}
    handles = [
        model.get_submodule(site.layers[0]).register_forward_pre_hook(
            lambda layer, args, name=site.layers[0]: inputs.setdefault(name, []).append(args[0].flatten(0, -2))
        )
        for site in sites
    ]
    with torch.no_grad():
        for window in windows:
            model(input_ids=window[None])
    for handle in handles:
        handle.remove()
    stacked = [torch.cat(inputs[site.layers[0]]) for site in sites]
    return [x.T @ x / len(x) for x in stacked]


def test_layers_with_the_same_input_form_one_site(make_teacher):
    sites = find_sites(make_teacher("llama"), SHARED)
    prefix = "model.layers.0.self_attn."
    assert sites[0].layers == tuple(prefix + name for name in ("q_proj", "k_proj", "v_proj"))
    assert (sites[0].outputs, sites[0].inputs, len(sites)) == (64, 32, 12)
    assert [site.projects_outputs for site in sites[:4]] == [False, True, False, True]


def test_statistics_are_the_moments_of_the_inputs(teacher):
    sites, windows = find_sites(teacher, SHARED), token_windows(3)
    for site, statistics, moment in zip(
        sites, collect(teacher, sites, windows), input_moments(teacher, sites, windows), strict=True
    ):
        weight = stacked_weight(teacher, site)
        expected = weight @ moment @ weight.T if site.projects_outputs else moment
        torch.testing.assert_close(statistics.gram, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


def test_fisher_is_the_mean_of_squared_gradients(make_teacher):
    model, windows = make_teacher("llama"), token_windows(2)
    sites = find_sites(model, SHARED)
    statistics = collect(model, sites, windows[:1], windows, seed=3)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())

    name, gradients = "model.layers.1.self_attn.o_proj", []
    model.get_submodule(name).register_forward_hook(lambda layer, args, y: y.register_hook(gradients.append) and None)
    for number, window in enumerate(windows):
        log_p = model(input_ids=window[None]).logits[0].float().log_softmax(-1)
        drawn = torch.multinomial(log_p.detach().exp(), 1, generator=torch.Generator().manual_seed(3 + number))
        (-log_p.gather(1, drawn).sum()).backward()
    g = torch.cat([gradient[0] for gradient in gradients])
    fisher = statistics[[site.layers[0] for site in sites].index(name)].fisher
    torch.testing.assert_close(fisher, g.T @ g / len(g), rtol=1e-4, atol=1e-9)


def test_factorisation_at_full_rank_is_exact(teacher):
    sites, windows = find_sites(teacher, SHARED), token_windows()
    for site, statistics in zip(sites, collect(teacher, sites, windows, windows[:4]), strict=True):
        weight = stacked_weight(teacher, site)
        factors = factorise(site, weight, statistics)
        torch.testing.assert_close(projected(site, weight, factors, site.size), weight, rtol=0, atol=1e-7)


def test_calibrated_error_is_at_most_that_of_svd(teacher):
    """At every rank, and the error that the factors predict is the true one."""
    sites, windows = find_sites(teacher, SHARED), token_windows()
    moments = input_moments(teacher, sites, windows)
    for site, statistics, moment in zip(sites, collect(teacher, sites, windows), moments, strict=True):
        weight = stacked_weight(teacher, site)
        factors = factorise(site, weight, statistics)
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        for rank in (4, 12, 20, 28):
            error = output_error(weight - projected(site, weight, factors, rank), moment)
            assert error < output_error(weight - (u[:, :rank] * s[:rank]) @ vh[:rank], moment)
            relative = error / output_error(weight, moment)
            assert factors.error(rank) == pytest.approx(relative, rel=2e-2, abs=1e-7)


def test_fisher_weighted_loss_is_the_tail_of_the_spectrum(make_teacher):
    model, windows = make_teacher("llama"), token_windows()
    sites = find_sites(model, SHARED)
    moments = input_moments(model, sites, windows)
    for site, statistics, moment in list(zip(sites, collect(model, sites, windows, windows), moments, strict=True))[:4]:
        weight = stacked_weight(model, site)
        factors = factorise(site, weight, statistics)
        difference = weight - projected(site, weight, factors, 16)
        fisher = statistics.fisher if statistics.fisher.dim() == 2 else torch.diag(statistics.fisher)
        loss = float((fisher @ difference @ moment @ difference.T).trace())
        assert loss == pytest.approx(float(factors.loss[16:].sum()), rel=0.1)


def test_no_projection_of_the_same_rank_loses_less():
    """Against random projections: the eigenvectors are the best ones."""
    site, generator = Site(("a",), (12,), 8), torch.Generator().manual_seed(0)
    weight, mix = torch.randn(12, 8, generator=generator).double(), torch.randn(8, 8, generator=generator).double()
    fisher = torch.rand(12, generator=generator).double()
    factors = factorise(site, weight, Statistics(mix @ mix.T, fisher))
    best = float(factors.loss[3:].sum())
    for _ in range(20):
        basis = torch.randn(3, 8, generator=generator).double()
        root = torch.linalg.cholesky(mix @ mix.T)
        target, rows = fisher.sqrt()[:, None] * weight @ root, basis @ root
        residual = target - target @ torch.linalg.pinv(rows) @ rows
        assert best < float(residual.square().sum())


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8, 0.95])
def test_allocation_hits_the_budget_within_one_percent(make_teacher, ratio):
    model, windows = make_teacher("llama"), token_windows()
    sites = find_sites(model, SHARED)
    measured = zip(sites, collect(model, sites, windows, windows), strict=True)
    losses = [factorise(site, stacked_weight(model, site), statistics).loss for site, statistics in measured]
    ranks = allocate(sites, losses, ratio)
    total = sum(site.numbers for site in sites)
    stored = sum(site.stored(rank) for site, rank in zip(sites, ranks, strict=True))
    assert ratio - 0.01 < stored / total <= ratio


def test_allocation_gives_harmonics_to_the_site_that_needs_them():
    sites = [Site(("a",), (64,), 32), Site(("b",), (64,), 32)]
    flat, steep = torch.ones(32), torch.logspace(0, -6, 32)
    ranks = allocate(sites, [flat, steep], 0.6)
    assert ranks[0] is None or ranks[0] > ranks[1]


def test_a_ratio_below_one_harmonic_cannot_be_reached():
    with pytest.raises(HoloError, match=r"ratio: 0\.01 cannot be reached.*0\.0"):
        allocate([Site(("a",), (64,), 32)], [torch.ones(32)], 0.01)


def test_pivoted_storage_counts_what_is_stored(make_teacher):
    model, windows = make_teacher("llama"), token_windows()
    site = find_sites(model, SHARED)[0]
    (statistics,) = collect(model, [site], windows)
    for pivoted in (True, False):
        changed = copy.deepcopy(model)
        install(changed, site, factorise(site, stacked_weight(model, site), statistics), 10, pivoted)
        stored = sum(changed.get_submodule(name).count_numbers()["stored"] for name in site.layers)
        assert stored == site.stored(10, pivoted)
        torch.testing.assert_close(
            torch.cat([changed.get_submodule(name).weight for name in site.layers]),
            projected(site, stacked_weight(model, site), factorise(site, stacked_weight(model, site), statistics), 10),
            rtol=0,
            atol=1e-8,
        )


def test_installed_layers_at_full_rank_change_nothing(teacher):
    """Conv1D, fused layers and biases included."""
    sites, windows = find_sites(teacher, SHARED), token_windows()
    with torch.no_grad():
        before = teacher(input_ids=windows).logits
        statistics = collect(teacher, sites, windows, windows[:4])
        for site, numbers in zip(sites, statistics, strict=True):
            install(teacher, site, factorise(site, stacked_weight(teacher, site), numbers), site.size)
        after = teacher(input_ids=windows).logits
    assert surgery_plan(sites, [site.size for site in sites]).keys() == {n for site in sites for n in site.layers}
    assert (after - before).abs().max() < 1e-6 * before.abs().max()


def test_activations_that_are_not_finite_are_refused(make_teacher):
    model = make_teacher("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = math.nan
    sites = find_sites(model, SHARED)
    with pytest.raises(HoloError, match=r"'model\.layers\.1\.mlp\.down_proj' are not finite"):
        collect(model, sites, token_windows(2))
