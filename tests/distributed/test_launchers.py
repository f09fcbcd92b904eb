"""The commands of docs/parallel.md, as they are given to torchrun: on one machine, and on two (of one address)."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from several_processes import free_port
from small_distillations import TEXT, arguments, write_models

from hf_holo_cli import main

ROOT = Path(__file__).parents[2]
TRAIN = [
    *("--preset", "hsn-tiny", "--model", "hidden_size=16", "num_hidden_layers=2", "--block_size", "32"),
    *("--optimizer", "adamw", "--max_steps", "3", "--logging_steps", "1", "--sample_tokens", "4", "--use_cpu"),
    *("--disable_tqdm", "true", "--causality_check", "false"),
]


def start(launcher, words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", *launcher, "-m", "hf_holo.cli", *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ended(*processes):
    """Exit codes and outputs."""
    said = [process.communicate(timeout=240)[0] for process in processes]
    return [process.returncode for process in processes], "".join(said)


def on_two_nodes(words):
    port = free_port()
    nodes = ["torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--rdzv_endpoint", f"localhost:{port}"]
    return ended(*(start([*nodes, "--node_rank", str(rank)], words) for rank in range(2)))


@pytest.mark.slow
def test_a_distillation_on_two_nodes_is_that_of_one_process(tmp_path):
    folder = write_models("hsn", tmp_path)
    main(["distill", *arguments(folder, [{"match": "blocks"}], out="one", per_device_train_batch_size=8)])
    codes, said = on_two_nodes(["distill", *arguments(folder, [{"match": "blocks"}], out="two")])
    assert codes == [0, 0], said
    one, two = (load_file(folder / out / "model.safetensors") for out in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_training_on_two_nodes_is_that_of_one_process(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    words = ["train", *TRAIN, "--train_file", str(tmp_path / "text.txt"), "--output_dir"]
    main([*words, str(tmp_path / "one"), "--per_device_train_batch_size", "8"])
    codes, said = on_two_nodes([*words, str(tmp_path / "two"), "--per_device_train_batch_size", "4"])
    assert codes == [0, 0], said
    one, two = (load_file(tmp_path / out / "model.safetensors") for out in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["torch.distributed.run", "--nproc_per_node", "2", "--master_port"],
        shlex.split("accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port"),
    ],
    ids=["torchrun", "accelerate"],
)
def test_launchers_of_one_machine_and_what_they_say_of_bad_input(launcher, tmp_path):
    folder = write_models("hsn", tmp_path)
    words = ["distill", *arguments(folder, [{"match": "blocks"}], max_steps=2)]
    codes, said = ended(start([*launcher, str(free_port())], words))
    assert codes == [0], said
    assert said.count("The student is saved in") == 1
    codes, said = ended(start([*launcher, str(free_port())], words))  # there is a run in the folder
    assert codes != [0]
    assert said.count("hf-holo: error: output_dir:") == 1
