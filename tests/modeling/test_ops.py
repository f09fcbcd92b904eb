"""Every fast operation against its naive twin, in float64: values and gradients."""

import functools
import math

import pytest
import torch

from hf_holo.modeling import binding, filters, phases, recording, resonators, scans

LENGTHS = (1, 7, 63, 64, 65, 200, 1100)
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def assert_twins(fast, naive, inputs: dict[str, torch.Tensor | None], **fixed) -> None:
    """Same outputs, and the same gradient with respect to every input, for a random linear loss."""
    results = []
    for function in (fast, naive):
        leaves = {name: x.clone().requires_grad_() for name, x in inputs.items() if x is not None}
        outputs = function(**leaves, **fixed)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        generator = torch.Generator().manual_seed(1)
        loss = sum((y * torch.randn(y.shape, generator=generator)).sum() for y in outputs)
        loss.backward()
        results.append((outputs, {name: leaf.grad for name, leaf in leaves.items()}))
    (outputs, gradients), (expected_outputs, expected_gradients) = results
    for got, expected in zip(outputs, expected_outputs, strict=True):
        torch.testing.assert_close(got, expected, **TOLERANCE)
    for name, expected in expected_gradients.items():
        assert torch.isfinite(expected).all(), name
        torch.testing.assert_close(
            gradients[name], expected, **TOLERANCE, msg=lambda m, n=name: f"gradient of {n}: {m}"
        )


def documents(batch: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Document indices [B, T]: a few borders at random places, also at chunk borders; row 0 begins with a new one."""
    starts = torch.rand(batch, length, generator=generator) < 0.02
    starts[:, 64::64] |= torch.rand(batch, len(range(64, length, 64)), generator=generator) < 0.5
    starts[0, 0] = True
    return starts.long().cumsum(1)


# ---------------------------------------------------------------------------------------------- binding
@pytest.mark.parametrize("width", [1, 2, 7, 16])
def test_bind_and_unbind_equal_their_twins(width):
    torch.manual_seed(0)
    a, b = torch.randn(3, 5, width), torch.randn(3, 5, width)
    assert_twins(binding.bind, binding.bind_naive, {"a": a, "b": b})
    assert_twins(binding.unbind, binding.unbind_naive, {"c": a, "b": b})


def test_bind_broadcasts_one_key_over_all_tokens():
    torch.manual_seed(0)
    x, key = torch.randn(2, 3, 8), torch.randn(8)
    torch.testing.assert_close(binding.bind(x, key)[1, 2], binding.bind(x[1, 2], key))


@pytest.mark.parametrize("width", [7, 16])
def test_unbinding_with_a_unitary_key_is_exact(width):
    torch.manual_seed(0)
    spectrum = torch.fft.rfft(torch.randn(width))
    key = torch.fft.irfft(spectrum / spectrum.abs(), n=width)
    x = torch.randn(4, width)
    torch.testing.assert_close(binding.unbind(binding.bind(x, key), key), x, **TOLERANCE)


# ---------------------------------------------------------------------------------------------- causal filters
@pytest.mark.parametrize("bins", [129, 128])
def test_minimum_phase_kernel_equals_its_twin(bins):
    torch.manual_seed(0)
    coarse = torch.randn(3, 1, 5)
    smooth = torch.nn.functional.interpolate(coarse, size=bins, mode="linear", align_corners=True)[:, 0]
    fast, naive = (kernel(smooth, 8) for kernel in (filters.minimum_phase_kernel, filters.minimum_phase_kernel_naive))
    torch.testing.assert_close(fast, naive, **TOLERANCE)


def test_minimum_phase_kernel_has_the_magnitude_of_its_gate():
    logits = 1.5 * torch.cos(torch.linspace(0, math.pi, 65))
    kernel = filters.minimum_phase_kernel(logits, 128)
    response = torch.fft.rfft(kernel, n=128).abs()
    torch.testing.assert_close(response, torch.sigmoid(logits), rtol=1e-6, atol=1e-6)


def test_minimum_phase_kernel_of_a_flat_gate_is_a_gain():
    kernel = filters.minimum_phase_kernel(torch.full((17,), 0.3), 8)
    expected = torch.zeros(8)
    expected[0] = torch.sigmoid(torch.tensor(0.3))
    torch.testing.assert_close(kernel, expected, **TOLERANCE)


def test_minimum_phase_kernel_delays_less_than_the_zero_phase_filter():
    """Of all causal filters with one magnitude response, its energy comes first: every partial sum is the largest."""
    torch.manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.randn(1, 1, 5), size=65, mode="linear", align_corners=True)[0, 0]
    kernel = filters.minimum_phase_kernel(smooth, 128)
    linear_phase = torch.fft.irfft(torch.sigmoid(smooth)).roll(64)
    assert (kernel.square().cumsum(0) >= linear_phase.square().cumsum(0) - 1e-9).all()


@pytest.mark.parametrize("length", LENGTHS[:-1])
@pytest.mark.parametrize("with_state", [False, True])
def test_the_short_convolution_equals_its_twin(length, with_state):
    torch.manual_seed(0)
    inputs = {"x": torch.randn(2, length, 3), "kernel": torch.randn(3, 4)}
    inputs["state"] = torch.randn(2, 3, 3) if with_state else None
    assert_twins(filters.short_causal_conv, filters.short_causal_conv_naive, inputs)


def test_causal_convolution_with_a_kernel_longer_than_the_input():
    torch.manual_seed(0)
    inputs = {"x": torch.randn(2, 5, 3), "kernel": torch.randn(3, 40), "state": torch.randn(2, 39, 3)}
    assert_twins(filters.short_causal_conv, filters.short_causal_conv_naive, inputs)


def test_short_convolution_sees_no_other_document():
    torch.manual_seed(0)
    x, kernel, state = torch.randn(1, 9, 3), torch.randn(3, 4), torch.randn(1, 3, 3)
    document = torch.tensor([[0, 0, 0, 0, 1, 1, 2, 2, 2]])
    got = filters.short_causal_conv(x, kernel, state, document)
    pieces = zip(x.split((4, 2, 3), 1), (state, None, None), strict=True)
    expected = torch.cat([filters.short_causal_conv_naive(piece, kernel, before) for piece, before in pieces], 1)
    torch.testing.assert_close(got, expected, **TOLERANCE)
    inputs = {"x": x, "kernel": kernel, "state": state}
    assert_twins(filters.short_causal_conv, filters.short_causal_conv_naive, inputs, document=document)


@pytest.mark.parametrize("taps", range(1, 10))
def test_the_zero_phase_kernel_equals_its_twin_and_is_symmetric(taps):
    torch.manual_seed(0)
    logits = torch.randn(3, 17)
    assert_twins(filters.zero_phase_kernel, filters.zero_phase_kernel_naive, {"gate_logits": logits}, taps=taps)
    kernel = filters.zero_phase_kernel(logits, taps)
    assert kernel.shape == (3, 2 * (taps // 2) + 1)
    torch.testing.assert_close(kernel, kernel.flip(-1), **TOLERANCE)


# ---------------------------------------------------------------------------------------------- phases
def test_drift_angles_stay_exact_far_out():
    omega = torch.tensor([[0.1, 2.5]], dtype=torch.float32)
    tokens = torch.tensor([0, 1, 1_000_003])
    angles = phases.drift_angles(omega, tokens)
    assert angles.shape == (3, 1, 2) and angles.dtype == torch.float32
    exact = (omega.double() * tokens[:, None, None]) % (2 * math.pi)
    torch.testing.assert_close(angles.double(), exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("length", [1, 7, 300])
def test_summed_turns_equal_their_twin(length):
    turn = 20 * torch.randn(2, length, 3, generator=torch.Generator().manual_seed(0))  # several times round a token
    assert_twins(phases.summed_turns, phases.summed_turns_naive, {"turn": turn})


def test_summed_turns_do_not_grow_and_lose_nothing():
    third = torch.full((1, 30_001, 1), 2 * math.pi / 3, dtype=torch.float32)
    total = phases.summed_turns(third)
    assert total.dtype == torch.float32 and total.min() >= 0 and total.max() < 2 * math.pi + 1e-3
    torch.testing.assert_close(total[0, -1].cos(), third[0, 0].cos(), rtol=0, atol=2e-3)  # 30,001 % 3 == 1


def test_turns_are_drawn_to_whole_fractions_and_stay_smooth():
    fractions = [2, 3, 4, 6]
    whole = torch.randint(-5, 6, (9, 4), generator=torch.Generator().manual_seed(0)).to(torch.float64)
    off = torch.linspace(-0.3, 0.3, 9)[:, None]
    steps = phases.whole_turns(whole + off, fractions) * torch.tensor(fractions) / (2 * math.pi)
    torch.testing.assert_close(steps, whole, rtol=0, atol=1e-6)
    x = torch.linspace(-1, 1, 2001)[:, None].expand(-1, 4).clone().requires_grad_()
    angles = phases.whole_turns(x, fractions)
    assert angles.diff(dim=0).min() > -1e-12 and angles.diff(dim=0).max() < 0.06  # rises everywhere, jumps nowhere
    angles.sum().backward()
    slope = x.grad * torch.tensor(fractions) / (2 * math.pi)
    assert slope.min() >= 0 and slope[(x.detach() % 1 - 0.5).abs() < 0.2].min() > 0.1  # between two it can be moved


def test_turns_have_the_gradient_of_the_gentle_curve():
    x = torch.linspace(-1.3, 1.3, 40).view(10, 4).requires_grad_()
    weight = torch.randn(10, 4)
    expected = torch.autograd.grad((phases.gentle_turns(x, [2, 3, 4, 6]) * weight).sum(), x)[0]
    found = torch.autograd.grad((phases.whole_turns(x, [2, 3, 4, 6]) * weight).sum(), x)[0]
    torch.testing.assert_close(found, expected, **TOLERANCE)


def test_phase_features_equal_their_twin():
    torch.manual_seed(0)
    drift = torch.randn(7, 2, 3)
    assert_twins(phases.phase_features, phases.phase_features_naive, {"theta": torch.randn(2, 7, 2, 3)}, drift=drift)


def test_rotating_a_state_equals_rotating_the_query_back():
    """Reading e^{-i angle} M with phases θ is reading M with phases θ + angle: cos(θ + angle - θ_k)."""
    torch.manual_seed(0)
    theta, angle = torch.randn(1, 1, 2, 3), torch.randn(2, 3)
    state = torch.randn(1, 2, 6, 5)
    rotated = phases.phase_features_naive(theta, torch.zeros(1, 2, 3)) @ phases.rotate_state(state, angle)
    read = phases.phase_features_naive(theta, angle[None]) @ state
    torch.testing.assert_close(rotated, read, **TOLERANCE)


# ---------------------------------------------------------------------------------------------- scans
def scan_inputs(scan: str, length: int, groups: int, with_state: bool, generator: torch.Generator) -> dict:
    batch, heads, features, width = 2, 2, 6, 3

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    q = normal(batch, heads * groups, length, features)
    k = normal(batch, heads, length, features)
    how_much = torch.nn.functional.logsigmoid(normal(batch, heads, length))
    return {
        "q": q / q.norm(dim=-1, keepdim=True),
        "k": k / k.norm(dim=-1, keepdim=True),
        "v": normal(batch, heads, length, width),
        "log_decay": -torch.nn.functional.softplus(normal(batch, heads, length) - 2),
        **({"log_write": how_much} if scan == "interference" else {"strength": how_much.exp()}),
        "state": normal(batch, heads, features, width) if with_state else None,
    }


SCANS = ("interference", "cancelling")


def scan_pair(scan: str) -> tuple:
    return getattr(scans, f"{scan}_scan"), getattr(scans, f"{scan}_scan_naive")


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("length", [*LENGTHS[:-1], pytest.param(LENGTHS[-1], marks=pytest.mark.slow)])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_scans_equal_their_twins(scan, length, with_state, with_documents, groups):
    generator = torch.Generator().manual_seed(length)
    inputs = scan_inputs(scan, length, groups, with_state, generator)
    document = documents(2, length, generator) if with_documents else None
    assert_twins(*scan_pair(scan), inputs, document=document)


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("chunk", [1, 16, 50, 256])
def test_the_chunk_changes_no_result(scan, chunk):
    generator = torch.Generator().manual_seed(0)
    inputs = scan_inputs(scan, 200, 1, True, generator)
    document = documents(2, 200, generator)
    fast, naive = scan_pair(scan)
    assert_twins(functools.partial(fast, chunk=chunk), naive, inputs, document=document)


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("with_documents", [False, True])
def test_the_exported_scan_equals_the_twin(monkeypatch, scan, length, with_documents):
    """What is recorded into graphs: no loop over chunks, no autograd function, always padded to whole chunks."""
    for module in (recording, scans):
        monkeypatch.setattr(module, "exporting", lambda: True)
    generator = torch.Generator().manual_seed(length)
    inputs = scan_inputs(scan, length, 2, True, generator)
    document = documents(2, length, generator) if with_documents else None
    assert_twins(*scan_pair(scan), inputs, document=document)


@pytest.mark.parametrize("scan", SCANS)
def test_padded_tokens_leave_the_state_alone(scan):
    fast, naive = scan_pair(scan)
    inputs = scan_inputs(scan, 70, 1, True, torch.Generator().manual_seed(0))
    inputs["log_decay"][:, :, 30:] = 0.0
    if scan == "interference":
        inputs["log_write"][:, :, 30:] = float("-inf")
    else:
        inputs["strength"][:, :, 30:] = 0.0
    short = {name: x if name == "state" else x[:, :, :30] for name, x in inputs.items()}
    torch.testing.assert_close(fast(**inputs)[1], naive(**short)[1], **TOLERANCE)


@pytest.mark.parametrize("scan", SCANS)
def test_no_decay_overflows_however_strong(scan):
    """Decays of e^-1000 a token: weights are exponentials of differences, so nothing divides by zero."""
    generator = torch.Generator().manual_seed(0)
    inputs = scan_inputs(scan, 130, 1, True, generator)
    inputs["log_decay"] = torch.where(torch.rand(2, 2, 130, generator=generator) < 0.2, -1000.0, -0.01)
    assert_twins(*scan_pair(scan), inputs)


@pytest.mark.parametrize("strength", [1.0, 1.9, 2.0])
def test_writes_that_turn_round_what_a_key_recalls_equal_their_twin(strength):
    """β up to 2, for keys that come again: the state is reflected and does not grow."""
    inputs = scan_inputs("cancelling", 200, 2, True, torch.Generator().manual_seed(0))
    inputs["k"] = inputs["k"][:, :, :1].expand(-1, -1, 200, -1).contiguous()
    inputs["strength"] = torch.full_like(inputs["strength"], strength)
    assert_twins(*scan_pair("cancelling"), inputs, document=documents(2, 200, torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("scan", SCANS)
def test_a_key_that_comes_again_and_again_costs_no_precision(scan):
    """One key for all tokens, almost no decay, full strength: the hardest case for the inverse in the chunk."""
    inputs = scan_inputs(scan, 256, 1, True, torch.Generator().manual_seed(0))
    inputs["k"] = inputs["k"][:, :, :1].expand(-1, -1, 256, -1).contiguous()
    inputs["log_decay"] = torch.full_like(inputs["log_decay"], -0.001)
    how_much = {"log_write": math.log(0.95)} if scan == "interference" else {"strength": 0.95}
    inputs |= {name: torch.full_like(inputs[name], value) for name, value in how_much.items()}
    fast, naive = scan_pair(scan)
    exact, _ = naive(**inputs)
    single, _ = fast(**{name: x.float() for name, x in inputs.items()})
    assert ((single - exact).abs().max() / exact.abs().max()).item() < 1e-5


# ---------------------------------------------------------------------------------------------- steps
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("name", ["interference", "cancelling"])
def test_steps_of_scans_equal_their_twins(name, groups):
    torch.manual_seed(0)
    rows, heads, features, width = 2, 3, 8, 5
    inputs = {
        "q": torch.randn(rows, heads * groups, features),
        "k": torch.nn.functional.normalize(torch.randn(rows, heads, features), dim=-1),
        "v": torch.randn(rows, heads, width),
        "decay": torch.rand(rows, heads),
        "write" if name == "interference" else "strength": torch.rand(rows, heads),
        "state": torch.randn(rows, heads, features, width),
    }
    assert_twins(getattr(scans, f"{name}_step"), getattr(scans, f"{name}_step_naive"), inputs)


def test_a_step_of_a_filter_equals_its_twin():
    torch.manual_seed(0)
    inputs = {"x": torch.randn(2, 1, 6), "taps": torch.randn(4, 6), "state": torch.randn(2, 3, 6)}
    assert_twins(filters.short_causal_conv_step, filters.short_causal_conv_step_naive, inputs)


@pytest.mark.parametrize("dim", [-1, -2])
def test_turning_equals_its_twin(dim):
    torch.manual_seed(0)
    along, across = phases.turning(*torch.randn(2, 4, 4), dim)
    x = torch.randn(3, 8, 4) if dim == -2 else torch.randn(3, 4, 8)
    assert_twins(phases.turn_halves, phases.turn_halves_naive, {"x": x, "along": along, "across": across}, dim=dim)


@pytest.mark.parametrize("begun", [True, False], ids=["continued", "new"])
@pytest.mark.parametrize("borders", [True, False], ids=["borders", "plain"])
def test_a_step_of_a_bank_equals_its_twin(begun, borders):
    torch.manual_seed(0)
    bank = resonators.ResonatorBank(6, 2, 3, 0.1, 3.0).double()
    with torch.no_grad():
        along, across, weights = bank.kept_coefficients()
    state = torch.randn(2, 6, 6) if begun else None
    fixed = {"lengths": torch.tensor([1, 0]), "document": torch.tensor([[1], [0]])} if borders else {}
    inputs = {"u": torch.randn(2, 1, 6), "state": state}
    fixed |= {"along": along, "across": across, "weights": weights}
    assert_twins(resonators.resonate_step, resonators.resonate_step_naive, inputs, **fixed)


def test_a_one_sided_convolution_equals_its_twin():
    torch.manual_seed(0)
    inputs = {"rows": torch.randn(3, 2, 2, 9), "kernel": torch.randn(3, 9)}
    assert_twins(resonators.one_sided, resonators.one_sided_naive, inputs)
    expected = resonators.one_sided_naive(**inputs)
    torch.testing.assert_close(resonators.one_sided(**inputs), expected, **TOLERANCE)  # without gradients
