"""States of a model as a file: written whole or not at all, and read by the model that they belong to only.

The file is in the format safetensors. Its metadata says which model read the text: family, dtype, and fingerprints of
the config and of the weights. A state is a sum over all that was read, in the coordinates that the weights span: for
any other weights it is noise, and nothing would say so.
"""

import hashlib
import inspect
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PretrainedConfig, PreTrainedModel

from .versions import VERSION

KIND, FORMAT = "hf_holo prefix", "1"  # FORMAT rises when older releases cannot read a file
SAMPLE = 16  # places of a tensor that are hashed as they are, next to the sum of all of it


class SavedStates(NamedTuple):
    """What a file holds: the states of every layer by name, how many tokens they stand for, and what else was kept."""

    layers: list[dict[str, torch.Tensor]]
    tokens: int
    tensors: dict[str, torch.Tensor]
    notes: dict[str, str]


def write_states(
    path: str | os.PathLike,
    model: PreTrainedModel,
    layers: Sequence[Mapping[str, torch.Tensor]],
    tokens: int,
    tensors: Mapping[str, torch.Tensor] | None = None,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Write the states of all layers, complete or not at all.

    Args:
        path: the file; its folder must exist.
        model: that has read the tokens.
        layers: for each layer, names and states `[B, ...]`.
        tokens: how many were read.
        tensors: what else is to be kept, by names without a dot.
        notes: texts that are to be kept.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: {str(path)!r} is in a folder that does not exist; make {str(path.parent)!r}")
    named = {f"layers.{i}.{name}": state for i, layer in enumerate(layers) for name, state in layer.items()}
    kept = {name: x.detach().to("cpu", copy=True).contiguous() for name, x in {**named, **(tensors or {})}.items()}
    metadata = {
        "kind": KIND,
        "format": FORMAT,
        "hf_holo": VERSION,
        "tokens": str(tokens),
        "layers": str(len(layers)),
        "values": checksum(kept),
        "notes": json.dumps(dict(notes or {})),
        **fingerprint(model),
    }
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        save_file(kept, temporary, metadata)
        os.replace(temporary, path)
    except SafetensorError as error:  # a full disk, for one
        raise OSError(f"path: {str(path)!r} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_states(path: str | os.PathLike, model: PreTrainedModel) -> SavedStates:
    """What [`write_states`] has written, on the device of `model`.

    Raises:
        OSError: the file does not exist, or is damaged.
        ValueError: it is something else, or was written for another model or by a newer release.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: {str(path)!r} is not a file; give one that was saved after a text was read")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            _check_reader(path, metadata, model)
            values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it cannot be iterated over
    except SafetensorError as error:
        raise OSError(f"path: {str(path)!r} is not a complete safetensors file ({error}); save it again") from error
    if checksum(values) != metadata["values"]:
        raise OSError(f"path: {str(path)!r} is damaged: its values are not those that were saved; save it again")
    layers: list[dict[str, torch.Tensor]] = [{} for _ in range(int(metadata["layers"]))]
    others: dict[str, torch.Tensor] = {}
    for key, x in values.items():
        _, number, name = key.split(".", 2) if key.startswith("layers.") else ("", "", key)
        of = layers[int(number)] if number else others
        of[name] = x.to(model.device, copy=True)  # so that nothing depends on the file, which is mapped
    return SavedStates(layers, int(metadata["tokens"]), others, json.loads(metadata["notes"]))


def fingerprint(model: PreTrainedModel) -> dict[str, str]:
    """What says which model it is: `family`, `dtype`, and hashes of `config` and `weights`, those of heads left out."""
    return {
        "family": model.config.model_type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "config": hashlib.sha256(_as_json(config_arguments(model.config)).encode()).hexdigest(),
        "weights": checksum(model.base_model.state_dict()),
    }


def config_arguments(config: PretrainedConfig) -> dict[str, Any]:
    """The arguments that a family's config declares, but for those at their defaults: so a release that adds an option
    reads the files of the one before. What transformers adds to a config differs from release to release; and whether
    to cache, and which tokens are special, is set on loaded models and changes no state."""
    families: list[Any] = [cls for cls in type(config).__mro__ if cls not in PretrainedConfig.__mro__]
    parameters = [inspect.signature(cls.__init__).parameters for cls in reversed(families)]
    declared = {name: parameter.default for some in parameters for name, parameter in some.items()}
    return {
        name: getattr(config, name)
        for name, default in sorted(declared.items())
        if name not in ("self", "use_cache") and not name.endswith("_token_id") and hasattr(config, name)
        if _as_json(getattr(config, name)) != _as_json(default)
    }


def _as_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """A hash of names, shapes, dtypes and values, at the speed of memory.

    Of the values it takes the sum of their bits as integers, which any change of one of them alters, and a few as they
    are, which tell their order. It tells models apart and finds damage; it does not protect against intent.
    """
    digest = hashlib.sha256()
    for name, x in sorted(tensors.items()):
        integers, rest = _bits(x)
        sample = integers[:: max(1, len(integers) // SAMPLE)]
        digest.update(repr((name, tuple(x.shape), str(x.dtype), int(integers.sum()))).encode())
        digest.update(repr((sample.tolist(), rest.tolist())).encode())
    return digest.hexdigest()


def _bits(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bits of all values as 64-bit integers, whose sum is fast, and the bytes that are left over."""
    raw = x.detach().contiguous().view(-1).view(torch.uint8)
    if raw.storage_offset() % 8:
        raw = raw.clone()
    whole = len(raw) // 8 * 8
    return raw[:whole].view(torch.int64), raw[whole:]


def _check_reader(path: Path, metadata: Mapping[str, str], model: PreTrainedModel) -> None:
    """Raise ValueError if a file with this metadata is not to be read by `model`."""
    if metadata.get("kind") != KIND:
        raise ValueError(f"path: {str(path)!r} is not the state after a text; give one that was saved as such")
    if int(metadata["format"]) > int(FORMAT):
        raise ValueError(
            f"path: {str(path)!r} was written by hf_holo {metadata['hf_holo']}, in a newer format than this release, "
            f"{VERSION}, can read: upgrade with `pip install -U hf-holo`"
        )
    for name, value in fingerprint(model).items():
        if metadata[name] != value:
            short = name in ("family", "dtype")
            difference = f"{name} {metadata[name]!r}, this one has {value!r}" if short else f"other {name}"
            raise ValueError(
                f"path: {str(path)!r} was saved by another model ({difference}); "
                "load it with the model that has read the text, or read the text again"
            )
