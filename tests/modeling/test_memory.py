"""HolographicMemory: its functions against naive twins, what it recalls against theory, and what may be done to it."""

import math

import pytest
import torch
import torch.nn.functional as F

from hf_holo.modeling import memory as module
from hf_holo.modeling.binding import bind
from hf_holo.modeling.memory import HolographicMemory, phasors, recall_theory

EXACT = {"rtol": 1e-9, "atol": 1e-9}


def random_phases(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * math.pi * torch.rand(*shape, generator=generator, dtype=dtype)


def filled(dimension: int, pairs: int, codes: int, seed: int = 0, dtype: torch.dtype = torch.float32):
    """A memory with one state, the keys, the codebook, and the indices of the codes that were written."""
    memory = HolographicMemory(dimension)
    keys = random_phases(pairs, dimension, seed=seed, dtype=dtype)
    codebook = phasors(random_phases(codes, dimension, seed=seed + 1000, dtype=dtype))
    stored = torch.randint(codes, (pairs,), generator=torch.Generator().manual_seed(seed))
    state = memory.write(memory.empty(dtype=dtype), keys, codebook[stored])
    return memory, state, keys, codebook, stored


def share(found: torch.Tensor, stored: torch.Tensor) -> float:
    return (found == stored).double().mean().item()


# ---------------------------------------------------------------------------------------------- twins
def assert_twins(name: str, **inputs) -> None:
    """Same values, and the same gradient with respect to every tensor, for a random linear loss."""
    results = []
    for function in (getattr(module, name), getattr(module, f"{name}_naive")):
        given = {key: x.clone().requires_grad_() if isinstance(x, torch.Tensor) else x for key, x in inputs.items()}
        leaves = {key: x for key, x in given.items() if isinstance(x, torch.Tensor)}
        y = function(**given)
        loss = (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)).sum()
        results.append((y, dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))))
    (got, gradients), (expected, expected_gradients) = results
    torch.testing.assert_close(got, expected, **EXACT)
    for key, expected_gradient in expected_gradients.items():
        assert expected_gradient.abs().max() > 0, key
        torch.testing.assert_close(gradients[key], expected_gradient, **EXACT, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("with_strength", [False, True])
@pytest.mark.parametrize("batch", [(), (2,), (3, 2)])
def test_writing_and_reading_equal_their_twins(batch, with_strength):
    torch.manual_seed(0)
    state, values = (torch.randn(*batch, *shape, dtype=torch.float64) for shape in ((14,), (5, 14)))
    keys = random_phases(*batch, 5, 7, dtype=torch.float64)
    strength = torch.randn(*batch, 5, dtype=torch.float64) if with_strength else None
    assert_twins("write_pairs", state=state, keys=keys, values=values, strength=strength)
    assert_twins("read_pairs", state=state, keys=keys)


@pytest.mark.parametrize("rounds", [0, 1, 2, 5])
@pytest.mark.parametrize("kind", ["phasors", "real vectors", "strength"])
def test_cancellation_equals_its_twin(rounds, kind):
    """At three pairs to eight phasors guesses stay doubtful, so that no gradient vanishes."""
    torch.manual_seed(0)
    keys = random_phases(3, 8, dtype=torch.float64)
    codebook = (
        torch.randn(5, 16, dtype=torch.float64) if kind == "real vectors" else phasors(keys.new_empty(5, 8).normal_())
    )
    strength = torch.tensor([0.5, 1.0, 0.8], dtype=torch.float64) if kind == "strength" else None
    state = module.write_pairs(keys.new_zeros(16), keys, codebook[[0, 3, 3]], strength)
    assert_twins("cancel_crosstalk", state=state, keys=keys, codebook=codebook, strength=strength, rounds=rounds)


def test_binding_is_circular_convolution():
    """Of 2D + 1 real numbers, seen at the D frequencies above zero, with keys of magnitude one there."""
    torch.manual_seed(0)
    dimension = 9
    phases = random_phases(dimension, dtype=torch.float64)
    spectrum = torch.polar(torch.ones(dimension + 1, dtype=torch.float64), F.pad(phases, (1, 0)))
    key, value = torch.fft.irfft(spectrum, n=2 * dimension + 1), torch.randn(2 * dimension + 1, dtype=torch.float64)

    def seen(x: torch.Tensor) -> torch.Tensor:
        bins = torch.fft.rfft(x)[1:]
        return torch.cat([bins.real, bins.imag])

    memory = HolographicMemory(dimension)
    written = memory.write(memory.empty(dtype=torch.float64), phases[None], seen(value)[None])
    torch.testing.assert_close(written, seen(bind(key, value)), **EXACT)


# ---------------------------------------------------------------------------------------------- recall
def test_one_pair_comes_back_as_it_was():
    memory = HolographicMemory(16)
    torch.manual_seed(0)
    keys, values = random_phases(2, 1, 16, dtype=torch.float64), torch.randn(2, 1, 32, dtype=torch.float64)
    state = memory.write(memory.empty(2, dtype=torch.float64), keys, values)
    torch.testing.assert_close(memory.read(state, keys), values, **EXACT)


@pytest.mark.parametrize(("pairs", "least"), [(64, 0.98), (128, 0.75)])
def test_one_shot_recall_at_dimension_1024(pairs, least):
    """The mean over 1,024 reads is above what is promised, and near theory."""
    shares = []
    for seed in range(1024 // pairs):
        memory, state, keys, codebook, stored = filled(1024, pairs, 1000, seed)
        shares.append(share(memory.cleanup(memory.read(state, keys), codebook), stored))
    measured = sum(shares) / len(shares)
    assert measured >= least and abs(measured - recall_theory(1024, pairs, 1000)) < 0.03


@pytest.mark.parametrize("pairs", [1, 128, 200])
def test_cancellation_reaches_beyond_one_shot(pairs):
    memory, state, keys, codebook, stored = filled(1024, pairs, 1000)
    assert share(memory.recall(state, keys, codebook).argmax(-1), stored) >= 0.95


def test_no_rounds_are_one_shot():
    memory, state, keys, codebook, _ = filled(64, 12, 50)
    log_probability = memory.recall(state, keys, codebook, rounds=0)
    assert torch.equal(log_probability.argmax(-1), memory.cleanup(memory.read(state, keys), codebook))
    torch.testing.assert_close(log_probability.exp().sum(-1), torch.ones(12))


@pytest.mark.parametrize("pairs", [4, 12, 20, 60])
def test_probabilities_are_honest(pairs):
    """The probability given to the most probable code is, on average, the share that is right."""
    claimed, right = [], []
    for seed in range(40):
        memory, state, keys, codebook, stored = filled(64, pairs, 50, seed)
        probability, found = memory.recall(state, keys, codebook, rounds=0).exp().max(-1)
        claimed.append(probability.mean().item())
        right.append(share(found, stored))
    assert abs(sum(claimed) - sum(right)) / 40 < 0.06


def test_real_vectors_as_values():
    memory, _, keys, _, stored = filled(256, 30, 100)
    codebook = torch.randn(100, 512, generator=torch.Generator().manual_seed(5)) * torch.linspace(0.5, 2, 100)[:, None]
    state = memory.write(memory.empty(), keys, codebook[stored])
    assert share(memory.recall(state, keys, codebook).argmax(-1), stored) == 1
    assert share(memory.cleanup(codebook, codebook), torch.arange(100)) == 1


def test_pairs_that_are_not_asked_for_stay_as_noise():
    memory, state, keys, codebook, stored = filled(1024, 128, 1000)
    some = memory.recall(state, keys[:64], codebook).argmax(-1)
    assert 0.8 < share(some, stored[:64]) < 1


def test_decayed_pairs_are_found_by_their_strength():
    """One pair is written at a time, and everything older fades."""
    memory, _, keys, codebook, stored = filled(512, 48, 200)
    state = memory.empty()
    for key, code in zip(keys, codebook[stored], strict=True):
        state = memory.write(memory.decay(state, 0.97), key[None], code[None])
    strength = 0.97 ** torch.arange(47, -1, -1)
    torch.testing.assert_close(state, memory.write(memory.empty(), keys, codebook[stored], strength))
    assert share(memory.recall(state, keys, codebook, strength).argmax(-1), stored) == 1


def test_theory_has_known_values():
    assert recall_theory(1024, 64, 1000) == pytest.approx(0.988, abs=0.001)
    assert recall_theory(1024, 128, 1000) == pytest.approx(0.764, abs=0.002)
    assert recall_theory(512, 3, 1) == pytest.approx(1)
    assert recall_theory(1, 10**9, 2) == pytest.approx(0.5, abs=1e-3)  # all noise: one of two
    falling = [recall_theory(256, pairs, 100) for pairs in (1, 10, 100, 1000)]
    assert falling == sorted(falling, reverse=True)


@pytest.mark.parametrize(("pairs", "rounds"), [(30, 0), (60, 0), (30, 8), (45, 2), (120, 8)])
def test_recall_follows_theory(pairs, rounds):
    right = []
    for seed in range(20):
        memory, state, keys, codebook, stored = filled(256, pairs, 200, seed)
        right.append(share(memory.recall(state, keys, codebook, rounds=rounds).argmax(-1), stored))
    assert abs(sum(right) / 20 - recall_theory(256, pairs, 200, rounds)) < 0.05


# ---------------------------------------------------------------------------------------------- a functional store
def test_nothing_is_changed_in_place():
    memory, state, keys, codebook, _ = filled(32, 4, 10)
    given = (state, keys, codebook)
    copies = [x.clone() for x in given]
    memory.write(state, keys, codebook[:4])
    memory.decay(state, 0.5)
    memory.recall(state, keys, codebook)
    assert all(torch.equal(x, copy) for x, copy in zip(given, copies, strict=True))


def test_rows_of_a_batch_are_independent_states():
    memory = HolographicMemory(32)
    keys = random_phases(3, 6, 32, dtype=torch.float64)
    codebooks = phasors(random_phases(3, 9, 32, seed=1, dtype=torch.float64))
    strength = torch.rand(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    state = memory.write(memory.empty(3, dtype=torch.float64), keys, codebooks[:, :6], strength)
    together = memory.recall(state, keys, codebooks, strength)
    for row in range(3):
        alone = memory.write(memory.empty(dtype=torch.float64), keys[row], codebooks[row, :6], strength[row])
        torch.testing.assert_close(state[row], alone)
        torch.testing.assert_close(together[row], memory.recall(alone, keys[row], codebooks[row], strength[row]))
    shared = memory.recall(state, keys[0], codebooks[0])  # one set of keys and one codebook for all states
    torch.testing.assert_close(shared[2], memory.recall(state[2], keys[0], codebooks[0]))


def test_any_split_of_the_pairs_writes_the_same():
    memory, whole, keys, codebook, stored = filled(32, 10, 20, dtype=torch.float64)
    state = memory.empty(dtype=torch.float64)
    for piece in torch.arange(10).split(3):
        state = memory.write(state, keys[piece], codebook[stored[piece]])
    torch.testing.assert_close(state, whole)


def test_a_pair_can_be_erased_left_out_and_replaced():
    memory, state, keys, codebook, stored = filled(32, 3, 20, dtype=torch.float64)
    values = codebook[stored]
    without = memory.write(memory.empty(dtype=torch.float64), keys[1:], values[1:])
    erased = memory.write(state, keys[:1], values[:1], -torch.ones(1))
    left_out = memory.write(memory.empty(dtype=torch.float64), keys, values, torch.tensor([0.0, 1, 1]))
    torch.testing.assert_close(erased, without)
    torch.testing.assert_close(left_out, without)
    new = codebook[:1]
    replaced = memory.write(state, keys[:1], new - memory.read(state, keys[:1]))
    torch.testing.assert_close(memory.read(replaced, keys[:1]), new)


def test_decay_by_number_and_by_row():
    memory = HolographicMemory(2)
    state = torch.ones(3, 4)
    assert torch.equal(memory.decay(state, 0.5), state / 2)
    assert torch.equal(memory.decay(state, torch.tensor([0.0, 0.5, 1.0]))[:, 0], torch.tensor([0.0, 0.5, 1.0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype):
    """4,096 equal pairs: in bfloat16 the sum would stop at 256."""
    memory = HolographicMemory(8)
    state = memory.empty(dtype=dtype)
    assert state.dtype == torch.float32
    one = phasors(torch.zeros(1, 8)).to(dtype)
    for _ in range(4):
        state = memory.write(state, torch.zeros(1024, 8, dtype=dtype), one.expand(1024, -1))
    assert state.dtype == torch.float32 and torch.equal(state[:8], torch.full((8,), 4096.0))
    assert memory.read(state.to(dtype), torch.zeros(1, 8, dtype=dtype)).dtype == torch.float32


def test_autocast_changes_nothing():
    memory, state, keys, codebook, _ = filled(64, 12, 50)
    plain = memory.recall(state, keys, codebook), memory.cleanup(memory.read(state, keys), codebook)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = memory.recall(state, keys, codebook), memory.cleanup(memory.read(state, keys), codebook)
    assert all(torch.equal(a, b) for a, b in zip(plain, mixed, strict=True))


@pytest.mark.parametrize("pairs", [0, 1, 5, 40, 400])
def test_values_and_gradients_are_finite(pairs):
    """All explained, hopelessly full, or empty: nothing overflows, and nothing divides by zero."""
    memory, state, keys, codebook, _ = filled(64, max(pairs, 1), 50)
    leaves = [x.clone().requires_grad_() for x in (state if pairs else torch.zeros_like(state), keys, codebook)]
    log_probability = memory.recall(*leaves, rounds=20)
    log_probability.max(-1).values.sum().backward()
    assert log_probability.isfinite().all() and all(leaf.grad.isfinite().all() for leaf in leaves)


def test_pairs_of_no_strength_are_finite():
    memory, _, keys, codebook, _ = filled(16, 3, 5)
    log_probability = memory.recall(memory.empty(), keys, codebook, torch.zeros(3))
    torch.testing.assert_close(log_probability, torch.full((3, 5), -math.log(5)))


def test_keys_are_learned_through_recall():
    """Keys that nearly coincide are moved apart by the gradient of the recall."""
    memory, _, _, codebook, stored = filled(32, 6, 12)
    keys = (random_phases(1, 32) + 0.2 * random_phases(6, 32, seed=3)).requires_grad_()
    optimizer = torch.optim.Adam([keys], lr=0.05)
    losses = []
    for _ in range(40):
        state = memory.write(memory.empty(), keys, codebook[stored])
        losses.append(F.nll_loss(memory.recall(state, keys, codebook, rounds=2), stored))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[0] > 0.5 and losses[-1] < 0.1 * losses[0]


# ---------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize("dimension", [0, -1, 1.5, True])
def test_the_dimension_is_a_positive_integer(dimension):
    with pytest.raises(ValueError, match=f"dimension: {dimension!r} is not a positive integer"):
        HolographicMemory(dimension)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, s, k, c: m.write(s, k, c[:2, :8]), r"values: the last dimension of its shape \(2, 8\) is not 16"),
        (lambda m, s, k, c: m.write(s, phasors(k), c[:2]), r"keys: the last dimension of its shape \(2, 16\) is not 8"),
        (lambda m, s, k, c: m.read(s[:8], k), r"state: the last dimension of its shape \(8,\) is not 16"),
        (lambda m, s, k, c: m.cleanup(c, c[:, :4]), r"codebook: the last dimension of its shape \(5, 4\) is not 16"),
        (lambda m, s, k, c: m.recall(s, k, c, rounds=-1), "rounds: -1 is not an integer of at least 0"),
        (lambda m, s, k, c: m.recall(s, k, c, rounds=1.5), "rounds: 1.5 is not an integer"),
        (lambda m, s, k, c: m.decay(s, 1.5), r"rate: 1.5 is not in \[0, 1\]"),
        (lambda m, s, k, c: m.decay(s, torch.tensor(1.5)), r"rate: 1.5 to 1.5; all values are"),
        (lambda m, s, k, c: m.decay(s, torch.tensor([0.5, -1.0])), r"rate: -1 to 0.5; all values are in \[0, 1\]"),
        (lambda m, s, k, c: m.decay(s, torch.tensor(float("nan"))), r"all values are in \[0, 1\]"),
        (lambda m, s, k, c: m.write(s, k, c[:1]), "keys, values: 2 and 1 pairs; every pair needs one of each"),
        (lambda m, s, k, c: m.write(s, k[0], c[0]), "keys, values: no and no pairs"),
        (lambda m, s, k, c: m.write(s, k, c[:2], torch.ones(4)), "keys, values, strength: 2 and 2 and 4 pairs"),
        (lambda m, s, k, c: m.recall(s, k, c, torch.ones(3)), "keys, strength: 2 and 3 pairs"),
        (lambda m, s, k, c: m.write(s, k, c[:2] * 1j), "values: it is complex"),
    ],
)
def test_bad_arguments(call, message):
    memory, state, keys, codebook, _ = filled(8, 2, 5)
    with pytest.raises(ValueError, match=message):
        call(memory, state, keys, codebook)


def test_theory_wants_positive_sizes():
    with pytest.raises(ValueError, match="codes: 0 is not a positive integer"):
        recall_theory(8, 8, 0)
    with pytest.raises(ValueError, match="rounds: -1 is not an integer of at least 0"):
        recall_theory(8, 8, 8, rounds=-1)
