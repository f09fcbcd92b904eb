"""On a GPU with fla-core, its kernels scan as the naive twins do, up to the rounding of TF32: values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from small_models import new_model

from hf_holo import get_architecture
from hf_holo.modeling import kernels, scans

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(isinstance(kernels.load_kernels(), str), reason=f"{kernels.load_kernels()}"),
]
ROUNDED = 0.02  # error relative to the norm: eleven bits of a product, summed


@pytest.fixture(autouse=True)
def rounding(exact, monkeypatch):
    """TF32 may be used, and nothing switches the kernels off."""
    monkeypatch.delenv(kernels.SWITCH, raising=False)
    torch.set_float32_matmul_precision("high")


def assert_near(got: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    error = (got.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-6)
    assert error < ROUNDED, f"{name}: {error:.4f}"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("cancel", [False, True], ids=["interference", "cancelling"])
@pytest.mark.parametrize("length", [2, 64, 65, 300])
@pytest.mark.parametrize("features", [32, 128, 256])
def test_they_scan_as_the_naive_twins(device, features, length, cancel, groups, packed):
    rows, heads, width = 2, 2, 32
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(rows, *shape, generator=generator)

    given = {
        "q": drawn(heads * groups, length, features) * features**-0.5,
        "k": F.normalize(drawn(heads, length, features), dim=-1),
        "v": drawn(heads, length, width),
        "log_decay": -F.softplus(drawn(heads, length)),
        "strength" if cancel else "log_write": drawn(heads, length).sigmoid()
        if cancel
        else -drawn(heads, length).abs(),
        "state": drawn(heads, features, width),
    }
    document = None
    if packed:
        document = torch.zeros(rows, length, dtype=torch.long)
        document[0, length // 2 :], document[1] = 1, 1
    fast, twin = (getattr(scans, f"{'cancelling' if cancel else 'interference'}_scan{end}") for end in ("", "_naive"))
    results = []
    for function, place in ((fast, device), (twin, torch.device("cpu"))):
        leaves = {name: x.clone().to(place).requires_grad_() for name, x in given.items()}
        assert kernels.fits(leaves["q"]) == (place == device)
        outputs = function(**leaves, document=None if document is None else document.to(place))
        reading = torch.Generator().manual_seed(1)
        sum((y * torch.randn(y.shape, generator=reading).to(place)).sum() for y in outputs).backward()
        named = {"y": outputs[0], "last state": outputs[1], **{name: leaf.grad for name, leaf in leaves.items()}}
        results.append({name: x.detach().cpu() for name, x in named.items()})
    for name, expected in results[1].items():
        assert_near(results[0][name], expected, name)


@pytest.mark.parametrize("variant", get_architecture("hsn").variants)
def test_models_train_as_without_them(device, monkeypatch, variant):
    causal = get_architecture("hsn").config(**get_architecture("hsn").variants[variant]).is_causal
    model = new_model("hsn", "AutoModelForCausalLM" if causal else "AutoModelForMaskedLM", variant).to(device).train()
    ids = torch.randint(1, 61, (2, 200), generator=torch.Generator().manual_seed(0)).to(device)
    losses, gradients = [], []
    for switch in ("torch", "auto"):
        monkeypatch.setenv(kernels.SWITCH, switch)
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert_near(gradients[1], gradients[0], "gradients")


def test_they_can_be_switched_off(device, monkeypatch):
    q = torch.zeros(1, 1, 5, 4, device=device)
    assert kernels.fits(q)
    monkeypatch.setenv(kernels.SWITCH, "torch")
    assert not kernels.fits(q)
