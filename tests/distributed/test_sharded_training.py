"""`hf-holo train` with FSDP2: the run of DistributedDataParallel, from shares of the weights.

Accelerate shards on GPUs alone; here it takes the CPU for one, with gloo. What follows is its own code, and torch's.
"""

import os

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from several_processes import in_processes
from small_distillations import TEXT
from transformers import AutoModelForCausalLM, Trainer

from hf_holo.training.arguments import HoloTrainingArguments
from hf_holo_cli import main

LAUNCHED = {  # what `accelerate launch --use_fsdp --fsdp_version 2` says
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "HoloSpectralBlock",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
WORDS = [
    *("train", "--preset", "hsn-tiny", "--model", "hidden_size=16", "num_hidden_layers=2", "--block_size", "32"),
    *("--optimizer", "adamw", "--max_steps", "4", "--save_steps", "2", "--logging_steps", "1", "--sample_tokens", "4"),
    *("--use_cpu", "--disable_tqdm", "true", "--causality_check", "false"),
]


def sharded(words):
    os.environ |= LAUNCHED
    HoloTrainingArguments.shards = False  # else it is refused on a CPU
    create = Trainer.create_accelerator_and_postprocess

    def create_as_on_a_gpu(trainer):
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        create(trainer)
        assert trainer.is_fsdp_enabled

    Trainer.create_accelerator_and_postprocess = create_as_on_a_gpu
    return main(words)


@pytest.mark.slow
def test_a_sharded_run_ends_where_a_copied_one_does(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    words = [*WORDS, "--train_file", str(tmp_path / "text.txt"), "--output_dir"]
    for function, name in ((main, "copied"), (sharded, "sharded")):
        codes, said = in_processes(2, tmp_path, function, [*words, str(tmp_path / name)])
        assert codes == [0, 0], "\n".join(said)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("copied", "sharded"))
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)
    assert (tmp_path / "sharded/sample.txt").is_file() and (tmp_path / "sharded/modeling_hsn.py").is_file()
    AutoModelForCausalLM.from_pretrained(tmp_path / "sharded")
    again = [*words, str(tmp_path / "sharded"), "--resume_from_checkpoint", str(tmp_path / "sharded/checkpoint-2")]
    codes, said = in_processes(2, tmp_path, sharded, again)
    assert codes == [0, 0], "\n".join(said)
    torch.testing.assert_close(load_file(tmp_path / "sharded/model.safetensors"), two, rtol=1e-4, atol=1e-5)
