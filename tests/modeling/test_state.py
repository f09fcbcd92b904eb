"""The cache beyond what the conformance kit asks of every family: long texts, rows, resetting, rolling back."""

import pytest
import torch

EXACT = {"rtol": 1e-8, "atol": 1e-8}


@torch.no_grad()
def test_a_long_prefill_in_segments_equals_one_shot(tiny_model, random_ids):
    """Two thousand tokens: drift angles and decays must not lose precision with the position."""
    model, ids = tiny_model("bundle"), random_ids(1, 2000)
    outputs, cache = [], None
    for piece in ids.split((700, 700, 600), 1):
        output = model(input_ids=piece, past_key_values=cache, use_cache=True)
        outputs.append(output.logits)
        cache = output.past_key_values
    torch.testing.assert_close(torch.cat(outputs, 1), model(input_ids=ids).logits, **EXACT)


@torch.no_grad()
def test_float32_stays_close_to_float64_far_out(tiny_model, random_ids):
    model, ids = tiny_model("bundle"), random_ids(1, 3000)
    exact = model(input_ids=ids).logits[:, -50:]
    single = model.float()(input_ids=ids).logits[:, -50:]
    assert (single - exact).abs().max() < 1e-3 * exact.abs().max()


@torch.no_grad()
def test_rows_of_the_cache_can_be_repeated_and_selected(model, random_ids):
    ids, token = random_ids(2, 20), random_ids(1, 1, seed=1)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    cache.batch_repeat_interleave(3)
    cache.batch_select_indices(torch.tensor([4, 0]))
    logits = model(input_ids=token.expand(2, 1), past_key_values=cache, use_cache=True).logits
    expected = model(input_ids=torch.cat([ids[[1, 0]], token.expand(2, 1)], 1)).logits[:, -1:]
    torch.testing.assert_close(logits, expected, **EXACT)


@torch.no_grad()
def test_a_reset_cache_starts_again(model, random_ids):
    ids = random_ids(2, 20)
    cache = model(input_ids=random_ids(2, 9, seed=1), use_cache=True).past_key_values
    cache.reset()
    assert cache.get_seq_length() == 0
    logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(logits, model(input_ids=ids).logits, **EXACT)


@torch.no_grad()
def test_without_cache_none_is_returned(model, random_ids):
    assert model(input_ids=random_ids(1, 4), use_cache=False).past_key_values is None


@torch.no_grad()
def test_model_outputs_follow_return_dict_and_hidden_states(model, random_ids):
    ids = random_ids(2, 6)
    output = model(input_ids=ids, output_hidden_states=True, use_cache=False)
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    assert all(h.shape == (2, 6, 32) for h in output.hidden_states)
    torch.testing.assert_close(model(input_ids=ids, return_dict=False)[0], output.logits)


@torch.no_grad()
def test_rolling_back_what_was_not_recorded_is_refused(tiny_model, random_ids):
    model = tiny_model("bundle")
    cache = model(input_ids=random_ids(1, 20), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="record"):
        cache.crop(10)


def test_assisted_sampling_runs(model, tiny_model, variant, random_ids):
    ids, assistant = random_ids(1, 10), tiny_model(variant, seed=5)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "pad_token_id": 0}
    assert model.generate(ids, do_sample=True, assistant_model=assistant, **options).shape == (1, 22)
