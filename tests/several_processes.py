"""A run in several processes, as torchrun starts them, but forked: they need not import torch again."""

import os
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.distributed import TCPStore

PATIENCE = 120  # seconds that the processes of a test may take


def free_port() -> int:
    """A port of this machine that nobody uses."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def in_processes(count: int, folder: Path, function: Callable, *args: Any) -> tuple[list[int | None], list[str]]:
    """Call `function(*args)` in so many processes; when one fails the others are ended, as torchrun does it.

    Returns:
        The exit status of each (negative: it was ended), and what it printed.
    """
    context, port = mp.get_context("fork"), free_port()
    logs = [folder / f"process-{rank}.log" for rank in range(count)]
    orders = [(rank, count, port, logs[rank], function, args) for rank in range(count)]
    processes = [context.Process(target=_serve, args=order, daemon=True) for order in orders]
    for process in processes:
        process.start()
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)  # of the launcher, as with torchrun
    _wait(processes)
    del store
    return [process.exitcode for process in processes], [log.read_text() for log in logs]


def _wait(processes: list[BaseProcess]) -> None:
    end = time.monotonic() + PATIENCE
    while any(process.is_alive() for process in processes):
        if time.monotonic() > end or any(process.exitcode not in (None, 0) for process in processes):
            time.sleep(0.3)  # the others may have something to say
            for process in processes:
                process.terminate()
        time.sleep(0.05)
    for process in processes:
        process.join()


def _serve(rank: int, count: int, port: int, log: Path, function: Callable, args: tuple) -> None:
    with log.open("w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    for state in (PartialState, AcceleratorState, GradientState):
        state._reset_state()  # of the process that this one was forked from
    sys.exit(function(*args))
