"""Texts, pictures and sounds in one space."""

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from several_senses import only
from transformers import pipeline

FEATURES = {"text": "get_text_features", "vision": "get_image_features", "audio": "get_audio_features"}
EMBEDS = {"text": "text_embeds", "vision": "image_embeds", "audio": "audio_embeds"}


@torch.no_grad()
def test_features_are_what_is_compared(make, inputs):
    model = make("contrastive")
    given = inputs(model)
    output = model(**given)
    embeds = {}
    for name, method in FEATURES.items():
        features = getattr(model, method)(**only(given, name))
        assert features.shape == (4, model.config.projection_dim)
        embeds[name] = F.normalize(features, dim=-1)
        torch.testing.assert_close(output[EMBEDS[name]], embeds[name])
    scale = model.logit_scale.exp()
    torch.testing.assert_close(output.logits_per_image, scale * embeds["vision"] @ embeds["text"].T)
    torch.testing.assert_close(output.logits_per_text, output.logits_per_image.T)
    torch.testing.assert_close(output.logits_per_audio, scale * embeds["audio"] @ embeds["text"].T)
    torch.testing.assert_close(output.logits_per_image_audio, scale * embeds["vision"] @ embeds["audio"].T)
    own = torch.arange(4)
    pairs = (output.logits_per_image, output.logits_per_audio, output.logits_per_image_audio)
    losses = [F.cross_entropy(logits, own) for pair in pairs for logits in (pair, pair.T)]
    torch.testing.assert_close(output.loss, torch.stack(losses).mean())


@torch.no_grad()
def test_numbers_may_differ_and_then_there_is_no_loss(make, inputs):
    model = make("contrastive")
    given = inputs(model)
    output = model(**only(given, "text"), pixel_values=given["pixel_values"][:1])
    assert output.logits_per_image.shape == (1, 4) and output.loss is None
    both = model(**given, return_loss=False)
    assert both.loss is None and both.logits_per_image.shape == (4, 4)


@torch.no_grad()
def test_who_lacks_one_of_a_pair_is_nobodys_partner(make, inputs):
    """The loss of a pair of modalities is that of the examples that have both."""
    model = make("contrastive")
    given = inputs(model, rows=6)
    mask = torch.ones(6, 3, dtype=torch.bool)
    mask[4:, 1] = mask[0, 2] = False
    given["pixel_values"][4:] = torch.nan
    output = model(**given, modality_mask=mask)
    assert (output.image_embeds[4:] == 0).all() and (output.audio_embeds[0] == 0).all()
    pairs = {"logits_per_image": range(4), "logits_per_audio": range(1, 6), "logits_per_image_audio": range(1, 4)}
    losses = []
    for name, rows in pairs.items():
        logits = output[name][rows][:, rows]
        losses += [F.cross_entropy(x, torch.arange(len(rows))) for x in (logits, logits.T)]
    torch.testing.assert_close(output.loss, torch.stack(losses).mean())


def test_it_learns_which_belong_together(make, inputs):
    model = make("contrastive").train()
    given = inputs(model, rows=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(25):
        loss = model(**given).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert (model.eval()(**given).logits_per_image.argmax(1) == torch.arange(8)).float().mean() > 0.8


def test_features_of_what_it_lacks_are_refused(make):
    with pytest.raises(ValueError, match="input_values: this model has no audio_config; it has text, vision"):
        make("contrastive", "text and vision").get_audio_features(torch.zeros(1, 2000))


def test_the_zero_shot_pipeline(make, processor):
    model = make("contrastive", "text and vision")
    parts = {"tokenizer": processor.tokenizer, "image_processor": processor.image_processor}
    classify = pipeline("zero-shot-image-classification", model, **parts)
    labels = ["even", "an even number", "below five"]
    picture = Image.new("RGB", (20, 30), "red")
    found = classify(picture, candidate_labels=labels, hypothesis_template="{}")
    assert {answer["label"] for answer in found} == {*labels}
    assert abs(sum(answer["score"] for answer in found) - 1) < 1e-5
