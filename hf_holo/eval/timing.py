"""Fair timing: tasks take turns in one process, so that a slow moment of the machine hits all of them alike."""

import ctypes
import platform
import statistics
import time
from collections.abc import Callable, Mapping

import torch


def interleaved_times(
    tasks: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of every call of each task, `repeats` of them after `warmup` that do not count."""
    for task in tasks.values():
        for _ in range(warmup):
            task()
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(repeats):
        for name, task in tasks.items():
            _wait()
            start = time.perf_counter()
            task()
            _wait()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def interleaved_medians(tasks: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 2) -> dict[str, float]:
    """Median seconds of each task."""
    return {name: statistics.median(values) for name, values in interleaved_times(tasks, repeats, warmup).items()}


def _wait() -> None:
    """Until a GPU, if there is one, has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory for the next tensor, as torch does on a GPU.

    By default it returns large blocks to the system at once, and every new tensor of more than 32 MiB pays for page
    faults again: timings at long lengths would measure the system, not the model. Does nothing with another C library.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        trim_threshold, mmap_threshold, mmap_max = -1, -3, -4
        libc.mallopt(mmap_max, 0)
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, 2**31 - 1)
