"""Saving and loading, as users of transformers do it: safetensors only, tied and untied, sharded, by Auto classes."""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from ...modeling.quantizer import QUANTIZED
from .checks import Violation, assert_same, check
from .quiet import quiet
from .subject import Subject, main_output, perturb

PICKLES = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}
LOADED = 1e-6  # relative tolerance of outputs and tables in float32: the same values in the same operations
IN_BFLOAT16 = 2**-7  # relative tolerance of a table that is rounded to bfloat16


# ---------------------------------------------------------------------------------------------- the checks
@check("persistence")
def saving_and_loading(subject: Subject) -> str:
    """A saved model is safetensors only, and loads through its class and the Auto classes with equal outputs."""
    model = subject.copy(torch.float32)
    with TemporaryDirectory() as folder, quiet():
        model.save_pretrained(folder)
        _assert_safetensors(Path(folder))
        autos = auto_classes(model)
        for loader in (type(model), *autos):
            loaded = _load(loader, folder)
            if type(loaded) is not type(model):
                raise Violation(
                    f"{loader.__name__} loads a {type(loaded).__name__} instead of a {type(model).__name__}"
                )
            _assert_same_outputs(loaded, model, subject, f"loading by {loader.__name__} changes the output")
    return ", ".join(auto.__name__ for auto in autos) or "no Auto class knows it"


@check("persistence")
def every_tensor_survives(subject: Subject) -> str:
    """Every parameter and every buffer is after loading what it was, and tied matrices are tied as before."""
    model = subject.copy(torch.float32)
    with TemporaryDirectory() as folder, quiet():
        model.save_pretrained(folder)
        loaded, report = _load(type(model), folder, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            raise Violation(f"loading reports {kind.replace('_', ' ')}: {_listed(map(str, report[kind]))}")
    _assert_same_tensors(loaded, model, LOADED)
    if _tied(loaded) != _tied(model):
        raise Violation(f"the input and output embeddings were {_word(model)} and are {_word(loaded)} after loading")
    parameters, buffers = (sum(1 for _ in tensors) for tensors in (model.parameters(), model.buffers()))
    return f"{parameters} parameters, {buffers} buffers"


@check("persistence", "tying")
def tied_and_untied(subject: Subject) -> str:
    """tie_word_embeddings=True ties and False does not, and both models save and load."""
    for tied in (True, False):
        config = copy.deepcopy(subject.config)
        config.tie_word_embeddings = tied
        for mark in QUANTIZED:  # a model that is built again has its first layers
            vars(config).pop(mark, None)
        torch.manual_seed(subject.seed)
        with TemporaryDirectory() as folder, quiet():
            model = perturb(subject.model_class(config).float().eval(), subject.seed)
            if _tied(model) != tied:
                raise Violation(f"with tie_word_embeddings={tied} the input and output embeddings are {_word(model)}")
            model.save_pretrained(folder)
            loaded = _load(type(model), folder)
        if _tied(loaded) != tied:
            raise Violation(f"the {_word(model)} input and output embeddings are {_word(loaded)} after loading")
        _assert_same_tensors(loaded, model, LOADED)
        remark = _assert_same_outputs(loaded, model, subject, f"loading the {_word(model)} model changes the output")
    return remark


@check("persistence")
def a_sharded_checkpoint(subject: Subject) -> str:
    """Saved in several files, the model loads with equal tensors and outputs."""
    model = subject.copy(torch.float32)
    with TemporaryDirectory() as folder, quiet():
        model.save_pretrained(folder, max_shard_size=max(1, sum(p.nbytes for p in model.parameters()) // 4))
        _assert_safetensors(Path(folder))
        shards = len(list(Path(folder).glob("*.safetensors")))
        if shards < 2:
            raise Violation("save_pretrained(max_shard_size=...) writes one file only")
        loaded = _load(type(model), folder)
    _assert_same_tensors(loaded, model, LOADED)
    _assert_same_outputs(loaded, model, subject, "loading from shards changes the output")
    return f"{shards} files"


@check("persistence")
def loading_in_bfloat16(subject: Subject) -> str:
    """Loaded in bfloat16 the model gives finite outputs, and its tables are those of float32 or round to them."""
    model = subject.copy(torch.float32)
    with TemporaryDirectory() as folder, quiet():
        model.save_pretrained(folder)
        loaded = _load(type(model), folder, dtype=torch.bfloat16)
    _assert_same_tensors(loaded, model, IN_BFLOAT16)
    if not _outputs(loaded, subject).isfinite().all():
        raise Violation("the model gives NaN or infinite outputs after loading in bfloat16")
    rounded = [name for name, table in loaded.named_buffers() if table.dtype == torch.bfloat16]
    return f"rounded too: {_listed(rounded)}" if rounded else ""


@check("persistence")
def the_config_survives(subject: Subject) -> str:
    """A saved config loads with equal fields, through its class and through AutoConfig."""
    config = subject.config
    known = config.model_type in CONFIG_MAPPING
    with TemporaryDirectory() as folder, quiet():
        config.save_pretrained(folder)
        for loader in (type(config), AutoConfig) if known else (type(config),):
            loaded = loader.from_pretrained(folder)
            if type(loaded) is not type(config):
                raise Violation(f"{loader.__name__} loads a {type(loaded).__name__} instead of {type(config).__name__}")
            before, after = _fields(config), _fields(loaded)
            for name in sorted(before.keys() | after.keys()):
                if before.get(name) != after.get(name):
                    raise Violation(
                        f"the config field {name!r} is {after.get(name)!r} after loading by {loader.__name__}, "
                        f"it was {before.get(name)!r}"
                    )
    return "" if known else "AutoConfig does not know it"


# ---------------------------------------------------------------------------------------------- loading
def auto_classes(model: PreTrainedModel) -> list[type]:
    """The Auto classes of transformers that load this very class from its config."""
    found = []
    for name, auto in vars(modeling_auto).items():
        if name.startswith("AutoModel") and getattr(auto, "_model_mapping", None) is not None:
            known = auto._model_mapping.get(type(model.config), None)
            if type(model) in (known if isinstance(known, (list, tuple)) else (known,)):
                found.append(auto)
    return found


def _load(loader: Any, folder: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """from_pretrained() as in a process that has not made the model: other random numbers, no lucky memory."""
    torch.manual_seed(20011)
    with _memory_of_nan():
        loaded = loader.from_pretrained(folder, dtype=dtype, **options)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    model.eval()
    return loaded


@contextmanager
def _memory_of_nan() -> Iterator[None]:
    """Fill fresh memory with NaN inside: transformers 5 leaves what it does not load as it finds it."""
    mode = torch.get_deterministic_debug_mode()
    settings: Any = torch.utils.deterministic  # what it offers is not declared
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = fill
        torch.set_deterministic_debug_mode(mode)


# ---------------------------------------------------------------------------------------------- comparing
def _assert_safetensors(folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir())
    pickles = [name for name in names if Path(name).suffix in PICKLES]
    if pickles:
        raise Violation(f"the checkpoint holds pickles: {_listed(pickles)}")
    if not any(name.endswith(".safetensors") for name in names):
        raise Violation(f"the checkpoint has no safetensors files, only {_listed(names)}")


def _assert_same_tensors(loaded: PreTrainedModel, model: PreTrainedModel, tolerance: float) -> None:
    """Raise [`Violation`] for the first parameter or buffer that loading lost or changed."""
    stored = model.state_dict().keys()
    for kind in ("parameter", "buffer"):
        before, after = (dict(getattr(m, f"named_{kind}s")()) for m in (model, loaded))
        for name, expected in before.items():
            if kind == "buffer" and name not in stored:
                fault = f"buffer {name!r} is lost: it is neither in the checkpoint nor rebuilt on loading"
            else:
                fault = f"{kind} {name!r} is not what was saved"
            if name not in after or after[name].is_meta or after[name].shape != expected.shape:
                raise Violation(fault)
            got, expected = after[name], expected.to(after[name].dtype)
            equal = got == expected  # infinite ones too, as in the table of a mask
            if not equal.all():
                got, expected = got.masked_fill(equal, 0), expected.masked_fill(equal, 0)
                assert_same(got, expected, fault, tolerance, where=("index",) * expected.dim())
        new = after.keys() - before.keys()
        if new:
            raise Violation(f"{kind} {min(new)!r} comes out of nowhere on loading")


def _assert_same_outputs(loaded: PreTrainedModel, model: PreTrainedModel, subject: Subject, what: str) -> str:
    return assert_same(_outputs(loaded, subject), _outputs(model, subject), what, LOADED)


@torch.no_grad()
def _outputs(model: PreTrainedModel, subject: Subject) -> torch.Tensor:
    """The output of a float32 or bfloat16 `model` for the inputs of the subject."""
    inputs = subject.inputs(length=subject.lengths(2, 16)[-1])
    inputs = {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    return main_output(model(**inputs))


def _tied(model: PreTrainedModel) -> bool:
    """Whether the output embeddings are the input embeddings."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _word(model: PreTrainedModel) -> str:
    return "tied" if _tied(model) else "untied"


def _fields(config: PretrainedConfig) -> dict[str, Any]:
    """What differs from the defaults, as JSON knows it: a tuple is a list there."""
    return json.loads(config.to_json_string(use_diff=True))


def _listed(names: Any, limit: int = 4) -> str:
    """The first names, and how many more there are."""
    names = sorted(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
