"""One sequence, one result: in one piece, in any pieces, padded, packed, continued. In float64."""

import pytest
import torch
import torch.nn.functional as F

CHUNKINGS = {
    "10+1+1+8+13": (10, 1, 1, 8, 13),
    "64+1": (64, 1),
    "63+1+1+64": (63, 1, 1, 64),
    "65+70": (65, 70),
    "1+69": (1, 69),
    "token by token": (1,) * 70,
}
EXACT = {"rtol": 1e-8, "atol": 1e-8}


@torch.no_grad()
def in_pieces(model, ids, lengths, **per_token):
    """Logits of `ids` fed in pieces through the cache, and the cache; `per_token` tensors are cut alongside."""
    outputs, cache = [], None
    start = 0
    for length in lengths:
        piece = slice(start, start + length)
        extra = {name: x[:, piece] for name, x in per_token.items()}
        output = model(input_ids=ids[:, piece], past_key_values=cache, use_cache=True, **extra)
        outputs.append(output.logits)
        cache = output.past_key_values
        start += length
    return torch.cat(outputs, 1), cache


# ---------------------------------------------------------------------------------------------- chunking
@pytest.mark.parametrize("lengths", CHUNKINGS.values(), ids=CHUNKINGS)
def test_any_chunking_equals_one_shot(model, random_ids, lengths):
    ids = random_ids(2, sum(lengths))
    logits, cache = in_pieces(model, ids, lengths)
    torch.testing.assert_close(logits, model(input_ids=ids, use_cache=False).logits, **EXACT)
    assert cache.get_seq_length() == sum(lengths)


def test_the_stepwise_loss_is_the_teacher_forced_loss(model, random_ids):
    ids = random_ids(2, 100)
    stepwise, _ = in_pieces(model, ids, (1,) * 100)
    loss = F.cross_entropy(stepwise[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    assert loss == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-6)  # transformers' is float32


@torch.no_grad()
def test_a_long_prefill_in_segments_equals_one_shot(tiny_model, random_ids):
    """Two thousand tokens: drift angles and decays must not lose precision with the position."""
    model, ids = tiny_model("bundle"), random_ids(1, 2000)
    logits, _ = in_pieces(model, ids, (700, 700, 600))
    torch.testing.assert_close(logits, model(input_ids=ids).logits, **EXACT)


@torch.no_grad()
def test_float32_stays_close_to_float64_far_out(tiny_model, random_ids):
    model, ids = tiny_model("bundle"), random_ids(1, 3000)
    exact = model(input_ids=ids).logits[:, -50:]
    single = model.float()(input_ids=ids).logits[:, -50:]
    assert (single - exact).abs().max() < 1e-3 * exact.abs().max()


# ---------------------------------------------------------------------------------------------- padding
def scattered(ids, keep):
    """`ids` [T] spread over the places where `keep` [L] is 1, junk elsewhere: what padding must not change."""
    padded = torch.full(keep.shape, 7)
    padded[keep.bool()] = ids
    return padded


PADDINGS = {
    "left": lambda n: [0] * n + [1] * 70,
    "right": lambda n: [1] * 70 + [0] * n,
    "both sides": lambda n: [0] * (n // 2) + [1] * 70 + [0] * (n - n // 2),
    "holes": lambda n: [1] * 3 + [0] * 2 + [1] * 1 + [0] * (n - 2) + [1] * 66,
}


@torch.no_grad()
@pytest.mark.parametrize("padding", PADDINGS.values(), ids=PADDINGS)
def test_padding_changes_nothing_for_real_tokens(model, random_ids, padding):
    ids = random_ids(2, 70)
    masks = torch.tensor([padding(9), padding(9)])
    padded = torch.stack([scattered(row, mask) for row, mask in zip(ids, masks, strict=True)])
    logits = model(input_ids=padded, attention_mask=masks).logits
    expected = model(input_ids=ids).logits
    for row in range(2):
        torch.testing.assert_close(logits[row][masks[row].bool()], expected[row], **EXACT)


@torch.no_grad()
def test_rows_with_different_padding_do_not_touch_each_other(model, random_ids):
    ids = random_ids(3, 70)
    masks = torch.tensor([[0] * n + [1] * (70 - n) for n in (0, 5, 66)])
    logits = model(input_ids=ids, attention_mask=masks).logits
    for row, n in enumerate((0, 5, 66)):
        torch.testing.assert_close(logits[row : row + 1, n:], model(input_ids=ids[row : row + 1, n:]).logits, **EXACT)


@torch.no_grad()
def test_a_padded_prompt_leaves_the_state_of_the_bare_one(model, random_ids):
    """The state after left-padded, right-padded and bare prompts is the same, so that they continue alike."""
    ids, next_ids = random_ids(1, 20), random_ids(1, 6, seed=1)
    expected = in_pieces(model, torch.cat([ids, next_ids], 1), (20, 6))[0][:, 20:]
    for mask in ([0] * 5 + [1] * 20, [1] * 20 + [0] * 5, [1] * 8 + [0] * 5 + [1] * 12):
        mask = torch.tensor([mask])
        padded = scattered(ids[0], mask[0])[None]
        cache = model(input_ids=padded, attention_mask=mask, use_cache=True).past_key_values
        whole = torch.cat([mask, torch.ones_like(next_ids)], 1)  # generate() sends the mask of past and new tokens
        logits = model(input_ids=next_ids, attention_mask=whole, past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(logits, expected, **EXACT)


@torch.no_grad()
def test_a_batched_second_turn_may_be_left_padded(model, random_ids):
    """Two conversations in one batch: the turns of both differ in length, so each turn pads one of them."""
    turns = [(random_ids(1, 12), random_ids(1, 5, seed=1)), (random_ids(1, 9, seed=2), random_ids(1, 8, seed=3))]
    expected = [model(input_ids=torch.cat(both, 1)).logits[:, -len(both[1][0]) :] for both in turns]

    def left_padded(rows):
        length = max(row.shape[1] for row in rows)
        ids = torch.cat([F.pad(row, (length - row.shape[1], 0), value=7) for row in rows])
        mask = torch.cat([F.pad(torch.ones_like(row), (length - row.shape[1], 0)) for row in rows])
        return ids, mask

    first_ids, first_mask = left_padded([first for first, _ in turns])
    second_ids, second_mask = left_padded([second for _, second in turns])
    cache = model(input_ids=first_ids, attention_mask=first_mask, use_cache=True).past_key_values
    mask = torch.cat([first_mask, second_mask], 1)
    logits = model(input_ids=second_ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits
    for row, wanted in enumerate(expected):
        torch.testing.assert_close(logits[row : row + 1, -wanted.shape[1] :], wanted, **EXACT)


# ---------------------------------------------------------------------------------------------- packing
DOCUMENTS = (5, 64, 1, 63, 1, 1, 20)


def packed(random_ids, name):
    """Ids of several documents in one row, and the argument that says where each begins."""
    documents = [random_ids(1, length, seed=i) for i, length in enumerate(DOCUMENTS)]
    borders = {
        "position_ids": torch.cat([torch.arange(length) for length in DOCUMENTS])[None],
        "seq_idx": torch.cat([torch.full((length,), i) for i, length in enumerate(DOCUMENTS)])[None],
    }
    return documents, {name: borders[name]}


@torch.no_grad()
@pytest.mark.parametrize("name", ["position_ids", "seq_idx"])
def test_packed_documents_equal_separate_ones(model, random_ids, name):
    documents, borders = packed(random_ids, name)
    logits = model(input_ids=torch.cat(documents, 1), **borders).logits
    expected = torch.cat([model(input_ids=document).logits for document in documents], 1)
    torch.testing.assert_close(logits, expected, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("name", ["position_ids", "seq_idx"])
@pytest.mark.parametrize("lengths", [(64, 64, 27), (5, 64, 86), (70, 1, 1, 83)], ids=str)
def test_packed_documents_may_be_cut_anywhere(model, random_ids, name, lengths):
    documents, borders = packed(random_ids, name)
    logits, _ = in_pieces(model, torch.cat(documents, 1), lengths, **borders)
    expected = torch.cat([model(input_ids=document).logits for document in documents], 1)
    torch.testing.assert_close(logits, expected, **EXACT)


@torch.no_grad()
def test_rows_are_packed_independently(model, random_ids):
    ids = random_ids(2, 12)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 2]])
    logits = model(input_ids=ids, position_ids=positions).logits
    for row, border in enumerate((5, 9)):
        expected = [model(input_ids=part).logits for part in ids[row : row + 1].split((border, 12 - border), 1)]
        torch.testing.assert_close(logits[row : row + 1], torch.cat(expected, 1), **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("at_pads", [0, 1])
def test_positions_of_pads_start_no_document(model, random_ids, at_pads):
    """generate() gives pads the position 1 in one release and 0 in another."""
    ids = random_ids(1, 20)
    mask = torch.tensor([[0] * 4 + [1] * 10 + [0] * 3 + [1] * 10])
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, at_pads)
    padded = scattered(ids[0], mask[0])[None]
    logits = model(input_ids=padded, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(logits[mask.bool()][None], model(input_ids=ids).logits, **EXACT)


# ---------------------------------------------------------------------------------------------- the state itself
@torch.no_grad()
def test_states_have_the_declared_shapes_at_any_length(model, random_ids):
    specification = model.state_spec(model.config)
    assert len(specification) == model.config.num_hidden_layers
    for length in (1, 5, 64, 130):
        cache = model(input_ids=random_ids(3, length), use_cache=True).past_key_values
        for layer, shapes in zip(cache.layers, specification, strict=True):
            for name, shape in shapes.items():
                assert tuple(layer.get(name).shape) == (3, *shape), (name, length)


@torch.no_grad()
def test_beam_reordering_moves_whole_rows(model, random_ids):
    ids, token = random_ids(3, 20), random_ids(3, 1, seed=1)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    order = torch.tensor([2, 0, 0])
    cache.reorder_cache(order)
    logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
    expected = model(input_ids=torch.cat([ids[order], token], 1)).logits[:, -1:]
    torch.testing.assert_close(logits, expected, **EXACT)


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
def test_a_reset_cache_starts_anew(model, random_ids):
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
def test_embeddings_may_be_given_instead_of_ids(model, random_ids):
    ids = random_ids(2, 6)
    embeddings = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeddings).logits, model(input_ids=ids).logits)
