"""`--state_passing`, `--tbptt`, `--state_tuning`: which states batches begin with, and resuming to the bit."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_models import new_model

from hf_holo.errors import HoloError
from hf_holo.modeling.cache import CACHE_NAME
from hf_holo.training import trainer as trainers
from hf_holo.training.states import PassedStates, StreamSampler

from .test_resume import same_weights

PASSING, STREAMS = ("--state_passing", "0.7"), ("--tbptt", "true", "--stride", "32")
OPTIONS = pytest.mark.parametrize("options", [PASSING, STREAMS], ids=["state passing", "streams"])


@pytest.mark.parametrize("rows", [4, 6])
def test_rows_begin_with_states_of_the_batch_before(rows):
    model = new_model("hsn").train()
    passed = PassedStates(model.config, share=1.0, seed=1)
    ids = torch.randint(1, 61, (4, 7), generator=torch.Generator().manual_seed(0))
    first = passed.begin(4)
    assert first.is_empty
    passed.end(model(ids, past_key_values=first)[CACHE_NAME])
    begun = passed.begin(rows)
    states = model(ids, use_cache=True)[CACHE_NAME]
    for layer, own in zip(begun.layers, states.layers, strict=True):
        for name, state in layer.states.items():
            assert len(state) == rows and not state.requires_grad
            assert all(any(torch.equal(row, one) for one in own.states[name]) for row in state)
    memory = begun.layers[0].states["memory"]
    assert not all(torch.equal(row, one) for row, one in zip(memory, states.layers[0].states["memory"], strict=False))


def test_a_share_of_the_batches_begins_empty():
    model = new_model("resonance").train()
    passed, ids = PassedStates(model.config, share=0.25), torch.ones(2, 3, dtype=torch.long)
    empty = []
    for _ in range(60):
        cache = passed.begin(2)
        empty.append(cache.is_empty)
        passed.end(model(ids, past_key_values=cache)[CACHE_NAME])
    assert 0.6 < sum(empty) / 60 < 0.9


def test_streams_continue_in_their_rows():
    """What a row reads in all steps is a piece of the text in one, on every process."""
    sampler = StreamSampler(windows=13, rows=2, processes=2)
    order = list(sampler)
    assert len(order) == len(sampler) == 12 and sampler.steps == 3
    for process in (0, 1):
        batches = [order[n : n + 2] for n in range(2 * process, 12, 4)]  # processes take turns
        for row in (0, 1):
            windows = [batch[row] for batch in batches]
            assert windows == list(range(windows[0], windows[0] + 3))
    assert sorted(order) == list(range(12))
    with pytest.raises(HoloError, match="tbptt: 3 windows are fewer than the 4 rows"):
        StreamSampler(3, 2, 2)


def test_a_text_in_streams_is_read_as_if_in_one_piece(tiny_run, monkeypatch):
    """With a learning rate of 0 the state of the last batch is that of everything its rows have read."""
    read: list[torch.Tensor] = []
    compute = trainers.HoloTrainer.compute_loss

    def watched(self, model, inputs, *args, **kwargs):
        if model.training:
            read.append(inputs["input_ids"])
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainers.HoloTrainer, "compute_loss", watched)
    flags = ("--learning_rate", "0", "--optimizer", "adamw", "--ema_decay", "0", "--model", "hidden_dropout_prob=0")
    trainer = tiny_run(*STREAMS, *flags, "hidden_size=16", "num_hidden_layers=2", "--max_steps", "4")
    steps = trainer.states.sampler.steps
    assert steps > 4
    with torch.no_grad():
        whole = trainer.model.eval()(torch.cat(read, 1), use_cache=True)[CACHE_NAME]
    for layer, own in zip(trainer.states._held.layers, whole.layers, strict=True):
        torch.testing.assert_close(layer.states, own.states, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.feature("training", "states in training", family="hsn")
@OPTIONS
def test_resume_is_bitwise_exact(tiny_run, tmp_path, options):
    flags = [*options, "--save_steps", "2", "--save_total_limit", "9", "--gradient_accumulation_steps", "2"]
    tiny_run(*flags, folder="whole")
    tiny_run(*flags[len(options) :], *options[2:], folder="plain")
    assert not same_weights(tmp_path / "whole", tmp_path / "plain")
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "part" / "checkpoint-4")
    tiny_run(*flags, "--resume_from_checkpoint", folder="part")
    assert same_weights(tmp_path / "whole", tmp_path / "part")
    tiny_run(*flags, "--resume_from_checkpoint", folder="part")  # has ended, and is only loaded
    assert same_weights(tmp_path / "whole", tmp_path / "part")
    assert _states(tmp_path / "whole") == _states(tmp_path / "part")

    if options is STREAMS:
        with pytest.raises(HoloError, match="was saved with 4 streams, and this run reads 2"):
            smaller = ("--per_device_train_batch_size", "2", "--max_steps", "8")
            tiny_run(*flags, "--resume_from_checkpoint", *smaller, folder="part")
    for file in (tmp_path / "part").glob("checkpoint-6/states_*"):
        file.unlink()
    with pytest.raises(HoloError, match=r"has no states_0\.safetensors: it comes from a run of fewer processes"):
        tiny_run(*flags, "--resume_from_checkpoint", "--max_steps", "8", folder="part")


def _states(folder: Path) -> dict[str, list]:
    """The states after the last step."""
    return {name: x.tolist() for name, x in load_file(folder / "checkpoint-6" / "states_0.safetensors").items()}


@pytest.mark.slow
def test_the_guard_of_causality_leaves_the_states_alone(tiny_run, tmp_path):
    tiny_run(*PASSING, folder="plain")
    tiny_run(*PASSING, "--causality_check", "true", folder="guarded")
    assert same_weights(tmp_path / "plain", tmp_path / "guarded")
    assert _states(tmp_path / "plain") == _states(tmp_path / "guarded")


@pytest.mark.slow
def test_states_are_tuned_alone(tiny_run, tmp_path):
    model = ("--model", "hidden_size=16", "num_hidden_layers=2", "learned_state=true")
    before = tiny_run("--max_steps", "1", "--ema_decay", "0", folder="base").model.state_dict()
    flags = ("--state_tuning", "true", "--model_name_or_path", str(tmp_path / "base"), "--ema_decay", "0")
    tuned = tiny_run(*flags, *model, "--max_steps", "2", "--optimizer", "adamw", folder="tuned").model
    changed = {name for name, x in tuned.state_dict().items() if name not in before or not torch.equal(x, before[name])}
    learned = {name for name, x in tuned.named_parameters() if x.requires_grad}
    assert changed == learned and all("initial_state" in name for name in learned)
    assert all(load_file(tmp_path / "tuned" / "model.safetensors")[name].any() for name in learned)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--state_passing", "1.5"), r"state_passing: 1.5 is not in \[0, 1\]"),
        (("--state_passing", "0.5", *STREAMS), "state_passing and tbptt: .* choose one"),
        (("--state_passing", "0.5", "--task", "masked"), "state_passing: 0.5: only --task causal .* not 'masked'"),
        (("--state_passing", "0.5", "--gradient_checkpointing", "true"), "gradient_checkpointing computes every block"),
        (("--state_passing", "0.5", "--preset", "holo-tiny"), "HoloForCausalLM with this config keeps no state"),
        (("--tbptt", "true"), "tbptt: stride=16 repeats tokens"),
        ((*STREAMS, "--auto_find_batch_size", "true"), "tbptt: it sets the order of windows"),
        ((*STREAMS, "--per_device_train_batch_size", "4000"), "tbptt: .* windows are fewer than the 4000 rows"),
        (("--state_tuning", "true"), "state_tuning: the model learns no states"),
    ],
)
def test_what_cannot_work_is_refused(tiny_run, flags, message):
    with pytest.raises(HoloError, match=message):
        tiny_run(*flags)


def test_streams_need_one_text(tiny_run, tmp_path):
    files = [tmp_path / name for name in ("one.txt", "two.txt")]
    for file in files:
        file.write_text("the wave binds a key to a value, " * 20)
    with pytest.raises(HoloError, match="tbptt: it needs one text"):
        tiny_run(*STREAMS, "--documents", "apart", "--validation_fraction", "0.5", "--train_file", *map(str, files))
