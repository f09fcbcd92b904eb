"""One ONNX graph for all sizes and batches."""

import io

import numpy as np
import pytest
import torch

from hf_holo import ResonanceVisionConfig, ResonanceVisionForImageClassification, get_architecture
from hf_holo.eval.conformance.subject import perturb

onnxruntime = pytest.importorskip("onnxruntime")
VARIANTS = get_architecture("resonance_vision").variants
AXES = {"pixel_values": {0: "batch", 2: "height", 3: "width"}, "pixel_mask": {0: "batch", 1: "height", 2: "width"}}


class Logits(torch.nn.Module):
    """A model whose output is the logits alone."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values, pixel_mask=None):
        return self.model(pixel_values, pixel_mask).logits


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_onnx_gives_the_same_logits_for_three_sizes_and_two_batches(variant, masked):
    model = perturb(ResonanceVisionForImageClassification(ResonanceVisionConfig(**VARIANTS[variant]))).eval()
    channels, file = model.config.num_channels, io.BytesIO()
    example = (torch.randn(2, channels, 16, 16), torch.ones(2, 16, 16))[: 1 + masked]
    names = list(AXES)[: len(example)]
    axes = {name: AXES[name] for name in names} | {"logits": {0: "batch"}}
    torch.onnx.export(
        Logits(model), example, file, input_names=names, output_names=["logits"], dynamic_axes=axes, dynamo=False
    )
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        for height, width in ((16, 16), (24, 33), (9, 12)):
            inputs = {"pixel_values": torch.randn(batch, channels, height, width)}
            if masked:
                inputs["pixel_mask"] = torch.ones(batch, height, width)
                inputs["pixel_mask"][0, :, 5:] = 0
            (got,) = session.run(["logits"], {name: value.numpy() for name, value in inputs.items()})
            np.testing.assert_allclose(got, model(**inputs).logits.numpy(), atol=1e-4, rtol=1e-4)
