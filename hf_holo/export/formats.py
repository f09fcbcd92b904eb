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
from transformers import AutoConfig, AutoProcessor, PreTrainedModel

from ..errors import HoloError, first_line
from .graph import TASKS, WITH_PAST, Graph, GraphModule, task_of

Program = Callable[[Sequence[torch.Tensor]], tuple[torch.Tensor, ...]]  # inputs and states to output and new states


class Source:
    """A saved model that is to be exported.

    Args:
        folder: folder or Hub id.
        task: as in [`Graph`]; default: what the config says, with state if it generates.

    Raises:
        HoloError: it cannot be loaded, or not for this task.
    """

    def __init__(self, folder: str, task: str | None = None):
        self.folder = folder
        try:
            config = AutoConfig.from_pretrained(folder)
            self.task = task_of(config) if task is None else task
            self.graph = Graph(self.task, config)
            auto = getattr(transformers, TASKS[self.graph.task])
            self.model: PreTrainedModel = auto.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
        except HoloError:
            raise
        except (OSError, ValueError) as error:
            raise HoloError(f"model={folder!r} cannot be loaded for export: {first_line(error)}") from error
        self.graph = Graph(self.task, self.model.config)
        self._temporary = TemporaryDirectory()

    @cached_property
    def processor(self) -> Any | None:
        """The processor or tokenizer that was saved with the model, None if there is none."""
        try:
            return AutoProcessor.from_pretrained(self.folder)
        except (OSError, ValueError):  # what transformers raises where it finds none
            return None

    @cached_property
    def onnx_folder(self) -> Path:
        """The ONNX export, made once for all formats that start from it."""
        from optimum.exporters.onnx import main_export

        from .onnx_config import register

        register()
        folder = Path(self._temporary.name)
        with quiet_tracer():
            main_export(self.folder, output=folder, task=self.task, do_validation=False)
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
    write: Callable[[Source, Path], None]
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
def write_onnx(source: Source, folder: Path) -> None:
    shutil.copytree(source.onnx_folder, folder, dirs_exist_ok=True)


def write_onnx_int8(source: Source, folder: Path) -> None:
    """Weights of matrix products and embeddings in int8, activations quantized as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    shutil.copytree(source.onnx_folder, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.onnx*"))
    quantize_dynamic(
        source.onnx_folder / "model.onnx", folder / "model.onnx", per_channel=True, weight_type=QuantType.QInt8
    )


def load_onnx(file: Path, graph: Graph) -> Program:
    from onnxruntime import InferenceSession, SessionOptions

    options = SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # as many as PyTorch has, so that timings compare
    session = InferenceSession(file, options, providers=["CPUExecutionProvider"])
    known = {entry.name for entry in session.get_inputs()}

    def run(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        named = dict(zip(graph.input_axes, tensors, strict=True))
        if (
            "position_ids" in known
        ):  # in graphs that Optimum makes of transformers' own models, which count for themselves
            mask, tokens = named["attention_mask"], named["input_ids"].shape[1]
            named["position_ids"] = torch.arange(mask.shape[1]).expand_as(mask)[:, -tokens:]
        feed = {name: tensor.numpy() for name, tensor in named.items() if name in known}
        return tuple(torch.from_numpy(array) for array in session.run(list(graph.output_axes), feed))

    return run


# ---------------------------------------------------------------------------------------------- PyTorch
def write_torch_export(source: Source, folder: Path) -> None:
    _save_exported(source.graph, source.model, folder / "model.pt2")


def write_torchao_int8(source: Source, folder: Path) -> None:
    """Weights of linear layers in int8, one scale for every row."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = copy.deepcopy(source.model)
    quantize_(model, Int8WeightOnlyConfig())
    _save_exported(source.graph, model, folder / "model.pt2")


def _save_exported(graph: Graph, model: PreTrainedModel, file: Path) -> None:
    sizes = {name: torch.export.Dim.DYNAMIC for axes in graph.input_axes.values() for name in axes.values()}
    shapes = tuple({axis: sizes[name] for axis, name in axes.items()} for axes in graph.input_axes.values())
    example = tuple(graph.example(tokens=70).values())  # several chunks, of which none is full
    with torch.no_grad(), _any_size():
        exported = torch.export.export(GraphModule(graph, model), example, dynamic_shapes=(shapes,), strict=False)
    torch.export.save(exported, file)


def _any_size() -> AbstractContextManager:
    """Without it the exporter takes every size that is not 1 in the example for one that never is."""
    return torch.fx.experimental._config.patch(backed_size_oblivious=True)


def load_torch_export(file: Path, graph: Graph) -> Program:
    module = torch.export.load(file).module(check_guards=False)  # they forbid sizes of 1, which the graph takes
    return lambda tensors: module(*tensors)


def load_torchao(file: Path, graph: Graph) -> Program:
    import torchao  # noqa: F401  (it registers what the file refers to)

    return load_torch_export(file, graph)


def write_torchscript(source: Source, folder: Path) -> None:
    example = tuple(source.graph.example().values())
    with torch.no_grad(), quiet_tracer():
        traced = torch.jit.trace(GraphModule(source.graph, source.model).eval(), example, check_trace=False)
        torch.jit.save(torch.jit.freeze(traced), folder / "model.pt")


def load_torchscript(file: Path, graph: Graph) -> Program:
    module = torch.jit.load(file)
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


def continues(source: Source) -> bool:
    """Whether the exported model generates text from a state."""
    return source.task == f"text-generation{WITH_PAST}"
