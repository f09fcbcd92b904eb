"""generate() in all its modes equals the same mode without a cache; float64, so that no tie is broken by rounding."""

import pytest
import torch

NEW = {"max_new_tokens": 12, "pad_token_id": 0}
MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 0},
    "beams": {"do_sample": False, "num_beams": 3},
    "beam sampling": {"do_sample": True, "num_beams": 2, "temperature": 1.5},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
}


@pytest.fixture
def model(variant, tiny_model):
    """Untied: with tied embeddings, random weights tend to say the same token for ever, which would prove little."""
    return tiny_model(variant, tie_word_embeddings=False)


def generate(model, ids, **options):
    """Every token counts unless the test says otherwise: a generated padding id is no padding."""
    torch.manual_seed(0)
    return model.generate(ids, **{"attention_mask": torch.ones_like(ids), **NEW, **options})


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_the_cache_changes_no_token(model, random_ids, mode):
    ids = random_ids(2, 10)
    generated = generate(model, ids, **mode)
    assert torch.equal(generated, generate(model, ids, use_cache=False, **mode))
    assert generated.shape == (2 * mode.get("num_return_sequences", 1), 22)


def test_greedy_is_the_argmax_of_forward(model, random_ids):
    ids = random_ids(1, 10)
    expected = ids
    with torch.no_grad():
        for _ in range(12):
            expected = torch.cat([expected, model(input_ids=expected).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(generate(model, ids, do_sample=False), expected)
    assert expected[:, 10:].unique().numel() > 1  # no model that says one token for ever


@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_a_left_padded_batch_equals_its_rows(model, random_ids, mode):
    rows = [random_ids(1, length, seed=length) for length in (12, 7, 3)]
    ids = torch.cat([torch.nn.functional.pad(row, (12 - row.shape[1], 0)) for row in rows])
    generated = generate(model, ids, attention_mask=(ids != 0).long(), **MODES[mode])
    for row, tokens in zip(rows, generated, strict=True):
        alone = generate(model, row, attention_mask=torch.ones_like(row), **MODES[mode])
        assert torch.equal(tokens[12:], alone[0, row.shape[1] :])


@pytest.mark.parametrize("turn", [1, 5])
def test_a_returned_cache_continues(model, random_ids, turn):
    """The second turn brings `turn` new tokens on top of the last generated one, which the cache has not seen yet."""
    first = generate(model, random_ids(2, 8), do_sample=False, return_dict_in_generate=True)
    assert first.past_key_values.get_seq_length() == 8 + 12 - 1
    ids = torch.cat([first.sequences, random_ids(2, turn, seed=1)], 1)
    continued = generate(model, ids, do_sample=False, past_key_values=first.past_key_values)
    assert torch.equal(continued, generate(model, ids, do_sample=False, use_cache=False))


def test_generation_may_start_from_embeddings(model, random_ids):
    ids = random_ids(2, 8)
    embeddings = model.get_input_embeddings()(ids)
    generated = model.generate(inputs_embeds=embeddings, do_sample=False, **NEW)
    assert torch.equal(generated, generate(model, ids, do_sample=False)[:, 8:])


# ---------------------------------------------------------------------------------------------- roll back
def test_prompt_lookup_equals_greedy(model, random_ids):
    ids = random_ids(1, 6).repeat(1, 4)  # repetition, so that there is something to look up
    # an end token is named because transformers 4.57 cannot look up prompts without one
    options = {"do_sample": False, "max_new_tokens": 30, "pad_token_id": 0, "eos_token_id": 60}
    expected = model.generate(ids, **options)
    looked_up = model.generate(ids, prompt_lookup_num_tokens=4, **options)  # may run one token over the limit
    assert torch.equal(looked_up[:, : expected.shape[1]], expected)


@pytest.mark.parametrize("same", [False, True], ids=["other weights", "same weights"])
def test_assisted_decoding_equals_greedy(variant, model, tiny_model, random_ids, same):
    """An assistant that is always right lets long drafts pass; one that is mostly wrong makes every draft roll back."""
    assistant = tiny_model(variant, seed=0 if same else 5, tie_word_embeddings=False)
    ids = random_ids(1, 10)
    assisted = generate(model, ids, do_sample=False, assistant_model=assistant)
    assert torch.equal(assisted, generate(model, ids, do_sample=False))


def test_assisted_sampling_runs(model, tiny_model, variant, random_ids):
    assistant = tiny_model(variant, seed=5)
    assert generate(model, random_ids(1, 10), do_sample=True, assistant_model=assistant).shape == (1, 22)


@torch.no_grad()
@pytest.mark.parametrize("drop", [1, 3, 5])
def test_a_recording_cache_rolls_back(model, random_ids, drop):
    """crop(n) keeps n tokens for n > 0 and drops |n| for n < 0; what follows is as if they had never been fed."""
    ids, draft, token = random_ids(2, 20), random_ids(2, 5, seed=1), random_ids(2, 1, seed=2)
    expected = model(input_ids=torch.cat([ids, draft[:, : 5 - drop], token], 1)).logits[:, -1:]
    for argument in (25 - drop, -drop):
        cache = model(input_ids=ids, use_cache=True).past_key_values
        cache.activate_past_recording()
        model(input_ids=draft, past_key_values=cache, use_cache=True)
        cache.crop(argument)
        assert cache.get_seq_length() == 25 - drop
        logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(logits, expected, rtol=1e-8, atol=1e-8)


@torch.no_grad()
def test_rolling_back_what_was_not_recorded_is_refused(tiny_model, random_ids):
    model = tiny_model("bundle")
    cache = model(input_ids=random_ids(1, 20), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="record"):
        cache.crop(10)


# ---------------------------------------------------------------------------------------------- logits_to_keep
@torch.no_grad()
def test_logits_to_keep_selects_positions(model, random_ids):
    ids = random_ids(2, 9)
    full = model(input_ids=ids).logits
    torch.testing.assert_close(model(input_ids=ids, logits_to_keep=0).logits, full)
    torch.testing.assert_close(model(input_ids=ids, logits_to_keep=1).logits, full[:, -1:])
    torch.testing.assert_close(model(input_ids=ids, logits_to_keep=4).logits, full[:, -4:])
    places = torch.tensor([0, 3, 8])
    torch.testing.assert_close(model(input_ids=ids, logits_to_keep=places).logits, full[:, places])
