"""Precision and execution modes: what they may change is rounding, and nothing else."""

import subprocess
import sys

import pytest
import torch

from hf_holo.modeling import phases


def exact_loss(model, ids):
    """The loss in the model's own precision; that of transformers is always in float32."""
    logits = model(input_ids=ids, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def gradients(model, ids):
    model.zero_grad()
    exact_loss(model, ids).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_gradients_equal_finite_differences(model, random_ids, monkeypatch):
    """One random direction through all parameters, over two chunks: the hand-written gradients are the true ones.

    Turns have the gradient of another curve on purpose, see `whole_turns`; so they take its values here.
    """
    monkeypatch.setattr("hf_holo.modeling.modeling_hsn.whole_turns", phases.gentle_turns)
    ids, step = random_ids(1, 70), 1e-5
    generator = torch.Generator().manual_seed(0)
    directions = {n: torch.randn(p.shape, generator=generator).double() for n, p in model.named_parameters()}
    slope = sum((g * directions[n]).sum() for n, g in gradients(model, ids).items())

    @torch.no_grad()
    def loss_at(distance):
        for name, parameter in model.named_parameters():
            parameter.add_(distance * directions[name])
        return exact_loss(model, ids)

    ahead, behind = loss_at(step), loss_at(-2 * step)
    torch.testing.assert_close((ahead - behind) / (2 * step), slope.detach(), rtol=1e-5, atol=1e-8)


def test_dropout_acts_in_training_only(tiny_model, random_ids):
    model, ids = tiny_model("bundle", hidden_dropout_prob=0.5), random_ids(1, 9)
    torch.testing.assert_close(model(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=0)
    model.train()
    assert not torch.allclose(model(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bundle", "cancel", "static"])
def test_compiled_equals_eager(kind, tiny_model, random_ids):
    torch.compiler.reset()  # after too many models in one process it would silently run eagerly
    model, ids = tiny_model(kind), random_ids(2, 70)
    expected = gradients(model, ids)
    compiled = torch.compile(model)
    torch.testing.assert_close(compiled(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-8, atol=1e-8)
    for name, gradient in gradients(compiled, ids).items():
        name = name.removeprefix("_orig_mod.")
        torch.testing.assert_close(gradient, expected[name], rtol=1e-8, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bundle", "cancel"])
def test_it_compiles_under_a_default_device(kind, tiny_model, random_ids):
    """NumPy's operations do not where torch.compile sees them; so tables of filters and scans must be out of sight."""
    torch.compiler.reset()
    model, ids = tiny_model(kind), random_ids(2, 70)
    with torch.device("cpu"), torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager")(input_ids=ids).logits
    torch.testing.assert_close(compiled, model(input_ids=ids).logits, rtol=1e-8, atol=1e-8)


BF16_TRAINING = """
import sys, torch
from transformers import Trainer, TrainingArguments
from hf_holo import HsnConfig, HsnForCausalLM

torch.manual_seed(0)
model = HsnForCausalLM(HsnConfig(vocab_size=17, hidden_size=32, num_hidden_layers=2))
rows = [{"input_ids": torch.arange(24) % 17, "labels": torch.arange(24) % 17}] * 32
arguments = TrainingArguments(
    sys.argv[1], bf16=True, use_cpu=True, max_steps=20, learning_rate=1e-2, per_device_train_batch_size=4,
    gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False},
    report_to=[], save_strategy="no", disable_tqdm=True, logging_steps=5,
)
trainer = Trainer(model, arguments, train_dataset=rows)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
assert losses[-1] < 0.5 * losses[0], losses
"""


@pytest.mark.slow
def test_bf16_training_with_checkpointing(tmp_path):
    """In a process of its own: transformers 4.57 lets bf16 leak into later trainers of the same process."""
    command = [sys.executable, "-c", BF16_TRAINING, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
