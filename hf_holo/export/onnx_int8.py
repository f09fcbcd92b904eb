"""An ONNX file in int8, by ONNX Runtime's dynamic quantization. Needs the extra `onnx`."""

from pathlib import Path

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, load, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from optimum.onnx.graph_transformations import check_and_save_model

from .onnx_numbers import digest, share

WEIGHT = {"MatMul": 1, "Gather": 0}  # which input of a node is a weight that can be rounded
LAST, MIDDLE = "last_axis", "zero_point"  # names of the constants -1 and 128, which stands for 0 in unsigned weights


def quantize(file: Path, rounded: Path) -> None:
    """Round the weights of products and embeddings to eight bits, with a scale for every output or row.

    The weights are unsigned. x86 processors without VNNI (AVX2 alone: many laptops and servers) multiply unsigned
    activations with *signed* weights in pairs whose 16-bit sums saturate, and the outputs are wrong without a word;
    with unsigned weights ONNX Runtime's sums are exact on every processor.

    Args:
        file: an ONNX file in float32 whose products hold their weights: one in which no values are shared.
        rounded: where to write.
    """
    model = load(file)
    tied = tied_tables(model)
    nodes = read_by_activations(model)
    quantize_dynamic(
        file,
        rounded,
        nodes_to_quantize=[node.name for node in nodes if node.op_type != "Gather" or node.input[0] not in tied],
        per_channel=True,
        weight_type=QuantType.QUInt8,
        extra_options={"WeightSymmetric": True},
    )
    model = load(rounded)
    look_up_rounded(model, tied)
    share(model)
    check_and_save_model(model, rounded)


def read_by_activations(model: ModelProto) -> list[NodeProto]:
    """The products and look-ups in which what depends on the text meets a stored weight.

    The quantizer would take all of them: products of weights with weights too, which design the filters, and look-ups
    in states.
    """
    stored = {tensor.name for tensor in model.graph.initializer}
    fixed, found = set(stored), []  # fixed: what depends on weights alone
    for node in model.graph.node:
        if all(name in fixed for name in node.input if name):
            fixed.update(node.output)
        elif node.op_type in WEIGHT and node.input[WEIGHT[node.op_type]] in stored:
            found.append(node)
    return found


def tied_tables(model: ModelProto) -> dict[str, str]:
    """Tables of embeddings, each with the weight of the head that is its transpose."""
    numbers = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    heads, tables = {}, {}
    for node in read_by_activations(model):
        weight = node.input[WEIGHT[node.op_type]]
        if node.op_type == "MatMul":
            heads[digest(numbers[weight].T)] = weight
        elif numbers[weight].ndim == 2:
            tables[weight] = digest(numbers[weight])
    return {table: heads[key] for table, key in tables.items() if key in heads}


def look_up_rounded(model: ModelProto, tied: dict[str, str]) -> None:
    """Embeddings are rows of the rounded head, each times its scale: one table of bytes in place of two.

    Args:
        model: a quantized model, which is changed.
        tied: as from [`tied_tables`], which were not quantized themselves.
    """
    graph, nodes = model.graph, []
    for name, value in ((LAST, np.array([-1])), (MIDDLE, np.array(128, np.float32))):
        graph.initializer.append(numpy_helper.from_array(value, name))
    for node in graph.node:
        if node.op_type == "Gather" and node.input[0] in tied:
            nodes += _rows_times_scale(tied[node.input[0]], node.input[1], node.output[0])
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    unread = set(tied) - {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name not in unread]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _rows_times_scale(head: str, ids: str, output: str) -> list[NodeProto]:
    """Nodes that look up the rows `ids` of a quantized head `[D, V]`, under the names that the quantizer gives."""
    table, rows, numbers, centred, scales, column = (f"{output}/{step}" for step in range(6))
    return [
        helper.make_node("Transpose", [f"{head}_quantized"], [table], table),
        helper.make_node("Gather", [table, ids], [rows], rows),
        helper.make_node("Cast", [rows], [numbers], numbers, to=TensorProto.FLOAT),
        helper.make_node("Sub", [numbers, MIDDLE], [centred], centred),
        helper.make_node("Gather", [f"{head}_scale", ids], [scales], scales),
        helper.make_node("Unsqueeze", [scales, LAST], [column], column),
        helper.make_node("Mul", [centred, column], [output], f"{output}/scaled"),
    ]
