"""The whole kit on wrong models, each caught by the check that is meant for it, and on right ones, none accused."""

import inspect
import re
from collections.abc import Iterable

import pytest
import torch
from torch import nn
from transformers import BambaConfig, BambaForCausalLM, RobertaConfig, RobertaForCausalLM

from hf_holo import HoloError, HsnForCausalLM
from hf_holo.eval.conformance import CHECKS, GROUPS, Check, Subject, Violation, run_check, select
from hf_holo.eval.conformance.subject import perturb


def failures(subject: Subject, checks: Iterable[Check]) -> dict[str, str]:
    results = [run_check(check, subject) for check in checks]
    return {result.check: result.detail for result in results if result.status == "failed"}


def test_every_wrong_model_is_caught_and_its_fault_named(fault, wrong_seed):
    checks = [CHECKS[name] for name in fault.caught_by]
    found = failures(fault.model.subject(wrong_seed), checks)
    assert found.keys() == fault.caught_by.keys()
    for name, message in found.items():
        assert re.search(fault.caught_by[name], message), message


def test_no_wrong_model_is_accused_of_other_faults(important_fault):
    spared = [
        check
        for check in select(None, quick=True)
        if check.name not in important_fault.caught_by and not {check.name, check.group} & set(important_fault.also)
    ]
    assert failures(important_fault.model.subject(), spared) == {}


@pytest.mark.parametrize("group", GROUPS)
def test_no_right_model_is_accused(right, right_seed, group):
    assert failures(right.subject(right_seed), select([group], quick=True)) == {}


# ---------------------------------------------------------------------------------------------- the runner
def result_of(function, wrong_models, needs=()):
    return run_check(Check("a check", "state", function, needs, slow=False), wrong_models.RIGHT["toy"].subject())


def test_what_the_model_raises_is_a_failure(wrong_models):
    def breaks(subject):
        raise ZeroDivisionError("no\n  beams")

    result = result_of(breaks, wrong_models)
    assert (result.status, result.detail) == ("failed", "raises ZeroDivisionError: no beams")


def test_a_violation_is_a_failure_with_its_message(wrong_models):
    def violated(subject):
        raise Violation("the state grows")

    result = result_of(violated, wrong_models)
    assert (result.status, result.detail) == ("failed", "the state grows")


def test_a_check_that_does_not_apply_says_why_and_is_not_run(wrong_models):
    result = result_of(lambda subject: pytest.fail("it ran"), wrong_models, needs=("text", "pixel_values"))
    assert (result.status, result.detail) == ("not applicable", "forward takes no pixel_values")


@pytest.mark.parametrize("check", ["left padding", "right padding", "suffix exchange at usual lengths"])
def test_positions_that_start_after_that_of_padding_are_no_fault(check):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    subject = Subject(RobertaForCausalLM, RobertaConfig(vocab_size=61, is_decoder=True, pad_token_id=1, **sizes))
    assert subject.first_position == 2 and subject.max_length == 510
    result = run_check(CHECKS[check], subject)
    if "without overflow" in result.detail:  # version 4 makes its mask in float32 whatever the model is in
        pytest.skip(result.detail)
    assert result.status == "passed", result.detail


def test_a_class_whose_generation_takes_no_embeddings_is_not_asked_to():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "attn_layer_indices": [0]}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "mamba_n_heads": 8, "mamba_d_head": 8}
    subject = Subject(BambaForCausalLM, BambaConfig(vocab_size=61, **sizes, **heads))
    takes = "inputs_embeds" in inspect.signature(BambaForCausalLM.prepare_inputs_for_generation).parameters
    result = run_check(CHECKS["generation from embeddings"], subject)
    assert result.status == ("passed" if takes else "not applicable"), result.detail


def test_a_check_starts_from_the_seed_every_time(wrong_models):
    details = {result_of(lambda subject: str(torch.rand(1).item()), wrong_models).detail for _ in range(2)}
    assert len(details) == 1


@pytest.mark.parametrize("group", ["causality", "equivalence"])
def test_nan_never_passes(wrong_models, group):
    """Whatever compares outputs fails; what is left over does not look at them."""
    checks = select([group], quick=True)
    found = failures(wrong_models.FAULTS["not a number"].model.subject(), checks)
    unconcerned = {"same weights from the same seed", "unknown arguments"}
    applying = {c.name for c in checks if c.reason_not(wrong_models.RIGHT["toy"].subject()) is None}
    assert applying - found.keys() == unconcerned & applying


def test_a_model_that_cannot_run_fails_every_check_that_runs_it(wrong_models):
    class Broken(wrong_models.ToyForCausalLM):
        def forward(self, input_ids=None, **kwargs):
            raise ArithmeticError("broken")

    subject = Subject(Broken, wrong_models.ToyConfig())
    result = run_check(CHECKS["suffix exchange"], subject)
    assert (result.status, result.detail) == ("failed", "raises ArithmeticError: broken")


# ---------------------------------------------------------------------------------------------- moved weights
def test_every_weight_moves_and_tied_ones_together(wrong_models):
    model = wrong_models.FAULTS["circular gate"].model.build()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    perturb(model, seed=3)
    for name, parameter in model.named_parameters():
        moved = (parameter - before[name]).std() / before[name].std().clamp_min(0.1)
        assert 0.1 < moved < 3, name
    assert model.lm_head.weight is model.model.embed_tokens.weight
    again = perturb(wrong_models.FAULTS["circular gate"].model.build(), seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_weights_move_by_kind_of_module_and_not_by_name():
    class Renamed(nn.Linear): ...

    moved = {}
    for cls in (nn.Linear, Renamed):
        layer = cls(8, 4)
        nn.init.zeros_(layer.weight)
        moved[cls] = perturb(layer).weight
    assert torch.equal(moved[nn.Linear], moved[Renamed])


def test_a_class_needs_a_config():
    with pytest.raises(HoloError, match="config: None; HsnForCausalLM is a class"):
        Subject(HsnForCausalLM)
