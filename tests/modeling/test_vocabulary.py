"""Compressed vocabularies: heads against their definitions, losses in pieces against losses at once, true sizes."""

import math
import tracemalloc
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_holo import ResonanceConfig, ResonanceForCausalLM, ResonanceForMaskedLM
from hf_holo.eval.cost import info
from hf_holo.modeling import hashing, heads, losses, vocabulary
from hf_holo.modeling.configuration_vocabulary import lay_out_vocabulary
from hf_holo.modeling.embeddings import check_ids
from hf_holo.modeling.hashing import HashEmbedding, collisions, gather_scores, gather_scores_naive, hash_codes
from hf_holo.modeling.losses import dense_token_losses, language_loss, language_loss_naive
from hf_holo.modeling.vocabulary import vocabulary_parameters

VOCAB_SIZE, WIDTH = 83, 16
OPTIONS = {
    "frequency_compressed": {"frequent_tokens": 20, "groups": 7, "group_size": 8},  # and 7 added tokens
    "adaptive": {"cutoffs": [10, 30, 80]},
    "hash": {"hashes": 2, "buckets": 9, "importances": 50},
}


def make(strategy: str, vocab_size: int = VOCAB_SIZE, width: int = WIDTH, **options) -> torch.nn.Module:
    strategy, options = lay_out_vocabulary(vocab_size, strategy, options)
    return vocabulary.EMBEDDINGS[strategy](vocab_size, width, **options)


@pytest.fixture(params=list(OPTIONS))
def embedding(request):
    """Every compressed embedding in float64, with weights moved away from their start."""
    embedding = make(request.param, **OPTIONS[request.param]).double()
    with torch.no_grad():
        for parameter in embedding.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return embedding


@pytest.fixture
def hidden():
    return torch.randn(2, 9, WIDTH, dtype=torch.double, requires_grad=True)


@pytest.fixture
def labels():
    labels = torch.randint(VOCAB_SIZE, (2, 9))
    labels[0, 3:5] = -100
    return labels


def assert_same_gradients(got, expected, leaves):
    for first, second in zip(*(torch.autograd.grad(y, leaves) for y in (got, expected)), strict=True):
        torch.testing.assert_close(first, second)


# ---------------------------------------------------------------------------------------------- choice and sizes
@pytest.mark.parametrize(
    ("vocab_size", "strategy"),
    [
        (50_000, "standard"),
        (50_001, "frequency_compressed"),
        (200_000, "frequency_compressed"),
        (200_001, "adaptive"),
        (500_000, "adaptive"),
        (500_001, "hash"),
        (2**31, "hash"),
    ],
)
def test_strategy_follows_from_the_size(vocab_size, strategy):
    assert lay_out_vocabulary(vocab_size)[0] == strategy


@pytest.mark.parametrize("strategy", OPTIONS)
@pytest.mark.parametrize("vocab_size", [61, 1000, 32_768, 200_001])
def test_default_sizes_are_kept_when_the_vocabulary_grows(strategy, vocab_size):
    _, options = lay_out_vocabulary(vocab_size, strategy)
    assert lay_out_vocabulary(vocab_size + 1000, strategy, options) == (strategy, options)
    with torch.device("meta"):
        embedding = vocabulary.EMBEDDINGS[strategy](vocab_size, 64, **options)
    assert sum(p.numel() for p in embedding.parameters()) < vocab_size * 64


@pytest.mark.parametrize(
    ("vocab_size", "strategy", "options", "message"),
    [
        (100, "zip", {}, "embedding_strategy: 'zip' is unknown"),
        (100, "hash", {"bucket": 3}, "'bucket' is not an option of 'hash', which takes 'hashes', 'buckets'"),
        (100, "standard", {"buckets": 3}, "which takes none"),
        (100, "frequency_compressed", {"frequent_tokens": 100}, "leaves 0 of vocab_size=100 tokens"),
        (100, "frequency_compressed", {"groups": 12, "group_size": 9}, "more than vocab_size=100"),
        (100, "adaptive", {"cutoffs": [10, 200]}, "rising ids from 1 to vocab_size=100"),
        (100, "adaptive", {"cutoffs": [50, 10, 100]}, "rising"),
        (100, "adaptive", {"cutoffs": [100]}, "at least two"),
        (100, "hash", {"hashes": 4, "buckets": 26}, "more rows than vocab_size=100"),
        (100, "hash", {"hashes": 0}, "hashes: 0 is not a positive integer"),
        (2**31 + 1, None, {}, f"at most {2**31}"),
        (100, "adaptive", {"cutoffs": 10}, "cutoffs: 10 is not a list"),
        (100, "hash", [1], r"embedding_options: \[1\] is not a dict"),
        (100, "hash", "buckets=3", "embedding_options: 'buckets=3' is not a dict"),
    ],
)
def test_mismatches_are_refused(vocab_size, strategy, options, message):
    with pytest.raises(ValueError, match=message):
        lay_out_vocabulary(vocab_size, strategy, options)


def test_a_million_tokens_fit_into_a_twentieth():
    strategy, options = lay_out_vocabulary(1_000_000)
    with torch.device("meta"):
        embedding = vocabulary.EMBEDDINGS[strategy](1_000_000, 768, **options)
    assert strategy == "hash"
    assert 20 * sum(p.numel() for p in embedding.parameters()) <= 1_000_000 * 768


@pytest.mark.parametrize("ids", [[-1, 3], [3, VOCAB_SIZE]])
def test_ids_outside_the_vocabulary_are_refused(ids):
    with pytest.raises(ValueError, match=f"input_ids: {ids[0] if ids[0] < 0 else ids[1]} is outside"):
        check_ids("input_ids", torch.tensor([ids]), VOCAB_SIZE)
    check_ids("input_ids", torch.tensor([[0, VOCAB_SIZE - 1]]), VOCAB_SIZE)


# ---------------------------------------------------------------------------------------------- heads
def test_logits_are_those_of_a_dense_table(embedding, hidden):
    got, expected = embedding.logits(hidden), embedding.logits_naive(hidden)
    torch.testing.assert_close(got, expected)
    noise = torch.randn_like(got)
    assert_same_gradients((got * noise).sum(), (expected * noise).sum(), [hidden, *embedding.parameters()])


def test_token_losses_are_those_of_the_logits(embedding, hidden):
    hidden = hidden.flatten(0, 1)
    probabilities = embedding.logits(hidden).softmax(-1)
    losses = [embedding.token_losses(hidden, torch.full((len(hidden),), i)) for i in range(VOCAB_SIZE)]
    torch.testing.assert_close(torch.stack(losses, -1), -probabilities.log())


def test_tokens_have_rows_of_their_own(embedding):
    """Even those with equal hash codes, since their importances differ: 50 there are."""
    ids = torch.arange(50)[None]
    rows = embedding.rows(ids)[0]
    assert rows.shape == (50, WIDTH)
    assert (torch.cdist(rows, rows) + torch.eye(50)).min() > 1e-3
    torch.testing.assert_close(embedding(ids)[0], rows * WIDTH**0.5)


def test_the_second_factor_depends_on_the_first(hidden):
    """Plain sums a_i + b_j have the same differences in every group; gated ones do not."""
    embedding = make("frequency_compressed", **OPTIONS["frequency_compressed"]).double()
    scores = embedding.logits(hidden)[0, 0, 20:76].view(7, 8)
    differences = scores - scores[:, :1]
    assert (differences.std(0)[1:] > 0.1 * differences.std()).all()


@pytest.mark.parametrize("strategy", ["frequency_compressed", "adaptive"])
def test_groups_start_as_probable_as_zipfs_law_makes_them(strategy):
    embedding = make(strategy, 4000)
    probabilities = embedding.logits(torch.zeros(WIDTH)).softmax(-1)
    rank = 1 / torch.arange(1, 4001.0)
    frequent = embedding.frequent_tokens
    torch.testing.assert_close(probabilities[:frequent].sum(), (rank[:frequent] / rank.sum()).sum())


def test_a_bfloat16_head_normalises_in_float32(embedding, hidden):
    coarse = embedding.bfloat16()
    got = coarse.token_losses(hidden[0].bfloat16(), torch.arange(9))
    assert got.dtype == torch.float32
    expected = coarse.double().token_losses(hidden[0].bfloat16().double(), torch.arange(9))
    torch.testing.assert_close(got.double(), expected, atol=0.05, rtol=0.02)


# ---------------------------------------------------------------------------------------------- the loss
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(7)])
def test_loss_in_pieces_is_the_loss_at_once(embedding, hidden, labels, shift, num_items, monkeypatch):
    monkeypatch.setattr(losses, "SCORES_AT_ONCE", 4 * embedding.scores_per_token)
    got = language_loss(
        embedding.token_losses, embedding.scores_per_token, hidden, labels, shift, num_items_in_batch=num_items
    )
    expected = language_loss_naive(embedding.logits(hidden), labels, shift, num_items)
    torch.testing.assert_close(got, expected)
    assert_same_gradients(got, expected, [hidden, *embedding.parameters()])


def test_loss_of_a_dense_head_in_pieces(hidden, labels, monkeypatch):
    monkeypatch.setattr(losses, "SCORES_AT_ONCE", 4 * VOCAB_SIZE)
    head = torch.nn.Linear(WIDTH, VOCAB_SIZE, bias=False).double()
    got = language_loss(dense_token_losses(head), VOCAB_SIZE, hidden, labels, shift=True)
    expected = language_loss_naive(head(hidden), labels, shift=True)
    torch.testing.assert_close(got, expected)
    assert_same_gradients(got, expected, [hidden, head.weight])


def test_labels_that_are_shifted_already(embedding, hidden, labels):
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    score = embedding.token_losses, embedding.scores_per_token
    torch.testing.assert_close(
        language_loss(*score, hidden, labels, True, shift_labels=shifted), language_loss(*score, hidden, labels, True)
    )


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that an operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = (x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor))
        self.numel = max(self.numel, *sizes, 0)
        return result


@pytest.mark.parametrize("strategy", OPTIONS)
def test_loss_never_holds_all_scores(strategy, monkeypatch):
    tokens, vocab_size = 512, 3000
    embedding = make(strategy, vocab_size)
    hidden = torch.randn(2, tokens // 2, WIDTH, requires_grad=True)
    labels = torch.randint(vocab_size, (2, tokens // 2))
    monkeypatch.setattr(losses, "SCORES_AT_ONCE", 16 * vocab_size)
    with LargestTensor() as largest:
        language_loss(embedding.token_losses, embedding.scores_per_token, hidden, labels, True).backward()
    assert largest.numel <= 16 * vocab_size < tokens * vocab_size / 10


@torch.no_grad()
def test_factored_scores_hold_no_more_than_they_give():
    """At a width above √V, where the hidden states after all gates would be several times as many values."""
    embedding, hidden = make("frequency_compressed", 3000, 256), torch.randn(64, 256)
    with LargestTensor() as largest:
        assert embedding.logits(hidden).numel() == largest.numel == 64 * 3000


# ---------------------------------------------------------------------------------------------- growing
def test_growing_leaves_old_scores_alone(embedding, hidden):
    before, parameters = embedding.logits(hidden), sum(p.numel() for p in embedding.parameters())
    embedding.resize(VOCAB_SIZE + 5)
    after = embedding.logits(hidden)
    assert after.shape[-1] == embedding.num_embeddings == VOCAB_SIZE + 5
    torch.testing.assert_close(after[..., :VOCAB_SIZE], before)
    torch.testing.assert_close(after, embedding.logits_naive(hidden))
    assert sum(p.numel() for p in embedding.parameters()) <= parameters + 5 * WIDTH
    embedding.resize(VOCAB_SIZE)
    torch.testing.assert_close(embedding.logits(hidden), before)


@pytest.mark.parametrize("strategy", ["frequency_compressed", "adaptive"])
def test_groups_are_not_cut(strategy):
    with pytest.raises(ValueError, match="num_embeddings: 60 is not at least"):
        make(strategy, **OPTIONS[strategy]).resize(60)


# ---------------------------------------------------------------------------------------------- hashing
def test_gathered_scores_equal_their_naive_twin():
    index, rows = torch.randint(9, (50, 2)), 11  # two rows belong to no token
    users = index.flatten().argsort(stable=True)
    starts = torch.searchsorted(index.flatten()[users], torch.arange(rows))
    scores = torch.randn(3, 4, rows, dtype=torch.double, requires_grad=True)
    weight = torch.randn(50, 2, dtype=torch.double, requires_grad=True)
    got, expected = gather_scores(scores, weight, index, users, starts), gather_scores_naive(scores, weight, index)
    torch.testing.assert_close(got, expected)
    noise = torch.randn_like(got)
    assert_same_gradients((got * noise).sum(), (expected * noise).sum(), [scores, weight])


def test_hash_codes_are_the_same_everywhere():
    """A checkpoint depends on them: on the CPU, in numpy, and in every release."""
    ids = [0, 1, 2, 49_151, 999_999, 2**31 - 1]
    index, sign = hash_codes(torch.tensor(ids), 3, 1000)
    for ours, theirs in zip((index, sign), hash_codes(np.array(ids), 3, 1000), strict=True):
        assert ours.tolist() == theirs.tolist()
    modulus = hashing.PRIME
    for k, (a, b, c) in enumerate(hashing._coefficients(3)):
        codes = [(a * i * i + b * i + c) % modulus % 2000 for i in ids]  # in integers without bound
        assert index[:, k].tolist() == [code // 2 + 1000 * k for code in codes]
        assert sign[:, k].tolist() == [1 - 2 * (code % 2) for code in codes]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_hash_codes_do_not_overflow_in_narrow_integers(dtype):
    ids = torch.tensor([0, 5, 82, 127])
    for narrow in (ids.to(dtype), ids.to(dtype).numpy()):
        for got, expected in zip(hash_codes(narrow, 3, 1000), hash_codes(ids, 3, 1000), strict=True):
            assert got.tolist() == expected.tolist()


def test_the_modulus_is_the_prime_above_all_ids():
    primes = [n for n in range(2**31 + 1, hashing.PRIME + 1) if all(n % d for d in range(2, math.isqrt(n) + 1))]
    assert primes == [hashing.PRIME]


def test_ids_up_to_two_to_the_31():
    embedding = make("hash", 2**31, buckets=64)
    ids = torch.tensor([[0, 1, 2**20, 2**30, 2**31 - 2, 2**31 - 1]])
    rows = embedding(ids)
    assert rows.isfinite().all() and torch.equal(rows, embedding(ids))
    assert (torch.cdist(rows[0], rows[0]) + torch.eye(6)).min() > 0.01


def test_a_head_that_this_machine_cannot_hold_is_refused_at_once(monkeypatch):
    """Its embedding works at that size: only the head looks at all tokens."""
    monkeypatch.setattr(hashing, "physical_memory", lambda: 24 * 2**30)
    options = {"embedding_options": {"buckets": 64}, "pad_token_id": None}
    model = ResonanceForCausalLM(small_config("hash", vocab_size=2**31, **options))
    ids = torch.tensor([[1, 2**31 - 1]])
    assert model.model(ids).last_hidden_state.isfinite().all()
    message = "vocab_size: 2147483648; .* take 224 GiB, and this machine has 24"
    with pytest.raises(ValueError, match=message):
        model.train()(ids, labels=ids)
    with pytest.raises(ValueError, match=message):
        model.eval().generate(ids, max_new_tokens=1)


def test_what_the_codes_take_is_what_is_reckoned(monkeypatch):
    tokens, hashes = 50_000, 3
    tracemalloc.start()
    hashing._all_codes.__wrapped__(tokens, hashes, 500)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    monkeypatch.setattr(hashing, "physical_memory", lambda: 0.9 * peak)
    with pytest.raises(ValueError, match="vocab_size: 50000"):
        hashing._all_codes.__wrapped__(tokens, hashes, 500)
    monkeypatch.setattr(hashing, "physical_memory", lambda: 1.1 * peak)
    hashing._all_codes.__wrapped__(tokens, hashes, 500)


def test_codes_stay_on_the_device(hidden):
    embedding = make("hash", **OPTIONS["hash"]).double()
    sizes = hidden.device, VOCAB_SIZE, embedding.hashes, embedding.buckets
    hashing._codes_on.cache_clear()
    assert hashing._codes_on(*sizes)[0] is hashing._codes_on(*sizes)[0]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # as while a graph is recorded: its tensors must not stay
        embedding.logits(mode.from_tensor(hidden.detach()))
    assert all(type(code) is torch.Tensor for code in hashing._codes_on(*sizes))
    assert hashing._codes_on.cache_info().currsize == 1


def test_codes_first_needed_in_inference_mode_serve_training(hidden):
    embedding = make("hash", **OPTIONS["hash"]).double()
    hashing._codes_on.cache_clear()
    with torch.inference_mode():
        embedding.logits(hidden)
    embedding.logits(hidden).sum().backward()
    assert embedding.tables.weight.grad.abs().max() > 0


def test_buckets_are_used_evenly():
    index, sign = hash_codes(torch.arange(100_000), 3, 1000)
    loads = np.bincount(index.flatten(), minlength=3000)
    assert loads.min() > 50 and loads.max() < 160  # 100 ± 10 for ideal hash functions
    assert abs(sign.float().mean()) < 0.01


@pytest.mark.parametrize(("hashes", "buckets"), [(1, 500), (2, 60), (3, 100)])
def test_collisions_are_counted(hashes, buckets):
    embedding = HashEmbedding(20_000, 2, hashes=hashes, buckets=buckets, importances=1)
    report = collisions(embedding)
    codes = zip(*(x.tolist() for x in hash_codes(torch.arange(20_000), hashes, buckets)), strict=True)
    counts = Counter((*index, *sign) for index, sign in codes)
    assert report["observed"] == sum(count for count in counts.values() if count > 1)
    assert report["observed"] == pytest.approx(report["expected"], rel=0.05, abs=60)
    assert report["tokens"] == 20_000 and report["bucket_load"] == 20_000 / buckets


# ---------------------------------------------------------------------------------------------- in a model
def small_config(strategy: str, **overrides) -> ResonanceConfig:
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": WIDTH, "num_hidden_layers": 1, "num_modes": 4, "pad_token_id": 0}
    return ResonanceConfig(
        **{**sizes, "embedding_strategy": strategy, "embedding_options": OPTIONS.get(strategy), **overrides}
    )


@pytest.fixture(params=["standard", *OPTIONS])
def config(request):
    return small_config(request.param)


@pytest.mark.parametrize("model_class", [ResonanceForCausalLM, ResonanceForMaskedLM])
def test_training_gives_the_loss_of_evaluation_without_logits(config, model_class, labels):
    model = model_class(config).double()
    ids = torch.randint(VOCAB_SIZE, (2, 9))
    evaluated, trained = (model.train(mode)(input_ids=ids, labels=labels) for mode in (False, True))
    assert trained.logits is None
    expected = language_loss_naive(evaluated.logits, labels, shift=model_class is ResonanceForCausalLM)
    torch.testing.assert_close(trained.loss, expected)
    torch.testing.assert_close(evaluated.loss, expected.float())  # transformers computes it in float32


@torch.no_grad()
def test_ids_of_32_bits_are_those_of_64(config):
    model = ResonanceForCausalLM(config).eval()
    ids = torch.randint(VOCAB_SIZE, (2, 9))
    assert torch.equal(model(ids.int()).logits, model(ids).logits)


@torch.no_grad()
def test_a_large_evaluation_gives_logits_only_where_they_are_asked_for(config, labels, monkeypatch):
    model = ResonanceForCausalLM(config).double().eval()
    ids = torch.randint(VOCAB_SIZE, (2, 9))
    whole = model(input_ids=ids, labels=labels)
    monkeypatch.setattr(heads, "LOGITS_WITH_A_LOSS", labels.numel() * VOCAB_SIZE - 1)
    large = model(input_ids=ids, labels=labels)
    assert large.logits is None
    torch.testing.assert_close(large.loss.float(), whole.loss)
    asked = model(input_ids=ids, labels=labels, logits_to_keep=2)
    torch.testing.assert_close(asked.loss, large.loss)
    torch.testing.assert_close(asked.logits, whole.logits[:, -2:])


def test_accumulated_gradients_are_those_of_the_whole_batch(config, labels):
    model = ResonanceForCausalLM(config).double().train()
    ids = torch.randint(VOCAB_SIZE, (2, 9))
    whole = torch.autograd.grad(model(input_ids=ids, labels=labels).loss, list(model.parameters()))
    items = (labels[:, 1:] != -100).sum()
    for row, row_labels in zip(ids.split(1), labels.split(1), strict=True):
        model(input_ids=row, labels=row_labels, num_items_in_batch=items).loss.backward()
    for parameter, expected in zip(model.parameters(), whole, strict=True):
        torch.testing.assert_close(parameter.grad, expected)


def test_generation(config):
    model = ResonanceForCausalLM(config).eval()
    ids = torch.randint(1, VOCAB_SIZE, (2, 5))
    for beams in (1, 3):
        options = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams}
        got = model.generate(ids, **options)
        assert got.shape == (2, 9)
        assert torch.equal(got, model.generate(ids, use_cache=False, **options))


def test_saving_a_vocabulary_that_has_grown(config, tmp_path):
    model = ResonanceForCausalLM(config).eval()
    model.resize_token_embeddings(VOCAB_SIZE + 5)
    model.save_pretrained(tmp_path)
    loaded = ResonanceForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.embedding_strategy == config.embedding_strategy
    assert loaded.config.vocab_size == loaded.get_input_embeddings().num_embeddings == VOCAB_SIZE + 5
    ids = torch.arange(VOCAB_SIZE + 5)[None]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_a_strategy_outlives_the_size_that_chose_it():
    """One that was chosen stays, on whichever side of a threshold the vocabulary is later."""
    for vocab_size, strategy in ((50_010, "standard"), (49_990, "frequency_compressed")):
        config = small_config(strategy, vocab_size=vocab_size, embedding_options=None)
        again = ResonanceConfig.from_dict(config.to_diff_dict())
        assert (again.embedding_strategy, again.embedding_options) == (strategy, config.embedding_options)


def test_labels_outside_the_vocabulary_are_refused(config):
    model = ResonanceForCausalLM(config)
    for mode in (True, False):
        with pytest.raises(ValueError, match=f"labels: {VOCAB_SIZE} is outside the vocabulary"):
            model.train(mode)(input_ids=torch.zeros(1, 3, dtype=torch.long), labels=torch.full((1, 3), VOCAB_SIZE))


@pytest.mark.parametrize("strategy", OPTIONS)
def test_untied_heads_are_refused(strategy):
    with pytest.raises(
        ValueError, match=f"tie_word_embeddings: False does not go with embedding_strategy='{strategy}'"
    ):
        ResonanceForCausalLM(small_config(strategy, tie_word_embeddings=False))


def test_true_compression_is_shown(config):
    stored, dense = vocabulary_parameters(ResonanceForCausalLM(config))
    record = info(config, lengths=[8])["vocabulary"]
    assert (record["parameters"], record["dense_parameters"]) == (stored, dense) == (stored, VOCAB_SIZE * WIDTH)
    assert record["strategy"] == config.embedding_strategy
    assert record["compression"] == dense / stored
    assert ("collisions" in record) == (config.embedding_strategy == "hash")
    if config.embedding_strategy == "standard":
        assert stored == dense
        untied = small_config("standard", tie_word_embeddings=False)
        assert vocabulary_parameters(ResonanceForCausalLM(untied)) == (2 * dense, dense)
