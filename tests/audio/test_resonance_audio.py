"""Resonance for sound: masks, pieces, silence, lengths, training and refusals."""

import copy

import pytest
import torch
from small_sounds import CAUSAL, EXACT, VARIANTS, make, padded, tones
from transformers import (
    AutoModel,
    AutoModelForAudioFrameClassification,
    AutoModelForPreTraining,
    PreTrainedModel,
    pipeline,
)

from hf_holo import preset_model
from hf_holo.modeling.cache import CACHE_NAME, RecurrentCache
from hf_holo.modeling.configuration_resonance_audio import ResonanceAudioConfig
from hf_holo.modeling.modeling_resonance_audio import (
    ResonanceAudioAutoencoder,
    ResonanceAudioForAudioClassification,
    ResonanceAudioForAudioFrameClassification,
    ResonanceAudioModel,
    hide_parts,
)
from hf_holo.modeling.processing_resonance_audio import ResonanceFeatureExtractor
from hf_holo.modeling.spectrogram import log_mel

HEADS = (ResonanceAudioForAudioClassification, ResonanceAudioForAudioFrameClassification, ResonanceAudioAutoencoder)


# ------------------------------------------------------------------------------------------------- padding
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_padding_changes_nothing(variant):
    model = make(variant=variant)
    recordings = [tones(1, samples, seed)[0] for seed, samples in enumerate((4001, 1733, 700))]
    together = model(*padded(recordings))
    for row, recording in enumerate(recordings):
        alone = model(recording[None])
        steps = len(recording) // model.config.samples_per_step
        assert alone.last_hidden_state.shape == (1, steps, model.config.hidden_size)
        torch.testing.assert_close(together.last_hidden_state[row, :steps], alone.last_hidden_state[0], **EXACT)
        torch.testing.assert_close(together.pooler_output[row], alone.pooler_output[0], **EXACT)


@torch.no_grad()
def test_a_row_without_samples_is_finite_and_changes_no_other():
    model = make()
    batch, mask = padded([tones(1, 2000)[0], torch.zeros(0)])
    output = model(batch, mask)
    assert output.pooler_output[1].eq(0).all() and output.last_hidden_state.isfinite().all()
    torch.testing.assert_close(output.pooler_output[0], model(batch[:1]).pooler_output[0], **EXACT)


# -------------------------------------------------------------------------------------------------- pieces
@pytest.mark.parametrize("variant", CAUSAL)
@torch.no_grad()
def test_pieces_of_any_length_give_what_the_whole_does(variant):
    model, sound = make(ResonanceAudioForAudioClassification, variant), tones(2, 3977)
    whole = model.model(sound, use_cache=False).last_hidden_state
    logits = model(sound, use_cache=False).logits
    for lengths in ([1, 158, 2, 1000, 37, 2779], [160] * 24 + [137], [3977], [5] * 60 + [3677]):
        cache, heard = RecurrentCache(model.config), []
        for piece in sound.split(lengths, 1):
            output = model.model(piece, past_key_values=cache)
            assert output[CACHE_NAME] is cache
            heard.append(output.last_hidden_state)
        torch.testing.assert_close(torch.cat(heard, 1), whole, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(model.score(output.pooler_output), logits, rtol=1e-6, atol=1e-6)
        assert cache.get_seq_length() == whole.shape[1]


@pytest.mark.parametrize("variant", CAUSAL)
@torch.no_grad()
def test_rows_may_end_at_different_moments_of_a_stream(variant):
    model = make(variant=variant)
    recordings = [tones(1, samples, seed)[0] for seed, samples in enumerate((3100, 1111, 100))]
    batch, mask = padded(recordings)
    cache = RecurrentCache(model.config)
    for piece, real in zip(batch.split(450, 1), mask.split(450, 1), strict=True):
        pooled = model(piece, real, cache=cache).pooler_output
    for row, recording in enumerate(recordings[:2]):
        torch.testing.assert_close(pooled[row], model(recording[None]).pooler_output[0], rtol=1e-6, atol=1e-6)
    assert pooled[2].eq(0).all()  # less than a step


@torch.no_grad()
def test_rows_that_wait_for_different_numbers_of_samples_continue_together():
    model = make(variant="causal")
    first, second = [tones(1, n, n)[0] for n in (900, 555)], [tones(1, n, n)[0] for n in (700, 1000)]
    cache = RecurrentCache(model.config)
    model(*padded(first), cache=cache)
    pooled = model(*padded(second), cache=cache).pooler_output
    for row in range(2):
        alone = model(torch.cat([first[row], second[row]])[None]).pooler_output[0]
        torch.testing.assert_close(pooled[row], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variant", CAUSAL)
@torch.no_grad()
def test_the_state_has_the_declared_size_however_much_was_heard(variant):
    model = make(variant=variant)
    declared = model.state_spec(model.config)
    cache = RecurrentCache(model.config)
    for samples in (30, 777, 4000):
        model(tones(2, samples), cache=cache)
    for layer, spec in zip(cache.layers, declared, strict=True):
        assert {name: tuple(state.shape[1:]) for name, state in layer.states.items()} == spec
    with pytest.raises(ValueError, match="sound cannot be taken back"):
        cache.activate_past_recording()
        model(tones(2, 500), cache=cache)
        cache.crop(-1)


@torch.no_grad()
def test_a_causal_model_hears_no_future():
    model, sound = make(variant="causal"), tones(1, 3200)
    changed = sound.clone()
    changed[:, 1600:] += 0.3
    before, after = (model(x).last_hidden_state[0] for x in (sound, changed))
    torch.testing.assert_close(before[:10], after[:10], **EXACT)
    assert (before[10:] - after[10:]).abs().amax(1).min() > 1e-4


def test_the_gradient_reaches_back_and_never_forward():
    model, sound = make(variant="causal"), tones(1, 3200).requires_grad_()
    (gradient,) = torch.autograd.grad(model(sound).last_hidden_state[0, 9].sum(), sound)
    past, future = gradient[0].split(1600)
    assert past[:160].abs().max() > 1e-6 * past.abs().max()
    assert future.abs().max() < 1e-12 * past.abs().max()  # what rounding in an FFT leaves


# ------------------------------------------------------------------------------------ silence, volume, lengths
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("value", [0.0, 1.0, -0.3])
def test_silent_and_constant_sound_is_finite_with_its_gradients(variant, value):
    model = make(ResonanceAudioForAudioClassification, variant).float()
    sound = torch.full((1, 1600), value, requires_grad=True)
    loss = model(sound, labels=torch.tensor([1])).loss
    loss.backward()
    assert loss.isfinite() and sound.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("variant", ["plain", "causal"])
@torch.no_grad()
def test_volume_changes_next_to_nothing(variant):
    model, sound = make(variant=variant), tones(2, 4000)
    loud, soft = model(sound).pooler_output, model(sound / 4).pooler_output
    assert (loud - soft).norm() < 0.02 * loud.norm()


@torch.no_grad()
def test_less_than_a_step_is_filled_up_with_silence():
    model = make(ResonanceAudioForAudioClassification)
    short, long = tones(1, 50)[0], tones(1, 900)[0]
    filled = model(torch.nn.functional.pad(short, (0, 110))[None]).logits[0]
    torch.testing.assert_close(model(short[None]).logits[0], filled, **EXACT)
    torch.testing.assert_close(model(*padded([long, short])).logits[1], filled, **EXACT)


@torch.no_grad()
def test_from_20_milliseconds_to_10_minutes():
    model = make().float()
    assert model(tones(1, 160).float()).last_hidden_state.shape[1] == 1
    minutes = torch.zeros(1, 8000 * 600)
    minutes[:, ::977] = 0.5
    output = model(minutes)
    assert output.last_hidden_state.shape[1] == 30_000 and output.pooler_output.isfinite().all()


@torch.no_grad()
def test_half_precision_hears_what_full_precision_does():
    model, sound = make(ResonanceAudioForAudioClassification), tones(2, 4000).float()
    full = model.float()(sound).logits
    half = model.to(torch.bfloat16)(sound).logits
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), full, rtol=0.1, atol=0.1)


# ------------------------------------------------------------------------------------------------ training
def test_parts_are_hidden_in_training_only():
    config = ResonanceAudioConfig(**VARIANTS["masked"], mask_time_length=4, mask_feature_length=3)
    x = torch.ones(8, 500, config.frames_per_step * config.num_mel_bins)
    hidden = hide_parts(x, config) == 0
    times = hidden.all(-1)  # [B, T]
    assert 0.1 < times.float().mean() < 0.25
    bands = hidden[~times].float().mean(0).unflatten(0, (config.frames_per_step, -1))
    assert torch.equal(bands[0], bands[1]) and 0 < bands.mean() < 0.4
    model, sound = make(variant="masked"), tones(1, 4000)
    torch.testing.assert_close(model(sound).pooler_output, model(sound).pooler_output, rtol=0, atol=0)
    model.train()
    assert not torch.allclose(model(sound).pooler_output, model(sound).pooler_output)


@pytest.mark.parametrize("variant", ["plain", "causal"])
def test_gradient_checkpointing_changes_no_gradient(variant):
    model, sound = make(ResonanceAudioForAudioClassification, variant), tones(2, 1600)
    gradients = []
    for checkpointing in (False, True):
        model.train().zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(sound, labels=torch.tensor([0, 2])).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients, **EXACT)


def test_a_model_learns_to_tell_high_from_low():
    torch.manual_seed(0)
    config = ResonanceAudioConfig(**{**VARIANTS["plain"], "num_labels": 2})
    model = ResonanceAudioForAudioClassification(config)
    time, labels = torch.arange(800) / 8000, torch.arange(16) % 2
    pitch = torch.where(labels == 1, 1500.0, 300.0)[:, None] * (0.8 + 0.4 * torch.rand(16, 1))
    sounds = torch.sin(6.28 * pitch * time)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(15):
        loss = model(sounds, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


def test_labels_of_steps_are_classes_and_some_may_be_left_out():
    model, sound = make(ResonanceAudioForAudioFrameClassification), tones(2, 1600)
    labels = torch.full((2, 10), -100)
    labels[:, 3] = torch.tensor([1, 2])
    output = model(sound, labels=labels)
    assert output.logits.shape == (2, 10, 3)
    expected = torch.nn.functional.cross_entropy(output.logits[:, 3], labels[:, 3])
    torch.testing.assert_close(output.loss.double(), expected)  # transformers takes it in float32
    with pytest.raises(ValueError, match=r"labels.*num_labels"):
        model(sound, labels=labels.masked_fill(labels == 2, 3))


@torch.no_grad()
def test_numbers_can_be_labels_of_recordings():
    model = make(ResonanceAudioForAudioClassification, num_labels=1)
    output = model(tones(2, 800), labels=torch.tensor([0.5, 1.0], dtype=torch.float64))
    torch.testing.assert_close(output.loss, (output.logits[:, 0] - torch.tensor([0.5, 1.0])).square().mean())


# --------------------------------------------------------------------------------------------- autoencoder
@torch.no_grad()
def test_the_autoencoder_takes_waveforms_or_frames_and_bears_padding():
    model = make(ResonanceAudioAutoencoder)
    config, recordings = model.config, [tones(1, n, n)[0] for n in (2400, 1300)]
    batch, mask = padded(recordings)
    output = model(batch, mask)
    assert output.latents.shape == (2, 15, config.latent_size)
    assert output.reconstruction.shape == output.target.shape == (2, 30, config.num_mel_bins)
    assert output.mask.sum(1).tolist() == [30, 16]
    error = (output.reconstruction - output.target)[output.mask].square().mean()
    torch.testing.assert_close(output.loss, error)
    alone = model(recordings[1][None])
    torch.testing.assert_close(output.reconstruction[1, :16], alone.reconstruction[0], **EXACT)
    sides = torch.nn.functional.pad(batch[:1], (config.history // 2, config.history - config.history // 2))
    settings = (config.sampling_rate, config.num_mel_bins, config.mel_lowest, config.mel_highest)
    frames = log_mel(sides, config.frame_length, config.hop_length, *settings)
    torch.testing.assert_close(model(input_features=frames).reconstruction[0], output.reconstruction[0], **EXACT)
    torch.testing.assert_close(model.decode(output.latents[:1]).flatten(), output.reconstruction[0].flatten(), **EXACT)
    with pytest.raises(ValueError, match="exactly one"):
        model(batch, input_features=frames)
    with pytest.raises(ValueError, match="input_features: shape"):
        model(input_features=frames[..., 1:])


def test_the_autoencoder_learns_to_reconstruct():
    torch.manual_seed(0)
    model = ResonanceAudioAutoencoder(ResonanceAudioConfig(**VARIANTS["plain"]))
    sounds, optimizer = tones(8, 1600).float(), torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        losses.append(model(sounds).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


# ------------------------------------------------------------------------------------- saving, sizes, refusals
@pytest.mark.parametrize("model_class", [ResonanceAudioModel, *HEADS])
@pytest.mark.parametrize("variant", ["causal", "masked"])
@torch.no_grad()
def test_saved_and_loaded(model_class: type[PreTrainedModel], variant, tmp_path):
    model, sound = make(model_class, variant).float(), tones(1, 1600).float()
    model.save_pretrained(tmp_path)
    again = model_class.from_pretrained(tmp_path)
    assert again.config.to_diff_dict() == model.config.to_diff_dict() | {"architectures": [model_class.__name__]}
    torch.testing.assert_close(again.eval()(sound)[0], model(sound)[0], rtol=0, atol=0)


def test_weights_start_the_same_way_when_a_head_is_new(tmp_path):
    make().float().save_pretrained(tmp_path)
    torch.manual_seed(1)
    head = ResonanceAudioForAudioClassification.from_pretrained(tmp_path, num_labels=7)
    assert head.score.weight.shape == (7, 32) and head.score.weight.std() > 0.05 and not head.score.bias.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hop_length": 300}, "hop_length: 300"),
        ({"mel_highest": 4001.0}, "mel_highest"),
        ({"mel_lowest": 4000.0}, "mel_lowest"),
        ({"normalization": "batch"}, "normalization: 'batch'"),
        ({"causal": True, "normalization": "recording"}, "knows the future"),
        ({"causal": None}, "causal: None"),
        ({"frames_per_step": 0}, "frames_per_step: 0"),
        ({"mask_time_prob": 1.0}, "mask_time_prob: 1.0"),
        ({"sampling_rate": 8000.0}, "sampling_rate: 8000.0"),
        ({"num_banks": 7}, "num_banks: 7"),
    ],
)
def test_configs_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        ResonanceAudioConfig(**{**VARIANTS["plain"], **arguments})


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ({}, ValueError, "input_values: None"),
        ({"input_values": torch.zeros(2, 2, 900)}, ValueError, r"input_values: torch.float32 of shape \(2, 2, 900\)"),
        ({"input_values": torch.zeros(1, 900, dtype=torch.int16)}, ValueError, "int16"),
        ({"input_values": torch.zeros(1, 0)}, ValueError, r"input_values: nothing, of shape \(1, 0\)"),
        (
            {"input_values": torch.zeros(1, 900), "attention_mask": torch.ones(1, 899)},
            ValueError,
            "attention_mask: shape",
        ),
        (
            {"input_values": torch.zeros(1, 900), "attention_mask": torch.arange(900)[None] > 7},
            ValueError,
            "padding must come after",
        ),
        ({"input_values": torch.zeros(1, 900), "input_ids": None}, TypeError, "'input_ids'"),
        ({"input_values": torch.zeros(1, 900), "past_key_values": object()}, ValueError, "bidirectional"),
    ],
)
def test_what_cannot_be_heard_is_refused(inputs, error, message):
    model = make(ResonanceAudioForAudioClassification)
    with pytest.raises(error, match=message):
        model(**inputs)


def test_a_stream_is_not_trained_with_checkpoints_and_takes_its_own_cache_only():
    model = make(variant="causal")
    with pytest.raises(ValueError, match="RecurrentCache"):
        model(tones(1, 500), past_key_values=object())
    model.train().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model(tones(1, 500), past_key_values=RecurrentCache(model.config))


@torch.no_grad()
def test_a_cache_that_is_copied_continues_twice():
    model, sound = make(variant="causal"), tones(1, 2000)
    cache = model(sound[:, :1000])[CACHE_NAME]
    kept = copy.deepcopy(cache)
    first, second = (model(sound[:, 1000:], cache=c).pooler_output for c in (cache, kept))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------- presets, pipelines
@pytest.mark.parametrize(
    ("preset", "rate", "millions"),
    [
        ("resonance-audio-tiny", 8000, 0.22),
        ("resonance-audio-small", 16_000, 4.8),
        ("resonance-audio-base", 16_000, 38),
    ],
)
def test_presets_have_the_size_that_is_told(preset, rate, millions):
    with torch.device("meta"):
        model = preset_model(preset, num_labels=10)
    assert isinstance(model, ResonanceAudioForAudioClassification) and model.config.sampling_rate == rate
    assert abs(model.count_parameters() / 1e6 / millions - 1) < 0.05


def test_a_pipeline_takes_arrays_and_names_the_class(tmp_path):
    labels = {0: "zero", 1: "one", 2: "two"}
    make(ResonanceAudioForAudioClassification, id2label=labels).float().save_pretrained(tmp_path)
    ResonanceFeatureExtractor(8000).save_pretrained(tmp_path)
    classify = pipeline("audio-classification", model=str(tmp_path), device="cpu")
    sound = tones(1, 4000)[0].float().numpy()
    (found,) = classify([sound], top_k=1)
    logits = classify.model(torch.from_numpy(sound)[None]).logits
    assert found[0]["label"] == labels[int(logits.argmax())]
    assert abs(found[0]["score"] - logits.softmax(-1).max().item()) < 1e-4
    with pytest.raises(ValueError, match="recording 0 is nan"):
        classify(sound * float("nan"))


def test_a_fresh_checkout_of_the_code_loads_through_the_auto_classes(tmp_path):
    for model_class, auto_class in [
        (ResonanceAudioModel, AutoModel),
        (ResonanceAudioForAudioFrameClassification, AutoModelForAudioFrameClassification),
        (ResonanceAudioAutoencoder, AutoModelForPreTraining),
    ]:
        folder = tmp_path / model_class.__name__
        make(model_class).float().save_pretrained(folder)
        assert type(auto_class.from_pretrained(folder)) is model_class
