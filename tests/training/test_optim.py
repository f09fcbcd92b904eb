"""The optimizers: who gets which rule, exactly the updates that are promised, and ordinary to everyone else."""

import copy
import io
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim._muon import _zeropower_via_newtonschulz
from transformers import LlamaConfig, LlamaForCausalLM

from hf_holo import hsn_tiny
from hf_holo.training import optim
from hf_holo.training.optim import MuonAdamW, WhitenedAdamW, orthogonalized, split_parameters


def tiny_hsn(**overrides) -> nn.Module:
    torch.manual_seed(0)
    return hsn_tiny(vocab_size=11, **{"hidden_size": 16, "num_hidden_layers": 2, **overrides})


def tiny_llama() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=11, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    )


def set_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("make", [tiny_hsn, tiny_llama, lambda: tiny_hsn(channel_mix="gated")])
def test_groups_hold_every_parameter_once(make):
    model = make()
    groups = split_parameters(model)
    grouped = [id(p) for group in groups.values() for p in group]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    assert all(p.ndim == 2 for p in groups["hidden"] + groups["matrices"])
    assert all(p.ndim == 1 or not _is_linear_weight(model, p) for p in groups["rest"])


def _is_linear_weight(model: nn.Module, parameter: nn.Parameter) -> bool:
    return any(isinstance(m, nn.Linear) and m.weight is parameter for m in model.modules())


@pytest.mark.parametrize("make", [tiny_hsn, tiny_llama])
def test_muon_gets_the_linear_weights_inside_the_blocks_and_nothing_else(make):
    model = make()
    hidden = {id(p) for p in split_parameters(model)["hidden"]}
    inside = {id(m.weight) for m in model.model.layers.modules() if isinstance(m, nn.Linear)}
    assert hidden == inside


@pytest.mark.parametrize("tied", [True, False])
def test_muon_never_gets_embedding_or_head(tied):
    model = tiny_hsn(tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    hidden = {id(p) for p in split_parameters(model)["hidden"]}
    assert id(model.lm_head.weight) not in hidden
    assert id(model.model.embed_tokens.weight) not in hidden


def test_a_linear_that_shares_the_embedding_stays_with_adamw():
    model = nn.Module()
    model.embedding = nn.Embedding(8, 8)
    model.layers = nn.ModuleList([nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)])
    model.layers[1].weight = model.embedding.weight
    groups = split_parameters(model)
    assert [id(p) for p in groups["hidden"]] == [id(model.layers[0].weight)]
    assert [id(p) for p in groups["matrices"]] == [id(model.embedding.weight)]


def test_the_rule_does_not_depend_on_names():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm_head = nn.ModuleList([nn.Linear(4, 4)])  # a block, whatever it is called
            self.layer = nn.Linear(4, 4)  # outside all blocks

    model = Odd()
    groups = split_parameters(model)
    assert [id(p) for p in groups["hidden"]] == [id(model.lm_head[0].weight)]
    assert [id(p) for p in groups["matrices"]] == [id(model.layer.weight)]


def test_frozen_parameters_are_left_out():
    model = tiny_hsn()
    model.model.embed_tokens.weight.requires_grad_(False)
    assert all(p.requires_grad for group in split_parameters(model).values() for p in group)


def test_only_matrices_decay():
    optimizer = MuonAdamW.for_model(tiny_hsn(), weight_decay=0.1)
    vectors = [g for g in optimizer.param_groups for p in g["params"] if p.ndim == 1]
    assert vectors and all(group["weight_decay"] == 0.0 for group in vectors)
    assert all(group["weight_decay"] == 0.1 for group in optimizer.param_groups if group["rule"] == "muon")


def test_updates_equal_torchs_own_optimizers_exactly(monkeypatch):
    """But for the precision of Muon on a CPU, which is torch's here."""
    monkeypatch.setattr(optim, "orthogonalized", partial(orthogonalized, dtype=torch.bfloat16))
    ours, theirs = tiny_hsn(), tiny_hsn()
    optimizer = MuonAdamW.for_model(ours, lr=3e-3, muon_lr_ratio=4.0, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-7)
    groups = split_parameters(theirs)
    muon = torch.optim.Muon(groups["hidden"], lr=4.0 * 3e-3, weight_decay=0.1)
    adamw = torch.optim.AdamW(
        [{"params": groups["matrices"]}, {"params": groups["rest"], "weight_decay": 0.0}],
        lr=3e-3,
        weight_decay=0.1,
        betas=(0.8, 0.9),
        eps=1e-7,
    )
    for step in range(3):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        for each in (optimizer, muon, adamw):
            each.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(6, 6), (12, 5), (5, 12)])
def test_orthogonalising_in_float32_is_more_exact_than_torchs(shape):
    """Both are compared with the same iteration on the singular values alone, in float64."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    a, b, c = coefficients = (3.4445, -4.775, 2.0315)
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = a * values + b * values**3 + c * values**5
    wanted = left @ torch.diag(values) @ right
    ours = orthogonalized(matrix, coefficients, 5, 1e-7)
    theirs = _zeropower_via_newtonschulz(matrix, coefficients, 5, 1e-7)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), wanted, atol=1e-4, rtol=1e-4)
    assert (ours - wanted).abs().max() < 0.1 * (theirs - wanted).abs().max()
    assert torch.equal(orthogonalized(matrix, coefficients, 5, 1e-7, torch.bfloat16), theirs)


def test_a_schedule_scales_both_learning_rates():
    model = tiny_hsn()
    optimizer = MuonAdamW.for_model(model, lr=1e-3, muon_lr_ratio=5.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    set_gradients(model, 0)
    optimizer.step()
    scheduler.step()
    rates = {group["rule"]: group["lr"] for group in optimizer.param_groups}
    assert rates == pytest.approx({"adamw": 5e-4, "muon": 2.5e-3})
    assert scheduler.get_last_lr()[0] == pytest.approx(5e-4)  # the one that Trainer logs


def test_a_state_dict_continues_exactly():
    model = tiny_hsn()
    optimizer = MuonAdamW.for_model(model)
    for step in range(2):
        set_gradients(model, step)
        optimizer.step()
    copied = copy.deepcopy(model)
    other = MuonAdamW.for_model(copied, lr=1.0)  # the loaded groups bring the true rate
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for m, o in ((model, optimizer), (copied, other)):
        set_gradients(m, 9)
        o.step()
    for a, b in zip(model.parameters(), copied.parameters(), strict=True):
        assert torch.equal(a, b)


def test_closure_gives_the_loss():
    model = tiny_hsn()
    optimizer = MuonAdamW.for_model(model, lr=1e-3)
    ids = torch.arange(10)[None]

    def closure():
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        return loss

    first = optimizer.step(closure).item()
    assert optimizer.step(closure).item() < first


def test_accelerate_prepares_it():
    from accelerate import Accelerator

    model = tiny_hsn()
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, MuonAdamW.for_model(model))
    before = model.model.layers[0].state_dict()
    before = {name: value.clone() for name, value in before.items()}
    accelerator.backward(model(torch.arange(10)[None], labels=torch.arange(10)[None]).loss)
    optimizer.step()
    assert any(not torch.equal(before[name], value) for name, value in model.model.layers[0].state_dict().items())


def test_bad_groups_are_refused():
    with pytest.raises(ValueError, match="'rule'"):
        MuonAdamW([{"params": [nn.Parameter(torch.zeros(2, 2))]}])
    with pytest.raises(ValueError, match="matrices only"):
        MuonAdamW([{"params": [nn.Parameter(torch.zeros(2))], "rule": "muon"}])
    with pytest.raises(ValueError, match=r"no trainable nn\.Linear"):
        MuonAdamW.for_model(nn.Linear(4, 4))


# WhitenedAdamW ------------------------------------------------------------------------------------------------------


def whitened_problem(rows: int = 3, features: int = 5) -> tuple[nn.Parameter, torch.Tensor]:
    """A matrix and the gram matrix of features of very unequal size."""
    coefficients = nn.Parameter(torch.randn(rows, features, dtype=torch.float64))
    z = torch.randn(200, features, dtype=torch.float64) * torch.logspace(0, 3, features, dtype=torch.float64)
    z = z @ torch.randn(features, features, dtype=torch.float64)
    return coefficients, z.T @ z / len(z)


def test_whitened_steps_are_those_of_adamw_on_the_whitened_matrix():
    coefficients, gram = whitened_problem(rows=8)
    gram += 1e-5 * gram.trace() * torch.eye(len(gram))  # above the floor
    lower = torch.linalg.cholesky(gram)  # C L reads white features
    u, size, v = torch.linalg.svd(coefficients.detach() @ lower, full_matrices=False)
    away = torch.linalg.inv(lower).T @ v.T  # from gradients of C to those of Ĉ; and C = Ĉ awayᵀ, for these rows
    power = size.square() / len(coefficients)  # mean square of the columns of Ĉ = U S
    steps = power.clamp_min(WhitenedAdamW.LEAST**2 * power.sum() / len(gram)).sqrt()
    twin = nn.Parameter(u * (size / steps))  # Ĉ in units of the steps
    ours, theirs = (
        WhitenedAdamW({coefficients: gram}, 0.05),
        torch.optim.AdamW([twin], 0.05, (0.9, 0.95), weight_decay=0.0, eps=1e-8),
    )
    target = torch.randn_like(coefficients)
    for _ in range(5):
        for optimizer, matrix in ((ours, coefficients), (theirs, (twin * steps) @ away.T)):
            optimizer.zero_grad()
            ((matrix - target) @ lower).square().sum().backward()
            optimizer.step()
    expected = (twin * steps) @ away.T
    torch.testing.assert_close(coefficients.detach(), expected.detach(), rtol=1e-6, atol=1e-9)


def test_layers_that_read_the_same_features_are_turned_together():
    (first, gram), (second, _) = whitened_problem(), whitened_problem()
    both = nn.Parameter(torch.cat([first, second]).detach())
    alone, together = WhitenedAdamW({both: gram}), WhitenedAdamW({first: gram, second: gram})
    torch.testing.assert_close(alone.param_groups[0]["whitener"], together.param_groups[1]["whitener"])


def test_whitened_adamw_learns_where_adamw_does_not():
    """One feature is 300 times larger and mixed into the others; the same steps, each at its best of several rates."""
    steps, features = 100, 40
    start = torch.randn(16, features, dtype=torch.float64)
    z = torch.randn(4000, features, dtype=torch.float64)
    z[:, 0] *= 300
    z = z @ (torch.eye(features) + 0.3 * torch.randn(features, features) / features**0.5).double()
    gram = z.T @ z / len(z)
    target = start + 0.1 * torch.randn_like(start) @ torch.linalg.inv(torch.linalg.cholesky(gram)).T

    def after(rate: float, make) -> float:
        matrix = nn.Parameter(start.clone())
        optimizer = make(matrix, rate)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, steps)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = ((matrix - target) @ gram @ (matrix - target).T).trace()
            loss.backward()
            optimizer.step()
            schedule.step()
        return loss.item()

    rates = (0.001, 0.003, 0.01, 0.03)
    whitened = min(after(rate, lambda p, rate: WhitenedAdamW({p: gram}, rate)) for rate in rates)
    plain = min(after(rate, lambda p, rate: torch.optim.AdamW([p], rate, weight_decay=0.0)) for rate in rates)
    assert whitened < plain / 10


def test_whitened_adamw_goes_on_from_its_saved_state():
    coefficients, gram = whitened_problem()
    twin = nn.Parameter(coefficients.detach().clone())
    optimizer = WhitenedAdamW({coefficients: gram})

    def step(optimizer, parameter, seed):
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)).double()
        optimizer.step()

    step(optimizer, coefficients, 1)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    with torch.no_grad():
        twin.copy_(coefficients)
    resumed = WhitenedAdamW({twin: torch.eye(gram.shape[0], dtype=gram.dtype)})
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    step(optimizer, coefficients, 2)
    step(resumed, twin, 2)
    torch.testing.assert_close(twin, coefficients, rtol=0, atol=0)


def test_parameters_without_features_take_the_steps_of_adamw():
    coefficients, gram = whitened_problem()
    ours, theirs = (nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    optimizers = (
        WhitenedAdamW({coefficients: gram}, 0.05, others=[ours]),
        torch.optim.AdamW([theirs], 0.05, (0.9, 0.95), weight_decay=0.0),
    )
    for _ in range(3):
        for optimizer, bias in zip(optimizers, (ours, theirs), strict=True):
            optimizer.zero_grad()
            (coefficients.sum() + bias.pow(3).sum()).backward()
            optimizer.step()
    assert torch.equal(ours, theirs)


def test_whitened_adamw_refuses_a_gram_of_another_size():
    with pytest.raises(ValueError, match=r"grams: \(4, 4\) does not fit a parameter \(3, 5\)"):
        WhitenedAdamW({nn.Parameter(torch.zeros(3, 5)): torch.eye(4)})
