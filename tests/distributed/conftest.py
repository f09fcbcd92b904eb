"""Processes that stay for all tests of a file: their start takes longer than what they compute."""

import os
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PATIENCE = timedelta(seconds=60)  # of a process that waits for another one


class Workers:
    """Processes that can talk to each other through torch.distributed (gloo, on the loopback interface)."""

    def __init__(self, count: int, store: str) -> None:
        context = mp.get_context("fork")  # which does not import torch again
        self.pipes, self.processes = [], []
        for rank in range(count):
            here, there = context.Pipe()
            self.processes.append(context.Process(target=_serve, args=(rank, count, store, there), daemon=True))
            self.pipes.append(here)
        for process in self.processes:
            process.start()

    def run(self, function: Callable, *args: Any) -> list[Any]:
        """What `function(*args)` returns in each of the processes."""
        for pipe in self.pipes:
            pipe.send((function, args))
        answers = [pipe.recv() for pipe in self.pipes]
        for error in (answer for answer in answers if isinstance(answer, _Failure)):
            pytest.fail("\n".join(a.text for a in answers if isinstance(a, _Failure)) or error.text)
        return answers

    def stop(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(10)
            process.kill()


class _Failure:
    def __init__(self, text: str) -> None:
        self.text = text


def _serve(rank: int, count: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=PATIENCE)
    while (order := pipe.recv()) is not None:
        function, args = order
        torch.manual_seed(0)
        try:
            pipe.send(function(*args))
        except Exception:
            pipe.send(_Failure(f"process {rank}: {traceback.format_exc()}"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def workers(tmp_path_factory) -> Iterator[Workers]:
    """Four of them."""
    four = Workers(4, str(tmp_path_factory.mktemp("store") / "store"))
    yield four
    four.stop()
