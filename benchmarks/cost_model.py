"""What a training step costs in several processes: a model of products, bytes and messages, fitted here and checked.

    python benchmarks/cost_model.py

Steps, forward and backward, are timed in 1, 2 and 4 processes with data parallelism (DistributedDataParallel), sharded
weights (`fully_shard`) and context parallelism, over gloo, one thread each. Four numbers are fitted to the times: what
a process multiplies and what it passes through its layers in a second, what it sends in a second, and what a message
costs. One configuration, of another width and depth than all others, is left out of the fit and predicted. Then the
same formulas say what GPUs would need, with numbers from data sheets in place of the fitted ones.
"""

import argparse
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from common.own_process import in_own_processes, parsed
from common.report import RESULTS, markdown_table, measured_on, print_footer, print_table, write_report
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from hf_holo import HsnConfig, HsnForCausalLM
from hf_holo.distributed import ContextParallel

NAME = "cost_model"
VOCAB_SIZE = 256
KINDS = {"data": "data parallelism", "sharded": "sharded weights", "context": "context parallelism"}


@dataclass(frozen=True)
class Setup:
    """A training step.

    Args:
        kind: one of `KINDS`; in a single process all are the same.
        processes: that share it.
        width, depth: of an hsn.
        rows: texts of every process; of all of them together with context parallelism.
        length: tokens of each text that a process has; with context parallelism its part of them.
        bytes: of a weight and of its gradient.
    """

    kind: str
    processes: int
    width: int = 128
    depth: int = 2
    rows: int = 4
    length: int = 512
    bytes: int = 4


FITTED = [
    *(Setup("data", 1, width, 2) for width in (128, 256)),
    *(Setup(kind, count, width, 2) for kind in KINDS for count in (2, 4) for width in (128, 256)),
]
PREDICTED = Setup("data", 2, width=192, depth=3)


# The model ----------------------------------------------------------------------------------------------------------


class Costs(NamedTuple):
    """Of one process in a step: operations in products, those that it waits for, values that pass through its layers,
    bytes it sends, and rounds of messages that follow each other."""

    operations: float
    waiting: float
    values: float
    bytes: float
    messages: float


@dataclass(frozen=True)
class Machine:
    """What the costs of a process are divided by.

    Args:
        operations, values, bytes: a second.
        message: seconds of each round.
        cores: of all processes together; more processes than these take turns.
    """

    operations: float
    values: float
    bytes: float
    message: float
    cores: float = math.inf

    def seconds(self, setup: Setup) -> float:
        operations, values, sent, messages = waited_for(setup, self.cores)
        return operations / self.operations + values / self.values + sent / self.bytes + messages * self.message


def waited_for(setup: Setup, cores: float) -> tuple[float, float, float, float]:
    """Operations, values, bytes and rounds that a step takes its time for, where processes take turns on the cores."""
    cost, turns = costs(setup), max(1.0, setup.processes / cores)
    return turns * cost.operations + cost.waiting, turns * cost.values, cost.bytes, cost.messages


def costs(setup: Setup) -> Costs:
    """Operations, bytes and messages of a step, from the shapes alone.

    A sum over P processes sends 2·(P−1)/P of what is summed, by rings, and takes 2·log₂P rounds, by trees. Sharded
    weights are gathered twice, forward and backward, and their gradients summed once: half a sum each. A state is
    handed on in each layer, forward, and its gradient backward; before that, in the first layer, each process waits
    for the scans of those before it.
    """
    size = _size(setup.width, setup.depth, setup.rows, setup.length)
    share, rounds = 1 - 1 / setup.processes, 2 * math.log2(setup.processes)
    gradients = setup.bytes * size.parameters
    values = setup.rows * setup.length * setup.width * setup.depth
    if setup.processes == 1:
        return Costs(size.operations, 0.0, values, 0.0, 0.0)
    if setup.kind == "sharded":
        return Costs(size.operations, 0.0, values, 3 * share * gradients, 1.5 * rounds * (setup.depth + 1))
    if setup.kind == "data":
        return Costs(size.operations, 0.0, values, 2 * share * gradients, rounds)
    waiting = (setup.processes - 1) * size.scan
    states = 2 * setup.bytes * setup.rows * size.state * setup.depth
    return Costs(size.operations, waiting, values, 2 * share * gradients + states, rounds + 2 * setup.depth)


class Size(NamedTuple):
    """Of a model and its batch in one process: operations in the products of a step; those in the scan of one layer;
    weights; numbers in the state of one layer and row."""

    operations: float
    scan: float
    parameters: int
    state: int


@cache
def _size(width: int, depth: int, rows: int, length: int) -> Size:
    """Counted by PyTorch on the meta device, for one row and two depths, since each layer costs the same."""
    (one, scan, first, state), (two, _, second, _) = (_counted(width, n, length) for n in (1, 2))
    operations, parameters = one + (depth - 1) * (two - one), first + (depth - 1) * (second - first)
    return Size(rows * operations, rows * scan, parameters, state)


def _counted(width: int, depth: int, length: int) -> tuple[float, float, int, int]:
    """The size of a model of this depth with one row."""
    with torch.device("meta"):
        model = new_model(width, depth)
        ids = torch.zeros(1, length, dtype=torch.long)
        with FlopCounterMode(display=False) as step:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        with torch.no_grad(), FlopCounterMode(display=False) as forward:
            model(input_ids=ids, use_cache=False)
    mixer = model.model.layers[0].mixer
    products = [name for name, part in mixer.named_modules() if isinstance(part, nn.Linear)]
    by_part = {name: sum(counts.values()) for name, counts in forward.get_flop_counts().items()}
    name = f"{type(model).__name__}.model.layers.0.mixer"
    scan = by_part[name] - sum(by_part[f"{name}.{part}"] for part in products)
    head = model.config.num_heads, 2 * model.config.num_phases, width // model.config.num_heads
    return step.get_total_flops(), 3 * scan, model.num_parameters(), math.prod(head)


def new_model(width: int, depth: int) -> HsnForCausalLM:
    return HsnForCausalLM(HsnConfig(vocab_size=VOCAB_SIZE, hidden_size=width, num_hidden_layers=depth)).train()


def fit(rows: Sequence[dict], cores: int) -> Machine:
    """The machine that explains measured seconds best: least squares of relative errors, with numbers of at least 0."""
    from scipy.optimize import nnls

    columns = np.array([waited_for(Setup(**row["setup"]), cores) for row in rows])
    table = columns / np.array([[row["seconds"]] for row in rows])
    scale = table.max(0)
    seconds = nnls(table / scale, np.ones(len(rows)))[0] / scale
    operations, values, sent = (1 / each if each else math.inf for each in seconds[:3])
    return Machine(operations, values, sent, seconds[3], cores)


# Measuring ----------------------------------------------------------------------------------------------------------


def measure(index: int, store: str, setup: dict, steps: int) -> dict:
    """Median seconds of a step as one of the processes takes it."""
    torch.set_num_threads(1)
    here = Setup(**setup)
    place = {"init_method": f"file://{store}", "rank": index, "world_size": here.processes}
    dist.init_process_group("gloo", **place, timeout=timedelta(minutes=2))  # fails where another process has ended
    torch.manual_seed(0)
    step = _step(here, new_model(here.width, here.depth))
    seconds = []
    for _ in range(steps + 2):
        dist.barrier()
        start = time.perf_counter()
        step()
        dist.barrier()
        seconds.append(time.perf_counter() - start)
    dist.destroy_process_group()
    return {"seconds": statistics.median(seconds[2:])}


def _step(setup: Setup, model: HsnForCausalLM) -> Callable[[], None]:
    """A forward and a backward pass of this process, gradients summed."""
    parts = setup.processes if setup.kind == "context" else 1
    ids = torch.randint(VOCAB_SIZE, (setup.rows, parts * setup.length), generator=torch.Generator().manual_seed(0))
    if setup.kind == "context":
        context = ContextParallel(model)

        def step() -> None:
            model.zero_grad()
            context(input_ids=ids, labels=ids).loss.backward()
            context.sum_gradients()

        return step

    if setup.kind == "sharded":
        for layer in model.model.layers:
            fully_shard(layer)
        trained: nn.Module = fully_shard(model)
    else:
        trained = DistributedDataParallel(model)

    def step() -> None:
        trained.zero_grad()
        trained(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    return step


def measured(setup: Setup, steps: int) -> dict:
    """A row: the setup, and the seconds of the slowest process."""
    with tempfile.TemporaryDirectory() as folder:
        each = [
            {"index": i, "store": f"{folder}/store", "setup": asdict(setup), "steps": steps}
            for i in range(setup.processes)
        ]
        seconds = max(part["seconds"] for part in in_own_processes(__file__, each))
    return {"setup": asdict(setup), "seconds": seconds}


# Predictions --------------------------------------------------------------------------------------------------------

REACHED = 0.3  # of a GPU's peak, that training is assumed to reach all in all
GPUS = {  # of the H200's data sheet: bfloat16 without sparsity, NVLink one way, and a 400 Gb/s adapter for each GPU
    8: Machine(REACHED * 989e12, math.inf, 450e9, 5e-6),
    1024: Machine(REACHED * 989e12, math.inf, 50e9, 20e-6),
}
LARGE = {"width": 2048, "depth": 24, "bytes": 2}
PER_GPU = {"data": (8, 4096), "sharded": (8, 4096), "context": (1, 32_768)}  # texts, and tokens of each


def predictions() -> list[dict]:
    """Seconds of a step and what of it is not waiting for others, for kinds and numbers of GPUs."""
    rows = []
    for (kind, (texts, length)), (count, machine) in ((k, g) for k in PER_GPU.items() for g in GPUS.items()):
        setup = Setup(kind, count, rows=texts, length=length, **LARGE)
        seconds, alone = machine.seconds(setup), machine.seconds(replace(setup, processes=1))
        tokens = count * texts * length
        rows.append(
            {"kind": kind, "gpus": count, "tokens": tokens, "seconds": seconds, "efficiency": alone / seconds}
            | {"tokens_per_second": tokens / seconds}
        )
    return rows


# The command --------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7, help="timed for each configuration, after two")
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2, 4], help="leave out those with others")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    args = parsed(parser, argv, measure)

    start, cores = time.perf_counter(), len(os.sched_getaffinity(0))
    rows = []
    for setup in [*(one for one in FITTED if one.processes in args.processes), PREDICTED]:
        rows.append(measured(setup, args.steps))
        print(f"{setup}: {rows[-1]['seconds']:.3f} s", flush=True)
    machine = fit(rows[:-1], cores)
    for row in rows:
        row["model"] = machine.seconds(Setup(**row["setup"]))
    print_table([{**row["setup"], "seconds": row["seconds"], "model": row["model"]} for row in rows])
    figures = {"machine": asdict(machine), "fitted": rows[:-1], "predicted": rows[-1], "gpus": predictions()}
    seconds = time.perf_counter() - start
    print_footer(write_report(NAME, figures, seed=0, seconds=seconds, folder=args.results), seconds)


def sentence(result: dict) -> str:
    f = result["figures"]
    off = f["predicted"]["model"] / f["predicted"]["seconds"] - 1
    return (
        f"a model of operations, bytes and messages, fitted to {len(f['fitted'])} configurations with 1, 2 and 4 "
        f"processes, is off by {_worst(f['fitted']):.0%} at most on them and by {off:+.0%} on one that it has not seen"
    )


def _worst(rows: Sequence[dict]) -> float:
    return max(abs(row["model"] / row["seconds"] - 1) for row in rows)


def table(result: dict) -> str:
    """What was measured next to what the model says, and its predictions for GPUs."""
    f, machine = result["figures"], result["figures"]["machine"]
    head = ("", ">processes", ">width", ">layers", ">measured", ">model", ">difference")
    rows = [_told(row) for row in f["fitted"]] + [_told(f["predicted"], "not fitted: ")]
    gpus = [
        (
            KINDS[row["kind"]],
            f"{row['gpus']:,}",
            f"{row['tokens'] / 1e6:,.1f} million",
            f"{row['seconds']:.2f} s",
            f"{row['efficiency']:.0%}",
            f"{row['tokens_per_second'] / 1e6:,.1f} million",
        )
        for row in f["gpus"]
    ]
    gpu_head = ("", ">GPUs", ">tokens of a step", ">step", ">of it computing", ">tokens a second")
    return "\n".join(
        [
            markdown_table(head, rows),
            "",
            f"{PREDICTED.rows} texts of {PREDICTED.length} tokens for each process, median of several steps. Fitted: "
            f"{_rate(machine['operations'], 'operations')}, {_rate(machine['values'], 'values')}, "
            f"{_rate(machine['bytes'], 'bytes')}, {machine['message'] * 1e3:.1f} ms a round of messages. "
            f"{measured_on(result)}.",
            "",
            markdown_table(gpu_head, gpus),
        ]
    )


def _told(row: dict, note: str = "") -> tuple[str, ...]:
    setup, off = row["setup"], row["model"] / row["seconds"] - 1
    kind = "one process" if setup["processes"] == 1 else KINDS[setup["kind"]]
    sizes = str(setup["processes"]), str(setup["width"]), str(setup["depth"])
    return (note + kind, *sizes, f"{row['seconds']:.3f} s", f"{row['model']:.3f} s", f"{off:+.0%}")


def _rate(a_second: float, of: str) -> str:
    return (
        f"{of} that cost nothing beside these"
        if math.isinf(a_second)
        else f"{a_second / 1e9:.2g} billion {of} a second"
    )


if __name__ == "__main__":
    main()
