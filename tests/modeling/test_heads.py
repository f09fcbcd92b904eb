"""The heads for masked language modelling and for classifying sequences and tokens."""

import pytest
import torch

from hf_holo import HsnForCausalLM, HsnForMaskedLM, HsnForSequenceClassification, HsnForTokenClassification

BIDIRECTIONAL = ("bundle", "cancel", "static", "hybrid", "gate-sublayer", "gated-mlp", "shared-keys")
EXACT = {"rtol": 1e-8, "atol": 1e-8}


@pytest.fixture(params=BIDIRECTIONAL)
def masked_lm(request, tiny_model):
    return tiny_model(request.param, HsnForMaskedLM, causal=False)


# ---------------------------------------------------------------------------------------------- masked language model
def test_a_bidirectional_model_sees_both_sides(masked_lm):
    x = torch.randn(1, 70, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    logits = masked_lm(inputs_embeds=x).logits
    (gradient,) = torch.autograd.grad(logits[0, 35].square().sum(), x)
    influence = gradient[0].abs().amax(-1)
    assert influence[0] > 0 and influence[34] > 0 and influence[36] > 0 and influence[69] > 0


@torch.no_grad()
@pytest.mark.parametrize("left", [0, 3, 9])
def test_padding_changes_no_bidirectional_output(masked_lm, random_ids, left):
    ids = random_ids(2, 70)
    padded = torch.nn.functional.pad(ids, (left, 9 - left), value=7)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (left, 9 - left))
    logits = masked_lm(input_ids=padded, attention_mask=mask).logits
    torch.testing.assert_close(logits[:, left : left + 70], masked_lm(input_ids=ids).logits, **EXACT)


def test_masked_loss_counts_labelled_tokens_only(masked_lm, random_ids):
    ids = random_ids(2, 12)
    labels = torch.full_like(ids, -100)
    labels[:, 5] = ids[:, 5]
    output = masked_lm(input_ids=ids, labels=labels)
    expected = torch.nn.functional.cross_entropy(output.logits[:, 5], ids[:, 5])
    torch.testing.assert_close(output.loss.double(), expected, rtol=1e-6, atol=0)
    output.loss.backward()


def test_a_causal_configuration_is_refused_for_masked_modelling(tiny_config):
    with pytest.raises(ValueError, match="causal"):
        HsnForMaskedLM(tiny_config(causal=True))


def test_a_bidirectional_configuration_is_refused_for_causal_modelling(tiny_config):
    with pytest.raises(ValueError, match="causal"):
        HsnForCausalLM(tiny_config(causal=False))


# ---------------------------------------------------------------------------------------------- sequences
@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("left", [0, 4, 6])
def test_sequence_logits_ignore_padding_on_either_side(variant, tiny_model, random_ids, causal, left):
    model = tiny_model(variant, HsnForSequenceClassification, causal=causal, num_labels=3)
    ids = random_ids(2, 20)
    padded = torch.nn.functional.pad(ids, (left, 6 - left), value=0)
    mask = (padded != 0).long()
    expected = model(input_ids=ids).logits
    assert expected.shape == (2, 3)
    torch.testing.assert_close(model(input_ids=padded, attention_mask=mask).logits, expected, **EXACT)


@torch.no_grad()
def test_half_precision_finds_the_last_token_of_a_long_text(tiny_model, random_ids):
    """Whole numbers beyond 256 are rounded in bfloat16."""
    model, ids = tiny_model("bundle", HsnForSequenceClassification, dtype=torch.bfloat16), random_ids(1, 600)
    with torch.no_grad():
        expected = model.score(model.model(ids).last_hidden_state[:, -1])
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=0)


def test_every_token_reaches_the_sequence_logits(variant, tiny_model, random_ids):
    model = tiny_model(variant, HsnForSequenceClassification, num_labels=3)
    ids = random_ids(1, 10)
    expected = model(input_ids=ids).logits
    for place in (0, 5, 9):
        changed = ids.clone()
        changed[:, place] = ids[:, place] % 60 + 1
        assert (model(input_ids=changed).logits - expected).abs().max() > 1e-9


@pytest.mark.parametrize(
    ("options", "labels"),
    [
        ({"num_labels": 3}, torch.tensor([0, 2])),
        ({"num_labels": 1}, torch.tensor([0.5, -1.0], dtype=torch.float64)),
        (
            {"num_labels": 3, "problem_type": "multi_label_classification"},
            torch.tensor([[1, 0, 1], [0, 0, 1]], dtype=torch.float64),
        ),
    ],
    ids=["classes", "regression", "several labels"],
)
def test_sequence_losses(tiny_model, random_ids, options, labels):
    model = tiny_model("bundle", HsnForSequenceClassification, **options)
    output = model(input_ids=random_ids(2, 9), labels=labels)
    functional = torch.nn.functional
    if labels.dtype == torch.long:
        expected = functional.cross_entropy(output.logits, labels)
    elif labels.dim() == 1:
        expected = functional.mse_loss(output.logits.squeeze(-1), labels)
    else:
        expected = functional.binary_cross_entropy_with_logits(output.logits, labels)
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


# ---------------------------------------------------------------------------------------------- tokens
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_token_classification(variant, tiny_model, random_ids, causal):
    model = tiny_model(variant, HsnForTokenClassification, causal=causal, num_labels=5)
    ids = random_ids(2, 9)
    labels = ids % 5
    labels[:, :3] = -100
    output = model(input_ids=ids, labels=labels)
    assert output.logits.shape == (2, 9, 5)
    expected = torch.nn.functional.cross_entropy(output.logits[:, 3:].flatten(0, 1), labels[:, 3:].flatten())
    torch.testing.assert_close(output.loss.double(), expected, rtol=1e-6, atol=0)
    output.loss.backward()


@pytest.mark.parametrize("model_class", [HsnForSequenceClassification, HsnForTokenClassification])
@pytest.mark.parametrize("bad", [-1, 3])
def test_classes_that_there_are_none_of_are_refused(tiny_model, random_ids, model_class, bad):
    model = tiny_model("bundle", model_class, num_labels=3)
    shape = (2,) if model_class is HsnForSequenceClassification else (2, 9)
    labels = torch.zeros(shape, dtype=torch.long)
    labels[0] = -100
    assert model(input_ids=random_ids(2, 9), labels=labels).loss.isfinite()
    labels[1] = bad
    with pytest.raises(ValueError, match=f"labels: {bad} is outside the classes, num_labels = 3; ids are 0 to 2"):
        model(input_ids=random_ids(2, 9), labels=labels)


def test_classifier_dropout_acts_in_training(tiny_model, random_ids):
    model = tiny_model("bundle", HsnForTokenClassification, classifier_dropout=0.5).train()
    ids = random_ids(2, 9)
    assert not torch.allclose(model(input_ids=ids).logits, model(input_ids=ids).logits)


# ---------------------------------------------------------------------------------------------- language model loss
def test_gradient_accumulation_divides_by_all_items(model, random_ids):
    """num_items_in_batch, which Trainer passes, makes the sum of micro-batch losses the loss of the whole batch."""
    ids = random_ids(4, 9)
    whole = model(input_ids=ids, labels=ids).loss
    parts = [model(input_ids=part, labels=part, num_items_in_batch=32).loss for part in ids.split(2)]
    torch.testing.assert_close(sum(parts), whole)
