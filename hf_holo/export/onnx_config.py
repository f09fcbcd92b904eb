"""Optimum learns every registered family: one ONNX config for all of them, filled with the facts of a [`Graph`].

Needs the extra `onnx`. `optimum-cli` calls [`register`] through `optimum/commands/register/register_hf_holo.py`.
"""

import functools
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from optimum.exporters.onnx.config import OnnxConfigWithPast
from optimum.exporters.onnx.model_patcher import ModelPatcher, PatchingSpec
from optimum.exporters.tasks import TasksManager
from optimum.utils import NormalizedTextConfig
from torch.onnx import JitScalarType, symbolic_helper, symbolic_opset14
from transformers import PreTrainedModel

from ..registry import Architecture, architectures
from .graph import TASKS, WITH_PAST, Graph, folded
from .onnx_numbers import share_numbers

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # by Optimum's names


def _transposed(g: Any, x: Any) -> torch.Value:
    """`x.mT`, which torch's exporter lacks."""
    *outer, rows, columns = range(x.type().dim())
    return g.op("Transpose", x, perm_i=[*outer, columns, rows])


torch.onnx.register_custom_op_symbolic("aten::mT", _transposed, 9)


@symbolic_helper.parse_args("v", "v", "v", "v", "f", "b", "v", "b")
def _attention(
    g: Any,
    query: torch.Value,
    key: torch.Value,
    value: torch.Value,
    mask: torch.Value,
    dropout: float,
    causal: bool,
    scale: torch.Value,
    grouped: bool,
) -> torch.Value:
    """torch's own, but for masks of truth values: of these it makes values in float32, whatever the queries are in."""
    if grouped or dropout or mask.node().mustBeNone() or JitScalarType.from_value(mask) != JitScalarType.BOOL:
        options = dropout, causal, scale, grouped
        return symbolic_opset14.scaled_dot_product_attention(g, query, key, value, mask, *options)
    kind = JitScalarType.from_value(query)
    nothing, never = (
        g.op("Constant", value_t=torch.tensor(x, dtype=kind.dtype())) for x in (0.0, torch.finfo(kind.dtype()).min)
    )
    if scale.node().mustBeNone():
        last, end = (g.op("Constant", value_t=torch.tensor([axis])) for axis in (-1, torch.iinfo(torch.long).max))
        width = g.op("Cast", g.op("Slice", g.op("Shape", query), last, end), to_i=kind.onnx_type())
        scale = g.op("Reciprocal", g.op("Sqrt", width))
    else:
        scale = g.op("Cast", scale, to_i=kind.onnx_type())
    scores = g.op("MatMul", g.op("Mul", query, scale), _transposed(g, key))
    weights = g.op("Softmax", g.op("Where", mask, scores, never), axis_i=-1)
    return g.op("MatMul", g.op("Where", mask, weights, nothing), value)  # zeros for a token that sees nothing


torch.onnx.register_custom_op_symbolic("aten::scaled_dot_product_attention", _attention, 14)


def _unflatten(x: torch.Tensor, dim: int, sizes: Sequence[int]) -> torch.Tensor:
    """`x.unflatten`, whose form in torch's exporter makes constants of the batch and the length."""
    dim %= x.dim()
    return x.reshape(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])


class GraphPatcher(ModelPatcher):
    """Makes `forward` take the state as a flat sequence of tensors and give it as one, while the graph is recorded."""

    def __init__(
        self, config: "HoloOnnxConfig", model: PreTrainedModel, model_kwargs: dict[str, Any] | None = None
    ) -> None:
        super().__init__(config, model, model_kwargs)
        forward, graph = self.orig_forward, config.graph
        signature = inspect.signature(forward)

        @functools.wraps(forward)
        def patched_forward(*args: Any, **kwargs: Any) -> dict[str, Any]:
            given = signature.bind(*args, **kwargs).arguments
            tensors = [given[name] for name in graph.inputs] + list(given.get("past_key_values") or ())
            output, *states = graph.call(forward, tensors)
            return {graph.output: output} | ({"past_key_values": tuple(states)} if states else {})

        self.patched_forward = patched_forward


class HoloOnnxConfig(OnnxConfigWithPast):
    """The ONNX config of every registered family: its inputs, outputs and dummy inputs are those of a [`Graph`].

    Args:
        as in `OnnxConfigWithPast`.
    """

    NORMALIZED_CONFIG_CLASS = NormalizedTextConfig
    ATOL_FOR_VALIDATION = 1e-4
    PATCHING_SPECS = [PatchingSpec(torch.Tensor, "unflatten", _unflatten, torch.Tensor.unflatten)]
    _MODEL_PATCHER = GraphPatcher

    @functools.cached_property
    def graph(self) -> Graph:
        task = self.task + (WITH_PAST if self.use_past_in_inputs else "")
        return Graph(task, self._config, DTYPES[self.float_dtype])

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        return self.graph.input_axes

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        return self.graph.output_axes

    def generate_dummy_inputs(
        self, framework: str = "pt", batch_size: int = 2, sequence_length: int = 16, **kwargs: Any
    ) -> dict[str, Any]:
        """The example of the graph, with the states as one list under `past_key_values`."""
        tensors: Mapping[str, Any] = self.graph.example(batch_size, sequence_length)
        if framework == "np":
            tensors = {name: tensor.numpy() for name, tensor in tensors.items()}
        inputs: dict[str, Any] = {name: tensors[name] for name in self.graph.inputs}
        if self.graph.states:
            inputs["past_key_values"] = [tensors[state.input_name] for state in self.graph.states]
        return inputs

    def fix_dynamic_axes(
        self, model_path: Path, device: str = "cpu", dtype: str | None = None, input_shapes: dict | None = None
    ) -> None:
        """Without the cast of Optimum: the example has the types of the graph, states in at least float32."""
        super().fix_dynamic_axes(model_path, device=device, input_shapes=input_shapes)

    def post_process_exported_models(self, path: Path, models: dict[str, Any], files: list[str]) -> tuple[dict, list]:
        """Optimum's own way to store a tied table once knows no embedding but `nn.Embedding`."""
        for file in files:
            share_numbers(Path(path, file))
        return models, files

    def flatten_output_collection_property(self, name: str, field: Any) -> dict[str, Any]:
        """Optimum's validation asks for the names of the states."""
        states = self.graph.states
        names = (state.output_name if name == "present" else state.input_name for state in states)
        return dict(zip(names, field, strict=True))


def register() -> None:
    """Make all families that are registered now known to Optimum; calling it again is fine."""
    _accept_own_modules()
    ModelPatcher.__enter__, ModelPatcher.__exit__ = _enter_folded, _exit_folded
    for architecture in architectures().values():
        TasksManager.create_register("onnx")(architecture.name, *tasks(architecture))(HoloOnnxConfig)


_enter, _exit = ModelPatcher.__enter__, ModelPatcher.__exit__


def _enter_folded(self: ModelPatcher) -> None:
    """Every patcher enters here, those of transformers' own models too, whose layers surgery may have replaced."""
    self.folded = folded(self._model)
    self.folded.__enter__()
    _enter(self)


def _exit_folded(self: ModelPatcher, *error: Any) -> None:
    _exit(self, *error)
    self.folded.__exit__(*error)


def tasks(architecture: Architecture) -> list[str]:
    """The tasks of a family in Optimum's names, from the Auto classes that it is registered with."""
    found = [task for task, auto in TASKS.items() if auto in architecture.models]
    return [*found, *(task + WITH_PAST for task in found if task == "text-generation")]


def _accept_own_modules() -> None:
    """Optimum takes a model for one of transformers by the name of its module; here by its base class."""
    infer = TasksManager._infer_library_from_model_or_model_class
    if getattr(infer, "of_hf_holo", False):
        return

    def infer_library(model: Any = None, model_class: type | None = None) -> str:
        if issubclass(type(model) if model_class is None else model_class, PreTrainedModel):
            return "transformers"
        return infer(model=model, model_class=model_class)

    infer_library.of_hf_holo = True  # type: ignore[attr-defined]  # a mark on the function
    TasksManager._infer_library_from_model_or_model_class = staticmethod(infer_library)
