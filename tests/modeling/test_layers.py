"""The building blocks on their own, as people use them outside a model."""

import pytest
import torch

import hf_holo
from hf_holo import HolographicMixer, HoloSpectralBlock, HsnConfig, LiteChannelMix, RotaryEmbedding, SpectralGate
from hf_holo.modeling import ops


def hidden(length: int, width: int = 32) -> torch.Tensor:
    return torch.randn(2, length, width, generator=torch.Generator().manual_seed(0))


def test_the_original_names_of_binding_are_kept():
    a, b = hidden(3), hidden(1)
    torch.testing.assert_close(hf_holo.fft_circular_conv(a, b), ops.bind_naive(a, b))
    torch.testing.assert_close(hf_holo.fft_circular_corr(a, b), ops.unbind_naive(a, b))


@pytest.mark.parametrize("name", ["HolographicMixer", "SpectralGate", "LiteChannelMix", "RotaryEmbedding"])
def test_blocks_lie_where_the_model_lies(name):
    from hf_holo.modeling import modeling_hsn

    assert getattr(modeling_hsn, name) is getattr(hf_holo, name)


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
def test_a_zero_phase_gate_is_symmetric():
    torch.manual_seed(0)
    kernel = SpectralGate(4, taps=7, causal=False).kernel()
    torch.testing.assert_close(kernel, kernel.flip(-1))


def test_rotary_embeddings_have_no_parameters():
    rotary = RotaryEmbedding(2, 8)
    assert not list(rotary.parameters()) and not rotary.state_dict()
    drift = rotary(100)
    assert drift.shape == (100, 2, 8)
    torch.testing.assert_close(drift[1, 0, 0], torch.tensor(1.0, dtype=drift.dtype))  # one radian a token


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
