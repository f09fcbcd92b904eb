"""A third-party architecture with a mixer of its own exports without export code of its own: texts, images, sounds."""

import json

import pytest
import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel, ViTImageProcessor, Wav2Vec2FeatureExtractor
from transformers.modeling_outputs import CausalLMOutputWithPast, ImageClassifierOutput, SequenceClassifierOutput

from hf_holo import HoloError, architectures, register_architecture, registry
from hf_holo.cli import main
from hf_holo.export.graph import Graph, states_of
from hf_holo.modeling.backbone import RecurrentBackbone
from hf_holo.modeling.configuration_base import FamilyConfig
from hf_holo.modeling.heads import RecurrentForCausalLM
from hf_holo.modeling.layers import at_least_float32
from hf_holo.modeling.pretrained import FamilyPreTrainedModel

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "pad_token_id": 0}


class AverageConfig(FamilyConfig):
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


class AveragePreTrainedModel(FamilyPreTrainedModel):
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


class AverageClassifier(AveragePreTrainedModel):
    """Pieces of an image or a sound are tokens."""

    convolution, channels = nn.Conv2d, 3

    def __init__(self, config):
        super().__init__(config)
        self.pieces = self.convolution(self.channels, config.hidden_size, 4, stride=4)
        self.model = AverageModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class AverageForImageClassification(AverageClassifier):
    """Patches of 4 × 4 as tokens, row by row; the last one is classified."""

    main_input_name = "pixel_values"

    @property
    def dummy_inputs(self):
        return {"pixel_values": torch.zeros(1, 3, 8, 12)}

    def forward(self, pixel_values, return_dict=None):
        x = self.pieces(pixel_values).flatten(2).mT
        last = self.model(inputs_embeds=x, use_cache=False).last_hidden_state[:, -1]
        return ImageClassifierOutput(logits=self.classifier(last))


class AverageForAudioClassification(AverageClassifier):
    """Four samples are a token; the mean of all is classified."""

    main_input_name = "input_values"
    convolution, channels = nn.Conv1d, 1

    @property
    def dummy_inputs(self):
        return {"input_values": torch.zeros(1, 40)}

    def forward(self, input_values, attention_mask=None, return_dict=None):
        if attention_mask is not None:
            input_values = input_values * attention_mask
        x = self.pieces(input_values[:, None]).mT
        hidden = self.model(inputs_embeds=x, use_cache=False).last_hidden_state
        return SequenceClassifierOutput(logits=self.classifier(hidden.mean(1)))


class AverageForSequenceClassification(AverageForImageClassification):
    """A text and an image: its patches stand in front."""

    main_input_name = "input_ids"

    def forward(self, input_ids, attention_mask=None, pixel_values=None, return_dict=None):
        patches = self.pieces(pixel_values).flatten(2).mT
        x = torch.cat([patches, self.model.get_input_embeddings()(input_ids)], 1)
        mask = torch.cat([torch.ones_like(patches[..., 0], dtype=torch.long), attention_mask], 1)
        hidden = self.model(inputs_embeds=x, attention_mask=mask, use_cache=False).last_hidden_state
        return SequenceClassifierOutput(logits=self.classifier(hidden.mean(1)))


HEADS = {
    "AutoModelForCausalLM": AverageForCausalLM,
    "AutoModelForImageClassification": AverageForImageClassification,
    "AutoModelForAudioClassification": AverageForAudioClassification,
    "AutoModelForSequenceClassification": AverageForSequenceClassification,
}


def made(model_class):
    torch.manual_seed(0)
    return model_class(AverageConfig(**SIZES, num_labels=5)).eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """Forgotten after the test."""
    monkeypatch.setattr(registry, "_ARCHITECTURES", architectures())
    register_architecture("export-average", AverageConfig, HEADS)


@pytest.fixture
def model():
    return made(AverageForCausalLM)


def save_classifier(kind: str, folder):
    """A saved classifier of images or sounds with its processor."""
    made(HEADS[f"AutoModelFor{kind}Classification"]).save_pretrained(folder)
    processor = ViTImageProcessor(size={"height": 8, "width": 12}) if kind == "Image" else Wav2Vec2FeatureExtractor()
    processor.save_pretrained(folder)
    return str(folder)


def test_its_state_is_known(model):
    (first, _) = states_of(type(model), model.config)
    assert first.input_name == "past_key_values.0.sum" and first.shape == (17,)


class BareForCausalLM(PreTrainedModel, GenerationMixin):
    """Knows nothing of the base classes here: it declares its state, and what it can, as attributes."""

    config_class, capabilities = AverageConfig, frozenset({"causal", "constant_state"})

    @classmethod
    def state_spec(cls, config):
        return [{"sum": (config.hidden_size,)}] * config.num_hidden_layers

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=None):
        """Without `return_dict`, which an export does not insist on."""
        x = torch.tanh(self.embed_tokens(input_ids)) * attention_mask[:, -input_ids.shape[1] :, None]
        for layer in past_key_values.layers:
            x = x.cumsum(1) + layer.get("sum")[:, None]
            layer.put("sum", x[:, -1], x.shape[1], lambda tokens, x=x: x[:, tokens - 1])
        return CausalLMOutputWithPast(logits=self.lm_head(x), past_key_values=past_key_values)


def graph_of(monkeypatch, model_class) -> Graph:
    monkeypatch.setattr("hf_holo.export.graph.head_for", lambda task, config: model_class)
    return Graph("text-generation-with-past", AverageConfig(**SIZES))


def test_a_class_without_capabilities_of_is_taken_at_its_word(monkeypatch):
    torch.manual_seed(0)
    model = BareForCausalLM(AverageConfig(**SIZES)).eval()
    graph = graph_of(monkeypatch, BareForCausalLM)
    assert [(state.name, state.shape) for state in graph.states] == [("sum", (16,))] * 2
    example = graph.example(batch=1, tokens=6)
    example["attention_mask"].fill_(1)
    logits, *states = graph.call(model, list(example.values()))
    halves = [graph.example(batch=1, tokens=3) for _ in range(2)]
    for half, ids in zip(halves, example["input_ids"].chunk(2, 1), strict=True):
        half["input_ids"], half["attention_mask"] = ids, torch.ones_like(ids)
    first, *between = graph.call(model, list(halves[0].values()))
    inputs = [halves[1][name] for name in graph.inputs]
    second, *after = graph.call(model, [*inputs, *between])
    torch.testing.assert_close(torch.cat([first, second], 1), logits)
    torch.testing.assert_close(after, states)


@pytest.mark.parametrize(
    ("forward", "missing"),
    [
        (lambda self, **kwargs: None, "input_ids, attention_mask, cache or past_key_values"),
        (lambda self, input_ids, past_key_values=None: None, "attention_mask"),
        (lambda self, input_ids, attention_mask=None, **kwargs: None, "cache or past_key_values"),
    ],
)
def test_a_forward_that_does_not_name_its_arguments_is_one_line(monkeypatch, forward, missing):
    unnamed = type("Unnamed", (BareForCausalLM,), {"forward": forward})
    with pytest.raises(HoloError, match=rf"Unnamed\.forward does not name {missing} among its arguments"):
        _ = graph_of(monkeypatch, unnamed).inputs


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


@pytest.mark.parametrize(
    ("task", "shapes"),
    [
        ("image-classification", {"pixel_values": (3, 3, 8, 12)}),
        ("audio-classification", {"input_values": (3, 47), "attention_mask": (3, 47)}),  # longer by the tokens
    ],
)
def test_inputs_have_the_sizes_that_the_model_says(task, shapes):
    graph = Graph(task, AverageConfig(**SIZES))
    example = graph.example(batch=3, tokens=7)
    assert {name: tuple(example[name].shape) for name in shapes} == shapes and example.keys() == shapes.keys()
    assert example[graph.model_class.main_input_name].std() > 0.5


def test_an_unknown_size_of_an_image_is_one_line(monkeypatch):
    monkeypatch.delattr(AverageForImageClassification, "dummy_inputs")
    with pytest.raises(HoloError, match=r"AverageForImageClassification\.dummy_inputs must hold pixel_values"):
        Graph("image-classification", AverageConfig(**SIZES)).example()


@pytest.mark.parametrize(
    ("kind", "name", "checked"),
    [("Image", "torchscript", 1), ("Image", "torch-export", 1), ("Audio", "torchscript", 2)],
)
def test_a_classifier_exports(tmp_path, quick_export, kind, name, checked):
    """An image has one size, a sound many lengths."""
    assert main(["export", save_classifier(kind, tmp_path / "saved"), str(tmp_path), "--format", name]) == 0
    report = json.loads((tmp_path / name / "report.json").read_text())
    assert len(report["parity"]) == checked and "generation" not in report
    assert report["milliseconds"]["input"]["exported"] > 0
    card = (tmp_path / name / "README.md").read_text()
    assert f"pipeline_tag: {kind.lower()}-classification" in card and "lengths" not in card
    assert (tmp_path / name / "preprocessor_config.json").exists()


@pytest.mark.parametrize("name", ["torchscript", "onnx"])
def test_a_text_and_an_image_are_read_together(tmp_path, quick_export, name):
    if name == "onnx":
        pytest.importorskip("optimum.exporters.onnx", reason="needs the extra `onnx`")
    made(AverageForSequenceClassification).save_pretrained(tmp_path / "saved")
    assert main(["export", str(tmp_path / "saved"), str(tmp_path), "--format", name]) == 0
    report = json.loads((tmp_path / name / "report.json").read_text())
    assert [row["length"] for row in report["parity"]] == [1, 17] and "text" in report["milliseconds"]
    card = (tmp_path / name / "README.md").read_text()
    assert "- input_ids: axis 0 batch_size, axis 1 sequence_length" in card and "- pixel_values: axis 0" in card


@pytest.mark.parametrize(("kind", "shape"), [("Image", (4, 3, 8, 12)), ("Audio", (3, 111))])
def test_a_classifier_runs_in_the_class_of_optimum(tmp_path, quick_export, kind, shape):
    runtime = pytest.importorskip("optimum.onnxruntime", reason="needs the extra `onnx`")
    source = save_classifier(kind, tmp_path / "saved")
    assert main(["export", source, str(tmp_path), "--format", "onnx", "onnx-int8"]) == 0
    model = made(HEADS[f"AutoModelFor{kind}Classification"])
    inputs = {model.main_input_name: torch.randn(shape)}
    if kind == "Audio":
        inputs["attention_mask"] = torch.ones(shape, dtype=torch.long)
    for name, tolerance in (("onnx", 1e-5), ("onnx-int8", 0.05)):
        (tmp_path / "new").mkdir(exist_ok=True)
        assert (tmp_path / name).stat().st_mode == (tmp_path / "new").stat().st_mode  # open to whom the umask says
        exported = getattr(runtime, f"ORTModelFor{kind}Classification").from_pretrained(tmp_path / name)
        found, wanted = exported(**inputs).logits, model(**inputs).logits
        torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))
