"""States in training: a batch that begins where another has ended, at random or because its text continues.

`state_passing` (Ruiz & Gu, "Understanding and improving length generalization in recurrent models", arXiv 2507.02782,
2025): with a probability a batch begins with the final states of the batch before it, detached and dealt to other rows,
so that a model meets the states of long texts in windows that are short. `tbptt`: the text is cut into as many streams
as there are rows; every row continues its stream from window to window, and gradients end where a window begins
(truncated backpropagation through time; Williams & Peng, 1990). Every process has states of its own.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import Sampler
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import HoloError
from ..modeling.cache import RecurrentCache
from ..registry import capabilities_of
from .arguments import Run

RANDOM = "random"  # the generator's state, next to those of the layers


class StreamSampler(Sampler[int]):
    """The windows of a text in streams: a row of a batch continues where it ended in the batch before.

    Args:
        windows: in the text, of which those are left over that do not fill all streams.
        rows: in the batch of a process.
        processes: that take turns at batches.

    Raises:
        HoloError: there are fewer windows than streams.
    """

    def __init__(self, windows: int, rows: int, processes: int = 1) -> None:
        self.streams = rows * processes
        self.steps = windows // self.streams
        if not self.steps:
            raise HoloError(f"tbptt: {windows} windows are fewer than the {self.streams} rows of all batches")

    def __len__(self) -> int:
        return self.streams * self.steps

    def __iter__(self) -> Iterator[int]:
        return (stream * self.steps + step for step in range(self.steps) for stream in range(self.streams))


class PassedStates:
    """What the batches of one process begin with.

    Args:
        config: of the model.
        share: of the batches that begin with the states of the batch before.
        streams: whether rows continue their own text: then no row moves, and `share` is 1.
        seed: of what is drawn.
    """

    def __init__(self, config: PretrainedConfig, share: float, streams: bool = False, seed: int = 0) -> None:
        self.config, self.share, self.streams = config, share, streams
        self.generator = torch.Generator().manual_seed(seed)
        self.sampler: StreamSampler | None = None  # of the streams
        self.fed = 0
        self._held: RecurrentCache | None = None

    def begin(self, rows: int) -> RecurrentCache:
        """The cache that a batch of so many rows begins with."""
        held, self._held = self._held, None
        if self.streams:
            begins = self.sampler is not None and self.fed % self.sampler.steps == 0  # with the text
        else:
            begins = float(torch.rand((), generator=self.generator)) >= self.share
        if held is None or begins:
            return RecurrentCache(self.config)
        if not self.streams:
            count = len(next(iter(held.layers[0].states.values())))
            dealt = torch.randperm(count, generator=self.generator)
            held.batch_select_indices(dealt.repeat(-(-rows // count))[:rows])
        return held

    def end(self, cache: RecurrentCache) -> None:
        """Keep the states after a batch, without their gradients."""
        self._held = cache.detach_()
        self.fed += 1

    @property
    def _count(self) -> str:
        """How many streams all processes read, as a note in a file."""
        return "no" if self.sampler is None else str(self.sampler.streams)

    def save(self, folder: Path, process: int) -> None:
        """Write them next to a checkpoint."""
        layers = [] if self._held is None else self._held.layers
        tensors = {f"{i}.{name}": x.contiguous() for i, layer in enumerate(layers) for name, x in layer.states.items()}
        seen = 0 if self._held is None else self._held.get_seq_length()
        notes = {"fed": str(self.fed), "seen": str(seen), "streams": self._count}
        save_file(tensors | {RANDOM: self.generator.get_state()}, states_file(folder, process), notes)

    def load(self, folder: Path, process: int, device: torch.device) -> None:
        """Take over what [`save`] has written.

        Raises:
            HoloError: the run that wrote the checkpoint passed no states on, had fewer processes, or other streams.
        """
        file = states_file(folder, process)
        if not file.is_file():
            raise HoloError(
                f"resume_from_checkpoint: {str(folder)!r} has no {file.name}: it comes from a run of fewer processes, "
                "or without --state_passing and --tbptt; resume it as it was begun"
            )
        with safe_open(file, "pt") as saved:
            notes, names = saved.metadata(), set(saved.keys())
            if self.sampler is not None and notes["streams"] != self._count:  # a run that has ended reads no more
                raise HoloError(
                    f"resume_from_checkpoint: {str(folder)!r} was saved with {notes['streams']} streams, and this run "
                    f"reads {self._count}; give it the batch size and the processes that it was begun with"
                )
            self.generator.set_state(saved.get_tensor(RANDOM))
            states = {name: saved.get_tensor(name).to(device, copy=True) for name in names - {RANDOM}}
        self.fed, self._held = int(notes["fed"]), None
        if states:
            self._held = RecurrentCache(self.config)
            for key, state in sorted(states.items()):
                index, name = key.split(".", 1)
                self._held.layers[int(index)].put(name, state)
            self._held.advance(int(notes["seen"]))


def states_file(folder: Path, process: int) -> Path:
    """Where a process keeps its states in the folder of a checkpoint."""
    return folder / f"states_{process}.safetensors"


def passed_states(run: Run, model: PreTrainedModel) -> PassedStates | None:
    """What the options of a run ask for.

    Raises:
        HoloError: it cannot work with the task, the model or the other options.
    """
    args, asked = run.training, run.states
    if not asked.state_passing and not asked.tbptt:
        return None
    option = "tbptt" if asked.tbptt else f"state_passing: {asked.state_passing}"
    if run.model.task != "causal":
        raise HoloError(f"{option}: only --task causal reads a text from its beginning on, not {run.model.task!r}")
    if "constant_state" not in (capabilities_of(type(model), model.config) or ()):
        raise HoloError(
            f"{option}: {type(model).__name__} with this config keeps no state of constant size; take a recurrent "
            "family, hsn or resonance, without attention layers"
        )
    if args.context_parallel_size > 1:
        raise HoloError(f"{option}: does not go together with context_parallel_size; leave one of them out")
    if args.gradient_checkpointing:
        raise HoloError(f"{option}: gradient_checkpointing computes every block twice, and would feed its state twice")
    if asked.tbptt:
        _check_streams(run)
    share = 1.0 if asked.tbptt else asked.state_passing
    return PassedStates(model.config, share, asked.tbptt, args.seed + args.process_index)


def _check_streams(run: Run) -> None:
    """Raise HoloError where windows are not the pieces of one text, each after the other."""
    args, data = run.training, run.data
    if data.data_format != "text" or data.documents != "joined":
        raise HoloError("tbptt: it needs one text: --data_format text with --documents joined")
    if data.stride not in (None, data.block_size):
        raise HoloError(f"tbptt: stride={data.stride} repeats tokens in the next window; leave it at block_size")
    lengths = getattr(args, "group_by_length", False) or getattr(args, "train_sampling_strategy", "random") != "random"
    if lengths or args.auto_find_batch_size:
        raise HoloError("tbptt: it sets the order of windows; leave group_by_length, auto_find_batch_size and others")
