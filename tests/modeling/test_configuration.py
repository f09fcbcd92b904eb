"""Configurations: sensible defaults at any width, HoloSpectralNet's argument names, and early errors for bad values."""

import pytest
import torch
import transformers

import hf_holo
from hf_holo import HsnConfig, HsnForCausalLM, HsnForSequenceClassification, get_architecture
from hf_holo.modeling.configuration_base import FORMAT


@pytest.mark.parametrize("width", [8, 16, 24, 32, 48, 64, 96, 100, 128, 256, 384, 512])
def test_a_width_is_all_a_model_needs(width):
    model = HsnForCausalLM(HsnConfig(vocab_size=11, hidden_size=width, num_hidden_layers=1))
    logits = model(input_ids=torch.arange(11)[None]).logits
    assert logits.shape == (1, 11, 11) and torch.isfinite(logits).all()


def test_a_default_configuration_builds():
    assert HsnConfig().model_type == "hsn"


def test_the_original_argument_names_are_understood():
    config = HsnConfig(vocab_size=11, dim=64, depth=3, rank=8)
    assert (config.hidden_size, config.num_hidden_layers, config.rank) == (64, 3, 8)
    assert (config.dim, config.depth) == (64, 3)


@pytest.mark.parametrize(
    ("name", "width", "depth", "rank"), [("tiny", 128, 4, 16), ("small", 256, 6, 32), ("base", 512, 8, 64)]
)
def test_presets(name, width, depth, rank):
    model = getattr(hf_holo, f"hsn_{name}")(vocab_size=65)
    assert type(model) is HsnForCausalLM
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.rank) == (width, depth, rank)
    without_embeddings = sum(p.numel() for block in model.model.layers for p in block.parameters()) + width  # last norm
    assert model.count_parameters() == 65 * width + without_embeddings  # the tied matrix counts once


def test_parameters_can_be_counted_by_what_trains():
    model = hf_holo.hsn_tiny(vocab_size=65)
    model.get_input_embeddings().requires_grad_(False)
    assert model.count_parameters() - model.count_parameters(trainable_only=True) == 65 * 128


def test_presets_take_overrides():
    model = hf_holo.hsn_tiny(vocab_size=33, num_hidden_layers=2)
    assert model.config.num_hidden_layers == 2 and model.config.hidden_size == 128
    assert model.get_input_embeddings().weight.shape == (33, 128)


def test_labels_follow_the_configuration():
    model = HsnForSequenceClassification(HsnConfig(vocab_size=11, hidden_size=16, num_hidden_layers=1, num_labels=4))
    assert model(input_ids=torch.arange(11)[None]).logits.shape == (1, 4)


BAD = {
    "vocab_size": ({"vocab_size": 0}, "0"),
    "hidden_size": ({"hidden_size": 0}, "0"),
    "num_hidden_layers": ({"num_hidden_layers": 0}, "0"),
    "num_heads": ({"hidden_size": 32, "num_heads": 5}, "5"),
    "num_key_heads": ({"hidden_size": 32, "num_heads": 4, "num_key_heads": 3}, "3"),
    "num_phases": ({"num_phases": 0}, "0"),
    "binding": ({"binding": "quantum"}, "quantum"),
    "write": ({"write": "erase"}, "erase"),
    "channel_mix": ({"channel_mix": "conv"}, "conv"),
    "gate_placement": ({"gate_placement": "sideways"}, "sideways"),
    "gate_taps": ({"gate_taps": 0}, "0"),
    "rank": ({"rank": 0}, "0"),
    "intermediate_size": ({"channel_mix": "gated", "intermediate_size": -1}, "-1"),
    "hidden_dropout_prob": ({"hidden_dropout_prob": 1.5}, "1.5"),
    "drift_base": ({"drift_base": 0.5}, "0.5"),
    "drift": ({"drift": "sideways"}, "sideways"),
    "drift for static binding": ({"binding": "static", "drift": "data"}, "data"),
    "drift_share": ({"drift_share": 1.5}, "1.5"),
    "turn_fractions": ({"turn_fractions": [2, 0]}, "0"),
    "turn_fractions, none": ({"turn_fractions": []}, "[]"),
    "memory": ({"memory": [100, 2]}, "[100, 2]"),
    "memory, one": ({"memory": [100]}, "[100]"),
    "write_range": ({"write": "cancel", "write_range": 2.5}, "2.5"),
    "write_start": ({"write": "cancel", "write_start": 1.0}, "1.0"),
    "phase_spread": ({"phase_spread": 0.0}, "0.0"),
    "write for static binding": ({"binding": "static", "write": "cancel"}, "cancel"),
    "mixer_types": ({"num_hidden_layers": 2, "mixer_types": ["holographic", "mamba"]}, "mamba"),
    "window": ({"window": 1}, "1"),
    "window of no size": ({"window": 2.5}, "2.5"),
    "num_heads of odd width": (
        {"hidden_size": 15, "num_heads": 1, "num_hidden_layers": 1, "mixer_types": ["window"]},
        "15",
    ),
    "mixer_types length": ({"num_hidden_layers": 2, "mixer_types": ["holographic"]}, "1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values_are_refused_early_and_by_name(case):
    options, value = BAD[case]
    with pytest.raises(ValueError) as error:
        HsnConfig(**{"vocab_size": 11, **options})
    message = str(error.value)
    assert case.replace(",", "").split()[0] in message and value in message
    assert "\n" not in message


@pytest.mark.parametrize("bad", [-1, 61, 1000])
def test_token_ids_outside_the_vocabulary_are_refused(tiny_model, bad):
    model = tiny_model("bundle")
    with pytest.raises(ValueError, match=rf"input_ids.*{bad}.*61"):
        model(input_ids=torch.tensor([[1, bad, 2]]))


@pytest.mark.parametrize("shape", [(2, 0), (0, 3)])
def test_a_model_wants_tokens(tiny_model, shape):
    model = tiny_model("bundle")
    with pytest.raises(ValueError, match=rf"input_ids: shape \({shape[0]}, {shape[1]}\) has no tokens"):
        model(input_ids=torch.ones(shape, dtype=torch.long))
    with pytest.raises(ValueError, match=r"inputs_embeds: shape .* has no tokens"):
        model(inputs_embeds=torch.ones(*shape, 32, dtype=torch.float64))


@pytest.mark.parametrize(
    "arguments", [{}, {"input_ids": torch.ones(1, 3).long(), "inputs_embeds": torch.ones(1, 3, 32)}]
)
def test_exactly_one_kind_of_input_is_accepted(tiny_model, arguments):
    with pytest.raises(ValueError, match=r"input_ids.*inputs_embeds"):
        tiny_model("bundle")(**arguments)


def test_what_an_older_format_means_now(caplog):
    """A bidirectional model of format 1 says once that its results differ; the others are read as they are."""
    transformers.utils.logging.enable_propagation()
    older = {"vocab_size": 11, "hidden_size": 32, "num_hidden_layers": 1, "format_version": 1}
    try:
        for family, options, words in (
            ("hsn", {"causal": False}, "could not tell before from after"),
            ("resonance", {"causal": False, "gate_taps": 4}, "gate_taps=4 are symmetric now"),
            ("hsn", {"causal": True}, None),
            ("resonance", {"causal": False, "gate_taps": 5}, None),
            ("holo", {"causal": False}, None),
        ):
            for _ in range(2):
                config = get_architecture(family).config(**older, **options)
            assert config.format_version == FORMAT  # what is saved again is of the present one
            assert [words in record.message for record in caplog.records] == [True] * (words is not None)
            caplog.clear()
    finally:
        transformers.utils.logging.disable_propagation()
    with pytest.raises(ValueError, match="format_version: 1 with binding='static'"):
        HsnConfig(**older, binding="static")
