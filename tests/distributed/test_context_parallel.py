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


def as_alone(family: str, variant: str | None, kind: str, size: int, length: int = LENGTH, **changes: Any) -> None:
    """What this process has of everything is that of one process."""
    group = group_of(size)
    if dist.get_rank() >= size:
        return
    model = new_model(family, HEAD, variant, **changes).double()
    batch = batch_of(kind, length)
    logits, loss, states = alone(model, batch)
    expected = gradients(model)

    context = ContextParallel(model, group=group)
    mine = context.part(**batch)
    output = model(**mine)
    start, stop = context.bounds(length)
    assert mine["input_ids"].shape[1] == stop - start in (length // size, length // size + 1)
    real = mine["attention_mask"].bool() if "attention_mask" in mine else torch.ones(3, stop - start, dtype=torch.bool)
    torch.testing.assert_close(output.logits[real], logits[:, start:stop][real], **EXACT)
    share = mine[CACHE_NAME].joined(
        float64_loss(output.logits, mine["shift_labels"], int(mine["num_items_in_batch"]))
    )
    total = context.summed(share)
    torch.testing.assert_close(total.detach(), loss, **EXACT)
    total.backward()
    context.sum_gradients()
    found = gradients(model)
    assert found.keys() == expected.keys() and max(x.abs().max() for x in expected.values()) > 1e-3
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, **EXACT, msg=lambda text, name=name: f"{name}: {text}")
    check_states(context.prefill(**{n: x for n, x in batch.items() if n != "labels"}), states)


def check_states(found: Any, expected: Any) -> None:
    assert found.get_seq_length() == expected.get_seq_length()
    for mine, one in zip(found.layers, expected.layers, strict=True):
        assert mine.states.keys() == one.states.keys()
        for name, state in one.states.items():
            torch.testing.assert_close(mine.states[name], state.detach(), **EXACT)


HSN = [(None, "plain"), ("cancel", "left"), ("static", "right"), ("gate-sublayer", "seq_idx")]
RESONANCE = [(None, "left"), ("hierarchical", "position_ids"), ("memory", "right"), ("interference", "seq_idx")]
CASES = [("hsn", *case) for case in HSN] + [("resonance", *case) for case in RESONANCE]


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize(("family", "variant", "kind"), CASES)
def test_several_processes_are_as_one(workers, family, variant, kind, size):
    workers.run(as_alone, family, variant, kind, size)
