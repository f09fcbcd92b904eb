"""The building blocks on their own, as people use them outside a model."""

import pytest
import torch

import hf_holo
from hf_holo import (
    HolographicMixer,
    HoloSpectralBlock,
    HsnConfig,
    LiteChannelMix,
    PhaseDrift,
    RotaryEmbedding,
    SpectralGate,
)
from hf_holo.modeling import binding
from hf_holo.modeling.layout import TokenLayout


def hidden(length: int, width: int = 32) -> torch.Tensor:
    return torch.randn(2, length, width, generator=torch.Generator().manual_seed(0))


def test_the_original_names_of_binding_are_kept():
    a, b = hidden(3), hidden(1)
    torch.testing.assert_close(hf_holo.fft_circular_conv(a, b), binding.bind_naive(a, b))
    torch.testing.assert_close(hf_holo.fft_circular_corr(a, b), binding.unbind_naive(a, b))


@pytest.mark.parametrize("name", ["HolographicMixer", "SpectralGate", "LiteChannelMix", "RotaryEmbedding"])
def test_blocks_lie_where_the_model_lies(name):
    from hf_holo.modeling import modeling_hsn

    assert getattr(modeling_hsn, name) is getattr(hf_holo, name)


@pytest.mark.parametrize("causal", [True, False])
def test_the_filter_is_designed_in_full_precision_under_autocast(causal):
    gate = SpectralGate(8, causal=causal)
    plain = gate.kernel()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gate.kernel(), plain)


@pytest.mark.parametrize("taps", [1, 2, 4, 7, 16])
def test_a_causal_gate_looks_back_and_never_ahead(taps):
    torch.manual_seed(0)
    gate, x = SpectralGate(32, taps).double(), hidden(40).double()
    changed = x.clone()
    changed[:, 10] += 1
    difference = (gate(changed) - gate(x)).abs().amax((0, 2))
    assert difference[:10].max() == 0
    assert difference[10] > 0
    assert difference[10 + taps :].max() < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False], ids=["minimum phase", "zero phase"])
def test_a_smooth_gate_has_the_response_that_its_logits_say(causal):
    """The response of the kernel that is really applied, cut included, against scale · σ(logits)."""
    gate = SpectralGate(1, taps=32, causal=causal).double()
    frequency = torch.linspace(0, torch.pi, 17, dtype=torch.float64)
    gate.logits.copy_(torch.cos(frequency)[None])
    wanted = gate.scale[:, None] * torch.sigmoid(gate.logits)
    torch.testing.assert_close(gate.response(bins=17), wanted, rtol=0.02, atol=0)


@torch.no_grad()
def test_a_delay_leaves_the_response_as_it_is():
    torch.manual_seed(0)
    gate = SpectralGate(4, taps=32, delayed=0.5).double()
    gate.logits.copy_(torch.linspace(1, -1, 17).expand(4, -1))  # smooth, so that the cut takes little away
    assert gate.kernel()[2:, 0].abs().max() == 0 < gate.kernel()[:2, 0].abs().min()
    torch.testing.assert_close(gate.response()[:2], gate.response()[2:], rtol=0.02, atol=0)


@torch.no_grad()
@torch.no_grad()
def test_a_kept_kernel_is_never_out_of_date(monkeypatch):
    """Whatever changes the values of a gate, also unseen by autograd, its kernel follows; else it stays."""
    gate, designs = SpectralGate(4, taps=4), []
    design = gate.kernel
    monkeypatch.setattr(gate, "kernel", lambda: designs.append(1) or design())
    changes = {
        "nothing": lambda: None,
        "in place": lambda: gate.scale.mul_(2),
        "data": lambda: gate.logits.data.add_(1),
        "a cast and back": lambda: gate.bfloat16().float(),
        "another parameter": lambda: setattr(gate, "scale", torch.nn.Parameter(gate.scale + 1)),
        "loading": lambda: gate.load_state_dict(SpectralGate(4, taps=4).state_dict()),
        "another dtype": gate.double,
    }
    gate.kept_kernel()
    for name, change in changes.items():
        designs.clear()
        change()
        for _ in range(3):
            torch.testing.assert_close(gate.kept_kernel(), design(), msg=name)
        assert len(designs) == (name != "nothing"), name
    with torch.enable_grad():
        assert gate.kept_kernel().requires_grad


@torch.no_grad()
@pytest.mark.parametrize("taps", range(1, 9))
def test_a_zero_phase_gate_hears_both_sides_alike(taps):
    torch.manual_seed(0)
    gate, impulse = SpectralGate(4, taps, causal=False).double(), torch.zeros(1, 41, 4, dtype=torch.float64)
    impulse[0, 20] = 1
    one_document = torch.zeros(1, 41, dtype=torch.long)
    for layout in (None, TokenLayout(41, document=one_document)):
        answer = gate(impulse, layout)[0]
        torch.testing.assert_close(answer, answer.flip(0), rtol=0, atol=1e-12)
        heard = answer.abs().amax(-1) > 1e-12
        assert heard.nonzero()[:, 0].tolist() == list(range(20 - taps // 2, 21 + taps // 2))


def test_the_drift_has_no_parameters():
    drift = PhaseDrift(2, 8)
    assert not list(drift.parameters()) and not drift.state_dict()
    angles = drift(100)
    assert angles.shape == (100, 2, 8)
    torch.testing.assert_close(angles[1, 0, 0], torch.tensor(1.0, dtype=angles.dtype))  # one radian a token


def test_rotary_embeddings_turn_pairs_of_channels():
    rotary, x = RotaryEmbedding(6), hidden(9, 6).double()
    turned = rotary(x)
    pairs, before = (torch.complex(z[..., :3], z[..., 3:]) for z in (turned, x))
    speed = 10000.0 ** -(torch.arange(3, dtype=torch.float64) / 3)
    angle = torch.arange(9, dtype=torch.float64)[:, None] * speed
    torch.testing.assert_close(pairs, before * torch.polar(torch.ones_like(angle), angle), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rotary(x[:, 4:], torch.arange(4, 9)), turned[:, 4:])
    with pytest.raises(ValueError, match="dim: 7"):
        RotaryEmbedding(7)


@pytest.mark.parametrize("causal", [None, True, False])
def test_a_bare_block_is_causal_unless_told_otherwise(causal):
    block = HoloSpectralBlock(HsnConfig(vocab_size=11, hidden_size=32, num_hidden_layers=1, causal=causal), 0).double()
    x = hidden(12).double()
    changed = x.clone()
    changed[:, 6] = x[:, 0]  # not a constant more, which the norm would remove
    difference = (block(changed) - block(x)).abs().amax((0, 2))
    assert (difference[:6].max() == 0) == (causal is not False)
    assert difference[6:].min() > 0


def test_blocks_map_hidden_states_to_hidden_states():
    config = HsnConfig(vocab_size=11, hidden_size=32, num_hidden_layers=1)
    x = hidden(70)
    assert HoloSpectralBlock(config, 0)(x).shape == x.shape
    assert HolographicMixer(config)(x).shape == x.shape
    assert LiteChannelMix(32, 4)(x).shape == x.shape


@pytest.mark.parametrize("family", ["hsn", "resonance"])
def test_a_deep_model_starts_with_quiet_blocks(family):
    """Modules that start the parameters of their children are met in both majors of transformers."""
    architecture, depth = hf_holo.get_architecture(family), 8
    model = architecture.main_model(architecture.config(vocab_size=11, hidden_size=64, num_hidden_layers=depth))
    for block in model.model.layers:
        for projection in (block.mixer.out_proj, block.channel_mix.out_proj):
            expected = 0.7 * projection.in_features**-0.5 / (2 * depth) ** 0.5
            assert projection.weight.std().item() == pytest.approx(expected, rel=0.1)
