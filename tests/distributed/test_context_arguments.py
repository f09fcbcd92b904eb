"""What `hf-holo train` says about `--context_parallel_size` before it starts."""

import pytest
from accelerate import ParallelismConfig
from small_models import new_model

from hf_holo.errors import HoloError
from hf_holo.training.arguments import HoloTrainingArguments, parse
from hf_holo.training.states import passed_states


def test_there_must_be_enough_processes():
    with pytest.raises(HoloError, match="context_parallel_size: 2 does not divide the number of processes, 1"):
        parse(["--context_parallel_size", "2", "--use_cpu"])


def test_that_of_accelerate_is_refused(monkeypatch, tmp_path):
    """It takes keys and values of attention apart: a model without them would see a part of every text only."""
    wanted = ParallelismConfig(cp_size=2)
    with pytest.raises(ValueError, match=r"parallelism_config: .* give --context_parallel_size"):
        HoloTrainingArguments(output_dir=str(tmp_path), use_cpu=True, parallelism_config=wanted)
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")  # as `accelerate launch` does
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "2")
    with pytest.raises(HoloError, match=r"parallelism_config: .* give --context_parallel_size"):
        parse(["--use_cpu"])


@pytest.mark.parametrize("option", [{"label_smoothing_factor": 0.1}, {"torch_compile": True}])
def test_what_does_not_go_together_is_named(option, monkeypatch, tmp_path):
    monkeypatch.setattr(HoloTrainingArguments, "world_size", 2)
    (name,) = option
    with pytest.raises(ValueError, match=f"{name}: .* does not go together with context_parallel_size"):
        HoloTrainingArguments(output_dir=str(tmp_path), use_cpu=True, context_parallel_size=2, **option)


def test_states_of_other_batches_are_refused(monkeypatch):
    monkeypatch.setattr(HoloTrainingArguments, "world_size", 2)
    run = parse(["--use_cpu", "--context_parallel_size", "2", "--state_passing", "0.5", "--task", "causal"])
    with pytest.raises(HoloError, match=r"state_passing: 0\.5: does not go together with context_parallel_size"):
        passed_states(run, new_model("hsn"))


@pytest.mark.parametrize("by", ["the launcher", "the argument"])
def test_sharding_that_would_silently_not_happen_is_refused(by, monkeypatch):
    """Accelerate has it on GPUs alone."""
    if by == "the launcher":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_VERSION", "2")
    words = ["--use_cpu", *(["--fsdp", "full_shard"] if by == "the argument" else [])]
    with pytest.raises(HoloError, match="fsdp: Accelerate does not shard on a CPU"):
        parse(words)
