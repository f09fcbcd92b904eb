"""What `hf-holo info` shows: parameters, recurrent state, FLOPs and memory of a preset or a checkpoint.

The model runs on tensors without data (torch's fake tensors) while every matrix product is counted and every tensor
that is alive is weighed. So the figures are the same on every machine and nothing is computed. Not in them: FLOPs of
FFTs and of elementwise operations, what a kernel allocates inside, the allocator's slack, and the optimizer's state.
"""

import argparse
import json
import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from ..data.processors import SECONDS, input_sizes
from ..errors import HoloError, Parser
from ..modeling.cache import CACHE_NAME
from ..modeling.hashing import HashEmbedding, collisions
from ..modeling.kernels import backend
from ..modeling.modeling_hsn import HolographicMixer
from ..modeling.vocabulary import vocabulary_parameters
from ..registry import get_architecture, preset_config, presets

USUAL_LENGTHS = (128, 512, 2048)
USUAL_SIDES, USUAL_SECONDS = (32, 224, 512), (1, 10, 60)  # of pictures in pixels, of sounds
TOKENS = 128  # of the text that a model of several senses is given


@dataclass(frozen=True)
class Cost:
    """What one sequence of `length` tokens costs."""

    length: int
    flops_per_token: float  # of reading the sequence and predicting one token, or every token if it cannot generate
    cache_bytes: int  # what decoding has to keep after the sequence
    inference_bytes: int  # most bytes alive in that pass, weights included
    training_bytes: int  # most bytes alive in a forward and backward pass, gradients included


def main(argv: list[str]) -> None:
    """Print what a preset or a checkpoint costs."""
    parser = Parser(prog="hf-holo info", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="PRESET|PATH", help="a preset (see `hf-holo list`) or a checkpoint folder")
    lengths = "lengths of texts in tokens, of sounds in seconds, or sides of pictures in pixels"
    parser.add_argument("--lengths", type=int, nargs="+", default=None, help=lengths)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args(argv)
    if args.lengths and min(args.lengths) < 1:
        raise HoloError(f"lengths: {args.lengths} are not all at least 1")
    config = find_config(args.model)
    reads = getattr(config, "vocab_size", None) is not None
    record = info(config, args.lengths or USUAL_LENGTHS) if reads else sensing_info(config, args.lengths)
    if args.json:
        print(json.dumps(record, indent=2))
    elif reads:
        _print_record(args.model, record)
    else:
        _print_sensing_record(args.model, record)


def find_config(model: str) -> PretrainedConfig:
    """The config of a preset or of the checkpoint in a folder.

    Raises:
        HoloError: it is neither, or the checkpoint's config cannot be read.
    """
    if model in presets() or not (Path(model).is_dir() or "/" in model):
        return preset_config(model)
    if not (Path(model) / "config.json").is_file():
        raise HoloError(f"{model!r} has no config.json: give a preset or the folder of a checkpoint")
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise HoloError(f"{model!r}: {str(error).splitlines()[0]}") from error


def info(config: PretrainedConfig, lengths: Sequence[int] = USUAL_LENGTHS) -> dict[str, Any]:
    """All figures for one config.

    Args:
        config: config of a registered family.
        lengths: sequence lengths.

    Returns:
        `model_type`, `vocab_size`, `vocabulary` (see [`vocabulary_record`]), `parameters`, `parameter_bytes`,
        `state_bytes` (see [`state_bytes`]), `decode_flops` (one more token), `scan` (what scans on this machine, see
        [`scan_backend`]) and `costs` (a record for each length, see [`Cost`]). A model that fills masks does not
        decode: its `state_bytes` and `decode_flops` are None.
    """
    with FakeTensorMode():
        model = get_architecture(config.model_type).model_for(config)(config)
        generates = model.can_generate()
        return {
            "model_type": config.model_type,
            "vocab_size": config.vocab_size,
            "vocabulary": vocabulary_record(model),
            "parameters": sum(p.numel() for p in model.parameters()),
            "parameter_bytes": sum(p.nbytes for p in model.parameters()),
            "state_bytes": state_bytes(model) if generates else None,
            "decode_flops": _run(model, 1)[0] if generates else None,
            "scan": scan_backend(model),
            "costs": [asdict(_cost(model, length)) for length in lengths],
        }


def sensing_info(config: PretrainedConfig, lengths: Sequence[int] | None = None) -> dict[str, Any]:
    """All figures for a model of pictures, sounds or several senses.

    Args:
        config: config of a registered family.
        lengths: sides of pictures in pixels, or sounds in seconds; default: the usual ones. A model of several senses
            is given what its config is made for, and a text of 128 tokens.

    Returns:
        `model_type`, `parameters`, `parameter_bytes`, `state_bytes` (of a causal one, else None) and `costs`: for each
        input its `size` in words, `flops`, and `inference_bytes` and `training_bytes` as in [`Cost`].
    """
    with FakeTensorMode():
        model = get_architecture(config.model_type).model_for(config)(config)
        keeps_state = getattr(config, "is_causal", False)
        return {
            "model_type": config.model_type,
            "parameters": sum(p.numel() for p in model.parameters()),
            "parameter_bytes": sum(p.nbytes for p in model.parameters()),
            "state_bytes": state_bytes(model) if keeps_state else None,
            "costs": [_sensing_cost(model, size, given) for size, given in _given_inputs(config, lengths)],
        }


def _given_inputs(config: PretrainedConfig, lengths: Sequence[int] | None) -> Iterable[tuple[str, dict[str, Any]]]:
    """Inputs of one example, and their size in words."""
    sizes = input_sizes(config)
    if hasattr(config, "modalities"):
        made = {
            "text": ("input_ids", torch.zeros(1, TOKENS, dtype=torch.long), f"{TOKENS} tokens"),
            "vision": ("pixel_values", torch.zeros(1, *sizes.get("pixel_values", ())), "a picture"),
            "audio": ("input_values", torch.zeros(1, *sizes.get("input_values", ())), f"{SECONDS:g} s of sound"),
        }
        chosen = [made[name] for name in config.modalities]
        yield ", ".join(words for *_, words in chosen), {name: x for name, x, _ in chosen}
    elif "pixel_values" in sizes:
        for side in lengths or USUAL_SIDES:
            yield f"{side} × {side} pixels", {"pixel_values": torch.zeros(1, sizes["pixel_values"][0], side, side)}
    else:
        for seconds in lengths or USUAL_SECONDS:
            yield f"{seconds} s", {"input_values": torch.zeros(1, seconds * config.sampling_rate)}


def _sensing_cost(model: PreTrainedModel, size: str, inputs: dict[str, Any]) -> dict[str, Any]:
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as flops, LiveBytes() as live:
        model(**inputs)
    model.train()
    with LiveBytes() as training:
        model(**inputs).logits.sum().backward()
    model.zero_grad()
    figures = {"inference_bytes": live.peak, "training_bytes": training.peak}
    return {"size": size, "flops": flops.get_total_flops(), **figures}


def state_bytes(model: PreTrainedModel) -> int | None:
    """Bytes of recurrent state that one sequence keeps whatever its length, from `state_spec`; None without one."""
    if not hasattr(model, "state_spec"):
        return None
    model_class: Any = type(model)
    shapes = [shape for layer in model_class.state_spec(model.config) for shape in layer.values()]
    return torch.float32.itemsize * sum(map(math.prod, shapes))


def scan_backend(model: PreTrainedModel) -> str | None:
    """What scans in the holographic mixers of a model on this machine, "fla-core triton" or "torch" with the reason;
    None if it has none."""
    features = [2 * m.phases if m.dynamic else 1 for m in model.modules() if isinstance(m, HolographicMixer)]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return backend(device, torch.float32, max(features)) if features else None


def vocabulary_record(model: PreTrainedModel) -> dict[str, Any]:
    """What embedding and head store together, against one dense table for both.

    Returns:
        `strategy`, `parameters`, `dense_parameters`, `compression` (how many times fewer) and, for a hashed vocabulary,
        `collisions` (see [`collisions`]).
    """
    parameters, dense = vocabulary_parameters(model)
    record = {
        "strategy": getattr(model.config, "embedding_strategy", "standard"),
        "parameters": parameters,
        "dense_parameters": dense,
        "compression": dense / parameters,
    }
    embedding = model.get_input_embeddings()
    return record | ({"collisions": collisions(embedding)} if isinstance(embedding, HashEmbedding) else {})


def _cost(model: PreTrainedModel, length: int) -> Cost:
    flops, cache_bytes, inference_bytes = _run(model, length)
    return Cost(length, flops / length, cache_bytes, inference_bytes, training_bytes=_train(model, length))


def _run(model: PreTrainedModel, length: int) -> tuple[int, int, int]:
    """FLOPs, bytes of the cache and most bytes alive when `length` tokens are read and the next one is predicted."""
    model.eval()
    x = torch.zeros(1, length, model.config.hidden_size)  # not ids: a check of their values would need data
    with torch.no_grad(), FlopCounterMode(display=False) as flops, LiveBytes() as live:
        output = model(inputs_embeds=x, **({"use_cache": True, "logits_to_keep": 1} if model.can_generate() else {}))
    return flops.get_total_flops(), _tensor_bytes(output.get(CACHE_NAME)), live.peak


def _train(model: PreTrainedModel, length: int) -> int:
    """Most bytes alive in one forward and backward pass."""
    model.train()
    x, labels = torch.zeros(1, length, model.config.hidden_size), torch.zeros(1, length, dtype=torch.long)
    with LiveBytes() as live:
        model(inputs_embeds=x, labels=labels).loss.backward()
    model.zero_grad()
    return live.peak


def _tensor_bytes(cache: Any) -> int:
    """Bytes of the tensors in the layers of a cache, if there is one; a count for every row does not matter."""
    if cache is None:
        return 0
    leaves = (x for layer in cache.layers for x in tree_leaves(vars(layer)))
    tensors = [x for x in leaves if isinstance(x, torch.Tensor) and x.dim() > 1]
    return sum({x.untyped_storage(): x.untyped_storage().nbytes() for x in tensors}.values())


class LiveBytes(TorchDispatchMode):
    """Weighs the tensors that operations make inside the context: `now` and at most (`peak`) alive, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._weigh(tensor.untyped_storage())
        return result

    def _weigh(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, size: int) -> None:
        self.now -= size


def _print_record(name: str, record: dict[str, Any]) -> None:
    console = Console()
    console.print(f"{name} ({record['model_type']}, vocabulary {record['vocab_size']:,})")
    console.print(f"parameters        {record['parameters']:,} ({_size(record['parameter_bytes'])})")
    _print_vocabulary(console, record["vocabulary"])
    if record["state_bytes"] is not None:
        console.print(f"recurrent state   {_size(record['state_bytes'])} per sequence, at any length")
    if record["decode_flops"] is not None:
        console.print(f"decoding          {record['decode_flops']:,} FLOPs per token")
    if record["scan"] is not None:
        console.print(f"scan              {record['scan']}")
    table = Table()
    for title in ("tokens", "FLOPs per token", "cache", "memory, inference", "memory, training"):
        table.add_column(title, justify="right")
    for cost in record["costs"]:
        sizes = (_size(cost[key]) for key in ("cache_bytes", "inference_bytes", "training_bytes"))
        table.add_row(f"{cost['length']:,}", f"{cost['flops_per_token']:,.0f}", *sizes)
    console.print(table)


def _print_sensing_record(name: str, record: dict[str, Any]) -> None:
    console = Console()
    console.print(f"{name} ({record['model_type']})")
    console.print(f"parameters        {record['parameters']:,} ({_size(record['parameter_bytes'])})")
    if record["state_bytes"] is not None:
        console.print(f"recurrent state   {_size(record['state_bytes'])} per sound, at any length")
    table = Table()
    for title in ("input", "FLOPs", "memory, inference", "memory, training"):
        table.add_column(title, justify="right")
    for cost in record["costs"]:
        sizes = (_size(cost[key]) for key in ("inference_bytes", "training_bytes"))
        table.add_row(cost["size"], f"{cost['flops']:,}", *sizes)
    console.print(table)


def _print_vocabulary(console: Console, vocabulary: dict[str, Any]) -> None:
    console.print(
        f"vocabulary        {vocabulary['strategy']}, {vocabulary['parameters']:,} parameters in embedding and head; "
        f"a dense tied table has {vocabulary['dense_parameters']:,} ({vocabulary['compression']:.2f} times as many)"
    )
    if "collisions" in vocabulary:
        found = vocabulary["collisions"]
        shared = f"{found['observed']:,} of {found['tokens']:,} tokens share all their buckets and signs with another"
        console.print(f"hash collisions   {shared} (expected {found['expected']:,.1f})")


def _size(count: int) -> str:
    return f"{count / 2**10:,.1f} KiB" if count < 2**20 else f"{count / 2**20:,.1f} MiB"
