"""The formats of `hf-holo export`: how a model is written in each, and how what was written is run."""

import copy
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.fx.experimental._config
import transformers
from torch import nn
from transformers import AutoConfig, AutoProcessor, PreTrainedModel

from ..errors import UNREADABLE, HoloError, first_line
from ..modeling.harmonics import HoloLinear
from ..modeling.quantizer import integer_matrices
from .graph import GENERATION, TASKS, Graph, GraphModule, positions, task_of

PROCESSOR_FILES = ("tokenizer*.json", "*processor_config.json")
Program = Callable[[Sequence[torch.Tensor]], tuple[torch.Tensor, ...]]  # inputs and states to output and new states


class SavedModel:
    """A saved model that is to be exported.

    Args:
        folder: folder or Hub id.
        task: as in [`Graph`]; default: what the config says, with state if it generates.

    Raises:
        HoloError: it cannot be loaded, or not for this task, or its layers are in small integers.
    """

    def __init__(self, folder: str, task: str | None = None) -> None:
        self.folder = folder
        try:
            config = AutoConfig.from_pretrained(folder)
            self.task = task_of(config) if task is None else task
            self.graph = Graph(self.task, config)
            auto = getattr(transformers, TASKS[self.graph.task])
            self.model: PreTrainedModel = auto.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
        except HoloError:
            raise
        except UNREADABLE as error:
            if not Path(folder).exists():
                reason = f"is not a folder, and the Hub does not give it: {first_line(error)}"
                raise HoloError(f"model: {folder!r} {reason}") from error
            raise HoloError(f"model: {folder!r} cannot be loaded for export: {first_line(error)}") from error
        if integer_matrices(self.model):
            raise HoloError(
                f"model: the layers of {folder!r} are in small integers, which have no form in exported graphs; export "
                "the conversion that was made without --quantize, in a format such as onnx-int8"
            )
        self.graph = Graph(self.task, self.model.config)
        self._temporary = TemporaryDirectory()

    @cached_property
    def processor(self) -> Any | None:
        """The processor or tokenizer that was saved with the model, None if there is none.

        Raises:
            HoloError: its files are there, but it cannot be loaded.
        """
        try:
            return AutoProcessor.from_pretrained(self.folder)
        except (OSError, ValueError) as error:  # what transformers raises where it finds none, too
            found = [file.name for pattern in PROCESSOR_FILES for file in Path(self.folder).glob(pattern)]
            if not found:
                return None
            raise HoloError(
                f"model: {self.folder!r}: {', '.join(found)} cannot be read: {first_line(error)}"
            ) from error

    @cached_property
    def onnx_folder(self) -> Path:
        """The ONNX export, made once for all formats that start from it; tied tables are written twice in it."""
        from optimum.exporters.onnx import onnx_export_from_model

        from .onnx_config import register

        register()
        folder = Path(self._temporary.name)
        model = copy.deepcopy(self.model)  # Optimum changes configs
        model.config.use_cache = self.graph.with_past
        with quiet_tracer():
            onnx_export_from_model(model, folder, task=self.task, do_validation=False, no_post_process=True)
        return folder


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        file: name of the file with the model.
        write: puts that file, and what else belongs to it, into a folder.
        load: the program in that file, with the names of a graph.
        exact: whether it computes with the weights as they are.
        modules: what has to be installed.
        install: the command that installs it.
    """

    file: str
    write: Callable[[SavedModel, Path], None]
    load: Callable[[Path, Graph], Program]
    exact: bool = True
    modules: tuple[str, ...] = ()
    install: str = ""

    def require(self) -> None:
        """Raise HoloError if something that it needs is not installed."""
        missing = [name for name in self.modules if not _installed(name)]
        if missing:
            raise HoloError(f"{', '.join(missing)} is not installed: {self.install}")


@contextmanager
def quiet_tracer() -> Iterator[None]:
    """The tracer warns of every size of a weight that becomes a constant, which is meant."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=torch.jit.TracerWarning)
        yield


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


# ---------------------------------------------------------------------------------------------- ONNX
def write_onnx(source: SavedModel, folder: Path) -> None:
    from .onnx_numbers import share_numbers

    _copy_files(source.onnx_folder, folder)
    share_numbers(folder / "model.onnx")


def write_onnx_int8(source: SavedModel, folder: Path) -> None:
    """Weights of matrix products and embeddings in int8, activations quantized as they come."""
    from .onnx_int8 import quantize

    _copy_files(source.onnx_folder, folder, without="model.onnx")
    quantize(source.onnx_folder / "model.onnx", folder / "model.onnx")


def _copy_files(made: Path, folder: Path, without: str | None = None) -> None:
    """Not `shutil.copytree`, which would give `folder` the mode of a temporary one, closed to others; `without`: the
    start of names that are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in made.iterdir():
        if file.is_file() and not (without and file.name.startswith(without)):
            shutil.copyfile(file, folder / file.name)


def load_onnx(file: Path, graph: Graph) -> Program:
    from onnxruntime import InferenceSession, SessionOptions

    options = SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # as many as PyTorch has, so that timings compare
    session = InferenceSession(file, options, providers=["CPUExecutionProvider"])
    known = {entry.name for entry in session.get_inputs()}

    def run(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        named = dict(zip(graph.input_axes, tensors, strict=True))
        if "position_ids" in known:  # in graphs that Optimum makes of transformers' own models
            mask = named["attention_mask"]
            counted = mask if graph.counts_positions else torch.ones_like(mask)
            named["position_ids"] = positions(counted, named["input_ids"].shape[1])
        if "token_type_ids" in known:  # one text, as PyTorch takes it where nothing is said
            named["token_type_ids"] = torch.zeros_like(named["input_ids"])
        feed = {name: tensor.numpy() for name, tensor in named.items() if name in known}
        return tuple(torch.from_numpy(array) for array in session.run(list(graph.output_axes), feed))

    run.takes_positions = "position_ids" in known  # type: ignore[attr-defined]  # a mark on the function
    return run


# ---------------------------------------------------------------------------------------------- PyTorch
def write_torch_export(source: SavedModel, folder: Path) -> None:
    _save_exported(source.graph, source.model, folder / "model.pt2")


def write_torchao_int8(source: SavedModel, folder: Path) -> None:
    """Weights of linear layers in int8, one scale for every row."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = with_thin_linears(copy.deepcopy(source.model))
    for linear in [module for module in model.modules() if isinstance(module, nn.Linear)]:
        quantize_(linear, Int8WeightOnlyConfig())  # one by one, because two layers may share one
    _save_exported(source.graph, model, folder / "model.pt2")


def with_thin_linears(model: nn.Module) -> nn.Module:
    """The model with two plain linear layers, basis and coefficients, in place of every holographic one."""
    bases: dict[int, nn.Linear] = {}
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, HoloLinear):
                basis = bases.setdefault(id(layer.basis), _linear(layer.basis.matrix()))
                setattr(parent, name, nn.Sequential(basis, _linear(layer.effective_coefficients(), layer.bias)))
    return model


def _linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Linear:
    outputs, inputs = weight.shape
    linear = nn.Linear(inputs, outputs, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = bias  # type: ignore[assignment]  # None is a bias, too
    return linear


def _save_exported(graph: Graph, model: nn.Module, file: Path) -> None:
    sizes = {name: torch.export.Dim.DYNAMIC for axes in graph.input_axes.values() for name in axes.values()}
    shapes = tuple({axis: sizes[name] for axis, name in axes.items()} for axes in graph.input_axes.values())
    example = tuple(graph.example(tokens=70).values())  # several chunks, of which none is full
    with torch.no_grad(), _any_size():
        exported = torch.export.export(GraphModule(graph, model), example, dynamic_shapes=(shapes,), strict=False)
    for module in exported.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # lines of the code on this machine, a third of the graph
    torch.export.save(exported, file)


def _any_size() -> AbstractContextManager:
    """Without it the exporter takes every size that is not 1 in the example for one that never is."""
    return torch.fx.experimental._config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]


def load_torch_export(file: Path, graph: Graph) -> Program:
    module = torch.export.load(file).module(check_guards=False)  # they forbid sizes of 1, which the graph takes
    return lambda tensors: module(*tensors)


def load_torchao(file: Path, graph: Graph) -> Program:
    import torchao  # noqa: F401  (it registers what the file refers to)

    return load_torch_export(file, graph)


def write_torchscript(source: SavedModel, folder: Path) -> None:
    example = tuple(source.graph.example().values())
    with torch.no_grad(), quiet_tracer():
        traced = torch.jit.trace(GraphModule(source.graph, source.model).eval(), example, check_trace=False)
        torch.jit.save(traced, folder / "model.pt")  # not frozen: what depends on weights only would be written as well


def load_torchscript(file: Path, graph: Graph) -> Program:
    module = torch.jit.freeze(torch.jit.load(file))
    return lambda tensors: module(*tensors)


_OPTIMUM = ("optimum.exporters.onnx", "onnx", "onnxruntime")
_INSTALL_ONNX = "`pip install 'hf-holo[onnx]'`, which needs transformers 4.57"
FORMATS = {
    "onnx": Format("model.onnx", write_onnx, load_onnx, modules=_OPTIMUM, install=_INSTALL_ONNX),
    "torch-export": Format("model.pt2", write_torch_export, load_torch_export),
    "torchscript": Format("model.pt", write_torchscript, load_torchscript),
    "onnx-int8": Format("model.onnx", write_onnx_int8, load_onnx, exact=False, modules=_OPTIMUM, install=_INSTALL_ONNX),
    "torchao-int8": Format(
        "model.pt2",
        write_torchao_int8,
        load_torchao,
        exact=False,
        modules=("torchao",),
        install="`pip install 'hf-holo[int8]'`",
    ),
}


def continues(source: SavedModel) -> bool:
    """Whether the exported model generates text from a state."""
    return source.task == GENERATION
