"""The resonator bank: its three forms agree, it stays stable, and its gradients are those of magnitude and phase."""

import itertools
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_holo.modeling import resonators
from hf_holo.modeling.chunks import ChunkContext
from hf_holo.modeling.layout import TokenLayout
from hf_holo.modeling.resonators import MIN_DAMPING, ResonatorBank, resonate, resonate_naive

EXACT = {"rtol": 1e-9, "atol": 1e-9}
DIM, BANKS, MODES = 6, 2, 3


def make(rows=2, length=40, seed=0, state=True):
    """Arguments of [`resonate`] in float64, all with gradients but the frequencies."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    return {
        "u": random(rows, length, DIM),
        "damping": (0.05 + random(BANKS, MODES).detach().abs()).requires_grad_(),
        "omega": torch.tensor([0.0, 0.4, 2.5], dtype=torch.float64),
        "magnitude": random(DIM, MODES),
        "phase": random(DIM, MODES),
        "state": random(rows, DIM, 2 * MODES) if state else None,
    }


def assert_same_with_gradients(arguments, fast, naive):
    leaves = [x for x in arguments.values() if torch.is_tensor(x) and x.requires_grad]
    found = []
    for run in (fast, naive):
        outputs = run()
        reading = sum((x * torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view_as(x)).sum() for x in outputs)
        found.append((outputs, torch.autograd.grad(reading, leaves)))
    torch.testing.assert_close(found[0], found[1], **EXACT)


DOCUMENTS = torch.tensor([[0] * 7 + [1] * 20 + [2] + [3] * 12, [1] * 33 + [2] * 7])
CASES = {
    "plain": {},
    "lengths": {"lengths": torch.tensor([40, 17])},
    "an empty row": {"lengths": torch.tensor([0, 33])},
    "documents": {"document": DOCUMENTS},
    "documents and lengths": {"document": DOCUMENTS, "lengths": torch.tensor([27, 34])},
}


@pytest.mark.parametrize("export", [False, True], ids=["fft", "products"])
@pytest.mark.parametrize("segment", [None, 8])
@pytest.mark.parametrize("state", [False, True], ids=["fresh", "continued"])
@pytest.mark.parametrize("case", CASES)
def test_every_form_equals_the_recurrence(monkeypatch, case, state, segment, export):
    monkeypatch.setattr(resonators, "exporting", lambda: export)
    monkeypatch.setattr(resonators, "JUMPS", 2)  # so that a few segments take several levels
    arguments = make(state=state)
    assert_same_with_gradients(
        arguments,
        lambda: resonate(**arguments, **CASES[case], segment=segment),
        lambda: resonate_naive(**arguments, **CASES[case]),
    )


@torch.no_grad()
def test_the_segment_changes_no_result():
    arguments = make(length=1000)
    expected = resonate(**arguments, segment=1000)
    for segment in (1, 7, 512, 4096):
        torch.testing.assert_close(resonate(**arguments, segment=segment), expected, **EXACT)


@torch.no_grad()
def test_an_exported_bank_says_where_its_reach_ends(monkeypatch):
    monkeypatch.setattr(resonators, "exporting", lambda: True)
    monkeypatch.setattr(resonators, "JUMPS", 2)
    monkeypatch.setattr(resonators, "LEVELS", 2)
    y, _ = resonate(**make(), segment=8)  # five segments, four of which can be reached
    assert torch.isfinite(y[:, :32]).all() and torch.isnan(y[:, 32:]).all()


def test_a_compiler_is_told_of_a_single_token(monkeypatch):
    """Then it is one step of the recurrence, not a padded chunk of products."""
    arguments = make(length=1)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with FlopCounterMode(display=False) as products:
        got = resonate(**arguments)
    assert products.get_total_flops() == 0
    torch.testing.assert_close(got, resonate_naive(**arguments), **EXACT)


def test_a_trace_of_a_single_token_takes_any_number_of_them():
    bank, u = make_bank(), make(length=9, state=False)["u"].detach()
    traced = torch.jit.trace(bank, (u[:, :1],), check_trace=False)
    torch.testing.assert_close(traced(u), bank(u), **EXACT)


# ---------------------------------------------------------------------------------------------- the bank
def make_bank(dim=DIM, banks=BANKS, modes=MODES, lowest=0.05, highest=math.pi, seed=0):
    torch.manual_seed(seed)
    return ResonatorBank(dim, banks, modes, lowest, highest).double()


@torch.no_grad()
def test_the_kernel_is_the_sum_of_damped_modes():
    bank, length = make_bank(), 50
    time = torch.arange(length)
    damping = bank.damping().repeat_interleave(DIM // BANKS, 0)[..., None]  # [D, K, 1]
    waves = torch.cos(bank.omega()[:, None] * time + bank.phase[..., None])
    expected = (bank.magnitude[..., None] * torch.exp(-damping * time) * waves).sum(1)
    torch.testing.assert_close(bank.kernel(length), expected, **EXACT)
    impulse = torch.zeros(1, length, DIM, dtype=torch.float64)
    impulse[:, 0] = 1
    torch.testing.assert_close(bank(impulse)[0][0].T, expected, **EXACT)


def test_frequencies_are_spaced_evenly_in_the_logarithm_and_survive_casts():
    bank = make_bank(modes=5, lowest=0.01, highest=1.0)
    omega = bank.omega()
    assert omega[0] == 0 and omega.dtype == torch.float64
    torch.testing.assert_close(omega[1:].log10(), torch.tensor([-2, -4 / 3, -2 / 3, 0], dtype=torch.float64))
    assert torch.equal(bank.bfloat16().omega(), omega)
    assert bank.bfloat16().damping().dtype == torch.float32


@torch.no_grad()
def test_noise_keeps_its_size_in_every_bank():
    bank = make_bank(dim=512, banks=4, modes=16)
    noise = torch.randn(1, 4096, 512, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sizes = bank(noise)[0][0, 1024:].unflatten(-1, (4, -1)).square().mean((0, 2)).sqrt()
    assert (sizes > 0.5).all() and (sizes < 2.0).all(), sizes


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((16, 4, 3, -0.1, 3.0), "lowest: -0.1 is not a positive number"),
        ((16, 4, 3, 0.1, 3.2), "highest: 3.2 is not a positive number of at most π"),
        ((16, 4, 3, 2.0, 1.0), "lowest: 2.0 is above highest=1.0"),
        ((16, 5, 3, 0.1, 3.0), "banks: 5 does not divide dim=16"),
        ((16, 4, 0, 0.1, 3.0), "modes: 0 is not a positive integer"),
    ],
)
def test_bad_sizes_of_a_bank(sizes, message):
    with pytest.raises(ValueError, match=message):
        ResonatorBank(*sizes)


def test_chunks_hold_tokens():
    with pytest.raises(ValueError, match="chunk_length: 0 is not a positive integer"):
        ChunkContext(0, ResonatorBank(16, 4, 3, 0.1, 3.0))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_damping_never_becomes_negative(optimizer):
    bank = make_bank().float()
    steps = optimizer(bank.parameters(), lr=1e3)
    u = torch.randn(1, 64, DIM, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        bank.damping().sum().backward()  # downhill: as little damping as there can be
        steps.step()
        steps.zero_grad()
        assert (bank.damping() >= MIN_DAMPING).all()
    y, state = bank(u)
    assert torch.isfinite(y).all() and torch.isfinite(state).all()
    with torch.no_grad():
        bank.raw_damping.fill_(1e9)  # and as much as there can be: only the present is heard
        now = (u[..., None] * bank.magnitude * bank.phase.cos()).sum(-1)
        torch.testing.assert_close(bank(u)[0], now, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_it_is_stable_after_300_000_tokens():
    """Single precision, streamed with long segments and then token by token, against the exact sum over the past."""
    length, steps = 300_000, 200
    bank = make_bank(dim=2, banks=1, modes=4).float()
    bank.raw_damping.fill_(-12.0)  # a memory of tens of thousands of tokens
    u = torch.randn(1, length + steps, 2, generator=torch.Generator().manual_seed(0))
    streamed, state = bank(u[:, :length])
    outputs = [streamed[:, -1]]
    for t in range(length, length + steps):
        y, state = bank(u[:, t : t + 1], state)
        outputs.append(y[:, 0])
    kernel = bank.double().kernel(length + steps)  # [D, T]
    for y, last in ((outputs[0], length), (outputs[-1], length + steps)):
        exact = (kernel[:, :last].flip(-1) * u[0, :last].T.double()).sum(-1)
        torch.testing.assert_close(y[0].double(), exact, rtol=1e-3, atol=1e-3 * streamed.std().item())


def test_gradients_of_magnitude_and_phase_are_those_of_the_theorem():
    """Theorem 1 of the Resonance reference: with w = m e^{iφ}, dL/dm = Re(e^{iφ} G) and dL/dφ = -m Im(e^{iφ} G), where
    G_k = Σ_t dL/dy_t z_{t,k} gathers what every mode has heard."""
    bank, length = make_bank(), 30
    u = torch.randn(1, length, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    reading = torch.randn(length, DIM, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    got = torch.autograd.grad((bank(u)[0][0] * reading).sum(), (bank.magnitude, bank.phase))
    damping = bank.damping().detach().repeat_interleave(DIM // BANKS, 0)  # [D, K]
    mode = torch.polar(torch.exp(-damping), bank.omega().expand_as(damping))
    z, heard = torch.zeros_like(mode), torch.zeros_like(mode)
    for t in range(length):
        z = mode * z + u[0, t, :, None]
        heard = heard + reading[t, :, None] * z
    turned = torch.polar(torch.ones_like(bank.phase), bank.phase.detach()) * heard
    torch.testing.assert_close(got[0], turned.real, **EXACT)
    torch.testing.assert_close(got[1], -bank.magnitude.detach() * turned.imag, **EXACT)


# ---------------------------------------------------------------------------------------------- hierarchical context
CHUNK = 5


def naive_context(context, u):
    """What every token of one document `[T, D]` hears: the coarse filter over the means of earlier chunks."""
    means = [chunk.mean(0) for chunk in u.split(CHUNK) if len(chunk) == CHUNK]
    kernel = context.bank.kernel(len(means) + 1)  # [D, S]
    rows = []
    for t in range(len(u)):
        own = t // CHUNK
        rows.append(sum((kernel[:, own - 1 - n] * means[n] for n in range(own)), torch.zeros(DIM, dtype=u.dtype)))
    return torch.stack(rows)


@pytest.fixture
def context():
    return ChunkContext(CHUNK, make_bank())


def noise(rows, length, seed=3):
    return torch.randn(rows, length, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("export", [False, True], ids=["eager", "export"])
def test_the_context_is_the_filtered_means_of_earlier_chunks(monkeypatch, context, export):
    monkeypatch.setattr(resonators, "exporting", lambda: export)
    u = noise(2, 33).requires_grad_()
    leaves = [u, *context.parameters()]
    expected = torch.stack([naive_context(context, row) for row in u])
    got = context(u, TokenLayout(33))
    torch.testing.assert_close(got, expected, **EXACT)
    reading = noise(2, 33, seed=4)
    torch.testing.assert_close(
        torch.autograd.grad((got * reading).sum(), leaves),
        torch.autograd.grad((expected * reading).sum(), leaves),
        **EXACT,
    )


@torch.no_grad()
@pytest.mark.parametrize("export", [False, True], ids=["eager", "export"])
def test_chunks_count_the_real_tokens_of_each_document(monkeypatch, context, export):
    monkeypatch.setattr(resonators, "exporting", lambda: export)
    borders, length = ((0, 4, 14, 15, 29), (0, 10, 11, 22)), 32  # where documents begin and the real tokens end
    u, document = noise(2, length), torch.zeros(2, length, dtype=torch.long)
    lengths = torch.tensor([29, 22])
    valid = torch.arange(length) < lengths[:, None]
    for row, starts in enumerate(borders):
        for number, start in enumerate(starts[:-1]):
            document[row, start:] = number
    got = context(u * valid[..., None], TokenLayout(length, valid, lengths, document))
    for row, starts in enumerate(borders):
        for start, end in itertools.pairwise(starts):
            torch.testing.assert_close(got[row, start:end], naive_context(context, u[row, start:end]), **EXACT)


def test_a_chunk_is_heard_by_later_chunks_only(context):
    u = noise(1, 4 * CHUNK).requires_grad_()
    for t in range(4 * CHUNK):
        (influence,) = torch.autograd.grad(context(u, TokenLayout(4 * CHUNK))[0, t].sum(), u, allow_unused=True)
        heard = (influence[0].abs().amax(-1) > 1e-12).tolist()  # an FFT leaves rounding behind
        assert heard == [s // CHUNK < t // CHUNK for s in range(4 * CHUNK)]
