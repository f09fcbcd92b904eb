"""Several processes that share a text give what one gives: logits, loss, gradients and states, in float64."""

from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from small_models import new_model

from hf_holo.distributed import ContextParallel
from hf_holo.modeling.cache import CACHE_NAME
from hf_holo.modeling.losses import IGNORED

EXACT = {"rtol": 0, "atol": 1e-10}
HEAD = "AutoModelForCausalLM"
LENGTH = 39  # no multiple of 2 or of 4


@cache
def group_of(size: int) -> dist.ProcessGroup | None:
    """The first `size` of the four processes."""
    return dist.new_group(list(range(size)))


def batch_of(kind: str, length: int = LENGTH, rows: int = 3) -> dict[str, torch.Tensor]:
    """Ids and labels, and what else a collator of this kind gives."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 61, (rows, length), generator=generator)
    batch = {"input_ids": ids, "labels": ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.2, IGNORED)}
    at = torch.arange(length)
    real = {
        "right": at < torch.tensor([[length], [length // 3], [2]]),  # the last parts of two rows are all padding
        "left": at >= torch.tensor([[0], [length // 3], [length - 2]]),
    }
    documents = torch.tensor([[0, 11, 12], [0, 1, 30], [0, 20, 21]])  # where they start, at borders of parts too
    number = (at >= documents[..., None]).sum(1)  # [B, T]
    if kind in real:
        batch["attention_mask"] = real[kind].long().expand(rows, -1)
        predicted = real[kind] & F.pad(real[kind], (1, 0))[:, :-1]  # from a token, not from padding
        batch["labels"] = batch["labels"].masked_fill(~predicted, IGNORED)
    if kind == "position_ids":
        batch["position_ids"] = at - documents.gather(1, number - 1)
    if kind == "seq_idx":
        batch["seq_idx"] = number
    return batch


def float64_loss(logits: torch.Tensor, labels: torch.Tensor, count: int) -> torch.Tensor:
    """The model's own takes float32."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum") / count


def alone(model: torch.nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Logits, loss in float64 and cache of one process; its gradients are left in the model."""
    output = model(**batch, use_cache=True)
    shifted = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    loss = float64_loss(output.logits, shifted, int((shifted != IGNORED).sum()))
    loss.backward()
    return output.logits.detach(), loss.detach(), output[CACHE_NAME]


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}
    model.zero_grad()
    return found


def as_alone(family: str, variant: str | None, kind: str, size: int, checkpointing: bool = False) -> None:
    """What this process has of everything is that of one process."""
    group = group_of(size)
    if dist.get_rank() >= size:
        return
    model = new_model(family, HEAD, variant, hidden_dropout_prob=0.0).double()
    batch, length = batch_of(kind), LENGTH
    logits, loss, states = alone(model, batch)
    expected = gradients(model)

    if checkpointing:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    context = ContextParallel(model, group=group)
    mine = context.part(**batch)
    of_loss = ("labels", "shift_labels", "num_items_in_batch")
    output = model(**{name: x for name, x in mine.items() if name not in of_loss})
    start, stop = context.bounds(length)
    assert mine["input_ids"].shape[1] == stop - start in (length // size, length // size + 1)
    real = mine["attention_mask"].bool() if "attention_mask" in mine else torch.ones(3, stop - start, dtype=torch.bool)
    torch.testing.assert_close(output.logits[real], logits[:, start:stop][real], **EXACT)
    share = mine[CACHE_NAME].joined(float64_loss(output.logits, mine["shift_labels"], int(mine["num_items_in_batch"])))
    total = context.summed(share)
    torch.testing.assert_close(total.detach(), loss, **EXACT)
    total.backward()
    context.sum_gradients()
    found = gradients(model)
    assert found.keys() == expected.keys() and max(x.abs().max() for x in expected.values()) > 1e-3
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, **EXACT, msg=lambda text, name=name: f"{name}: {text}")
    model.eval()
    check_states(context.prefill(**{n: x for n, x in batch.items() if n != "labels"}), states)


def check_states(found: Any, expected: Any) -> None:
    assert found.get_seq_length() == expected.get_seq_length()
    for mine, one in zip(found.layers, expected.layers, strict=True):
        assert mine.states.keys() == one.states.keys()
        for name, state in one.states.items():
            torch.testing.assert_close(mine.states[name], state.detach(), **EXACT)


HSN = [(None, "plain"), ("cancel", "left"), ("static", "right"), ("gate-sublayer", "seq_idx"), ("window", "seq_idx")]
HSN += [("learned-state-cancel", "seq_idx"), ("window-shared-keys", "left")]
RESONANCE = [(None, "left"), ("hierarchical", "position_ids"), ("memory", "right"), ("interference", "seq_idx")]
CASES = [("hsn", *case) for case in HSN] + [("resonance", *case) for case in RESONANCE]


@pytest.mark.parametrize("size", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("family", "variant", "kind"), CASES)
def test_several_processes_are_as_one(workers, family, variant, kind, size):
    workers.run(as_alone, family, variant, kind, size)


@pytest.mark.parametrize(("family", "variant"), [("hsn", "cancel"), ("resonance", "hierarchical")])
def test_blocks_that_are_computed_twice_exchange_once(workers, family, variant):
    """With gradient checkpointing."""
    workers.run(as_alone, family, variant, "seq_idx", 4, True)


def whole_call(family: str) -> None:
    """`context(...)` has the loss of the model itself, and a gradient of which only its share is this process's."""
    model, batch = new_model(family), batch_of("seq_idx")
    expected = model(**batch).loss
    expected.backward()
    wanted = gradients(model)
    context = ContextParallel(model)
    loss = context(**batch).loss
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
    loss.backward()
    context.sum_gradients()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["hsn", "resonance"])
def test_the_loss_of_the_model_itself(workers, family):
    workers.run(whole_call, family)


def two_groups() -> tuple[int, float]:
    """Two groups of two processes, each with a text of its own; what the mean of their gradients is."""
    model, batch = new_model("hsn").double(), batch_of("plain", rows=3)
    context = ContextParallel(model, size=2)
    mine = {name: x[dist.get_rank() // 2 :][:1] for name, x in batch.items()}
    context(**mine).loss.backward()
    context.sum_gradients()
    alone = new_model("hsn").double()
    alone(**mine).loss.backward()
    wanted = gradients(alone)
    return context.index, max((gradient - wanted[n]).abs().max().item() for n, gradient in gradients(model).items())


def test_groups_have_texts_of_their_own(workers):
    indices, differences = zip(*workers.run(two_groups), strict=True)
    assert indices == (0, 1, 0, 1) and max(differences) < 1e-5


def continued(family: str, variant: str | None) -> None:
    """A text in two calls, each over all processes, and generation from the state of both."""
    model = new_model(family, variant=variant).double()
    ids, context = batch_of("plain")["input_ids"], ContextParallel(model)
    past = context.prefill(input_ids=ids[:, :17])
    cache = context.prefill(input_ids=ids[:, 17:-1], past_key_values=past)
    check_states(cache, model(input_ids=ids[:, :-1], use_cache=True)[CACHE_NAME])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    expected = model.generate(ids, attention_mask=mask, **options)
    found = model.generate(ids, attention_mask=mask, **{CACHE_NAME: cache}, **options)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("family", "variant"), [("hsn", "cancel"), ("resonance", "interference")])
def test_a_text_that_is_continued_and_generated_from(workers, family, variant):
    workers.run(continued, family, variant)


def bytes_sent(family: str, length: int) -> tuple[int, int]:
    """In one forward pass, and in forward and backward pass."""
    model = new_model(family)
    context, ids = ContextParallel(model), batch_of("plain", length, rows=2)["input_ids"]
    loss = context(input_ids=ids, labels=ids).loss
    forward = context.channel.sent_bytes
    loss.backward()
    context.sum_gradients()
    return forward, context.channel.sent_bytes


@pytest.mark.parametrize("family", ["hsn", "resonance"])
def test_what_is_sent_does_not_grow_with_the_text(workers, family):
    short, long = (workers.run(bytes_sent, family, length) for length in (8, 200))
    assert short == long
    kind = type(new_model(family))
    spec = kind.state_spec(new_model(family).config)
    values = 2 * sum(torch.Size(shape).numel() for states in spec for shape in states.values())  # of two rows
    pads = 2 * 8  # how many a row was fed
    first, *middle, last = short
    assert first == (4 * values + pads, 4 * values + pads) and last == (0, 4 * values)
    assert middle == [(4 * values + pads, 8 * values + pads)] * 2


def draws() -> tuple[float, float, float]:
    """Numbers drawn before, in and after a part in training."""
    context = ContextParallel(new_model("hsn", hidden_dropout_prob=0.5).train())
    before = torch.rand(()).item()
    with context.own_randomness():
        within = torch.rand(()).item()
    return before, within, torch.rand(()).item()


def test_every_part_has_dropout_of_its_own(workers):
    before, within, after = map(set, zip(*workers.run(draws), strict=True))
    assert (len(before), len(within), len(after)) == (1, 4, 1)


def raised(change: str) -> str:
    model, ids = new_model("hsn"), batch_of("plain", 3)["input_ids"]
    try:
        if change == "size":
            ContextParallel(model, size=3)
        elif change == "short":
            ContextParallel(model)(input_ids=ids)
        elif change == "checkpointing":
            model.train().gradient_checkpointing_enable({"use_reentrant": True})
            ContextParallel(model)(input_ids=ids.repeat(1, 2))
        elif change == "logits_to_keep":
            ContextParallel(model)(input_ids=ids.repeat(1, 2), logits_to_keep=1)
        else:
            context = ContextParallel(model)
            model(**context.part(input_ids=ids.repeat(1, 2)))
            context.sum_gradients()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("size", "context_parallel_size: 3 does not divide the number of processes, 4"),
        ("short", "input_ids: 3 tokens, fewer than the 4 processes"),
        ("checkpointing", "gradient_checkpointing_kwargs: use_reentrant=True loses the gradients"),
        ("logits_to_keep", "logits_to_keep: the last tokens are those of one process"),
        ("not joined", "joined: take the backward pass of"),
    ],
)
def test_what_cannot_work_is_said_in_every_process(workers, change, message):
    for found in workers.run(raised, change):
        assert found.startswith(message)


@pytest.mark.parametrize(
    ("family", "head", "variant", "changes", "message"),
    [
        ("hsn", "AutoModelForMaskedLM", None, {"causal": False}, "reads in both directions"),
        ("hsn", HEAD, "hybrid", {}, "mixer_types: HsnForCausalLM has attention layers"),
        ("holo", HEAD, None, {}, "HoloForCausalLM has no state of constant size"),
        ("resonance", "AutoModelForSequenceClassification", None, {}, "judges a text as a whole"),
    ],
)
def test_models_that_cannot_be_shared_are_named(family, head, variant, changes, message):
    with pytest.raises(ValueError, match=message):
        ContextParallel(new_model(family, head, variant, **changes))


def test_one_process_is_no_group():
    with pytest.raises(ValueError, match="context_parallel_size: there is one process"):
        ContextParallel(new_model("hsn"))
