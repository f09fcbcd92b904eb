"""One ONNX graph for every number of examples, every size, and whatever is missing."""

import io

import numpy as np
import pytest
import torch
from several_senses import OWN

from hf_holo.eval.conformance.subject import perturb

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("hf_holo.export.onnx_config")  # teaches torch's older exporter an operator that it lacks
AXES = {
    "input_ids": {0: "batch", 1: "tokens"},
    "attention_mask": {0: "batch", 1: "tokens"},
    "pixel_values": {0: "batch", 2: "height", 3: "width"},
    "pixel_mask": {0: "batch", 1: "height", 2: "width"},
    "input_values": {0: "batch", 1: "samples"},
    "audio_attention_mask": {0: "batch", 1: "samples"},
    "modality_mask": {0: "batch"},
}


class Logits(torch.nn.Module):
    """A model that takes its inputs in the order of their names, and whose output is the logits alone."""

    def __init__(self, model, names):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs):
        return self.model(**dict(zip(self.names, inputs, strict=True))).logits


@torch.no_grad()
@pytest.mark.parametrize("variant", ["plain", "concatenation", "text and vision"])
def test_onnx_gives_the_same_logits(make, inputs, variant):
    model = perturb(make("classifier", variant))
    count = len(model.config.modalities)
    example = inputs(model, rows=2) | {"modality_mask": torch.ones(2, count, dtype=torch.bool)}
    names, file = [*example], io.BytesIO()
    axes = {name: AXES[name] for name in names} | {"logits": {0: "batch"}}
    arguments = {"input_names": names, "output_names": ["logits"], "dynamic_axes": axes, "dynamo": False}
    torch.onnx.export(Logits(model, names), tuple(example.values()), file, **arguments)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for rows, less in ((1, 0), (5, 3)):
        given = inputs(model, rows=5, seed=1)
        given = {name: x[:rows, ..., : x.shape[-1] - less] for name, x in given.items()}
        mask = torch.ones(rows, count, dtype=torch.bool)
        if rows > 1:
            mask[torch.arange(count), torch.arange(count)] = False
            for column, name in enumerate(model.config.modalities):
                values = given[OWN[name][0]]
                values[column] = torch.nan if values.is_floating_point() else 1
        given["modality_mask"] = mask
        (got,) = session.run(["logits"], {name: given[name].numpy() for name in names})
        np.testing.assert_allclose(got, model(**given).logits.numpy(), atol=1e-4, rtol=1e-4)
