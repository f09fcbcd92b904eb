"""Every call in the READMEs of the projects whose ideas these models take up runs here and does what it says there, or
says what to call instead.

HoloSpectralNet: github.com/s3nh/s3nh-holospectral-net. HOLO-PyTorch: github.com/anttiluode/HOLO-pytorch. Resonance:
the package resonance_nn.
"""

import re

import pytest
import torch
import transformers
from torch import nn

import hf_holo
from hf_holo import (
    HoloError,
    HolographicMemory,
    HolographicMixer,
    HoloLinear,
    HoloSpectralBlock,
    HoloSpectralNet,
    HoloTransformerBlock,
    HsnConfig,
    HsnForCausalLM,
    LiteChannelMix,
    ResonanceConfig,
    ResonanceModel,
    RotaryEmbedding,
    SineActivation,
    SpectralGate,
)
from hf_holo.references import INSTEAD

X = torch.randn(2, 24, 64, generator=torch.Generator().manual_seed(0))  # [batch, tokens, dim]


@torch.no_grad()
def heard(layer: nn.Module) -> torch.Tensor:
    """[B, T]: where a change at token 5 of row 0 is heard."""
    changed = X.clone()
    changed[0, 5] += 1  # a constant, which LayerNorm would remove
    return (layer.eval()(X) - layer(changed)).abs().amax(-1) > 1e-6


def parameters(layer: nn.Module) -> int:
    return sum(parameter.numel() for parameter in layer.parameters())


# ---------------------------------------------------------------------------------------------- HoloSpectralNet
@pytest.mark.parametrize("name", ["hsn_tiny", "hsn_small", "hsn_base"])
def test_the_models_by_size(name):
    with torch.device("meta"):
        model = getattr(hf_holo, name)(vocab_size=320)
    assert isinstance(model, HsnForCausalLM) and model.count_parameters() == parameters(model)


@pytest.mark.parametrize("tie_weights", [True, False])
def test_the_model_by_its_sizes(tie_weights):
    model = HoloSpectralNet(vocab_size=50, dim=64, depth=2, max_seq_len=512, rank=16, tie_weights=tie_weights)
    assert model(torch.randint(50, (2, 9))).logits.shape == (2, 9, 50)
    block = model.model.layers[1]
    assert len(model.model.layers) == 2 and block.channel_mix.down_proj.out_features == 16 and block.gate is not None
    assert model.config.max_position_embeddings == 512
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tie_weights


def test_the_model_by_default():
    with torch.device("meta"):
        config = HoloSpectralNet().config
    assert (config.vocab_size, config.dim, config.depth, config.rank, config.max_seq_len) == (32000, 256, 6, 32, 512)
    assert config.tie_weights


def test_config_by_the_names_of_the_reference():
    config = HsnConfig(vocab_size=50, dim=64, depth=2, rank=8, max_seq_len=512, tie_weights=False)
    assert (config.hidden_size, config.num_hidden_layers, config.rank) == (64, 2, 8)
    assert config.max_position_embeddings == 512 and not config.tie_word_embeddings
    model = HsnForCausalLM(config)
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight


@pytest.mark.parametrize("family", ["holo", "resonance"])
def test_the_other_families_understand_these_names(family):
    config = hf_holo.get_architecture(family).config(dim=64, depth=2, max_seq_len=512, tie_weights=False)
    assert (config.hidden_size, config.num_hidden_layers) == (64, 2)
    assert config.max_position_embeddings == 512 and not config.tie_word_embeddings


@pytest.mark.parametrize("arguments", [{"dim": 64}, {"hidden_size": 64, "dim": 32}, {"num_attention_heads": 4}])
def test_no_argument_is_given_twice(arguments):
    given = {"hidden_size": 32, "num_heads": 2} | arguments
    with pytest.raises(ValueError, match="is another name of"):
        HsnConfig(**given)


@pytest.mark.parametrize("make", [lambda: HolographicMixer(64), lambda: HolographicMixer(dim=64)])
def test_the_mixer(make):
    mixer = make()
    assert heard(mixer)[0].tolist() == [t >= 5 for t in range(24)] and not heard(mixer)[1].any()
    assert 2 * 64 <= parameters(mixer) < 2.1 * 64  # "~2 × dim"


@pytest.mark.parametrize(
    "make",
    [lambda: HoloSpectralBlock(64, 512, 16), lambda: HoloSpectralBlock(dim=64, max_seq_len=512, rank=16)],
)
def test_the_block(make):
    block = make()
    assert heard(block)[0].tolist() == [t >= 5 for t in range(24)] and not heard(block)[1].any()
    assert block.channel_mix.down_proj.out_features == 16


def test_the_gate():
    """Its length is needless here; a number of channels that is not the input's is refused, and the right one named."""
    with pytest.raises(ValueError, match=r"x: it has 64 channels, .* 512: call SpectralGate\(64\)"):
        SpectralGate(512)(X)
    assert heard(SpectralGate(64))[0, 5:].any() and not heard(SpectralGate(64))[0, :5].any()


def test_the_channel_mix():
    mix = LiteChannelMix(64, 16)
    assert mix(X).shape == X.shape and parameters(mix) == 2 * 64 * 16 + 64


def test_rotary_positions():
    rotary = RotaryEmbedding(64)
    torch.testing.assert_close(rotary(X)[:, 0], X[:, 0])
    assert not parameters(rotary) and not torch.allclose(rotary(X)[:, 1], X[:, 1])
    torch.testing.assert_close(rotary(X).norm(dim=-1), X.norm(dim=-1))


def test_training():
    torch.manual_seed(0)
    model, ids = HoloSpectralNet(vocab_size=50, dim=32, depth=1), torch.randint(50, (4, 16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(ids).logits.view(-1, 50), ids.view(-1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


# ---------------------------------------------------------------------------------------------- HOLO-PyTorch
def test_holographic_layers_in_place_of_linear_ones():
    model = nn.Sequential(HoloLinear(784, 256, harmonics=32), SineActivation(), HoloLinear(256, 10, harmonics=32))
    assert model(torch.randn(3, 784)).shape == (3, 10)
    torch.optim.Adam(model.parameters())


def test_a_first_layer_of_two_inputs():
    model = nn.Sequential(HoloLinear(2, 64, harmonics=32), SineActivation(), HoloLinear(64, 2, harmonics=32))
    assert model(torch.randn(3, 2)).shape == (3, 2)


@pytest.mark.parametrize("harmonics", [16, 64, 256])
def test_harmonics(harmonics):
    layer = HoloLinear(512, 512, harmonics=harmonics)
    assert layer(torch.randn(2, 512)).shape == (2, 512) and layer.phase.shape == (512, harmonics)


def test_the_transformer_block_attends_over_the_tokens_of_a_row():
    block = HoloTransformerBlock(dim=64, heads=8, harmonics=16)
    assert block(X).shape == X.shape
    assert heard(block)[0].all() and not heard(block)[1].any()


# --------------------------------------------------------------------------------------------------- Resonance
@pytest.mark.parametrize("name", INSTEAD)
def test_what_to_call_instead_of_a_class_of_resonance(name):
    call, _ = INSTEAD[name]
    with pytest.raises(HoloError, match=f"^{name}: there is no such class here; use {re.escape(call)}"):
        getattr(hf_holo, name)(input_dim=512, num_frequencies=64)
    known = {word: getattr(hf_holo, word) for word in re.findall(r"\w+", call) if word in dir(hf_holo)}
    with torch.device("meta"):
        assert callable(eval(call, {"transformers": transformers, **known}))


def test_vectors_as_resonance_takes_them():
    """`ResonanceNet(input_dim=512, ...)` on `[batch, seq_len, dim]`, by what is to be called instead."""
    model = ResonanceModel(ResonanceConfig(vocab_size=20, hidden_size=64, num_hidden_layers=2, memory_dimension=8))
    assert model(inputs_embeds=X).last_hidden_state.shape == X.shape


@pytest.mark.parametrize("arguments", [{}, {"pattern_dim": 512, "hologram_dim": 1024, "capacity": 1000}])
def test_the_memory_of_resonance(arguments):
    with pytest.raises(TypeError, match=r"call HolographicMemory\(A\)"):
        HolographicMemory(**arguments)
    assert HolographicMemory(1024).dimension == 1024
