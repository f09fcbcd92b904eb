"""The memory inside a model: what it holds, when it can be read, and how far it reaches."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from hf_holo import ResonanceConfig, ResonanceModel
from hf_holo.eval.conformance.subject import perturb
from hf_holo.modeling import filters, recording, resonators, scans
from hf_holo.modeling import memory as memory_module
from hf_holo.modeling.chunks import FadingSum
from hf_holo.modeling.layout import TokenLayout
from hf_holo.modeling.memory import HolographicMemory, PersistentMemory

EXACT = {"rtol": 1e-9, "atol": 1e-9}
DIM, PHASORS, CHUNK = 6, 8, 5


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(dim=DIM, phasors=PHASORS, chunk=CHUNK, seed=0):
    torch.manual_seed(seed)
    return perturb(PersistentMemory(dim, phasors, chunk)).double()


def naive(memory, x):
    """What the tokens of one document `[T, D]` read: a HolographicMemory that is written to, chunk by chunk."""
    store, rows = HolographicMemory(memory.store.dimension), []
    state, rate = store.empty(dtype=x.dtype), torch.exp(-resonators.positive_damping(memory.chunks.bank.raw_damping))[0]
    for chunk in x.split(memory.chunks.chunk_length):
        rows.append(store.read(state, memory.query_proj(chunk)))
        strength = memory.strength_proj(chunk).sigmoid()[:, 0] / memory.chunks.chunk_length
        state = store.write(store.decay(state, rate), memory.key_proj(chunk), memory.value_proj(chunk), strength)
    read = torch.cat(rows)
    return memory.out_proj(F.rms_norm(read, read.shape[-1:], eps=memory.norm_eps))


@pytest.mark.parametrize("export", [False, True], ids=["eager", "export"])
def test_it_is_a_holographic_memory_written_to_chunk_by_chunk(monkeypatch, export):
    for module in (filters, memory_module, recording, resonators, scans):
        monkeypatch.setattr(module, "exporting", lambda: export)
    memory, x = make(), noise(2, 33, DIM).requires_grad_()
    leaves = [x, *memory.parameters()]
    got, expected = memory(x), torch.stack([naive(memory, row) for row in x])
    torch.testing.assert_close(got, expected, **EXACT)
    reading = noise(2, 33, DIM, seed=1)
    found = [torch.autograd.grad((y * reading).sum(), leaves) for y in (got, expected)]
    torch.testing.assert_close(*found, **EXACT)


@torch.no_grad()
def test_documents_and_padding_are_kept_apart():
    borders, length = ((0, 4, 14, 15, 29), (0, 10, 11, 22)), 32  # where documents begin and the real tokens end
    document, lengths = torch.zeros(2, length, dtype=torch.long), torch.tensor([29, 22])
    for row, starts in enumerate(borders):
        for number, start in enumerate(starts[:-1]):
            document[row, start:] = number
    memory, x, valid = make(), noise(2, length, DIM), torch.arange(length) < lengths[:, None]
    got = memory(x, TokenLayout(length, valid, lengths, document))
    for row, starts in enumerate(borders):
        for start, end in itertools.pairwise(starts):
            torch.testing.assert_close(got[row, start:end], naive(memory, x[row, start:end]), **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [None, torch.tensor([9, 0])])
def test_a_fading_sum_is_its_recurrence(lengths):
    bank = FadingSum(DIM).double()
    bank.raw_damping.fill_(-1.0)
    u, state = noise(2, 9, DIM), noise(2, 1, DIM, seed=1)
    rate, expected, last = torch.exp(-resonators.positive_damping(bank.raw_damping)), [], state[:, 0]
    for t in range(9):
        last = rate * last + u[:, t]
        expected.append(last)
    y, after = bank(u, state, lengths)
    rows = slice(None) if lengths is None else slice(0, 1)
    torch.testing.assert_close(y[rows], torch.stack(expected, 1)[rows], **EXACT)
    torch.testing.assert_close(after[rows, 0], last[rows], **EXACT)
    if lengths is not None:
        torch.testing.assert_close(after[1], state[1], **EXACT)


@torch.no_grad()
def test_a_pair_is_recalled_100_chunks_later():
    """Projections that write the value next to the key of one token, and read it with that key: 100 chunks of other
    pairs come between, and the memory still knows which of 20 values it was."""
    values, phasors, chunk, chunks = 20, 512, 8, 100
    dim = 2 * values + 1  # one-hot keys, one-hot values, and whether to write
    memory = PersistentMemory(dim, phasors, chunk).double()
    for projection in (memory.key_proj, memory.query_proj, memory.value_proj, memory.strength_proj):
        projection.weight.zero_()
    codes = noise(2 * phasors, values)
    memory.key_proj.weight[:, :values] = math.pi * noise(phasors, values, seed=1)
    memory.query_proj.weight.copy_(memory.key_proj.weight)
    memory.value_proj.weight[:, values : 2 * values] = codes
    memory.strength_proj.weight[:, -1] = 20.0
    memory.out_proj = torch.nn.Linear(2 * phasors, values, bias=False).double()
    memory.out_proj.weight.copy_(codes.T)

    pair = torch.randint(values, (chunks * chunk, 2), generator=torch.Generator().manual_seed(2))
    pair[:, 0] = pair[:, 0] % (values - 1) + 1  # key 0 is written once, in the first chunk
    pair[3] = torch.tensor([0, 7])
    x = torch.zeros(1, len(pair) + 1, dim, dtype=torch.float64)
    x[0, :-1].scatter_(1, pair + torch.tensor([0, values]), 1.0)
    x[..., -1] = -1.0  # silent but for a few
    x[0, :60, -1] = 1.0
    x[0, -1, 0] = 1.0  # which value belongs to key 0?
    assert memory(x)[0, -1].argmax() == 7


def test_gradients_reach_writes_that_the_modes_have_long_forgotten():
    config = ResonanceConfig(vocab_size=11, hidden_size=16, num_hidden_layers=1, memory_dimension=16)
    reach = {}
    for memory in (None, 16):
        torch.manual_seed(0)
        config.memory_dimension = memory
        model = ResonanceModel(config).double()
        embeds = noise(1, 12_000, 16).requires_grad_()
        (gradient,) = torch.autograd.grad(model(inputs_embeds=embeds).last_hidden_state[0, -1, 0], embeds)
        sizes = gradient[0].norm(dim=-1)
        reach[memory] = (sizes[:200].max() / sizes[-1]).item()
    assert reach[None] < 1e-9 and reach[16] > 1e-7
