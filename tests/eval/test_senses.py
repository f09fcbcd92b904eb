"""The checks on models that see, hear or have several senses: wrong ones are caught, right ones are not accused."""

import re

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from hf_holo import get_architecture
from hf_holo.eval.conformance import CHECKS, Subject, run_check, select
from hf_holo.modeling.modeling_resonance_audio import (
    ResonanceAudioForAudioClassification,
    ResonanceAudioForAudioFrameClassification,
)
from hf_holo.modeling.modeling_resonance_multimodal import ResonanceMultimodalForSequenceClassification
from hf_holo.modeling.modeling_resonance_vision import ResonanceVisionForImageClassification


def given(**inputs) -> dict:
    return {name: value for name, value in inputs.items() if value is not None}


class DeafToMasks(ResonanceVisionForImageClassification):
    def forward(self, pixel_values=None, pixel_mask=None, labels=None, **kwargs):
        return super().forward(pixel_values, None, labels, **kwargs)


class SeesNoPlace(ResonanceVisionForImageClassification):
    def forward(self, pixel_values=None, pixel_mask=None, labels=None, **kwargs):
        output = super().forward(pixel_values, pixel_mask, labels, **kwargs)
        output.logits = output.logits + super().forward(pixel_values.flip(-1), pixel_mask, labels, **kwargs).logits
        return output


class SeesOtherRows(ResonanceVisionForImageClassification):
    def forward(self, pixel_values=None, pixel_mask=None, labels=None, **kwargs):
        return super().forward(pixel_values - 0.1 * pixel_values.mean(0), pixel_mask, labels, **kwargs)


class OneSize(ResonanceVisionForImageClassification):
    def forward(self, pixel_values=None, pixel_mask=None, labels=None, **kwargs):
        if pixel_values.shape[-1] % 2:
            pixel_values = pixel_values / 0.0
        return super().forward(pixel_values, pixel_mask, labels, **kwargs)


class TakesAnything(ResonanceVisionForImageClassification):
    def forward(self, pixel_values=None, pixel_mask=None, labels=None, **kwargs):
        return super().forward(pixel_values.float()[:, : self.config.num_channels], pixel_mask, labels)


class HearsPadding(ResonanceAudioForAudioClassification):
    def forward(self, input_values=None, attention_mask=None, labels=None, **kwargs):
        return super().forward(input_values, None, labels=labels, **kwargs)


class HearsNoOrder(ResonanceAudioForAudioClassification):
    def forward(self, input_values=None, attention_mask=None, labels=None, **kwargs):
        output = super().forward(input_values, attention_mask, labels=labels, **kwargs)
        output.logits = output.logits + super().forward(input_values.flip(-1), attention_mask, **kwargs).logits
        return output


class BreaksAtSilence(ResonanceAudioForAudioClassification):
    def forward(self, input_values=None, attention_mask=None, labels=None, **kwargs):
        louder = input_values / input_values.square().mean(1, keepdim=True).sqrt()
        return super().forward(louder, attention_mask, labels=labels, **kwargs)


class Forgets(ResonanceAudioForAudioClassification):
    """Each piece is heard as if it were the first."""

    def forward(self, input_values=None, attention_mask=None, past_key_values=None, cache=None, **kwargs):
        if input_values.shape[1] < self.config.samples_per_step:
            input_values = torch.nn.functional.pad(input_values, (0, self.config.samples_per_step))
        return super().forward(input_values, attention_mask, **{**kwargs, "use_cache": False})


class HearsTheFuture(ResonanceAudioForAudioFrameClassification):
    def forward(self, input_values=None, attention_mask=None, past_key_values=None, cache=None, **kwargs):
        output = super().forward(input_values, attention_mask, **kwargs)
        output.logits = output.logits + 0.01 * output.logits.mean(1, keepdim=True)
        return output


class HearsWhatIsMissing(ResonanceMultimodalForSequenceClassification):
    def forward(self, input_values=None, modality_mask=None, **inputs):
        output = super().forward(input_values=input_values, modality_mask=modality_mask, **inputs)
        if input_values is not None:
            output.logits = output.logits + 1e-6 * input_values.mean(1, keepdim=True)
        return output


class HasNoEars(ResonanceMultimodalForSequenceClassification):
    def forward(self, input_values=None, audio_attention_mask=None, input_ids=None, pixel_values=None, **inputs):
        if input_ids is None and pixel_values is None:
            return super().forward(input_values=input_values, audio_attention_mask=audio_attention_mask, **inputs)
        return super().forward(input_ids=input_ids, pixel_values=pixel_values, **inputs)


class OneMaskForAll(ResonanceMultimodalForSequenceClassification):
    def forward(self, modality_mask=None, **inputs):
        if modality_mask is not None:
            modality_mask = modality_mask[-1:].expand_as(modality_mask)
        return super().forward(modality_mask=modality_mask, **inputs)


SEES, HEARS, BOTH = "resonance_vision", "resonance_audio", "resonance_multimodal"
FAULTS = {  # the family and variant, the check that must notice, and what it says
    DeafToMasks: (SEES, "plain", "padding of pictures", "padding pictures of .* changes the output"),
    SeesNoPlace: (SEES, "plain", "place in a picture", "an input that is mirrored gives the same output"),
    SeesOtherRows: (SEES, "plain", "rows of a batch", "the other rows of the batch change a row"),
    OneSize: (SEES, "plain", "pictures of any size", "are not finite"),
    TakesAnything: (SEES, "plain", "bad inputs are refused", "a picture with other channels is taken without an error"),
    HearsPadding: (HEARS, "plain", "padding of sounds", "padding of .* samples changes the output"),
    HearsNoOrder: (HEARS, "plain", "order of a sound", "an input that is reversed gives the same output"),
    BreaksAtSilence: (HEARS, "plain", "sounds of any length", "silence gives outputs .* not finite"),
    Forgets: (HEARS, "causal", "a sound in pieces", "hearing a sound in pieces of .* changes the output"),
    HearsTheFuture: (HEARS, "causal", "future of a sound", "other samples from .* on change the steps before"),
    HearsWhatIsMissing: (BOTH, "plain", "missing senses add nothing", "the places of the missing senses change logits"),
    HasNoEars: (BOTH, "plain", "every sense counts", "another input for audio gives the same output"),
    OneMaskForAll: (BOTH, "plain", "rows that lack different senses", "a row with .* differs from that row alone"),
}


def subject_of(model_class, family: str, variant: str) -> Subject:
    architecture = get_architecture(family)
    return Subject(model_class, architecture.config(**architecture.variants[variant]))


@pytest.mark.parametrize("model_class", FAULTS, ids=lambda model_class: model_class.__name__)
def test_a_wrong_model_is_caught_and_its_fault_named(model_class):
    family, variant, check, message = FAULTS[model_class]
    result = run_check(CHECKS[check], subject_of(model_class, family, variant))
    assert result.status == "failed" and re.search(message, result.detail), result


@pytest.mark.parametrize("family", [SEES, HEARS, BOTH])
def test_no_check_of_senses_accuses_a_right_model(family):
    architecture = get_architecture(family)
    subject = Subject(
        architecture.main_model, architecture.config(**next(iter(architecture.variants.values()))), seed=3
    )
    results = [run_check(check, subject) for check in select(["senses"], quick=True)]
    assert [result for result in results if result.status == "failed"] == []
    assert sum(result.status == "passed" for result in results) >= 4


def test_every_check_of_senses_can_fail():
    caught = {check for *_, check, _ in FAULTS.values()}
    assert {check.name for check in select(["senses"], quick=False)} <= caught


def test_a_vision_model_of_transformers_is_checked_as_far_as_it_goes():
    config = ViTConfig(image_size=16, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    config.intermediate_size = 16
    subject = Subject(ViTForImageClassification, config)
    assert subject.modalities == ["vision"] and subject.inputs(2)["pixel_values"].shape == (2, 3, 16, 16)
    for name in ("rows of a batch", "place in a picture", "gradient of every parameter"):
        assert run_check(CHECKS[name], subject).status == "passed"
    result = run_check(CHECKS["padding of pictures"], subject)
    assert (result.status, result.detail) == ("not applicable", "forward takes no pixel_mask")
