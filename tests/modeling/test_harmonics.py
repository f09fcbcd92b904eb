"""HoloLinear, its bases and sine activations: the values, the counts, the costs, and what must not be done to them."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_model, save_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_holo.conversion import restore_linears
from hf_holo.modeling.harmonics import (
    HarmonicBasis,
    HoloLinear,
    SineActivation,
    harmonic_basis,
    harmonic_linear,
    harmonic_linear_naive,
    named_seed,
)

REGENERATED = ("random", "dct", "golden")
INPUTS, OUTPUTS, R = 24, 20, 6  # R harmonics


def fitted(pivoted: bool = False, folded: bool = True, dtype: torch.dtype = torch.float64, **options) -> HoloLinear:
    """A layer with a "data" basis, set to random factors."""
    layer = HoloLinear(INPUTS, OUTPUTS, R, "data", folded=folded, pivoted=pivoted, dtype=dtype, **options)
    layer.load_factors(torch.randn(OUTPUTS, R, dtype=dtype), torch.randn(R, INPUTS, dtype=dtype))
    return layer


# ---------------------------------------------------------------------------------------------- the bases
@pytest.mark.parametrize(
    ("kind", "entries"),
    [
        ("random", [0.576413717634242, 0.18677386501871415, 0.21115896353786562]),
        ("dct", [0.4472135954999579, 0.0, 0.5116672736016926]),
        ("golden", [0.34724794461545466, -0.16599490607819484, 0.5038874706086716]),
    ],
)
def test_no_release_changes_a_basis(kind, entries):
    """Checkpoints do not store them. Only the last digits of a cosine may depend on the machine."""
    basis = harmonic_basis(kind, 3, 5, seed=7)
    np.testing.assert_allclose([basis[0, 0], basis[1, 2], basis[2, 4]], entries, rtol=1e-13, atol=1e-15)


def test_no_release_changes_the_seeds_of_layers():
    assert named_seed(0, "model.layers.0.q_proj") == 4030871767
    assert named_seed(3, "a") == 16789257795
    assert named_seed(2**32, "a") < 2**64


@pytest.mark.parametrize("kind", REGENERATED)
def test_rows_have_norm_one_and_full_rank(kind):
    basis = harmonic_basis(kind, 64, 512)
    assert basis.dtype == np.float64
    np.testing.assert_allclose(np.linalg.norm(basis, axis=1), 1, atol=0.1 if kind == "random" else 1e-12)
    assert np.linalg.cond(basis) < 3


@pytest.mark.parametrize("kind", REGENERATED)
@pytest.mark.parametrize(
    "path",
    [
        lambda make: make().bfloat16().float(),
        lambda make: make().half().to("cpu").to(torch.float32),
        lambda make: make().double().float(),
        lambda make: make().to("meta").to_empty(device="cpu"),
        lambda make: make(device="meta").to_empty(device="cpu"),
        lambda make: make(dtype=torch.bfloat16).float(),
        lambda make: copy.deepcopy(make().bfloat16()).float(),
    ],
    ids=["bf16", "fp16", "fp64", "over meta", "made on meta", "made in bf16", "copied"],
)
def test_a_basis_is_the_same_on_every_path(kind, path):
    expected = torch.from_numpy(harmonic_basis(kind, R, INPUTS, seed=5)).float()
    layer = path(partial(HoloLinear, INPUTS, OUTPUTS, R, kind, seed=5))
    assert torch.equal(layer.basis.table, expected)


@pytest.mark.parametrize("kind", REGENERATED)
def test_a_cast_rounds_the_exact_numbers_once(kind):
    exact = torch.from_numpy(harmonic_basis(kind, R, INPUTS))
    layer = HoloLinear(INPUTS, OUTPUTS, R, kind)
    assert torch.equal(layer.double().basis.table, exact)
    assert torch.equal(layer.bfloat16().basis.table, exact.bfloat16())
    assert layer.to("meta").basis.table.is_meta


@pytest.mark.parametrize("seed", [-1, 2**64, 0.5, "x"])
def test_a_seed_that_is_none_is_refused(seed):
    with pytest.raises(ValueError, match=r"seed: .* is not a whole number in \[0, 2\^64\)"):
        HoloLinear(INPUTS, OUTPUTS, R, seed=seed)


def test_seeds_differ():
    tables = [HarmonicBasis(INPUTS, R, "random", seed).table for seed in (0, 1, 2**64 - 1)]
    assert not any(torch.equal(a, b) for a, b in zip(tables, [*tables[1:], tables[0]], strict=True))


@pytest.mark.parametrize("harmonics", [1, R, INPUTS])
def test_pivoted_storage_is_exact(harmonics):
    basis = HarmonicBasis(INPUTS, harmonics, "data", pivoted=True, dtype=torch.float64)
    matrix, c = (
        torch.randn(harmonics, INPUTS, dtype=torch.float64),
        torch.randn(OUTPUTS, harmonics, dtype=torch.float64),
    )
    x = torch.randn(5, INPUTS, dtype=torch.float64)
    new = c @ basis.store(matrix)
    torch.testing.assert_close(new @ basis.matrix(), c @ matrix, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(basis(x) @ new.T, x @ (c @ matrix).T, rtol=1e-10, atol=1e-10)
    assert new.numel() + basis.tail.numel() == harmonics * (OUTPUTS + INPUTS - harmonics)
    assert basis.stored_numbers() == basis.tail.numel() + INPUTS  # and the order of the inputs


# ---------------------------------------------------------------------------------------------- the operation
def test_the_operation_is_its_naive_twin():
    h, amplitude, phase, bias = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 5, R), (OUTPUTS, R), (OUTPUTS, R), (OUTPUTS,))
    )
    inputs = (h, amplitude, phase, bias)
    fast, naive = harmonic_linear(*inputs), harmonic_linear_naive(*inputs)
    torch.testing.assert_close(fast, naive)
    weight = torch.randn_like(fast)
    gradients = (torch.autograd.grad((y * weight).sum(), inputs) for y in (fast, naive))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(harmonic_linear(h, amplitude, phase), harmonic_linear_naive(h, amplitude, phase))


class Largest(TorchDispatchMode):
    """The most values in any tensor that an operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = (x.untyped_storage().nbytes() // x.itemsize for x in tree_leaves(result) if isinstance(x, torch.Tensor))
        self.numbers = max(self.numbers, *sizes, 0)
        return result


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("basis", [*REGENERATED, "data", "pivoted"])
def test_nothing_large_is_made(basis, folded):
    tokens, inputs, outputs, harmonics = 64, 128, 256, 16
    pivoted = basis == "pivoted"
    layer = HoloLinear(inputs, outputs, harmonics, "data" if pivoted else basis, folded=folded, pivoted=pivoted)
    x = torch.randn(tokens, inputs, requires_grad=True)
    with Largest() as largest:
        layer(x).square().sum().backward()
    assert 0 < largest.numbers <= tokens * max(harmonics, outputs)
    assert all(p.grad is not None for p in layer.parameters()) and x.grad is not None


@pytest.mark.parametrize("basis", [*REGENERATED, "data"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_is_its_weight(basis, bias):
    layer = fitted(bias=bias) if basis == "data" else HoloLinear(INPUTS, OUTPUTS, R, basis, bias, dtype=torch.float64)
    x = torch.randn(2, 3, INPUTS, dtype=torch.float64)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert layer.weight.shape == (OUTPUTS, INPUTS) and torch.linalg.matrix_rank(layer.weight) == R


def test_fresh_layers_have_the_variance_they_claim():
    for folded in (False, True):
        layer = HoloLinear(512, 2048, 64, bias=False, folded=folded)
        assert layer(torch.randn(256, 512)).var().item() == pytest.approx(0.5, rel=0.15)


# ---------------------------------------------------------------------------------------------- its forms
@pytest.mark.parametrize("pivoted", [False, True])
@pytest.mark.parametrize("folded", [False, True])
def test_merging_and_folding_change_nothing(pivoted, folded):
    layer = fitted(pivoted, folded)
    x = torch.randn(7, INPUTS, dtype=torch.float64)
    expected, saved = layer(x), set(layer.state_dict())
    for change in (layer.merge, layer.unmerge, layer.fold, layer.merge, layer.unfold, layer.unmerge, layer.fold):
        change()
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    layer.merge()
    assert {name.removeprefix("own_basis.") for name in layer.state_dict()} == {"coefficients", "bias"} | (
        {"tail", "order"} if pivoted else {"table"}
    )
    if not folded:
        layer.unfold()
    assert set(layer.state_dict()) == saved


def test_a_merged_layer_follows_new_factors():
    layer = fitted()
    layer.merge()
    layer.load_factors(2 * layer.coefficients)
    fresh = copy.deepcopy(layer)
    fresh.unmerge()
    x = torch.randn(3, INPUTS, dtype=torch.float64)
    torch.testing.assert_close(layer(x), fresh(x))


@pytest.mark.parametrize("change", ["train", "load"])
def test_a_merged_layer_does_not_outlive_its_factors(change):
    layer, other, x = HoloLinear(INPUTS, OUTPUTS, R), HoloLinear(INPUTS, OUTPUTS, R), torch.randn(2, INPUTS)
    layer.eval().merge()
    if change == "train":
        layer.train()
        layer(x).sum().backward()
        assert layer.amplitude.grad is not None
    else:
        layer.load_state_dict(other.state_dict())
        torch.testing.assert_close(layer(x), other(x))


def test_unfolding_trains_amplitudes_and_phases():
    layer = fitted()
    layer.unfold()
    layer(torch.randn(4, INPUTS, dtype=torch.float64)).square().sum().backward()
    assert layer.amplitude.grad.abs().min() > 0 and layer.phase.grad.abs().min() > 0


@pytest.mark.parametrize("basis", [*REGENERATED, "data", "pivoted"])
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_counts(basis, folded, bias):
    pivoted = basis == "pivoted"
    layer = HoloLinear(INPUTS, OUTPUTS, R, "data" if pivoted else basis, bias, folded=folded, pivoted=pivoted)
    counts = layer.count_numbers()
    assert counts["stored"] == sum(x.numel() for x in layer.state_dict().values())
    assert (
        counts["trained"] == sum(p.numel() for p in layer.parameters()) == (2 - folded) * OUTPUTS * R + bias * OUTPUTS
    )
    assert counts["dense"] == sum(p.numel() for p in nn.Linear(INPUTS, OUTPUTS, bias).parameters())
    layer.merge()
    assert layer.merged.numel() + bias * OUTPUTS == counts["dense"]
    layer.fold()
    assert counts["folded"] == layer.count_numbers()["stored"]
    assert counts["stored"] - counts["trained"] == {"data": R * INPUTS, "pivoted": R * (INPUTS - R) + INPUTS}.get(
        basis, 0
    )


def test_a_shared_basis_is_saved_once(tmp_path):
    def pair() -> nn.ModuleList:
        owner = fitted(pivoted=True)
        return nn.ModuleList([owner, HoloLinear(INPUTS, 8, R, owner.basis, folded=True, dtype=torch.float64)])

    model, other = pair(), pair()
    x = torch.randn(3, INPUTS, dtype=torch.float64)
    assert sum(name.endswith("tail") for name in model.state_dict()) == 1
    assert model[1].count_numbers()["stored"] == 8 * R + 8
    save_model(model, tmp_path / "model.safetensors")
    load_model(other, tmp_path / "model.safetensors")
    for ours, theirs in zip(model, other, strict=True):
        assert torch.equal(ours(x), theirs(x))
    twin = copy.deepcopy(model)
    assert twin[1].basis is twin[0].basis and twin[0].basis is not model[0].basis


def sharing(**options) -> tuple[nn.ModuleList, HarmonicBasis]:
    """Three layers of one basis, which counts how often it is computed in `basis.count`."""
    owner = fitted(pivoted=True, **options)
    layers = [owner, *(HoloLinear(INPUTS, n, R, owner.basis, folded=True, dtype=torch.float64) for n in (8, 8))]
    basis, product = owner.basis, owner.basis._product

    def counted(x: torch.Tensor) -> torch.Tensor:
        basis.count += 1
        return product(x)

    basis.count, basis._product = 0, counted
    return nn.ModuleList(layers), basis


@torch.no_grad()
def test_layers_that_share_a_basis_compute_its_product_once():
    layers, basis = sharing()
    for rows in (1, 5):
        x, basis.count = torch.randn(rows, INPUTS, dtype=torch.float64), 0
        got = [layer(x) for layer in layers]
        assert basis.count == 1
        for layer, y in zip(layers, got, strict=True):
            torch.testing.assert_close(y, x @ layer.dense_matrix().T + layer.bias)


@torch.no_grad()
def test_a_shared_product_is_not_used_for_anything_else():
    """Another input, the same one written to, another basis, another number type, or gradients to be recorded."""
    layers, basis = sharing()
    changes = {
        "the input": lambda: x.mul_(2),
        "the basis": lambda: basis.tail.add_(1),
        "its memory": lambda: setattr(basis, "tail", basis.tail + 1),
        "gradients": lambda: torch.set_grad_enabled(True),
    }
    for name, change in changes.items():
        x = torch.randn(2, INPUTS, dtype=torch.float64)
        with torch.no_grad():
            layers[0](x)
            change()
            torch.testing.assert_close(layers[1](x), x @ layers[1].dense_matrix().T + layers[1].bias, msg=name)
    assert basis.count == 2 * len(changes)
    with torch.inference_mode():  # where a change of the input leaves no trace
        x = torch.randn(2, INPUTS, dtype=torch.float64)
        layers[0](x)
        x.mul_(2)
        torch.testing.assert_close(layers[1](x), x @ layers[1].dense_matrix().T + layers[1].bias)


@torch.no_grad()
def test_a_shared_product_lives_as_long_as_its_input():
    layers, basis = sharing()
    x = torch.randn(2, INPUTS, dtype=torch.float64)
    layers[0](x)
    assert basis.last._held is not None
    assert copy.deepcopy(layers)[0].basis.last._held is None  # and copies do not fail
    del x
    assert basis.last._held is None


# ---------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"harmonics": 25, "basis": "dct"}, "harmonics: 25 is more than in_features=24; use at most 24"),
        ({"harmonics": 25, "basis": "data"}, "harmonics: 25 is more than in_features=24; use at most 24"),
        ({"harmonics": 0}, "harmonics: 0 is not a positive integer"),
        ({"basis": "fourier"}, "basis: 'fourier' is unknown; choose one of 'random', 'dct', 'golden', 'data'"),
        ({"pivoted": True}, "pivoted: True needs basis='data'"),
        ({"out_features": 0}, "out_features: 0 is not a positive integer"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        HoloLinear(**{"in_features": INPUTS, "out_features": OUTPUTS, "harmonics": R, **options})


def test_the_frequency_must_be_positive():
    with pytest.raises(ValueError, match="frequency: 0 is not positive"):
        SineActivation(0)


def assign(layer: HoloLinear) -> None:
    layer.weight.data = torch.zeros(OUTPUTS, INPUTS)


def increase(layer: HoloLinear) -> None:
    layer.weight.data += 1


def overwrite(weight: torch.Tensor) -> None:
    weight[0] = 0


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(
    "write",
    [
        lambda layer: layer.weight.add_(1),
        lambda layer: layer.weight.data.mul_(2),
        lambda layer: layer.weight.T.zero_(),
        lambda layer: layer.weight.copy_(torch.zeros(OUTPUTS, INPUTS)),
        lambda layer: nn.init.normal_(layer.weight),
        lambda layer: torch.add(layer.weight, 1, out=layer.weight),
        lambda layer: overwrite(layer.weight),
        lambda layer: overwrite(layer.weight.data),
        assign,
        increase,
    ],
)
def test_the_weight_refuses_changes(write, merged):
    layer = HoloLinear(INPUTS, OUTPUTS, R)
    if merged:
        layer.merge()
    before = layer.weight.clone()
    with torch.no_grad(), pytest.raises(TypeError, match="computed from its factors and cannot be changed in place"):
        write(layer)
    assert torch.equal(layer.weight, before)


def test_the_weight_can_be_read():
    layer = HoloLinear(INPUTS, OUTPUTS, R)
    weight = layer.weight
    assert weight.shape == (OUTPUTS, INPUTS) and weight.dtype == torch.float32 and weight.device.type == "cpu"
    assert type(weight @ torch.eye(INPUTS)) is torch.Tensor and type(weight.clone()) is torch.Tensor
    assert (
        weight.data.norm() > 0
        and weight.detach().numpy().shape == (OUTPUTS, INPUTS)
        and weight.T.shape == (INPUTS, OUTPUTS)
    )
    target = torch.empty(OUTPUTS, INPUTS)
    target.copy_(weight.detach())
    assert torch.equal(target, weight)
    weight.square().sum().backward()
    assert layer.amplitude.grad is not None


# ---------------------------------------------------------------------------------------------- adapters
@pytest.fixture
def adapted():
    """LoRA on a HoloLinear, trained for a few steps, with the input and what it gives."""
    model = get_peft_model(
        nn.Sequential(HoloLinear(INPUTS, OUTPUTS, R, bias=False)), LoraConfig(r=2, target_modules=["0"])
    )
    x = torch.randn(8, INPUTS)
    target = torch.randn(8, OUTPUTS)
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(20):
        losses.append((model(x) - target).square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    return model.eval(), x


def test_lora_trains_nothing_but_itself(adapted):
    model, _ = adapted
    assert {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert all(p.grad is None for name, p in model.named_parameters() if not p.requires_grad)


@pytest.mark.parametrize("safe", [False, True])
def test_an_adapter_is_not_merged_into_factors(adapted, safe):
    model, x = adapted
    expected = model(x)
    with pytest.raises(TypeError, match=r"keep the adapter separate, or convert the layer to nn\.Linear"):
        model.merge_and_unload(safe_merge=safe)
    assert torch.equal(model(x), expected)


def test_an_adapter_is_merged_into_restored_layers(adapted):
    model, x = adapted
    expected = model(x)
    merged = restore_linears(model).merge_and_unload()
    assert type(merged[0]) is nn.Linear
    torch.testing.assert_close(merged(x), expected)


# ---------------------------------------------------------------------------------------------- sine activations
@pytest.mark.parametrize("frequency", [1.0, 30.0])
@pytest.mark.parametrize(
    "linear",
    [
        nn.Linear,
        lambda i, o: HoloLinear(i, o, min(64, i)),
        lambda i, o: HoloLinear(i, o, min(64, i), "dct", folded=True),
    ],
    ids=["dense", "holographic", "folded"],
)
def test_the_variance_is_kept_through_ten_layers(linear, frequency):
    """SIREN: normal inputs of the sine with variance one, whatever the depth."""
    sine = SineActivation(frequency)
    x = sine(sine.init_linear_(linear(2, 256), first=True)(2 * torch.rand(512, 2) - 1))
    for _ in range(10):
        layer = sine.init_linear_(linear(256, 256))
        spread = frequency * (layer(x) - layer.bias).std().item()
        x = sine(layer(x))
        assert spread == pytest.approx(1, rel=0.3)
        assert x.std().item() == pytest.approx(0.5**0.5, rel=0.1)


def test_the_first_layer_spans_the_frequency():
    sine = SineActivation(30.0)
    layer = sine.init_linear_(nn.Linear(2, 4096), first=True)
    assert layer.weight.abs().max().item() == pytest.approx(0.5, rel=0.01)
