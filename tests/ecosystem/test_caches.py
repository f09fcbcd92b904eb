"""What users do with the cache of every family: by both names, in training, in several turns, on several devices."""

import pickle

import pytest
import torch
import torch.nn.parallel.scatter_gather as scatter_gather
from transformers import DynamicCache, StoppingCriteria

from hf_holo import RecurrentCache, get_architecture
from hf_holo.modeling.cache import CACHE_NAME, CACHE_NAMES

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
RECURRENT = ["hsn", "resonance"]
PLAIN = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(1, 61, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(tiny, family):
    """With an output matrix of its own: it says more than one token."""
    return speaker(tiny, family)


def speaker(tiny, family: str, **overrides):
    model = tiny(family, tie_word_embeddings=False, **overrides)
    torch.nn.init.normal_(model.lm_head.weight, std=0.3)
    return model


@torch.no_grad()
def test_a_cache_is_taken_under_both_names_and_given_under_that_of_the_release(model, ids):
    whole = model(ids).logits[:, 5:]
    for name in CACHE_NAMES:
        kept = getattr(model(ids[:, :5]), CACHE_NAME)
        torch.testing.assert_close(model(ids[:, 5:], **{name: kept}).logits, whole, **CLOSE)


@torch.no_grad()
def test_of_two_caches_the_one_with_tokens_is_taken(model, ids):
    """PEFT's prefix tuning gives its prefix by the old name, along with the cache of generate()."""
    empty = model.model.new_cache()
    kept = getattr(model(ids[:, :5]), CACHE_NAME)
    logits = model(ids[:, 5:], past_key_values=kept, cache=empty).logits
    torch.testing.assert_close(logits, model(ids).logits[:, 5:], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [None, True, False])
@pytest.mark.parametrize("training", [True, False])
def test_a_given_cache_is_heard(model, ids, training, use_cache):
    kept = getattr(model(ids[:, :5], use_cache=True), CACHE_NAME)
    logits = model.train(training)(ids[:, 5:], use_cache=use_cache, **{CACHE_NAME: kept}).logits
    torch.testing.assert_close(logits, model.eval()(ids).logits[:, 5:], **CLOSE)


def test_gradient_checkpointing_refuses_a_cache_and_hears_it_where_it_computes_no_gradients(model, ids):
    with torch.no_grad():
        whole = model(ids).logits[:, 5:]
    kept = getattr(model(ids[:, :5], use_cache=True), CACHE_NAME)
    model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with torch.no_grad():
        torch.testing.assert_close(model(ids[:, 5:], **{CACHE_NAME: kept}).logits, whole, **CLOSE)
    with pytest.raises(ValueError, match="past_key_values: gradient checkpointing computes every block twice"):
        model(ids[:, 5:], **{CACHE_NAME: kept})


def test_generation_in_training_mode_with_gradient_checkpointing(model, ids):
    expected = model.generate(ids, use_cache=False, max_new_tokens=5, **PLAIN)
    model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert torch.equal(model.generate(ids, max_new_tokens=5, **PLAIN), expected)


@pytest.mark.parametrize("family", RECURRENT)
def test_backpropagation_through_time_and_its_cut(model, ids):
    """Without a cut the gradient of both pieces is that of the whole text; with one the past gets none."""

    def gradient(cut: bool) -> torch.Tensor:
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        cache = RecurrentCache(model.config)
        model(inputs_embeds=embedded[:, :5], cache=cache)
        logits = model(inputs_embeds=embedded[:, 5:], cache=cache.detach_() if cut else cache).logits
        return torch.autograd.grad(logits.square().sum(), embedded)[0]

    model.train()
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    whole = torch.autograd.grad(model(inputs_embeds=embedded).logits[:, 5:].square().sum(), embedded)[0]
    torch.testing.assert_close(gradient(cut=False), whole, rtol=1e-3, atol=1e-3)
    assert gradient(cut=True)[:, :5].abs().max() == 0 < whole[:, :5].abs().max()


def test_a_bidirectional_model_continues_from_nothing(tiny, family, ids):
    model = tiny(family, "AutoModel", causal=False)
    with pytest.raises(ValueError, match="past_key_values: a bidirectional model continues from nothing"):
        model(ids, cache=DynamicCache())


# ---------------------------------------------------------------------------------------------- several turns
class EndsAt(StoppingCriteria):
    """Rows end at lengths of their own."""

    def __init__(self, *lengths: int):
        self.lengths = lengths

    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([input_ids.shape[1] >= length for length in self.lengths])


@torch.no_grad()
@pytest.mark.parametrize("family", RECURRENT)
def test_rows_that_ended_early_are_not_continued_with_their_padding(model, ids):
    options = {"stopping_criteria": [EndsAt(14, 17)], "return_dict_in_generate": True, "max_new_tokens": 9}
    first = model.generate(ids, **{**PLAIN, "eos_token_id": 60}, **options)
    kept, fed = getattr(first, CACHE_NAME), getattr(first, CACHE_NAME).get_seq_length()
    mask = torch.ones(2, fed + 3, dtype=torch.long)
    mask[0, 14:fed] = 0
    with pytest.raises(ValueError, match=f"attention_mask: row 0 has {fed - 14} pads among the {fed} tokens"):
        model(ids[:, :3], attention_mask=mask, cache=kept)
    model(ids[:, :3], attention_mask=torch.ones_like(mask), cache=kept)  # what was fed is what the mask says


@torch.no_grad()
@pytest.mark.parametrize("family", RECURRENT)
def test_padding_is_counted_through_reordering_and_roll_back(model, ids):
    """A mask of the whole past fits whatever was done to the cache."""
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :4] = 0
    cache = RecurrentCache(model.config)
    cache.activate_past_recording()
    model(ids, attention_mask=mask, cache=cache)
    model(ids[:, :3], cache=cache)
    cache.crop(-2)
    cache.reorder_cache(torch.tensor([1, 0]))
    past, one = torch.nn.functional.pad(mask, (0, 1), value=1).flip(0), ids[:, :1]
    model(one, attention_mask=torch.cat([past, torch.ones_like(one)], 1), cache=cache)
    with pytest.raises(ValueError, match=r"attention_mask: row 0 has 0 pads among the 14 tokens .* took 4 as padding"):
        model(one, attention_mask=torch.ones(2, 15, dtype=torch.long), cache=cache)


@pytest.mark.parametrize("family", RECURRENT)
def test_recording_ends_with_the_generation_that_needs_it(model, ids):
    """A constant state stays constant, and can be pickled, also after speculative decoding."""
    options = {"return_dict_in_generate": True, **PLAIN, "eos_token_id": 60}
    first = model.generate(ids[:1], prompt_lookup_num_tokens=3, max_new_tokens=6, **options)
    sizes = []
    for new in (5, 40):
        text = torch.cat([first.sequences, torch.tensor([[7]])], 1)
        kept, mask = getattr(first, CACHE_NAME), torch.ones_like(text)
        first = model.generate(text, attention_mask=mask, **{CACHE_NAME: kept}, max_new_tokens=new, **options)
        sizes.append(len(pickle.dumps(getattr(first, CACHE_NAME))))
    assert abs(sizes[0] - sizes[1]) < 200


def test_early_exit_drafts_what_greedy_decoding_says(tiny, family, ids):
    model = speaker(tiny, family, num_hidden_layers=3)
    expected = model.generate(ids[:1], use_cache=False, max_new_tokens=8, **PLAIN)
    drafted = model.generate(ids[:1], assistant_early_exit=1, max_new_tokens=8, **{**PLAIN, "eos_token_id": 60})
    assert torch.equal(drafted[:, : expected.shape[1]], expected[:, : drafted.shape[1]])


@pytest.mark.parametrize("fed", [5, 11])
def test_speculation_from_a_given_cache_says_what_greedy_decoding_says(model, ids, fed):
    """transformers 5 feeds the text that the cache has seen once more."""
    options = {"attention_mask": torch.ones_like(ids[:1]), "max_new_tokens": 6, **PLAIN, "eos_token_id": 60}
    with torch.no_grad():
        kept = getattr(model(ids[:1, :fed], use_cache=True), CACHE_NAME)
    expected = model.generate(ids[:1], use_cache=False, **options)
    drafted = model.generate(ids[:1], prompt_lookup_num_tokens=3, **{CACHE_NAME: kept}, **options)
    assert torch.equal(drafted[:, : expected.shape[1]], expected[:, : drafted.shape[1]])
    assert kept.get_seq_length() == drafted.shape[1] - 1


@torch.no_grad()
def test_crop_0_does_what_it_does_to_the_cache_of_transformers(model, ids):
    kept, other = getattr(model(ids), CACHE_NAME), DynamicCache()
    other.update(torch.ones(1, 1, 12, 2), torch.ones(1, 1, 12, 2), 0)
    kept.crop(0)
    other.crop(0)
    assert kept.get_seq_length() == other.get_seq_length()


# ---------------------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize("shape", [(2, 1, 12, 12), (2, 12, 12), (2, 9), (2, 15), (24,)])
def test_masks_of_other_shapes_are_refused(model, ids, shape):
    with pytest.raises(ValueError, match="attention_mask: shape"):
        model(ids, attention_mask=torch.ones(shape))


@pytest.mark.parametrize("head", get_architecture("hsn").models)
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(3, 12), r"shape \(3, 12\); the batch has 2 rows"),
        (torch.zeros(2, 12).masked_fill(torch.arange(12) > 9, -1e9), "values below 0"),
        ({"full_attention": None}, "a dict; give"),
    ],
)
def test_masks_of_other_kinds_are_refused(tiny, family, head, ids, mask, message):
    with pytest.raises(ValueError, match=f"attention_mask: .*{message}"):
        tiny(family, head)(ids, attention_mask=mask)


@pytest.mark.parametrize("name", ["position_ids", "seq_idx"])
@pytest.mark.parametrize("shape", [(12,), (2, 9), (1, 15), (3, 12), (3, 2, 12)])
def test_positions_and_documents_of_other_shapes_are_refused(model, ids, name, shape):
    with pytest.raises(ValueError, match=f"{name}: shape"):
        model(ids, **{name: torch.zeros(shape, dtype=torch.long)})


@torch.no_grad()
@pytest.mark.parametrize("name", ["position_ids", "seq_idx"])
def test_one_row_of_positions_or_documents_holds_for_all_texts(model, ids, name):
    row = torch.arange(12)[None] % 5 if name == "position_ids" else torch.arange(12)[None] // 5
    torch.testing.assert_close(model(ids, **{name: row}).logits, model(ids, **{name: row.expand(2, -1)}).logits)


@torch.no_grad()
def test_the_cache_of_another_model_is_refused(model, tiny, family, ids):
    """A state that is not the model's own would be left out, or taken for something else, without a word."""
    others = [tiny(family, num_hidden_layers=count) for count in (1, 3)] + [tiny(family, hidden_size=64)]
    others += [tiny(other) for other in ("hsn", "holo", "resonance") if other != family]
    others += [tiny("hsn", variant="static")] * (family == "hsn")
    for other in others:
        kept = getattr(other(ids[:, :5], use_cache=True), CACHE_NAME)
        with pytest.raises(ValueError, match="past_key_values: "):
            model(ids[:, 5:], **{CACHE_NAME: kept})
    legacy = ((torch.zeros(2, 2, 5, 16),) * 2,) * 2
    with pytest.raises(ValueError, match="past_key_values: a tuple"):
        model(ids[:, 5:], **{CACHE_NAME: legacy})


@torch.no_grad()
def test_a_cache_of_other_rows_is_refused(model, ids):
    kept = getattr(model(ids[:, :5], use_cache=True), CACHE_NAME)
    with pytest.raises(ValueError, match="past_key_values: a cache of 2 rows for 1 texts"):
        model(ids[:1, 5:], **{CACHE_NAME: kept})


@torch.no_grad()
@pytest.mark.parametrize("length", [3, 12])
def test_generation_from_a_cache_is_given_the_whole_text(model, ids, length):
    """Only what is new, as other libraries take it, would be read as the start of the text."""
    kept = getattr(model(ids, use_cache=True), CACHE_NAME)
    with pytest.raises(ValueError, match=f"input_ids: {length} tokens, and the cache has seen 12"):
        model.generate(ids[:, :length], **{CACHE_NAME: kept}, max_new_tokens=3, **PLAIN)


@pytest.mark.parametrize("family", ["holo"])
def test_a_static_cache_is_refused(model, ids):
    with pytest.raises(ValueError, match="static"):
        model.generate(ids, cache_implementation="static", max_new_tokens=3, **PLAIN)


@pytest.mark.parametrize("method", ["generate_batch", "init_continuous_batching"])
def test_continuous_batching_is_refused_in_one_line(model, method):
    with pytest.raises(NotImplementedError, match=r"generate_batch.*continuous batching") as refusal:
        getattr(model, method)([[1, 2, 3]])
    assert "\n" not in str(refusal.value)


# ---------------------------------------------------------------------------------------------- several devices
@torch.no_grad()
@pytest.mark.parametrize("head", ["AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification"])
def test_what_several_devices_give_can_be_gathered(tiny, family, ids, head, monkeypatch):
    """nn.DataParallel joins the outputs, caches included; its one CUDA operation is replaced by a concatenation."""

    class Gather:
        @staticmethod
        def apply(device, dim, *tensors):
            return torch.cat(tensors, dim)

    monkeypatch.setattr(scatter_gather, "Gather", Gather)
    model = tiny(family, head)
    gathered = scatter_gather.gather([model(ids[:1, :9]), model(ids[1:, :9])], "cpu")
    torch.testing.assert_close(gathered[0], model(ids[:, :9])[0], **CLOSE)
    if head == "AutoModelForCausalLM":
        logits = model(ids[:, 9:], **{CACHE_NAME: gathered[CACHE_NAME]}).logits
        torch.testing.assert_close(logits, model(ids).logits[:, 9:], **CLOSE)
