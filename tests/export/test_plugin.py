"""A third-party architecture with a mixer of its own exports without any export code of its own."""

import pytest
import torch
from torch import nn

from hf_holo import architectures, register_architecture, registry
from hf_holo.export.graph import states_of
from hf_holo.modeling.base import RecurrentBackbone, RecurrentForCausalLM, RecurrentPreTrainedModel
from hf_holo.modeling.configuration_base import RecurrentConfig
from hf_holo.modeling.layers import at_least_float32

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "pad_token_id": 0}


class AverageConfig(RecurrentConfig):
    model_type = "export-average"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)


class AverageBlock(nn.Module):
    """Adds the running mean of what a projection of the past has been: its state is the sum and the count."""

    def __init__(self, config, layer_idx=0):
        super().__init__()
        self.layer_idx = layer_idx
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, layout, past_key_values=None):
        cache = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        values = layout.mask(torch.tanh(self.proj(x))).to(at_least_float32(x.dtype))
        ones = layout.mask(torch.ones_like(values[..., :1]))
        before = cache.get("sum") if cache is not None else None
        total = torch.cat([values, ones], -1).cumsum(1)
        if before is not None:
            total = total + before[:, None]
        if cache is not None:
            cache.put("sum", total[:, -1], layout.length, lambda tokens: total[:, tokens - 1])
        return x + (total[..., :-1] / total[..., -1:].clamp_min(1)).to(x.dtype)


class AveragePreTrainedModel(RecurrentPreTrainedModel):
    config_class = AverageConfig
    block_class = AverageBlock
    capabilities = frozenset({"causal", "constant_state"})

    @classmethod
    def state_spec(cls, config):
        return [{"sum": (config.hidden_size + 1,)}] * config.num_hidden_layers


class AverageModel(AveragePreTrainedModel, RecurrentBackbone):
    pass


class AverageForCausalLM(AveragePreTrainedModel, RecurrentForCausalLM):
    backbone_class = AverageModel


@pytest.fixture
def model(monkeypatch):
    """A registered model, forgotten after the test."""
    monkeypatch.setattr(registry, "_ARCHITECTURES", architectures())
    register_architecture("export-average", AverageConfig, {"AutoModelForCausalLM": AverageForCausalLM})
    torch.manual_seed(0)
    return AverageForCausalLM(AverageConfig(**SIZES)).eval().requires_grad_(False)


def test_its_state_is_known(model):
    (first, _) = states_of(type(model), model.config)
    assert first.input_name == "past_key_values.0.sum" and first.shape == (17,)


def test_it_exports_to_onnx_and_generates(model, tmp_path):
    pytest.importorskip("optimum.exporters.onnx", reason="needs the extra `onnx`")
    from optimum.exporters.onnx import main_export

    from hf_holo.export.onnx_config import register
    from hf_holo.export.onnx_runtime import HoloORTModelForCausalLM

    register()
    model.save_pretrained(tmp_path / "saved")
    task = "text-generation-with-past"
    main_export(str(tmp_path / "saved"), output=tmp_path / "onnx", task=task, do_validation=False)
    runtime = HoloORTModelForCausalLM.from_pretrained(tmp_path / "onnx")
    inputs = {"input_ids": torch.arange(1, 9).view(2, 4), "attention_mask": torch.tensor([[0, 0, 1, 1], [1] * 4])}
    options = {"max_new_tokens": 12, "pad_token_id": 0, "num_beams": 2}
    assert torch.equal(model.generate(**inputs, **options), runtime.generate(**inputs, **options))
