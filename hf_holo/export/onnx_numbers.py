"""What an exporter writes twice into an ONNX file is stored once. Needs the extra `onnx`."""

import hashlib
from pathlib import Path

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, load, numpy_helper
from optimum.onnx.graph_transformations import check_and_save_model

LEAST = 1024  # bytes; a smaller tensor is not worth a node


def share_numbers(file: Path) -> None:
    """Of several tensors with the same values keep one; the others become nodes that read it, transposed or as it is.

    The exporter writes the transpose of every weight of a product, and so a table that is embedding and head a second
    time; and tables of constants once for every layer. The nodes cost no time: ONNX Runtime computes whatever depends
    on weights alone when it loads a file.

    Args:
        file: an ONNX file, which is changed.
    """
    model = load(file)
    share(model)
    check_and_save_model(model, file)


def share(model: ModelProto) -> None:
    """[`share_numbers`] of a model in memory."""
    graph = model.graph
    constants = [node for node in graph.node if _is_large_constant(node)]
    tensors, reading = [], []
    names: dict[tuple | None, str] = {}
    # what the exporter has transposed is called onnx::..., and comes after the parameters
    for tensor in sorted(map(_as_initializer, [*graph.initializer, *constants]), key=lambda t: t.name[:6] == "onnx::"):
        numbers = numpy_helper.to_array(tensor)
        same, turned = digest(numbers), digest(numbers.T) if numbers.ndim == 2 else None
        if numbers.nbytes >= LEAST and same in names:
            reading.append(helper.make_node("Identity", [names[same]], [tensor.name], f"shared/{tensor.name}"))
        elif numbers.nbytes >= LEAST and turned in names:
            reading.append(helper.make_node("Transpose", [names[turned]], [tensor.name], f"shared/{tensor.name}"))
        else:
            names[same] = tensor.name
            tensors.append(tensor)
    others = [node for node in graph.node if not _is_large_constant(node)]
    for field, content in ((graph.initializer, tensors), (graph.node, [*reading, *others])):
        del field[:]
        field.extend(content)
    del graph.value_info[:]  # shapes, which the quantizer notes for every tensor: a runtime infers them itself


def _is_large_constant(node: NodeProto) -> bool:
    value = node.attribute[0] if node.op_type == "Constant" else None
    return value is not None and value.name == "value" and len(value.t.raw_data) >= LEAST


def _as_initializer(tensor: TensorProto | NodeProto) -> TensorProto:
    """An initializer as it is, and the tensor of a `Constant` under the name of its output."""
    if isinstance(tensor, TensorProto):
        return tensor
    named = TensorProto()
    named.CopyFrom(tensor.attribute[0].t)
    named.name = tensor.output[0]
    return named


def digest(numbers: np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
    """The same for tensors of the same type, shape and values."""
    return str(numbers.dtype), numbers.shape, hashlib.sha256(np.ascontiguousarray(numbers).tobytes()).digest()
