"""Labels belong to outputs one by one: of another shape they would count against the wrong ones."""

import pytest
import torch
from small_models import new_model

TEXT = ("hsn", "resonance", "holo")


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("head", ["AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForTokenClassification"])
@pytest.mark.parametrize("family", TEXT)
def test_every_token_has_one(family, head, train):
    model = new_model(family, head).train(train)
    ids = torch.randint(2, 9, (2, 11))
    classes = ids % model.config.num_labels
    for wrong in (classes[:, :5], classes.T, classes[0], classes[..., None]):
        with pytest.raises(ValueError, match=r"labels: shape \(.*\); give \(2, 11\)"):
            model(input_ids=ids, labels=wrong)
    with pytest.raises(ValueError, match="labels: float32; ids are whole numbers"):
        model(input_ids=ids, labels=classes.float())


@pytest.mark.parametrize("family", TEXT)
def test_labels_of_the_asked_positions_alone_will_do(family):
    model, ids = new_model(family).eval(), torch.randint(2, 9, (2, 11))
    few = model(input_ids=ids, labels=ids[:, -4:], logits_to_keep=4)
    assert few.logits.shape[1] == 4
    ignored = ids.masked_fill(torch.arange(11) < 8, -100)  # the first of the four has a label that nothing predicts
    torch.testing.assert_close(few.loss, model(input_ids=ids, labels=ignored).loss)
    whole = model(input_ids=ids, labels=ids, logits_to_keep=4)
    assert whole.logits.shape[1] == 4
    torch.testing.assert_close(whole.loss, model(input_ids=ids, labels=ids).loss)


def test_shifted_labels_are_counted_too():
    model, ids = new_model("hsn"), torch.randint(2, 9, (2, 11))
    with pytest.raises(ValueError, match=r"shift_labels: shape \(2, 10\); give \(2, 11\)"):
        model(input_ids=ids, labels=ids, shift_labels=ids[:, 1:])


@pytest.mark.parametrize("family", TEXT)
@pytest.mark.parametrize(
    ("options", "wrong", "given"),
    [
        ({"num_labels": 3}, torch.zeros(3).long(), r"\(2,\) or \(2, 1\)"),
        ({"num_labels": 3}, torch.zeros(1).long(), r"\(2,\) or \(2, 1\)"),
        ({"num_labels": 3, "problem_type": "single_label_classification"}, torch.eye(3)[:2], r"\(2,\) or \(2, 1\)"),
        ({"num_labels": 1}, torch.zeros(1), r"\(2,\) or \(2, 1\)"),
        ({"num_labels": 1}, torch.zeros(2, 2), r"\(2,\) or \(2, 1\)"),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, torch.zeros(2), r"\(2, 3\)"),
        ({"num_labels": 3, "problem_type": "regression"}, torch.zeros(1, 3), r"\(2, 3\)"),
    ],
)
def test_every_text_has_one(family, options, wrong, given):
    model = new_model(family, "AutoModelForSequenceClassification", pad_token_id=0, **options)
    with pytest.raises(ValueError, match=rf"labels: shape .*; give {given}"):
        model(input_ids=torch.randint(2, 9, (2, 11)), labels=wrong)


@pytest.mark.parametrize("family", TEXT)
def test_a_text_without_a_batch_is_refused(family):
    model = new_model(family)
    with pytest.raises(ValueError, match=r"input_ids: shape \(11,\); give \[batch, tokens\]"):
        model(input_ids=torch.ones(11).long())
    with pytest.raises(ValueError, match=r"inputs_embeds: shape \(2, 32\); give \[batch, tokens, channels\]"):
        model(inputs_embeds=torch.zeros(2, 32))
    with pytest.raises(ValueError, match="input_ids: float32; ids are whole numbers"):
        model(input_ids=torch.ones(1, 3))
