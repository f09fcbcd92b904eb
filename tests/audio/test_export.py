"""One graph from waveforms to logits: real matrix products, any number of recordings, any length."""

import pytest
import torch
from small_sounds import make, padded, tones

from hf_holo.modeling.modeling_resonance_audio import (
    ResonanceAudioForAudioClassification,
    ResonanceAudioForAudioFrameClassification,
)

onnxruntime = pytest.importorskip("onnxruntime")
onnx_config = pytest.importorskip("hf_holo.export.onnx_config")  # teaches torch's older exporter what it lacks
SIZES = [(1, 160), (1, 8000), (3, 1733), (2, 24_001)]  # recordings, samples


class Logits(torch.nn.Module):
    """What goes into a graph: two tensors in, one out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_values, attention_mask):
        return self.model(input_values, attention_mask, use_cache=False).logits


def inputs(rows, samples):
    """Recordings of different lengths, the longest first."""
    return padded([tones(1, max(samples * (rows - row) // rows, 160), row)[0] for row in range(rows)])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dynamo", "variant", "head"),
    [
        (False, "plain", ResonanceAudioForAudioClassification),
        (False, "causal", ResonanceAudioForAudioFrameClassification),
        pytest.param(True, "masked", ResonanceAudioForAudioFrameClassification, marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_onnx_gives_the_same_logits_at_every_size(dynamo, variant, head, tmp_path, monkeypatch):
    model = make(head, variant).float()
    names, path = ["input_values", "attention_mask"], tmp_path / "model.onnx"
    example = tuple(x.float() if x.is_floating_point() else x for x in inputs(2, 4000))
    options = {"input_names": names, "output_names": ["logits"], "opset_version": 18}
    if dynamo:
        dims = {0: torch.export.Dim("rows"), 1: torch.export.Dim("samples", min=160)}
        torch.onnx.export(Logits(model), example, path, dynamo=True, dynamic_shapes=(dims, dims), **options)
    else:
        monkeypatch.setattr(torch.Tensor, "unflatten", onnx_config._unflatten)  # as Optimum exports our models
        axes = {name: {0: "rows", 1: "samples"} for name in names}
        torch.onnx.export(Logits(model), example, path, dynamo=False, dynamic_axes=axes, **options)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in SIZES:
        batch, mask = inputs(*size)
        if min(mask.sum(1)) < model.config.samples_per_step:
            continue
        expected = model(batch.float(), mask, use_cache=False).logits
        (logits,) = session.run(None, {"input_values": batch.float().numpy(), "attention_mask": mask.numpy()})
        assert logits.shape == expected.shape
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-4)
