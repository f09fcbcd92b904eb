"""The processes of one run: who writes, how one failure ends all of them, and what is summed over them.

A run that was not started by torchrun or `accelerate launch` is one process, and then nothing here waits or sends.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from ..errors import HoloError

STORE_PATIENCE = timedelta(seconds=5)
PATIENCE = timedelta(days=1)  # of processes that wait for what one of them does alone; if that one ends, so do they
Result = TypeVar("Result")


def launched() -> bool:
    """Whether a launcher has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def count() -> int:
    """How many processes share this run."""
    return PartialState().num_processes


def index() -> int:
    """The number of this one, from 0."""
    return PartialState().process_index


def is_main() -> bool:
    """Whether this is the process that writes files."""
    return PartialState().is_main_process


def by_main(work: Callable[[], Result]) -> Result:
    """Let the main process do some work, once all have come here; the others wait until it is done.

    Returns:
        In every process, what the work returned in the main one; it has to be picklable.

    Raises:
        HoloError: in all processes, if the work raised one in the main process.
        SystemExit: in the others, if the work failed otherwise; the main process raises what it was.
    """
    if count() == 1:
        return work()
    PartialState().wait_for_everyone()
    news: list[Any] = [None, None]  # the result, and the message of a HoloError or that it was another error
    failure: Exception | None = None
    if is_main():
        try:
            news[0] = work()
        except Exception as error:
            failure, news[1] = error, str(error) if isinstance(error, HoloError) else True
    broadcast_object_list(news)
    if failure is not None:
        raise failure
    if news[1] is not None:
        raise HoloError(news[1]) if isinstance(news[1], str) else SystemExit(1)
    return news[0]


@contextmanager
def failing_together() -> Iterator[None]:
    """Where one process finds bad input in this block, all of them raise what the first one says.

    The block must not exchange anything: processes that fail would be missed there.

    Raises:
        HoloError: one of the processes raised it.
    """
    failure: HoloError | None = None
    try:
        yield
    except HoloError as error:
        failure = error
    messages = gathered(None if failure is None else str(failure))
    if failure is not None and str(failure) == next(filter(None, messages)):
        raise failure  # with its own cause
    for message in filter(None, messages):
        raise HoloError(message) from None


def gathered(value: Any) -> list[Any]:
    """What each process gives, in their order; any object that can be pickled, such as text."""
    return gather_object([value]) if count() > 1 else [value]


def share_of(number: int) -> range:
    """Which of so many items this process takes: every `count()`-th."""
    return range(index(), number, count())


@torch.no_grad()
def summed(values: torch.Tensor) -> torch.Tensor:
    """The sum of these values over all processes, of the same type and on the same device."""
    if count() == 1:
        return values
    total = values.detach().to(PartialState().device, copy=True).contiguous()  # where the backend can reach it
    dist.all_reduce(total)
    return total.to(values.device)


@torch.no_grad()
def side_by_side(values: torch.Tensor) -> torch.Tensor:
    """Those of all processes, which have the same shape, along the last dimension: `[..., N]` to `[..., count · N]`."""
    if count() == 1:
        return values
    mine = values.detach().to(PartialState().device).contiguous()
    every = [torch.empty_like(mine) for _ in range(count())]
    dist.all_gather(every, mine)
    return torch.cat(every, -1).to(values.device)


def first_to_say(message: str) -> bool:
    """Whether no other process of this run has said the same: an error that all have is to be printed once.

    It asks the store of the launcher, which works before the processes know each other, and while some are ending.
    """
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not launched() or not host or not port:
        return True
    try:
        store = dist.TCPStore(host, int(port), is_master=False, timeout=STORE_PATIENCE, wait_for_workers=False)
        return store.add(f"hf_holo/said/{hashlib.sha256(message.encode()).hexdigest()}", 1) == 1
    except (RuntimeError, ValueError):  # nobody keeps one: better twice than never
        return True
