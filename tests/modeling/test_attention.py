"""Attention over a window: the operation, what the mixer sees, and what its state holds."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hf_holo import HsnConfig, HsnForCausalLM
from hf_holo.modeling import attention
from hf_holo.modeling.attention import AttentionMixer, WindowMixer, window_attention, window_attention_naive
from hf_holo.modeling.cache import RecurrentLayer
from hf_holo.modeling.layout import TokenLayout

DIM, WINDOW = 24, 5
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def mixer(kind=WindowMixer, **options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "hidden_size": DIM, "num_heads": 4, "num_key_heads": 2, "num_hidden_layers": 1}
    return kind(HsnConfig(**{**sizes, "window": WINDOW, **options})).double().eval()


def hidden(length: int, rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, length, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# The operation --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("window", "length", "past"),
    [(2, 9, 1), (5, 1, 4), (5, 4, 0), (5, 5, 4), (5, 23, 4), (5, 20, 0), (40, 70, 39), (150, 300, 0), (150, 131, 149)],
)
def test_window_attention_equals_its_twin(window, length, past, causal, recorded, monkeypatch):
    """Values and gradients, with padding at both ends and a border of documents, in every form."""
    monkeypatch.setattr(attention, "exporting", lambda: recorded)
    torch.manual_seed(0)
    shapes = {"q": (2, 4, length, 6), "k": (2, 2, past + length, 6), "v": (2, 2, past + length, 6)}
    inputs = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    labels = torch.zeros(2, past + length, dtype=torch.long)
    labels[0, : past // 2] = labels[1, past + (length + 1) // 2 :] = -1
    labels[0, past + length // 3 :] = 1
    results = []
    for operation in (window_attention, window_attention_naive):
        leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        y = operation(**leaves, labels=labels, window=window, past=past, causal=causal)
        y.mul(torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)).sum().backward()
        results.append((y, *(leaf.grad for leaf in leaves.values())))
    for got, expected in zip(*results, strict=True):
        assert torch.isfinite(expected).all()
        torch.testing.assert_close(got, expected, **EXACT)


def test_work_grows_with_the_text_and_not_with_its_square():
    def products(operation, length: int) -> int:
        q = torch.randn(1, 2, length, 8)
        with FlopCounterMode(display=False) as flops, sdpa_kernel(SDPBackend.MATH):  # it counts no other on a CPU
            operation(q, q, q, torch.zeros(1, length, dtype=torch.long), 16)
        return flops.get_total_flops()

    assert products(window_attention, 1024) == 4 * products(window_attention, 256) > 0
    assert products(window_attention_naive, 1024) == 16 * products(window_attention_naive, 256)


# The mixer ------------------------------------------------------------------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
def test_a_window_that_holds_the_text_is_attention_to_all_of_it(causal):
    """With the same weights, and rotary positions that are counted from elsewhere."""
    options = {"window": 30, "rotary_base": 50.0, "causal": causal}
    window, whole = mixer(**options), mixer(AttentionMixer, **options)
    whole.load_state_dict(window.state_dict())
    x = hidden(30)
    torch.testing.assert_close(window(x), whole(x), **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
def test_a_token_hears_its_window_and_nothing_else(causal):
    made, x, at = mixer(causal=causal), hidden(40), 17
    y, changed = made(x), x.clone()
    reached = range(at - WINDOW + 1, at + 1 if causal else at + WINDOW)
    for other in set(range(40)) - set(reached):
        changed[:, other] += 1
    torch.testing.assert_close(made(changed)[:, at], y[:, at], **EXACT)
    for other in reached:
        changed = x.clone()
        changed[:, other] += 1
        assert (made(changed)[:, at] - y[:, at]).abs().max() > 1e-3, other
    alone = x[:, reached.start : reached.stop]  # wherever the window is, the distances in it are the same
    torch.testing.assert_close(made(alone)[:, at - reached.start], y[:, at], **EXACT)


@torch.no_grad()
def test_positions_do_not_grow_with_the_text():
    """In float32, after 100,000 tokens, the text is read as if it began a window ago."""
    made, x, cache = mixer().float(), hidden(20_000, 1).float(), RecurrentLayer()
    for _ in range(5):
        made(x, cache=cache)
    far, near = RecurrentLayer(), RecurrentLayer()
    far.states = dict(cache.states)
    made(x[:, -WINDOW:], cache=near)
    for name, state in near.states.items():
        assert torch.equal(far.states[name], state), name
    assert torch.equal(made(x[:, :3], cache=far), made(x[:, :3], cache=near))


# The state ------------------------------------------------------------------------------------------------------------
def test_the_state_holds_the_last_real_tokens_of_the_last_document():
    made, x = mixer(), hidden(9)
    valid = torch.tensor([[True] * 7 + [False] * 2, [True] * 9])
    document = torch.tensor([[0] * 9, [0] * 6 + [1] * 3])
    cache = RecurrentLayer()
    made(x, TokenLayout(9, valid, valid.sum(1), document), cache)
    keys, values = (made._heads(projection(x)) for projection in (made.k_proj, made.v_proj))  # [B, H, T, V]
    assert {name: tuple(state.shape[1:]) for name, state in cache.states.items()} == made.state_spec()
    assert cache.get("valid").tolist() == [[1, 1, 1, 1], [0, 1, 1, 1]]
    for name, tokens in (("keys", keys), ("values", values)):
        state = cache.get(name)
        torch.testing.assert_close(state[0], tokens[0, :, 3:7], **EXACT)
        torch.testing.assert_close(state[1, :, 1:], tokens[1, :, 6:9], **EXACT)
        assert not state[1, :, 0].any()  # of another document nothing is kept


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 3, 12])
def test_zeros_are_the_window_of_a_text_that_begins(length):
    made, x, zeros = mixer(), hidden(length), RecurrentLayer()
    zeros.states = {name: torch.zeros(2, *shape, dtype=torch.float64) for name, shape in made.state_spec().items()}
    torch.testing.assert_close(made(x, cache=zeros), made(x), **EXACT)


def test_a_bidirectional_window_keeps_nothing():
    assert mixer(causal=False).state_spec() == {}


@torch.no_grad()
def test_windows_have_rotary_positions_without_being_told():
    x = hidden(12)
    assert torch.equal(mixer()(x), mixer(rotary_base=10000.0)(x))
    assert not torch.allclose(mixer()(x), mixer(rotary_base=100.0)(x))


def test_a_model_of_windows_has_a_constant_state_and_sees_the_order():
    layers = {"vocab_size": 11, "hidden_size": 32, "num_hidden_layers": 2, "mixer_types": ["window"] * 2}
    assert "constant_state" in HsnForCausalLM.capabilities_of(HsnConfig(**layers))
    HsnConfig(**layers, causal=False)  # rotary positions tell before from after
    mixed = HsnConfig(**layers | {"mixer_types": ["window", "attention"]})
    assert "constant_state" not in HsnForCausalLM.capabilities_of(mixed)
