"""Names, shapes and order of a graph follow from what an architecture says of itself."""

import pytest
import torch
from transformers import LlamaConfig

from hf_holo import HoloError, architectures
from hf_holo.export.formats import with_thin_linears
from hf_holo.export.graph import Graph, folded, head_for, make_cache, positions, states_of, take_states, task_of
from hf_holo.export.graph import _read_off as read_off
from hf_holo.modeling.harmonics import HoloLinear

from .conftest import tiny_model

STATE = "text-generation-with-past"


@pytest.mark.parametrize("family", ["hsn", "resonance"])
def test_declared_states_are_those_that_the_cache_holds(family):
    model = tiny_model(family)
    declared = states_of(type(model), model.config)
    assert set(declared) == set(read_off(type(model), model.config, torch.float32))
    assert declared[0].input_name.startswith("past_key_values.0.")


def test_states_that_grow_are_read_off():
    model = tiny_model("hsn", "hybrid")
    states = {state.output_name: state for state in states_of(type(model), model.config)}
    assert states["present.1.labels"].shape == (None,) and states["present.1.labels"].dtype == torch.long
    assert states["present.1.keys"].axes("tokens") == {0: "batch_size", 2: "tokens"}
    assert None not in states["present.0.memory"].shape


@pytest.mark.parametrize(("family", "variant"), [("hsn", "hybrid"), ("holo", "dense-attention")])
def test_a_cache_is_made_of_its_tensors(family, variant):
    model = tiny_model(family, variant)
    states = states_of(type(model), model.config)
    ids = torch.arange(12).view(2, 6) + 1
    cache = model(ids).past_key_values
    again = make_cache(model.config, states, take_states(states, cache))
    expected = model(ids, past_key_values=cache).logits
    torch.testing.assert_close(model(ids, past_key_values=again).logits, expected)


def test_amplitudes_and_phases_are_one_number_while_a_graph_is_written():
    model = tiny_model("holo")
    before, ids = dict(model.named_parameters()), torch.arange(12).view(2, 6)
    expected = model(ids).logits
    with folded(model):
        assert not any(name.endswith(("amplitude", "phase")) for name, _ in model.named_parameters())
        torch.testing.assert_close(model(ids).logits, expected)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert {name for name, _ in model.named_parameters()} == set(before)


def test_holographic_layers_become_plain_ones():
    model = tiny_model("holo")
    expected = model(torch.arange(12).view(2, 6)).logits
    plain = with_thin_linears(model)
    assert not any(isinstance(module, HoloLinear) for module in plain.modules())
    torch.testing.assert_close(plain(torch.arange(12).view(2, 6)).logits, expected)


def test_positions_count_no_padding():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert positions(mask, 3).tolist() == [[0, 1, 2], [2, 3, 4]]
    assert Graph(STATE, LlamaConfig()).counts_positions
    assert not Graph(STATE, tiny_model("hsn").config).counts_positions  # there a position of 0 begins a document


def test_the_task_is_that_of_the_saved_head():
    config = tiny_model("hsn").config
    for name, task in (("HsnForCausalLM", STATE), ("HsnModel", "feature-extraction"), ("HsnForMaskedLM", "fill-mask")):
        config.architectures = [name]
        assert task_of(config) == task
    config.architectures = ["Nonsense"]
    with pytest.raises(HoloError, match="architectures: 'Nonsense'"):
        task_of(config)
    assert head_for("text-generation", LlamaConfig()).__name__ == "LlamaForCausalLM"
    with pytest.raises(HoloError, match="did you mean 'fill-mask'"):
        head_for("fill-masks", config)
    with pytest.raises(HoloError, match="the family 'hsn' has no head"):
        head_for("image-classification", config)


def test_every_family_that_reads_has_a_graph_for_its_classifier():
    for architecture in architectures().values():
        if "AutoModelForCausalLM" not in architecture.models:
            continue
        config = architecture.config(**next(iter(architecture.variants.values())))
        graph = Graph("text-classification", config)
        assert list(graph.inputs) == ["input_ids", "attention_mask"]
        assert graph.output_axes == {"logits": {0: "batch_size"}}
