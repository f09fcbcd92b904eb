"""Steps of decoding, a single token each: what they say, what they cost, and what is kept between them."""

import copy
import io
import threading

import pytest
import torch
from small_models import new_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from hf_holo import get_architecture
from hf_holo.modeling import kept
from hf_holo.modeling.resonators import ResonatorBank

EXACT = {"rtol": 1e-9, "atol": 1e-9}
RECURRENT = [(family, variant) for family in ("hsn", "resonance") for variant in get_architecture(family).variants]


# ---------------------------------------------------------------------------------------------- models
@torch.no_grad()
@pytest.mark.parametrize(("family", "variant"), RECURRENT)
def test_token_by_token_equals_whole_texts(family, variant):
    """Also where single tokens are padding, begin a document, or come in rows that differ in both."""
    model, length = new_model(family, variant=variant).double(), 23
    ids = torch.randint(1, model.config.vocab_size, (3, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[1, 9:12] = mask[2, 15] = 0
    positions = torch.arange(length).expand_as(ids).clone()
    positions[0, 11:] -= 11
    positions[1, 5:] -= 5
    layouts = {"plain": {}, "padded": {"attention_mask": mask}, "packed": {"position_ids": positions}}
    layouts |= {
        "numbered": {"seq_idx": (positions == 0).long().cumsum(1)},
        "both": layouts["padded"] | layouts["packed"],
    }
    for name, layout in layouts.items():
        whole = model(input_ids=ids, **layout, use_cache=False).logits
        cache, steps = None, []
        for t in range(length):
            given = {key: x[:, : t + 1] if key == "attention_mask" else x[:, t : t + 1] for key, x in layout.items()}
            output = model(input_ids=ids[:, t : t + 1], **given, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
        real = layout.get("attention_mask", torch.ones_like(ids)).bool()
        torch.testing.assert_close(torch.cat(steps, 1)[real], whole[real], **EXACT, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("family", "variant"), RECURRENT)
def test_gradients_pass_through_steps(family, variant):
    model = new_model(family, variant=variant).double()
    ids = torch.randint(1, model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(1))
    model(input_ids=ids, use_cache=False).logits[:, -1].square().sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    cache = None
    for token in ids.split(1, 1):
        output = model(input_ids=token, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
    output.logits[:, -1].square().sum().backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, gradient, rtol=1e-7, atol=1e-9, msg=name)


class Operations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def operations_of_a_step(model) -> int:
    ids = torch.arange(1, 9)[None]
    cache = model(input_ids=ids, use_cache=True).past_key_values
    for _ in range(2):  # the first step computes what the others find
        with Operations() as operations:
            model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
    return operations.count


@pytest.mark.parametrize(("family", "share"), [("hsn", 1.3), ("resonance", 1.0)])
def test_a_step_takes_about_as_many_operations_as_that_of_a_llama(family, share):
    """Most of a token's time goes into starting them."""
    sizes = {"vocab_size": 61, "hidden_size": 64, "num_hidden_layers": 4}
    own = get_architecture(family)
    model = own.models["AutoModelForCausalLM"](own.config(**sizes, channel_mix="gated")).eval()
    llama = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=176, num_attention_heads=2)).eval()
    assert operations_of_a_step(model) <= share * operations_of_a_step(llama)


@pytest.mark.slow
@pytest.mark.feature("training", "training and decoding compile as one graph")
@pytest.mark.parametrize("family", ["hsn", "resonance", "holo"])
def test_training_and_decoding_compile_as_one_graph(family):
    """And decoding does not compile again with every token."""
    torch.compiler.reset()
    model = new_model(family).double()
    ids = torch.randint(1, model.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(input_ids=ids, labels=ids).loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-7, atol=1e-9, msg=name)
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        cache = model(input_ids=ids[:, :10], use_cache=True).past_key_values
        steps = [compiled(input_ids=x, past_key_values=cache, use_cache=True).logits for x in ids[:, 10:].split(1, 1)]
        torch.testing.assert_close(torch.cat(steps, 1), model(input_ids=ids).logits[:, 10:], **EXACT)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


# ---------------------------------------------------------------------------------------------- what is kept
def step(model: nn.Module, cache, token: torch.Tensor) -> torch.Tensor:
    return model(input_ids=token, past_key_values=copy.deepcopy(cache), use_cache=True).logits


@torch.no_grad()
@pytest.mark.parametrize(("family", "variant"), RECURRENT)
def test_what_is_kept_is_never_out_of_date(family, variant):
    """A model that has decoded before says, after any change of its weights, what a new one with them says."""
    model, other = new_model(family, variant=variant), new_model(family, variant=variant)
    ids = torch.randint(1, model.config.vocab_size, (1, 6), generator=torch.Generator().manual_seed(1))
    cache = model(input_ids=ids, use_cache=True).past_key_values
    with torch.enable_grad():
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        model(input_ids=ids, labels=ids).loss.backward()

    def through_data() -> None:
        for parameter in model.parameters():
            parameter.data += 0.01

    changes = {
        "an optimizer": optimizer.step,
        "data": through_data,
        "loading": lambda: model.load_state_dict({key: 1.1 * x for key, x in other.state_dict().items()}),
        "assigning": lambda: model.load_state_dict({k: 0.9 * x for k, x in other.state_dict().items()}, assign=True),
        "a cast and back": lambda: model.bfloat16().float(),
    }
    for name, change in changes.items():
        before = step(model, cache, ids[:, :1])
        change()
        fresh = new_model(family, variant=variant)
        fresh.load_state_dict(model.state_dict())
        got = step(model, cache, ids[:, :1])
        torch.testing.assert_close(got, step(fresh, cache, ids[:, :1]), rtol=0, atol=0, msg=name)
        assert not torch.equal(got, before), name


def test_versions_and_identity_tell_changes_where_values_are_out_of_reach():
    """As it is done elsewhere than on the CPU."""
    linear = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(linear.parameters(), lr=1.0)
    linear(torch.ones(1, 3)).sum().backward()
    changes = {
        "an optimizer": optimizer.step,
        "loading": lambda: linear.load_state_dict(nn.Linear(3, 3).state_dict()),
        "a cast": linear.double,
        "other data": lambda: setattr(linear.weight, "data", linear.weight.data + 1),
        "another parameter": lambda: setattr(linear, "weight", nn.Parameter(linear.weight.detach().clone())),
    }
    for name, change in changes.items():
        noted = [kept._identity(linear.weight)]
        assert kept._same_tensors([linear.weight], noted)
        change()
        assert not kept._same_tensors([linear.weight], noted), name


@torch.no_grad()
def test_elsewhere_only_steps_take_what_is_kept(monkeypatch):
    """What writes through `data` is not counted by torch: only within a text does it go unseen."""
    weight, store, calls = nn.Parameter(torch.ones(2, device="meta")), kept.Kept(), []
    for a_step, expected in ((True, 1), (True, 1), (False, 2), (True, 2), (False, 3)):
        store.get(lambda: calls.append(1), (weight,), step=a_step)
        assert len(calls) == expected


def test_nothing_is_kept_while_gradients_are_recorded():
    bank = ResonatorBank(4, 2, 3, 0.1, 3.0)
    with torch.no_grad():
        bank.kept_coefficients()
    assert all(x.requires_grad for x in bank.kept_coefficients())
    with torch.no_grad():
        assert not any(x.requires_grad for x in bank.kept_coefficients())


@torch.no_grad()
def test_copies_and_files_begin_with_nothing():
    bank = ResonatorBank(4, 2, 3, 0.1, 3.0)
    expected = bank.kept_coefficients()
    file = io.BytesIO()
    torch.save(bank, file)
    file.seek(0)
    for other in (copy.deepcopy(bank), torch.load(file, weights_only=False)):
        assert other._coefficients._held is None
        torch.testing.assert_close(other.kept_coefficients(), expected)
    assert set(bank.state_dict()) == {"raw_damping", "magnitude", "phase"}


@torch.no_grad()
def test_threads_share_what_is_kept():
    model = new_model("resonance")
    ids = torch.randint(1, model.config.vocab_size, (4, 12), generator=torch.Generator().manual_seed(1))
    expected, got = model(input_ids=ids).logits, {}

    @torch.no_grad()
    def decode(row: int) -> None:
        cache, steps = None, []
        for token in ids[row : row + 1].split(1, 1):
            output = model(input_ids=token, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
        got[row] = torch.cat(steps, 1)

    threads = [threading.Thread(target=decode, args=(row,)) for row in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(torch.cat([got[row] for row in range(4)]), expected, rtol=1e-4, atol=1e-4)
