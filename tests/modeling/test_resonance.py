"""Resonance beyond what the conformance kit asks of every family: segments, directions, presets and refusals."""

import logging
import math

import pytest
import torch

import hf_holo
from hf_holo import (
    ResonanceConfig,
    ResonanceForCausalLM,
    ResonanceForMaskedLM,
    ResonanceForTokenClassification,
    ResonanceModel,
    get_architecture,
    preset_config,
)
from hf_holo.eval.conformance.subject import perturb

VARIANTS = get_architecture("resonance").variants
EXACT = {"rtol": 1e-8, "atol": 1e-8}


def make(model_class=ResonanceForCausalLM, variant="hierarchical", seed=0, **overrides):
    """A float64 model whose weights are moved away from their initial values: no claim may rest on them."""
    torch.manual_seed(seed)
    return perturb(model_class(ResonanceConfig(**{**VARIANTS[variant], **overrides}))).double().eval()


# ---------------------------------------------------------------------------------------------- segments
def segmented_and_whole(model, segment=16, **inputs):
    outputs = []
    with torch.no_grad():
        for length in (segment, 10_000):
            model.config.segment_length = length
            outputs.append(model(**inputs, output_hidden_states=True))
    return outputs


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("left", [0, 21])
def test_segments_change_no_result(variant, left, random_ids):
    model, ids = make(variant=variant), random_ids(2, 100)
    mask = torch.ones_like(ids)
    mask[0, :left] = 0
    segmented, whole = segmented_and_whole(model, input_ids=ids, attention_mask=mask)
    for got, expected in zip(segmented.hidden_states, whole.hidden_states, strict=True):
        torch.testing.assert_close(got[0, left:], expected[0, left:], **EXACT)
        torch.testing.assert_close(got[1], expected[1], **EXACT)
    for got, expected in zip(segmented.past_key_values.layers, whole.past_key_values.layers, strict=True):
        assert got.seen == expected.seen == 100
        torch.testing.assert_close(got.states, expected.states, **EXACT)


def test_segments_keep_documents_apart(random_ids):
    model, ids = make(), random_ids(1, 100)
    positions = torch.cat([torch.arange(n) for n in (37, 11, 1, 51)])[None]
    segmented, whole = segmented_and_whole(model, input_ids=ids, position_ids=positions)
    torch.testing.assert_close(segmented.logits, whole.logits, **EXACT)


def test_segments_take_tokens_back(random_ids):
    model, ids = make(segment_length=16), random_ids(1, 60)
    cache = hf_holo.RecurrentCache(model.config)
    cache.activate_past_recording()
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache.crop(29)
        got = model(input_ids=ids[:, 29:], past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(got, model(input_ids=ids).logits[:, 29:], **EXACT)


def test_segments_need_no_cache(random_ids):
    model, ids = make(segment_length=16), random_ids(1, 60)
    with torch.no_grad():
        output = model(input_ids=ids, use_cache=False)
        assert output.past_key_values is None
    torch.testing.assert_close(output.logits, model(input_ids=ids).logits, **EXACT)  # with gradients: at once


# ---------------------------------------------------------------------------------------------- directions
@torch.no_grad()
def test_a_bidirectional_model_tells_before_from_after(random_ids):
    model, ids = make(ResonanceForMaskedLM, "plain"), random_ids(1, 21)
    forward, backward = model(input_ids=ids).logits, model(input_ids=ids.flip(1)).logits
    assert (forward[:, 10] - backward[:, 10]).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_bidirectional_model_hears_both_sides(variant, random_ids):
    model, ids = make(ResonanceForTokenClassification, variant, causal=False), random_ids(1, 41)
    expected = model(input_ids=ids).logits[:, 20]
    for place in (0, 19, 21, 40):
        changed = ids.clone()
        changed[:, place] = ids[:, place] % 60 + 1
        assert (model(input_ids=changed).logits[:, 20] - expected).abs().max() > 1e-7, place


# ---------------------------------------------------------------------------------------------- configs and presets
@pytest.mark.parametrize(
    ("name", "width", "depth", "vocab_size", "strategy"),
    [
        ("small", 256, 6, 50_000, "standard"),
        ("base", 512, 12, 100_000, "frequency_compressed"),
        ("large", 1024, 24, 200_000, "frequency_compressed"),
    ],
)
def test_presets(name, width, depth, vocab_size, strategy):
    """Their vocabularies are those of the Resonance reference; with another one, its strategy is chosen again."""
    preset = preset_config(f"resonance-{name}")
    assert (preset.vocab_size, preset.embedding_strategy) == (vocab_size, strategy)
    with torch.device("meta"):
        model = getattr(hf_holo, f"resonance_{name}")(vocab_size=65)
    assert type(model) is ResonanceForCausalLM and model.config.embedding_strategy == "standard"
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (width, depth)
    block = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    print(f"resonance-{name}: {depth * block:,} parameters in its blocks")
    assert model.count_parameters() == 65 * width + depth * block + width  # tied embeddings, blocks, the last norm


@pytest.mark.parametrize("width", [7, 8, 12, 32, 100])
def test_a_width_is_all_a_model_needs(width):
    model = ResonanceForCausalLM(ResonanceConfig(vocab_size=11, hidden_size=width, num_hidden_layers=1))
    logits = model(input_ids=torch.arange(11)[None]).logits
    assert logits.shape == (1, 11, 11) and torch.isfinite(logits).all()


def test_one_mode_is_enough():
    model = ResonanceModel(ResonanceConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_modes=1))
    assert torch.isfinite(model(input_ids=torch.arange(11)[None]).last_hidden_state).all()


def test_a_memory_can_be_added_to_a_trained_model(tmp_path):
    """What was loaded stays, what is new starts quietly: the model says nearly what it said."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 64, "num_hidden_layers": 2}
    plain = ResonanceForCausalLM(ResonanceConfig(**sizes)).double().eval()
    plain.save_pretrained(tmp_path)
    options = {"memory_dimension": 8, "memory_chunk_length": 4, "dtype": torch.float64}
    model = ResonanceForCausalLM.from_pretrained(tmp_path, **options)
    loaded = model.state_dict()
    for name, expected in plain.state_dict().items():
        assert torch.equal(loaded[name], expected), name
    assert any("memories" in name for name in loaded)
    ids = torch.arange(1, 41)[None]
    with torch.no_grad():
        expected = plain(input_ids=ids).logits
        assert 0 < (model(input_ids=ids).logits - expected).std() < 0.2 * expected.std()


BAD = {
    "num_banks": ({"hidden_size": 32, "num_banks": 5}, "5"),
    "num_modes": ({"num_modes": 0}, "0"),
    "lowest_frequency": ({"lowest_frequency": 0.0}, "0.0"),
    "lowest_frequency below zero": ({"lowest_frequency": -0.1}, "-0.1"),
    "lowest_frequency that is none": ({"lowest_frequency": None}, "None"),
    "lowest_frequency in words": ({"lowest_frequency": "0.1"}, "'0.1'"),
    "interference": ({"interference": "no"}, "'no'"),
    "embedding_options": ({"embedding_options": [1]}, "[1]"),
    "highest_frequency": ({"highest_frequency": -1.0}, "-1.0"),
    "highest_frequency above what can be told": ({"highest_frequency": 1.01 * math.pi}, "3.17"),
    "lowest_frequency above the highest": (
        {"lowest_frequency": 2.0, "highest_frequency": 1.0},
        "highest_frequency=1.0",
    ),
    "chunk_length": ({"chunk_length": 0}, "0"),
    "memory_dimension": ({"memory_dimension": 0}, "0"),
    "memory_chunk_length": ({"memory_chunk_length": -8}, "-8"),
    "segment_length": ({"segment_length": 0}, "0"),
    "channel_mix": ({"channel_mix": "conv"}, "conv"),
    "intermediate_size": ({"intermediate_size": -1}, "-1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values_are_refused_early_and_by_name(case):
    options, value = BAD[case]
    with pytest.raises(ValueError) as error:
        ResonanceConfig(**options)
    message = str(error.value)
    assert case.split()[0] in message and value in message and "\n" not in message


def test_there_is_no_limit_to_warn_of(caplog, monkeypatch):
    """Neither in the default nor in a preset: generation says nothing when a prompt is long."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model = ResonanceForCausalLM(ResonanceConfig(**VARIANTS["plain"])).eval()
    model.generate(torch.ones(1, 2100, dtype=torch.long), max_new_tokens=2)
    assert "maximum length" not in caplog.text
    assert all(preset_config(f"resonance-{size}").max_position_embeddings >= 131_072 for size in ("small", "large"))


def test_heads_refuse_the_wrong_direction():
    with pytest.raises(ValueError, match="causal"):
        ResonanceForMaskedLM(ResonanceConfig(**VARIANTS["plain"], causal=True))
    with pytest.raises(ValueError, match="causal"):
        ResonanceForCausalLM(ResonanceConfig(**VARIANTS["plain"], causal=False))
