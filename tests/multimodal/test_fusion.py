"""How features become one vector: the algebra, what is missing, what can be read back."""

import pytest
import torch
import torch.nn.functional as F
from several_senses import FAMILY

from hf_holo.modeling.binding import bind, bind_phasors, bind_phasors_naive
from hf_holo.modeling.fusion import Centre, Fusion, drop_modalities, superpose_products, superpose_products_naive
from hf_holo.modeling.losses import contrastive_loss, contrastive_loss_naive

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def same_with_gradients(fast, naive, *tensors: torch.Tensor) -> None:
    """Both give the same values, and the same gradients, of a random sum of them."""
    tensors = [x.requires_grad_() for x in tensors]
    got, expected = fast(*tensors), naive(*tensors)
    torch.testing.assert_close(got, expected, **EXACT)
    weight = torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), tensors) for y in (got, expected)), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_the_product_of_phasors_is_that_of_complex_numbers():
    same_with_gradients(bind_phasors, bind_phasors_naive, *torch.randn(2, 3, 10, dtype=torch.float64))


def test_the_product_of_phasors_is_circular_convolution_of_what_they_are_the_spectra_of():
    a, b = torch.randn(2, 16, dtype=torch.float64)
    spectra = [torch.view_as_real(torch.fft.rfft(x)).T.flatten() for x in (a, b, bind(a, b))]
    torch.testing.assert_close(bind_phasors(*spectra[:2]), spectra[2], **EXACT)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_all_sets_of_parts_are_superposed(count):
    parts = torch.randn(count, 5, 8, dtype=torch.float64)
    same_with_gradients(
        lambda *x: superpose_products([*x]), lambda *x: superpose_products_naive([*x]), *parts.unbind(0)
    )


def test_the_order_of_the_parts_means_nothing():
    a, b, c = torch.randn(3, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(superpose_products([a, b, c]), superpose_products([c, a, b]), **EXACT)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_zeros_add_exactly_nothing(place):
    parts = [*torch.randn(2, 5, 8).unbind(0)]
    with_zeros = [*parts[:place], torch.zeros(5, 8), *parts[place:]]
    assert torch.equal(superpose_products(with_zeros), superpose_products(parts))


@pytest.mark.parametrize("fusion", ["binding", "superposition", "concatenation"])
def test_features_have_power_one_whatever_their_scale(make, fusion):
    fusion = Fusion(make(fusion=fusion).config).eval()
    pooled, present = torch.randn(6, 16), torch.tensor([1, 1, 1, 0, 1, 1]).bool()
    torch.nn.init.normal_(fusion.projections["vision"].weight)
    torch.nn.init.zeros_(fusion.projections["vision"].bias)
    features = fusion.features("vision", pooled, present)
    assert (features[3] == 0).all()
    power = features[present].square().sum(-1) / (features.shape[-1] / 2)  # of a phasor
    torch.testing.assert_close(power, torch.ones(5), rtol=1e-3, atol=0)
    torch.testing.assert_close(fusion.features("vision", 9 * pooled, present), features, rtol=1e-3, atol=1e-3)


def test_the_mean_of_what_is_present_is_taken_off():
    """At first that of all batches so far, without placeholders; in evaluation it stays as it is."""
    centre = Centre(5)
    batches, present = torch.randn(3, 8, 5) + 4, torch.rand(3, 8) < 0.5
    batches[~present] = torch.nan
    seen = [centre(x, real)[real] for x, real in zip(batches, present, strict=True)]
    means = torch.stack([x[real].mean(0) for x, real in zip(batches, present, strict=True)])
    torch.testing.assert_close(centre.mean, means.mean(0))
    torch.testing.assert_close(seen[0].mean(0), torch.zeros(5), rtol=0, atol=1e-5)
    centre(torch.full((8, 5), torch.nan), torch.zeros(8, dtype=torch.bool))  # an empty batch says nothing
    centre.eval()
    x = torch.randn(2, 5)
    torch.testing.assert_close(centre(x, torch.ones(2, dtype=torch.bool)), x - means.mean(0))
    torch.testing.assert_close(centre.mean, means.mean(0))


def test_a_role_that_is_alone_is_turned_back_exactly(make):
    model = make()
    features = torch.randn(4, 48)
    fused = model.fusion({"audio": features})
    assert not torch.allclose(fused, features, atol=0.1)  # it is bound
    torch.testing.assert_close(model.unbind(fused, "audio"), features)


def test_of_random_features_the_share_remains_that_theory_says():
    """1/√(2^M - 1): each of the 2^M - 1 sets in the vector is as strong as the one that is read."""
    for variant, count in (("vision and audio", 2), ("plain", 3)):
        config = FAMILY.config(**{**FAMILY.variants[variant], "hidden_size": 4096})
        fusion = Fusion(config)
        fusion.reset_parameters()
        features = {name: torch.randn(20, 4096) / 2**0.5 for name in config.modalities}
        fused = fusion(features)
        for name, x in features.items():
            cosine = F.cosine_similarity(fusion.unbind(fused, name), x, dim=-1).mean()
            assert abs(cosine - (2**count - 1) ** -0.5) < 0.01, (variant, name)


def test_what_cannot_be_read_back_is_refused(make):
    with pytest.raises(ValueError, match="'smell' is unknown; this model has text, vision, audio"):
        make().unbind(torch.zeros(1, 48), "smell")
    with pytest.raises(ValueError, match="fusion='superposition' binds to no role"):
        make(variant="superposition").unbind(torch.zeros(1, 48), "text")


def test_from_a_concatenation_the_features_are_cut_out(make, inputs):
    model = make(variant="concatenation")
    output = model(**inputs(model))
    for name in model.config.modalities:
        assert torch.equal(model.unbind(output.pooler_output, name), output[f"{name}_features"])


def test_dropping_leaves_one_and_adds_none():
    present = torch.rand(4000, 3) < 0.6
    present = present[present.any(1)]
    kept = drop_modalities(present, 0.3)
    assert kept.any(1).all() and not (kept & ~present).any()
    whole = present.all(1)
    shares = kept[whole].sum(1).bincount(minlength=4) / whole.sum()  # of 3: none, one, two, all are kept
    expected = torch.tensor([0, 0.3**3 + 3 * 0.7 * 0.3**2, 3 * 0.7**2 * 0.3, 0.7**3])
    torch.testing.assert_close(shares, expected, rtol=0, atol=0.06)
    assert torch.equal(drop_modalities(present, 0.0), present)


def test_the_contrastive_loss_is_that_of_its_definition():
    paired = torch.tensor([1, 1, 0, 1, 0, 1]).bool()
    logits = torch.randn(6, 6, dtype=torch.float64)
    same_with_gradients(lambda x: contrastive_loss(x, paired), lambda x: contrastive_loss_naive(x, paired), logits)
    everywhere = torch.ones(6, dtype=torch.bool)
    own = torch.arange(6)
    both = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    torch.testing.assert_close(contrastive_loss(logits, everywhere), both, **EXACT)
    assert contrastive_loss(logits, ~everywhere) == 0
