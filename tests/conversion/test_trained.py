"""Surgery on a model that has learned something: a small Phi-3, trained for seconds."""

import copy
import math

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM

from hf_holo.conversion import HoloSurgeryConfig, apply_surgery
from hf_holo.conversion.surgery.calibration import allocate, collect, factorise, find_sites, stacked_weight
from hf_holo.conversion.surgery.refit import refit
from hf_holo.data.documents import python_help

STEPS, ROWS, LENGTH, RATIO = 150, 8, 48, 0.8
ASCII = 128


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    """ASCII codes of Python's help, `[N, LENGTH]`; the last ones are measured on."""
    text = python_help()[0][:60_000].encode("ascii", "replace")
    return torch.tensor(list(text[: len(text) // LENGTH * LENGTH])).view(-1, LENGTH)


@pytest.fixture(scope="module")
def teacher(windows) -> Phi3ForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = Phi3ForCausalLM(Phi3Config(vocab_size=ASCII, pad_token_id=0, **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(STEPS):
        batch = windows[torch.randint(len(windows) - 100, (ROWS,))]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def held_out_loss(model: Phi3ForCausalLM, windows: torch.Tensor) -> float:
    """In nats per character."""
    return float(model(input_ids=windows[-100:], labels=windows[-100:]).loss)


def calibrated(teacher: Phi3ForCausalLM, windows: torch.Tensor) -> Phi3ForCausalLM:
    """As `hf-holo convert` does it."""
    student = copy.deepcopy(teacher)
    sites = find_sites(student, HoloSurgeryConfig(shared=True))
    statistics = collect(student, sites, windows[:128], windows[:32])
    losses = [factorise(site, stacked_weight(student, site), s).loss for site, s in zip(sites, statistics, strict=True)]
    refit(student, sites, allocate(sites, losses, RATIO), [s.fisher for s in statistics], windows[:128])
    return student


@pytest.mark.slow
def test_calibrated_surgery_keeps_what_was_learned_and_random_bases_do_not(teacher, windows):
    before = held_out_loss(teacher, windows)
    learned = math.log(ASCII) - before
    assert learned > 1.5
    assert held_out_loss(calibrated(teacher, windows), windows) - before < 0.03 * learned
    student = copy.deepcopy(teacher)
    report = apply_surgery(student, HoloSurgeryConfig(ratio=RATIO))
    assert report.kept <= RATIO and held_out_loss(student, windows) - before > 0.15 * learned
