import copy

import pytest
import torch

from hf_holo.conversion import HoloSurgeryConfig
from hf_holo.conversion.surgery.calibration import allocate, collect, factorise, find_sites, install, stacked_weight
from hf_holo.conversion.surgery.refit import DAMPING, Arrival, Call, fit, refit, residual_writers, worth_refitting
from hf_holo.errors import HoloError

WRITERS = {
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "phi3": ("self_attn.o_proj", "mlp.down_proj"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "bert": (),  # it normalises the sum
}


def token_windows(count: int = 24, length: int = 32) -> torch.Tensor:
    return torch.randint(3, 80, (count, length), generator=torch.Generator().manual_seed(0))


def calibrated(model, ratio: float):
    """Sites, ranks, factors and statistics at this ratio."""
    sites = find_sites(model, HoloSurgeryConfig(shared=True))
    statistics = collect(model, sites, token_windows(), token_windows(4))
    factors = [factorise(site, stacked_weight(model, site), s) for site, s in zip(sites, statistics, strict=True)]
    return sites, allocate(sites, [f.loss for f in factors], ratio), factors, [s.fisher for s in statistics]


@torch.no_grad()
def logit_error(student, teacher, windows) -> float:
    """Squared distance of the log-probabilities, without what all tokens share."""
    distance = student(windows).logits.log_softmax(-1) - teacher(windows).logits.log_softmax(-1)
    return float(distance.square().mean())


@pytest.mark.parametrize("outputs", [3, 6])
@pytest.mark.parametrize("writes", [False, True])
def test_fitted_weights_solve_the_damped_least_squares(writes, outputs):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    weight, theirs, noise = draw(outputs, 4), draw(2, 50, 4), draw(2, 50, 4)
    streams = draw(2, 2, 50, outputs)
    ours = theirs + 0.3 * noise
    passages = [(Arrival(theirs[n], streams[0, n]), Arrival(ours[n], streams[1, n])) for n in range(2)]

    fitted, gram = fit(weight, iter(passages), writes)

    x, y = ours.flatten(0, 1), theirs.flatten(0, 1) @ weight.T
    if writes:
        y = y + (streams[0] - streams[1]).flatten(0, 1)
    root = (DAMPING * (x.T @ x).trace() / 4).sqrt()  # the damping as rows of a plain least-squares problem
    rows, targets = torch.cat([x, root * torch.eye(4).double()]), torch.cat([y, root * weight.T])
    torch.testing.assert_close(fitted, torch.linalg.lstsq(rows, targets).solution.T)
    torch.testing.assert_close(gram, x.T @ x / len(x))


def test_the_layers_that_write_into_the_stream_are_found(teacher):
    block_name, kind = {
        "llama": ("model.layers.1", "llama"),
        "phi3": ("model.layers.1", "phi3"),
        "gpt2": ("transformer.h.1", "gpt2"),
        "bert": ("bert.encoder.layer.1", "bert"),
    }[teacher.config.model_type]
    calls = []
    block = teacher.get_submodule(block_name)
    block.register_forward_pre_hook(lambda m, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    teacher.config.use_cache = False
    with torch.no_grad():
        teacher(token_windows(1))
        args, kwargs = calls[0]
        assert residual_writers(block, Call(args[0], args[1:], kwargs), args[0]) == WRITERS[kind]


def test_refitting_brings_the_student_nearer_to_the_teacher(teacher):
    sites, ranks, factors, fishers = calibrated(teacher, ratio=0.6)
    plain, fitted = copy.deepcopy(teacher), copy.deepcopy(teacher)
    for site, numbers, rank in zip(sites, factors, ranks, strict=True):
        if rank is not None:
            install(plain, site, numbers, rank)

    errors = refit(fitted, sites, ranks, fishers, token_windows())

    fresh = torch.randint(3, 80, (16, 32), generator=torch.Generator().manual_seed(1))
    assert logit_error(fitted, teacher, fresh) < logit_error(plain, teacher, fresh)
    assert len(errors) == len(sites) and all(0 <= error < 1 for error in errors)
    assert fitted.config.use_cache == teacher.config.use_cache


def test_refitting_at_full_rank_changes_nothing(teacher):
    sites, _, _, fishers = calibrated(teacher, ratio=0.6)
    student = copy.deepcopy(teacher)
    refit(student, sites, [site.size for site in sites], fishers, token_windows(4))
    assert logit_error(student, teacher, token_windows(2)) < 1e-12


def test_layers_outside_the_blocks_cannot_be_refitted(make_teacher):
    model = make_teacher("llama", tie_word_embeddings=False)
    sites = find_sites(model, HoloSurgeryConfig(modules=["lm_head"]))
    with pytest.raises(HoloError, match="lm_head"):
        refit(model, sites, [4], [None], token_windows(2))


@pytest.mark.parametrize(
    "modules, tokens, worth", [(None, 640, True), (None, 639, False), (["self_attn", "lm_head"], 640, False)]
)
def test_refitting_is_worth_it_inside_the_blocks_from_ten_tokens_for_each_input(make_teacher, modules, tokens, worth):
    model = make_teacher("llama", tie_word_embeddings=False)
    sites = find_sites(model, HoloSurgeryConfig(modules=modules, shared=True))  # the widest reads 64 inputs
    assert worth_refitting(model, sites, tokens) is worth
