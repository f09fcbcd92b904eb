"""Models of several senses: what is missing adds nothing, what is wrong is refused, transformers' ways work."""

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from several_senses import FAMILY, HEADS, OWN, only
from transformers import AutoConfig, Trainer, TrainingArguments

import hf_holo
from hf_holo import ResonanceMultimodalForSequenceClassification, ResonanceMultimodalModel, preset_config
from hf_holo.eval.conformance.subject import main_output, perturb
from hf_holo.modeling.modeling_resonance_multimodal import unbinding_fidelity

MODALITIES = ["text", "vision", "audio"]
SUBSETS = [["text"], ["vision"], ["audio"], ["text", "vision"], ["text", "audio"], ["vision", "audio"]]
FUSIONS = ["plain", "superposition", "concatenation"]


# ---------------------------------------------------------------------------------------------- what is missing
@torch.no_grad()
@pytest.mark.parametrize("variant", FUSIONS)
@pytest.mark.parametrize("left", SUBSETS, ids="+".join)
def test_a_modality_that_is_missing_for_all_adds_exactly_nothing(make, inputs, variant, left):
    """Masked, with NaN in its place, it gives the same bits as a call without it."""
    model = perturb(make("classifier", variant))
    given = inputs(model)
    mask = torch.tensor([[name in left for name in MODALITIES]]).expand(4, -1)
    for name in set(MODALITIES) - set(left):
        values = OWN[name][0]
        given[values] = torch.full_like(given[values], -7 if name == "text" else torch.nan)
    assert torch.equal(model(**given, modality_mask=mask).logits, model(**only(given, *left)).logits)


@torch.no_grad()
@pytest.mark.parametrize("variant", FUSIONS)
def test_examples_of_one_batch_may_lack_different_modalities(make, inputs, variant):
    model = perturb(make("classifier", variant)).double()
    given = inputs(model, rows=6)
    given = {name: x.double() if x.is_floating_point() else x for name, x in given.items()}
    mask = torch.tensor([[name in left for name in MODALITIES] for left in SUBSETS])
    logits = model(**given, modality_mask=mask).logits
    for row, left in enumerate(SUBSETS):
        alone = {name: x[row : row + 1] for name, x in only(given, *left).items()}
        torch.testing.assert_close(logits[row : row + 1], model(**alone).logits, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_placeholders_change_nothing_to_the_bit(make, inputs):
    model, other = make("classifier"), inputs(make(), seed=1)
    given = inputs(model)
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[0, 0] = mask[1, 1] = mask[2, 2] = mask[3, 0] = False
    expected = model(**given, modality_mask=mask).logits
    for column, name in enumerate(MODALITIES):
        for key in OWN[name]:
            missing = (~mask[:, column]).view(-1, *(1,) * (given[key].dim() - 1))
            given[key] = torch.where(missing, other[key], given[key])
    assert torch.equal(model(**given, modality_mask=mask).logits, expected)


def test_placeholders_reach_no_gradient(make, inputs):
    model = make("classifier").train()
    given = inputs(model)
    mask = torch.tensor([[0, 1, 1], [1, 0, 1], [1, 1, 0], [1, 1, 1]])
    given["pixel_values"][1], given["input_values"][2] = torch.nan, torch.inf
    model(**given, modality_mask=mask, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@torch.no_grad()
def test_every_modality_matters(make, inputs):
    model = make("classifier")
    given, other = inputs(model), inputs(model, seed=1)
    expected = model(**given).logits
    for name in MODALITIES:
        assert (model(**{**given, **only(other, name)}).logits - expected).abs().max() > 1e-3, name


def test_modalities_are_dropped_in_training_only(make, inputs):
    model = make(variant="text and audio")  # modality_dropout 0.5
    given = inputs(model, rows=64)
    assert model(**given).modality_mask.all()
    kept = model.train()(**given).modality_mask
    assert kept.any(1).all() and 0.2 < kept.float().mean() < 0.9
    assert make(variant="concatenation").train()(**inputs(make())).modality_mask.all()  # modality_dropout 0


@torch.no_grad()
def test_padding_changes_nothing(make, inputs):
    model = perturb(make("classifier"))
    given = {name: x[:1] for name, x in inputs(model).items()}
    given["attention_mask"] = torch.ones_like(given["attention_mask"])
    expected = model(**given).logits
    more = torch.randn(1, 3, 20, 24)
    more[:, :, :12, :16] = given["pixel_values"]
    real = torch.zeros(1, 20, 24, dtype=torch.long)
    real[:, :12, :16] = 1
    padded = {
        "input_ids": torch.nn.functional.pad(given["input_ids"], (0, 5), value=3),
        "attention_mask": torch.nn.functional.pad(given["attention_mask"], (0, 5)),
        "pixel_values": more,
        "pixel_mask": real,
        "input_values": torch.nn.functional.pad(given["input_values"], (0, 900), value=0.5),
        "audio_attention_mask": torch.nn.functional.pad(given["audio_attention_mask"], (0, 900)),
    }
    torch.testing.assert_close(model(**padded).logits, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_pads_are_found_where_there_is_no_mask(make, inputs):
    model = make()
    given = only(inputs(model), "text")
    given["input_ids"][given["attention_mask"] == 0] = 0  # pad_token_id
    torch.testing.assert_close(model(given["input_ids"])[0], model(**given)[0])


# ---------------------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize("head", HEADS)
def test_what_is_wrong_is_named(make, inputs, head):
    model, two = make(head), make(head, "text and vision")
    given = inputs(model)
    wrong = [
        (model, {}, "no modality at all: give at least one of input_ids, pixel_values, input_values"),
        (two, inputs(model), "input_values: this model has no audio_config; it has text, vision"),
        (model, {"pixel_mask": given["pixel_mask"]}, "pixel_mask: give pixel_values too"),
        (model, {**given, "modality_mask": torch.ones(4, 2)}, r"modality_mask of shape \(4, 2\): give \[batch, 3\]"),
        (model, {**given, "modality_mask": torch.ones(2, 3)}, "numbers of examples differ: .*modality_mask has 2"),
        (model, {**given, "modality_mask": torch.eye(4)[:, :3]}, r"no modality at all in the rows \[3\] of the batch"),
    ]
    for chosen, arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            chosen(**arguments)
    with pytest.raises(TypeError, match="unexpected argument 'pixel_value'; did you mean 'pixel_values'"):
        model(**given, pixel_value=given["pixel_values"])


@pytest.mark.parametrize("head", ["model", "classifier"])
def test_unequal_numbers_of_examples_are_refused(make, inputs, head):
    model = make(head)
    given = inputs(model)
    with pytest.raises(ValueError, match="numbers of examples differ: input_ids has 3, pixel_values has 4, input"):
        model(**{**given, "input_ids": given["input_ids"][:3], "attention_mask": None})


def test_a_class_that_does_not_exist_is_refused(make, inputs):
    model = make("classifier")
    with pytest.raises(ValueError, match="labels holds 3, outside the classes, num_labels = 3"):
        model(**inputs(model), labels=torch.tensor([0, 1, 2, 3]))


# ---------------------------------------------------------------------------------------------- transformers
@torch.no_grad()
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("variant", FAMILY.variants)
def test_saved_and_loaded_it_is_the_same(make, inputs, tmp_path, head, variant):
    """transformers 5 builds on the meta device before it loads: what is not saved must be made again."""
    model = perturb(make(head, variant))
    given = inputs(model)
    model.train()(**given)  # the running means are no longer zero
    model.eval().save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(main_output(loaded(**given)), main_output(model(**given)))
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == loaded.config.to_dict()
    assert loaded.config.modalities == model.config.modalities


@torch.no_grad()
def test_a_classifier_begins_with_the_encoders_of_a_contrastive_model(make, inputs, tmp_path):
    trained = perturb(make("contrastive"))
    trained.save_pretrained(tmp_path)
    model = ResonanceMultimodalForSequenceClassification.from_pretrained(tmp_path)
    for name, expected in trained.text_model.state_dict().items():
        assert torch.equal(model.model.text_model.state_dict()[name], expected), name


@pytest.mark.parametrize("head", HEADS)
def test_all_parameters_start_in_bounds_and_are_trained(make, inputs, head):
    model = make(head, modality_dropout=0.0).train()
    main_output(model(**inputs(model))).square().sum().backward()
    idle = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert not idle
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_gradient_checkpointing_changes_no_gradient(make, inputs):
    gradients = []
    for checkpointing in (False, True):
        model = make("classifier", modality_dropout=0.0).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            assert model.is_gradient_checkpointing
        model(**inputs(model), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, msg=name)


def test_lora_needs_no_target_modules_and_reaches_every_encoder(make, inputs):
    base = make("classifier", modality_dropout=0.0)
    given = inputs(base)
    before = base(**given).logits.detach()
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS"))
    torch.testing.assert_close(model(**given).logits, before)
    model(**given, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    for encoder in ("text_model", "vision_model", "audio_model"):
        assert any(encoder in name and "lora_B" in name for name in trained), encoder


def test_a_trainer_trains_it_and_evaluates(make, inputs, tmp_path):
    model = make("classifier")
    given = inputs(model, rows=8)
    rows = [{name: x[row] for name, x in given.items()} | {"labels": row % 3} for row in range(8)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    assert trainer.train().training_loss > 0
    assert trainer.evaluate()["eval_loss"] > 0


def test_half_precision_is_close(make, inputs):
    model = make("classifier")
    given = inputs(model)
    expected = model(**given).logits
    half = {name: x.bfloat16() if x.is_floating_point() else x for name, x in given.items()}
    assert (model.bfloat16()(**half).logits.float() - expected).abs().max() < 0.1


# ---------------------------------------------------------------------------------------------- facts and presets
@torch.no_grad()
def test_fidelity_of_unbinding(make, inputs):
    model = make(hidden_size=512)
    fidelity = unbinding_fidelity(model, **inputs(model, rows=32))
    assert fidelity.keys() == set(MODALITIES)
    for measured in fidelity.values():
        assert 0.2 < measured.cosine < 0.7
        assert measured.identified > 0.5
    cut_out = make(variant="concatenation")
    assert all(measured.cosine > 0.999 for measured in unbinding_fidelity(cut_out, **inputs(cut_out)).values())


def test_presets():
    with torch.device("meta"):
        model = hf_holo.resonance_multimodal_trimodal()
    assert type(model) is ResonanceMultimodalForSequenceClassification
    assert model.config.modalities == MODALITIES and model.config.vision_config.image_size == 224
    assert model.count_parameters() == 40_436_386
    assert preset_config("resonance-multimodal-tiny").fusion == "binding"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "none is given; two are needed"),
        ({"text_config": {}}, "only text_config is given; two are needed"),
        ({"text_config": {}, "smell_config": {}}, "smell_config: there is no such modality"),
        ({"text_config": {"causal": True}, "audio_config": {}}, "text_config: causal=True"),
        ({"text_config": {"model_type": "bert"}, "audio_config": {}}, "'bert' is unknown; choose one of 'resonance'"),
        ({"text_config": 3, "audio_config": {}}, "text_config is a int; give a ResonanceConfig"),
        (
            {"text_config": {}, "audio_config": {}, "fusion": "mean"},
            "fusion='mean' is unknown; choose one of",
        ),
        ({"text_config": {}, "audio_config": {}, "hidden_size": 7}, "2 does not divide hidden_size=7"),
        ({"text_config": {}, "audio_config": {}, "modality_dropout": 1.0}, r"modality_dropout=1.0 must be in \[0, 1\)"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        FAMILY.config(**arguments)


def test_a_config_keeps_what_it_was_given():
    given = hf_holo.ResonanceConfig(hidden_size=32, num_hidden_layers=1)
    config = FAMILY.config(text_config=given, vision_config={"hidden_sizes": [24], "depths": [1]})
    assert config.hidden_size == 64 and config.projection_dim == 32
    assert config.text_config.causal is False and given.causal is None
    assert set(config.sub_configs) == {"text_config", "vision_config"}
    again = FAMILY.config.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict() and "sub_configs" not in config.to_dict()
    with torch.device("meta"):
        assert ResonanceMultimodalModel(config).main_input_name == "input_ids"
    assert not re.search("modalities", config.to_json_string())
