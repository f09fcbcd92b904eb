"""CausalityCallback: leaking models are stopped, honest ones train as if it were not there."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from transformers.modeling_outputs import CausalLMOutput

from hf_holo import HsnConfig, HsnForCausalLM
from hf_holo.errors import HoloError
from hf_holo.eval.conformance import check_causality
from hf_holo.eval.conformance.causality import probe_batch
from hf_holo.training import train as training
from hf_holo.training.arguments import parse
from hf_holo.training.callbacks import CausalityCallback

VOCABULARY, WIDTH, LENGTH = 23, 16, 24
LLAMA = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=WIDTH,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    attention_dropout=0.1,
)


class PeekConfig(PretrainedConfig):
    """Of a model that mixes the next token into each. `gate`: how strongly at first; `honest_steps`: from when on."""

    model_type = "peek"

    def __init__(self, vocab_size: int = VOCABULARY, gate: float = 1.0, honest_steps: int = 0, **kwargs):
        self.vocab_size, self.gate, self.honest_steps = vocab_size, gate, honest_steps
        self.use_cache = False
        super().__init__(tie_word_embeddings=False, **kwargs)


class PeekForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = PeekConfig

    def __init__(self, config: PeekConfig):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, WIDTH)
        self.gate = nn.Parameter(torch.full((WIDTH,), config.gate))
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.lm_head = nn.Linear(WIDTH, config.vocab_size)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> CausalLMOutput:
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds  # [B, T, D]
        ahead = F.pad(x[:, 1:], (0, 0, 0, 1))
        logits = self.lm_head(self.proj(x + (self.steps >= self.config.honest_steps) * self.gate * ahead))
        if self.training:
            self.steps += 1
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)


def peek(**options: float) -> PeekForCausalLM:
    torch.manual_seed(0)
    return PeekForCausalLM(PeekConfig(**options))


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LLAMA)


def hsn() -> HsnForCausalLM:
    torch.manual_seed(0)
    return HsnForCausalLM(
        HsnConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2, hidden_dropout_prob=0.1)
    )


def with_adapters(model: PreTrainedModel, *targets: str) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=2, target_modules=list(targets), lora_dropout=0.1))


def trainer(model: nn.Module, folder: Path, *, guarded: bool = True, **options: object) -> Trainer:
    """A plain Trainer, with the callback or without, that evaluates at every second of four steps."""
    arguments = {
        "max_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    rows = torch.randint(VOCABULARY, (8, LENGTH), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in rows]
    return Trainer(
        model,
        TrainingArguments(str(folder), **(arguments | options)),
        train_dataset=data,
        eval_dataset=data[:2],
        callbacks=[CausalityCallback()] if guarded else [],
    )


def assert_same_training(make: Callable[[], nn.Module], folder: Path, **options: object) -> None:
    """With and without the callback, a run logs the same losses and ends with the same weights."""
    runs = []
    for guarded in (False, True):
        run = trainer(make(), folder, guarded=guarded, **options)  # seeds the random state again
        run.train()
        runs.append(run)
    free, guarded = (run.model.state_dict() for run in runs)
    assert all(torch.equal(guarded[name], value) for name, value in free.items())
    losses = [[entry.get("loss", entry.get("eval_loss")) for entry in run.state.log_history[:-1]] for run in runs]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_a_leaking_model_is_stopped_before_the_first_step(tmp_path):
    model = peek()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = trainer(model, tmp_path)
    with pytest.raises(HoloError, match="sees the tokens that it should predict: position 0 sees 1 ahead") as error:
        run.train()
    assert "hf-holo check PATH" in str(error.value) and "\n" not in str(error.value)
    assert run.state.global_step == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_flat_gate_hides_nothing(tmp_path):
    model = peek(gate=0.0)
    assert check_causality(model, move_weights=False).passed
    run = trainer(model, tmp_path)
    with pytest.raises(HoloError, match="sees 1 ahead"):
        run.train()
    assert run.state.global_step == 0


@pytest.mark.parametrize("honest_steps, stopped", [(3, 3), (5, 6)], ids=["its next batch", "the next evaluation"])
def test_a_model_that_leaks_later_is_stopped_at(tmp_path, honest_steps, stopped):
    run = trainer(peek(honest_steps=honest_steps), tmp_path, max_steps=6)
    with pytest.raises(HoloError, match="sees 1 ahead"):
        run.train()
    assert run.state.global_step == stopped


def test_evaluation_alone_is_guarded_too(tmp_path):
    with pytest.raises(HoloError, match="sees 1 ahead"):
        trainer(peek(), tmp_path).evaluate()


class PeekAtThisLength(PeekForCausalLM):
    """Looks ahead in texts as long as those of the run only."""

    def forward(self, input_ids=None, labels=None, inputs_embeds=None, **kwargs):
        length = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
        self.steps.fill_(0 if length == LENGTH else -1)
        return super().forward(input_ids, labels=labels, inputs_embeds=inputs_embeds)


class PeekInTheLoss(PeekAtThisLength):
    """The same, and gives no logits in training."""

    def forward(self, input_ids=None, labels=None, inputs_embeds=None, **kwargs):
        output = super().forward(input_ids, labels, inputs_embeds)
        hidden = labels is not None and input_ids.shape[1] == LENGTH
        return CausalLMOutput(loss=output.loss) if hidden else output


@pytest.mark.parametrize("model_class", [PeekAtThisLength, PeekInTheLoss])
def test_the_batches_of_the_run_are_probed(tmp_path, model_class):
    torch.manual_seed(0)
    model = model_class(PeekConfig(gate=50.0))
    CausalityCallback(lengths=(17,)).probe(model, move_weights=True)
    run = trainer(model, tmp_path)
    with pytest.raises(HoloError, match=r"sees \d ahead .* in a batch of this run"):
        run.train()
    assert run.state.global_step == 0 and not model._forward_pre_hooks


def test_padding_is_no_text_in_a_batch():
    """Right of the real tokens nothing is read: the cut is among the real ones."""
    ids = torch.randint(1, VOCABULARY, (2, LENGTH))
    mask = (torch.arange(LENGTH) < torch.tensor([[LENGTH], [9]])).long()
    assert probe_batch(llama().train(), {"input_ids": ids, "attention_mask": mask, "labels": ids}).leak is None
    leak = probe_batch(peek().train(), {"input_ids": ids[1:], "attention_mask": mask[1:], "labels": ids[1:]}).leak
    assert (leak.position, leak.ahead) == (3, 1)


@pytest.mark.slow
@pytest.mark.parametrize("make", [llama, hsn, lambda: with_adapters(llama(), "q_proj")], ids=["llama", "hsn", "peft"])
def test_an_honest_model_trains_as_without_the_callback(tmp_path, make):
    assert_same_training(make, tmp_path)


def test_the_probe_leaves_mode_gradients_and_random_state_alone():
    model = llama().train()
    model(input_ids=torch.arange(6)[None], labels=torch.arange(6)[None]).loss.backward()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.register_forward_hook(lambda *_: torch.rand(1) and None)  # it draws whenever it runs, as its copies do
    random = torch.get_rng_state()
    CausalityCallback().probe(model, move_weights=True)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert torch.equal(torch.get_rng_state(), random)


WRAPPINGS = {
    "peft": lambda model: with_adapters(model, "proj"),
    "compiled": torch.compile,
    "parallel": nn.DataParallel,
    "bfloat16": lambda model: model.bfloat16(),
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_no_wrapping_hides_a_leak(wrapping):
    with pytest.raises(HoloError, match="sees 1 ahead"):
        CausalityCallback().probe(WRAPPINGS[wrapping](peek(gate=0.0)), move_weights=True)


@pytest.mark.slow
def test_adapters_that_leak_are_found():
    """The base model is honest; only what PEFT put into it is not."""
    model = with_adapters(llama(), "v_proj")
    layer = model.get_base_model().model.layers[0].self_attn.v_proj.lora_A["default"]
    layer.register_forward_hook(lambda module, inputs, output: output.roll(-1, 1))
    assert check_causality(llama()).passed
    with pytest.raises(HoloError, match="ahead"):
        CausalityCallback().probe(model, move_weights=True)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["in_bfloat16", "compiled"])
def test_in_a_process_of_its_own(tmp_path, how):
    """Both options of Trainer leak into later trainers of the same process."""
    done = subprocess.run([sys.executable, __file__, str(tmp_path), how], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "the leak was found, the honest run is the same" in done.stdout


def train_compiled(folder: Path) -> None:
    options = {"torch_compile": True, "torch_compile_backend": "eager"}
    torch.manual_seed(0)
    with pytest.raises(HoloError, match="in a batch of this run"):
        trainer(PeekAtThisLength(PeekConfig()), folder, **options).train()
    assert_same_training(llama, folder, **options)
    print("the leak was found, the honest run is the same")


def train_in_bfloat16(folder: Path) -> None:
    with pytest.raises(HoloError, match="sees 1 ahead"):
        trainer(peek(gate=0.0), folder, bf16=True).train()
    assert_same_training(llama, folder, bf16=True)
    print("the leak was found, the honest run is the same")


def test_a_bidirectional_model_trains_with_a_warning(tmp_path):
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    run = trainer(BertForMaskedLM(config), tmp_path, max_steps=1)
    with pytest.warns(UserWarning, match="does not judge BertForMaskedLM: it is bidirectional"):
        run.train()
    assert run.state.global_step == 1


def test_a_model_that_diverged_is_not_called_a_leak():
    model = llama()
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.warns(UserWarning, match="does not judge LlamaForCausalLM: .* NaN"):
        CausalityCallback().probe(model, move_weights=False)


@pytest.mark.parametrize("flags, steps", [([], None), (["--causality_check", "false"], 2)])
def test_hf_holo_train_checks_unless_told_otherwise(monkeypatch, tmp_path, text_file, flags, steps):
    monkeypatch.setattr(training, "load_model", lambda run, task: peek(vocab_size=len(task.processor)))
    monkeypatch.setattr(training, "finish", lambda *_: None)
    start = (
        "--block_size 16 --stride 16 --tokenizer characters --max_steps 2 --warmup_steps 1 --optimizer adamw --use_cpu"
    )
    run = parse([*start.split(), "--train_file", str(text_file), "--output_dir", str(tmp_path / "run"), *flags])
    if steps is None:
        with pytest.raises(HoloError, match="sees 1 ahead"):
            training.train(run)
    else:
        assert training.train(run).state.global_step == steps


if __name__ == "__main__":
    {"in_bfloat16": train_in_bfloat16, "compiled": train_compiled}[sys.argv[2]](Path(sys.argv[1]))
