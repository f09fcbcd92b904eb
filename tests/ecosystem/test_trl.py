"""TRL's SFTTrainer on instructions in the Alpaca format, for every family; needs the package trl."""

import pytest
import torch
from datasets import Dataset

from hf_holo.data.instructions import alpaca_prompt
from hf_holo.data.tokenizers import character_tokenizer

trl = pytest.importorskip("trl")
RECORDS = [{"instruction": f"Say {word}.", "input": "", "output": f"{word}!"} for word in ("wave", "key", "value")] * 4


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer([alpaca_prompt(record) + record["output"] for record in RECORDS])


def sft(model, tokenizer, tmp_path, **options) -> "trl.SFTTrainer":
    """A trainer on prompts and their answers; the loss is on the answers only."""
    pairs = [{"prompt": alpaca_prompt(record), "completion": record["output"]} for record in RECORDS]
    small = {
        "max_length": 96,
        "max_steps": 8,
        "per_device_train_batch_size": 6,
        "learning_rate": 1e-2,
        "logging_steps": 1,
    }
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "bf16": False}
    args = trl.SFTConfig(str(tmp_path / "sft"), **{**small, **quiet, **options})
    return trl.SFTTrainer(model, args, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer)


@pytest.mark.feature("TRL", "SFTTrainer")
def test_answers_are_learned(tiny, family, tokenizer, tmp_path):
    trainer = sft(tiny(family, vocab_size=len(tokenizer), hidden_dropout_prob=0.0), tokenizer, tmp_path)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.feature("TRL", "SFTTrainer, packed")
def test_packed_answers_cost_what_they_cost_apart(tiny, family, tokenizer, tmp_path):
    """The loss of the first step, in which all records are: no record sees another in its row."""
    first = []
    for options in ({}, {"packing": True, "max_length": 192}):
        model = tiny(family, vocab_size=len(tokenizer))
        trainer = sft(model, tokenizer, tmp_path, max_steps=1, per_device_train_batch_size=len(RECORDS), **options)
        trainer.train()
        first.append(next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry))
    assert first[1] == pytest.approx(first[0], abs=1e-4)


@pytest.mark.feature("TRL", "SFTTrainer with LoRA")
def test_an_adapter_is_learned(tiny, family, tokenizer, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny(family, vocab_size=len(tokenizer)), LoraConfig(r=4, task_type="CAUSAL_LM"))
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    trainer = sft(model, tokenizer, tmp_path)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if not p.requires_grad)
