"""Resonance for pictures: sizes, padding, stages, feature maps, saving, what is refused."""

import pytest
import torch
from transformers import AutoBackbone, AutoConfig, AutoModelForImageClassification

import hf_holo
from hf_holo import (
    ResonanceVisionBackbone,
    ResonanceVisionConfig,
    ResonanceVisionForImageClassification,
    ResonanceVisionModel,
    get_architecture,
    preset_config,
)
from hf_holo.eval.conformance.subject import perturb
from hf_holo.modeling import grids

VARIANTS = get_architecture("resonance_vision").variants
PRESETS = get_architecture("resonance_vision").presets
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def make(model_class=ResonanceVisionForImageClassification, variant="plain", dtype=torch.float64, **overrides):
    """A model whose weights are moved away from their initial values: no claim may rest on them."""
    return perturb(model_class(ResonanceVisionConfig(**{**VARIANTS[variant], **overrides}))).to(dtype).eval()


def pictures(model, *sizes):
    """One picture of each size, alone."""
    return [torch.randn(1, model.config.num_channels, *size, dtype=model.dtype) for size in sizes]


def padded(images, height, width, filling=7.0):
    """A batch of them and its mask; the padding is not zero, so that it shows where it is heard."""
    batch = images[0].new_full((len(images), images[0].shape[1], height, width), filling)
    mask = torch.zeros(len(images), height, width, dtype=torch.long)
    for row, image in enumerate(images):
        h, w = image.shape[2:]
        batch[row, :, :h, :w] = image[0]
        mask[row, :h, :w] = 1
    return batch, mask


# ---------------------------------------------------------------------------------------------- size and padding
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_padding_changes_nothing(variant):
    model = make(variant=variant)
    alone = pictures(model, (16, 16), (9, 21), (33, 40), (4, 5))
    for height, width in ((33, 40), (41, 57)):  # as much as is needed, and more
        together = model(*padded(alone, height, width))
        expected = torch.cat([model(image).logits for image in alone])
        torch.testing.assert_close(together.logits, expected, **EXACT)


@torch.no_grad()
def test_padding_changes_less_than_a_millionth_in_float32():
    model = make(hidden_sizes=[32, 64], depths=[2, 2], filter_reaches=5, dtype=torch.float32)
    alone = pictures(model, (16, 16), (30, 22), (48, 48))
    expected = torch.cat([model(image).logits for image in alone])
    assert (model(*padded(alone, 48, 64)).logits - expected).abs().max() < 1e-6 * max(1, expected.abs().max())


@torch.no_grad()
def test_patches_of_padding_are_zero_and_not_counted():
    model = make(ResonanceVisionModel)
    images = pictures(model, (16, 16), (8, 4))
    output = model(*padded(images, 16, 16))
    alone = model(images[1])
    grid = output.last_hidden_state[1].view(4, 4, -1)  # patches of 2 pixels, merged once
    torch.testing.assert_close(grid[:2, :1].flatten(0, 1), alone.last_hidden_state[0], **EXACT)
    assert not grid[2:].any() and not grid[:, 1:].any()
    torch.testing.assert_close(output.pooler_output[1], alone.last_hidden_state[0].mean(0), **EXACT)


@torch.no_grad()
def test_a_mask_of_ones_is_as_no_mask():
    model = make()
    (image,) = pictures(model, (15, 18))
    torch.testing.assert_close(model(image, torch.ones(1, 15, 18)).logits, model(image).logits, **EXACT)


@torch.no_grad()
def test_ffts_and_matrices_give_one_result(monkeypatch):
    model = make()
    images = torch.cat(pictures(model, *[(20, 26)] * 8))
    dense = model(images).logits
    monkeypatch.setattr(grids, "DENSE_CELLS", 0)
    torch.testing.assert_close(model(images).logits, dense, **EXACT)


@torch.no_grad()
def test_rows_of_a_batch_do_not_see_each_other():
    model = make()
    images = torch.cat(pictures(model, (16, 16), (16, 16)))
    expected = model(images).logits[:1]
    images[1] = 100
    torch.testing.assert_close(model(images).logits[:1], expected, **EXACT)


@torch.no_grad()
def test_all_patches_are_heard_from_a_corner():
    """Filters and merging together reach across the picture."""
    model = make(ResonanceVisionModel, filter_reaches=[7, 7])
    (image,) = pictures(model, (16, 16))
    before = model(image).last_hidden_state
    image[..., :2, :2] += 1
    assert ((model(image).last_hidden_state - before).abs().amax(2) > 0).all()


def test_gradients_reach_every_parameter():
    for variant in VARIANTS:
        model = make(variant=variant).train()
        (image,) = pictures(model, (16, 16))
        model(image, labels=torch.tensor([1])).loss.backward()
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_gradient_checkpointing_changes_no_gradient():
    model = make(depths=[2, 1]).train()
    (image,) = pictures(model, (16, 16))
    gradients = []
    for _ in range(2):
        loss = model(image, torch.ones(1, 16, 16), labels=torch.tensor([1])).loss
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert model.is_gradient_checkpointing
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_a_model_in_bfloat16_takes_float32_pictures():
    model = make(dtype=torch.bfloat16)
    logits = model(torch.randn(1, 3, 16, 16)).logits
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()


# ---------------------------------------------------------------------------------------------- outputs
@torch.no_grad()
def test_shapes_of_the_outputs():
    model = make(ResonanceVisionModel)
    output = model(torch.randn(2, 3, 17, 24).double(), output_hidden_states=True)
    assert output.last_hidden_state.shape == (2, 5 * 6, 24)  # 9 × 12 patches, merged two by two
    assert output.pooler_output.shape == (2, 24)
    assert [tuple(h.shape) for h in output.hidden_states] == [(2, 16, 9, 12), (2, 16, 9, 12), (2, 24, 5, 6)]
    assert len(model(torch.randn(2, 3, 17, 24).double(), return_dict=False)) == 2


@torch.no_grad()
def test_backbones_give_the_maps_that_are_asked_for():
    config = ResonanceVisionConfig(**VARIANTS["plain"], out_features=["stem", "stage2"])
    backbone = perturb(AutoBackbone.from_config(config)).double().eval()
    assert isinstance(backbone, ResonanceVisionBackbone)
    assert (backbone.out_features, list(backbone.out_indices), backbone.channels) == (
        ["stem", "stage2"],
        [0, 2],
        [16, 24],
    )
    images = pictures(backbone, (16, 18), (8, 8))
    maps = backbone(*padded(images, 16, 18)).feature_maps
    assert [tuple(m.shape) for m in maps] == [(2, 16, 8, 9), (2, 24, 4, 5)]
    torch.testing.assert_close(maps[1][1, :, :2, :2], backbone(images[1]).feature_maps[1][0], **EXACT)
    assert not maps[1][1, :, 2:].any()


def test_feature_maps_are_kept_in_the_config(tmp_path):
    ResonanceVisionConfig(**VARIANTS["plain"], out_indices=[1, 2]).save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert (loaded.out_features, list(loaded.out_indices)) == (["stage1", "stage2"], [1, 2])
    with pytest.raises(ValueError, match="name different stages"):
        ResonanceVisionConfig(out_features=["stem"], out_indices=[1])
    with pytest.raises(ValueError, match="stage9"):
        ResonanceVisionConfig(out_features=["stage9"])


@torch.no_grad()
def test_a_saved_classifier_loads_as_classifier_model_and_backbone(tmp_path):
    model = make(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    (image,) = pictures(model, (16, 16))
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(image).logits, model(image).logits)
    body = ResonanceVisionModel.from_pretrained(tmp_path)
    torch.testing.assert_close(body(image).pooler_output, model.model(image).pooler_output)
    backbone = ResonanceVisionBackbone.from_pretrained(tmp_path, out_indices=[1, 2])
    expected = model(image, output_hidden_states=True).hidden_states
    for got, wanted in zip(backbone(image, output_hidden_states=True).hidden_states, expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_presets_have_the_sizes_that_the_docs_name():
    sizes = {}
    for name in PRESETS:
        config = preset_config(name)
        with torch.device("meta"):
            model = ResonanceVisionForImageClassification(config)
        sizes[name] = (config.image_size, config.num_labels, model.count_parameters())
    assert sizes == SIZES


SIZES = {
    "resonance-vision-base": (224, 1000, 33_090_472),
    "resonance-vision-small": (224, 1000, 6_179_320),
    "resonance-vision-tiny": (32, 10, 704_330),
}


def test_presets_make_classifiers():
    assert isinstance(hf_holo.resonance_vision_tiny(), ResonanceVisionForImageClassification)


# ---------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pixel_values": None}, "pixel_values: None"),
        ({"pixel_values": torch.zeros(1, 1, 16, 16)}, "3 channels"),
        ({"pixel_values": torch.zeros(3, 16, 16)}, "3 channels"),
        ({"pixel_values": torch.zeros(1, 3, 1, 16)}, "smaller than one patch of 2 pixels"),
        ({"pixel_values": torch.zeros(0, 3, 16, 16)}, "the batch is empty"),
        ({"pixel_values": torch.zeros(1, 3, 16, 16, dtype=torch.uint8)}, "give floats"),
        ({"pixel_values": torch.zeros(1, 3, 16, 16), "pixel_mask": torch.ones(1, 16)}, "pixel_mask: shape"),
        ({"pixel_values": torch.zeros(1, 3, 16, 16), "labels": torch.tensor([3])}, "labels"),
        ({"pixel_values": torch.zeros(1, 3, 16, 16), "output_attentions": True}, "no attention weights"),
    ],
)
def test_what_is_no_picture_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(dtype=torch.float32)(**arguments)


@pytest.mark.parametrize("model_class", [ResonanceVisionModel, ResonanceVisionBackbone])
def test_unknown_arguments_are_refused(model_class):
    with pytest.raises(TypeError, match="did you mean 'pixel_mask'"):
        make(model_class, dtype=torch.float32)(torch.zeros(1, 3, 16, 16), pixel_masks=None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden_sizes": [16, 32], "depths": [1]}, r"hidden_sizes: \[16, 32\]; one number for each"),
        ({"depths": []}, "hidden_sizes"),
        ({"hidden_sizes": [16, 0, 16]}, r"hidden_sizes\[1\]: 0 is not a positive"),
        ({"filter_reaches": 0}, r"filter_reaches\[0\]: 0"),
        ({"mlp_ratio": 0}, "mlp_ratio: 0 is not a positive number"),
        ({"patch_size": 2.5}, "patch_size: 2.5"),
        ({"interference": "some"}, "interference: 'some'"),
        ({"hidden_dropout_prob": 1}, "hidden_dropout_prob: 1"),
        ({"format_version": 99}, "newer hf_holo"),
    ],
)
def test_configs_refuse_what_makes_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        ResonanceVisionConfig(**arguments)


# ---------------------------------------------------------------------------------------------- recorded graphs
class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return self.model(pixel_values).logits


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_one_recorded_graph_serves_all_sizes(variant):
    """In real matrix products: no FFT, no complex number."""
    model = make(variant=variant)
    (image,) = pictures(model, (16, 20))
    graph = torch.jit.trace(Logits(model), image, check_trace=False)
    names = {node.kind() for node in graph.inlined_graph.nodes()}
    assert not any("fft" in name or "complex" in name for name in names)
    for batch, height, width in ((1, 16, 20), (3, 24, 24), (2, 9, 33), (1, 4, 4)):
        images = torch.randn(batch, image.shape[1], height, width, dtype=torch.float64)
        torch.testing.assert_close(graph(images), model(images).logits, **EXACT)
