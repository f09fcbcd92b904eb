"""HOLO's parts: the block that stands in for torch's encoder layer, attention without positions, the hybrid configs."""

import copy

import pytest
import torch
from torch import nn

from hf_holo.modeling.configuration_holo import HoloConfig
from hf_holo.modeling.harmonics import HoloLinear
from hf_holo.modeling.modeling_holo import HoloAttention, HoloForCausalLM, HoloTransformerBlock

DIM, HEADS, ROWS, LENGTH = 32, 4, 3, 7


def holo_layer(**options) -> nn.Module:
    return HoloTransformerBlock(DIM, HEADS, harmonics=8, **options)


def torch_layer(**options) -> nn.Module:
    return nn.TransformerEncoderLayer(DIM, HEADS, 4 * DIM, **options)


@pytest.fixture(params=[holo_layer, torch_layer], ids=["holo", "torch"])
def layer(request) -> nn.Module:
    """Ours and torch's: what a mask means is tested on both."""
    return request.param(batch_first=True).double().eval()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(ROWS, LENGTH, DIM, dtype=torch.float64)


def influence(layer: nn.Module, x: torch.Tensor, **masks) -> torch.Tensor:
    """[B, T, S]: does the output at t depend on the input at s?"""
    rows = []
    for s in range(x.shape[1]):
        moved = x.clone()
        moved[:, s] += torch.randn(DIM)  # the norms would not notice a constant
        rows.append((layer(moved, **masks) - layer(x, **masks)).abs().amax(-1) > 1e-9)
    return torch.stack(rows, -1)


def as_float(mask: torch.Tensor) -> torch.Tensor:
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, float("-inf"))


# ---------------------------------------------------------------------------------------------- masks as torch's
@pytest.mark.parametrize("form", [lambda mask: mask, as_float], ids=["bool", "float"])
def test_a_hidden_key_has_no_influence(layer, x, form):
    hidden = torch.rand(LENGTH, LENGTH).lt(0.4).fill_diagonal_(False)
    assert torch.equal(influence(layer, x, src_mask=form(hidden)), ~hidden.expand(ROWS, -1, -1))


@pytest.mark.parametrize("form", [lambda mask: mask, as_float], ids=["bool", "float"])
def test_a_padded_key_has_no_influence(layer, x, form):
    padding = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    padding[0, 5:] = padding[1, :2] = True
    seen = influence(layer, x, src_key_padding_mask=form(padding))
    real = ~padding
    expected = real[:, None].expand(-1, LENGTH, -1)
    assert torch.equal(seen[real], expected[real])


def test_both_masks_and_one_for_every_head(layer, x):
    hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    padding = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    padding[0, 5:] = True
    together = layer(x, src_mask=hidden, src_key_padding_mask=padding)
    per_head = layer(x, src_mask=hidden.expand(ROWS * HEADS, -1, -1), src_key_padding_mask=padding)
    torch.testing.assert_close(together, per_head)
    torch.testing.assert_close(together[1:], layer(x[1:], src_mask=hidden))
    torch.testing.assert_close(together[:1, :5], layer(x[:1, :5], src_mask=hidden[:5, :5]))


def test_is_causal_says_what_the_mask_does(layer, x):
    hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    torch.testing.assert_close(layer(x, src_mask=hidden, is_causal=True), layer(x, src_mask=hidden))


def test_is_causal_alone_hides_the_future(x):
    layer = holo_layer(batch_first=True).double().eval()
    hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    torch.testing.assert_close(layer(x, is_causal=True), layer(x, src_mask=hidden))


def test_rows_come_first_by_default(x):
    """As in HOLO-PyTorch: a token hears the others of its row, and no other row."""
    layer = holo_layer().double().eval()
    assert influence(layer, x).all()
    for row in range(ROWS):
        torch.testing.assert_close(layer(x)[row], layer(x[row : row + 1])[0])


def test_it_knows_no_positions(x):
    layer = holo_layer(batch_first=True).double().eval()
    order = torch.randperm(LENGTH)
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order])


@pytest.mark.parametrize("make", [holo_layer, torch_layer], ids=["holo", "torch"])
def test_layouts(make, x):
    """Tokens or rows first, with dropout, as in torch; one sequence may come without a batch."""
    layer = make(batch_first=False).double()
    assert not torch.equal(layer(x), layer(x))
    last = make(batch_first=True).double()
    last.load_state_dict(layer.state_dict())
    layer.eval(), last.eval()
    torch.testing.assert_close(layer(x.transpose(0, 1)).transpose(0, 1), last(x))
    padding = torch.zeros(LENGTH, dtype=torch.bool)
    padding[5:] = True
    alone = layer(x[0], src_key_padding_mask=padding)
    assert alone.shape == x[0].shape
    torch.testing.assert_close(alone, last(x[:1], src_key_padding_mask=padding[None])[0])


# ---------------------------------------------------------------------------------------------- inside torch's encoder
def encoder(layers: int = 2, **options) -> nn.TransformerEncoder:
    return nn.TransformerEncoder(holo_layer(**options), layers, enable_nested_tensor=False)


def test_inside_an_encoder(x):
    model = encoder(batch_first=True).double().eval()
    padding = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    padding[0, 5:] = True
    torch.testing.assert_close(model(x, src_key_padding_mask=padding)[:1, :5], model(x[:1, :5]))
    causal = nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=torch.float64)
    assert torch.equal(influence(model, x, mask=causal)[0], torch.ones(LENGTH, LENGTH).tril().bool())


def test_an_encoder_trains_and_every_layer_for_itself(x):
    model = encoder(batch_first=True, dropout=0.0)
    x = x.float()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        losses.append((model(x).mean((1, 2)) - torch.arange(ROWS)).square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
    assert losses[-1] < 0.01 * losses[0]
    first, second = (layer.mlp.up_proj for layer in model.layers)
    assert not torch.equal(first.amplitude, second.amplitude) and not torch.equal(first.phase, second.phase)
    assert torch.equal(first.basis.table, second.basis.table)


def test_state_dict_round_trip(x):
    model = encoder(batch_first=True).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    torch.manual_seed(1)
    other = encoder(batch_first=True).double().eval()
    assert not torch.allclose(other(x), model(x))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    assert not any("basis" in name for name in model.state_dict())  # recomputed, never stored
    torch.testing.assert_close(copy.deepcopy(model)(x), model(x))


def test_the_seed_makes_the_basis(x):
    tables = [holo_layer(seed=seed).self_attn.q_proj.basis.table for seed in (0, 0, 1)]
    assert torch.equal(tables[0], tables[1]) and not torch.equal(tables[0], tables[2])
    block = holo_layer()
    assert not torch.equal(block.self_attn.q_proj.basis.table, block.self_attn.k_proj.basis.table)


def test_errors():
    with pytest.raises(ValueError, match="heads: 5 does not divide dim=32"):
        HoloTransformerBlock(32, 5, 8)
    with pytest.raises(ValueError, match="harmonics: 64 is more than in_features=32"):
        HoloTransformerBlock(32, 4, 64, basis="dct")
    with pytest.raises(ValueError, match="basis: 'data'"):
        HoloTransformerBlock(32, 4, 8, basis="data")


# ---------------------------------------------------------------------------------------------- the family
def test_attention_has_positions_unless_it_is_told_otherwise(x):
    order = torch.randperm(LENGTH)
    for base, blind in ((None, True), (10000.0, False)):
        attention = HoloAttention(DIM, HEADS, causal=False, rotary_base=base).double()
        assert torch.allclose(attention(x[:, order]), attention(x)[:, order]) is blind


@pytest.mark.parametrize("attention", ["holographic", "dense"])
@pytest.mark.parametrize("mlp", ["holographic", "dense"])
def test_every_projection_is_what_the_config_says(attention, mlp):
    config = HoloConfig(
        vocab_size=11, hidden_size=32, num_hidden_layers=1, attention_projections=attention, mlp_projections=mlp
    )
    for name, module in HoloForCausalLM(config).named_modules():
        if isinstance(module, nn.Linear) and "layers" in name:
            kind = attention if ".attention." in name else mlp
            assert isinstance(module, HoloLinear) is (kind == "holographic"), name


def test_the_default_is_a_quarter_of_the_dense_parameters():
    config = {"vocab_size": 11, "hidden_size": 192, "num_hidden_layers": 1}
    dense = {"attention_projections": "dense", "mlp_projections": "dense"}
    counts = []
    for kind in ({}, dense):
        model = HoloForCausalLM(HoloConfig(**config, **kind))
        linears = (m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in name)
        counts.append(sum(p.numel() for m in linears for p in m.parameters()))
    assert counts[0] / counts[1] == pytest.approx(0.25, rel=0.2)
