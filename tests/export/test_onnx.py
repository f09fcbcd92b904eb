"""ONNX through Optimum: exported models compute, continue and generate as PyTorch does."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("optimum.exporters.onnx", reason="needs the extra `onnx`, which needs transformers 4.57")

from onnx import ModelProto, TensorProto, checker, helper, load, numpy_helper
from onnx import save as save_onnx
from onnxruntime import InferenceSession
from optimum.exporters.onnx import main_export
from transformers import LlamaConfig, LlamaForCausalLM

from hf_holo import HoloError, HoloSurgeryConfig, apply_surgery, architectures
from hf_holo.cli import main as command_line
from hf_holo.export import standalone_script
from hf_holo.export.formats import FORMATS, load_onnx
from hf_holo.export.graph import TASKS, Graph
from hf_holo.export.onnx_config import register, tasks
from hf_holo.export.onnx_int8 import quantize, read_by_activations
from hf_holo.export.onnx_numbers import share
from hf_holo.export.onnx_runtime import HoloORTModelForCausalLM

from .conftest import TEXT, auto_of, bytes_in, save, tiny_model

STATE = "text-generation-with-past"
FEW, ALL = [(1, 1), (3, 17), (1, 65)], [(b, t) for b in (1, 3) for t in (1, 7, 16, 17, 63, 64, 65, 1000)]
READING = {name: family for name, family in architectures().items() if "AutoModelForCausalLM" in family.models}
MODELS = [(name, variant) for name, family in READING.items() for variant in family.variants]
HEADS = [(name, task) for name, family in READING.items() for task in tasks(family) if task != STATE]
# a model that generates and a head of every family, and attention with and without holographic projections
HALF = [(family, None, task) for family in READING for task in (STATE, "token-classification")]
HALF += [("hsn", "hybrid", STATE), ("holo", "dense-attention", STATE)]


def export(model, folder, task=STATE):
    """Save and export; the folder of the export."""
    register()
    source, out = save(model, folder / "saved"), folder / "onnx"
    main_export(str(source), output=out, task=task, do_validation=False)
    return out


def check_parity(model, folder, task, shapes):
    """Outputs and states are PyTorch's: of a text with padding in front and of the same text again, after itself.
    Outputs to 1e-4; states, which sum up a text, to 1e-4 of the largest number."""
    graph = Graph(task, model.config)
    program = load_onnx(folder / "model.onnx", graph)
    for batch, tokens in shapes:
        tensors = list(graph.example(batch, tokens, past=0, seed=tokens).values())
        for _ in range(2 if graph.states else 1):
            wanted = graph.call(model, tensors)
            output, *states = program(tensors)
            torch.testing.assert_close(output, wanted[0], rtol=0, atol=1e-4)
            for state, expected in zip(states, wanted[1:], strict=True):
                largest = float(expected.abs().max()) if expected.numel() else 0.0
                torch.testing.assert_close(state, expected, rtol=0, atol=1e-4 * max(1.0, largest))
            if graph.states:
                tensors = graph.again(tensors, wanted[1:])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A tiny HSN and its export."""
    model = tiny_model("hsn")
    return model, export(model, tmp_path_factory.mktemp("onnx"))


def check_size(model, folder):
    """The file has the values of the model, and little more: nothing that follows from them is stored."""
    graph = load(folder / "model.onnx").graph
    constants = [n.attribute[0].t for n in graph.node if n.op_type == "Constant" and n.attribute[0].name == "value"]
    stored = [numpy_helper.to_array(tensor) for tensor in (*graph.initializer, *constants)]
    assert sum(numbers.nbytes for numbers in stored) <= 1.25 * bytes_in(model) + 50_000
    large = [numbers for numbers in stored if numbers.nbytes >= 1024]
    pairs = [(a, b) for i, a in enumerate(large) for b in large[:i] if a.dtype == b.dtype]
    assert not any(np.array_equal(a, b) or np.array_equal(a.T, b) for a, b in pairs)


@pytest.mark.slow
def test_nothing_is_stored_twice(exported):
    check_size(*exported)


def test_equal_and_transposed_tensors_become_nodes():
    table = np.random.default_rng(0).standard_normal((30, 20)).astype(np.float32)
    given = {"table": table, "onnx::MatMul_1": table.T, "again": table, "small": np.ones(3, np.float32)}
    tensors = [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in given.items()]
    constant = helper.make_node("Constant", [], ["constant"], value=numpy_helper.from_array(table, "value"))
    names = [*given, "constant"]
    reads = [helper.make_node("Identity", [name], [f"out.{i}"]) for i, name in enumerate(names)]
    outputs = [
        helper.make_tensor_value_info(f"out.{i}", TensorProto.FLOAT, given.get(name, table).shape)
        for i, name in enumerate(names)
    ]
    graph = helper.make_graph([constant, *reads], "g", [], outputs, tensors[::-1])
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)])
    share(model)
    checker.check_model(model)
    assert len(model.graph.initializer) == 2
    for name, found in zip(names, InferenceSession(model.SerializeToString()).run(None, {}), strict=True):
        np.testing.assert_array_equal(found, given.get(name, table))


def small_model() -> ModelProto:
    """An embedding and its head, a filter that is designed, and a look-up in what it has filtered."""
    table = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    weights = {"table": table, "head": table.T, "gate": np.ones((4, 2), np.float32), "design": np.eye(2, 4)}
    nodes = [
        helper.make_node("MatMul", ["gate", "design"], ["filter"], "of weights"),
        helper.make_node("Gather", ["table", "ids"], ["rows"], "embedding"),
        helper.make_node("MatMul", ["rows", "filter"], ["filtered"], "of activations"),
        helper.make_node("Gather", ["filtered", "zero"], ["first"], "state"),
        helper.make_node("MatMul", ["first", "head"], ["scores"], "head"),
    ]
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["tokens"]) for name in ("ids", "zero")]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("rows", "scores")]
    stored = [numpy_helper.from_array(np.float32(array), name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, stored)
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)])


def test_what_is_rounded_reads_the_text():
    """Not what designs a filter, from weights alone, and no look-up in a state."""
    assert [node.name for node in read_by_activations(small_model())] == ["embedding", "head"]


def test_a_tied_table_is_rounded_once(tmp_path):
    save_onnx(small_model(), tmp_path / "model.onnx")
    quantize(tmp_path / "model.onnx", tmp_path / "int8.onnx")
    stored = load(tmp_path / "int8.onnx").graph.initializer
    assert [
        tuple(tensor.dims) for tensor in stored if tensor.data_type == TensorProto.UINT8 and len(tensor.dims) > 1
    ] == [(4, 6)]
    assert "table" not in {tensor.name for tensor in stored}
    feed = {"ids": np.array([5, 0, 3]), "zero": np.array([0])}
    rows, scores = {}, {}
    for name in ("model", "int8"):
        rows[name], scores[name] = InferenceSession(tmp_path / f"{name}.onnx").run(["rows", "scores"], feed)
    largest = np.abs(rows["model"]).max(1, keepdims=True)
    assert (np.abs(rows["model"] - rows["int8"]) <= largest / 250).all() and (rows["model"] != rows["int8"]).any()
    np.testing.assert_allclose(scores["int8"], scores["model"], atol=0.1)


def test_rounded_weights_saturate_on_no_processor(tmp_path):
    """Products of unsigned activations and signed weights do where there is no VNNI: pairs are summed in 16 bits. What
    is stored tells, whatever processor the test runs on."""
    save_onnx(small_model(), tmp_path / "model.onnx")
    quantize(tmp_path / "model.onnx", tmp_path / "int8.onnx")
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in load(tmp_path / "int8.onnx").graph.initializer}
    rounded = [array for name, array in stored.items() if name.endswith("_quantized")]
    assert rounded and all(array.dtype == np.uint8 for array in rounded)
    assert all((array == 128).all() for name, array in stored.items() if name.endswith("_zero_point"))


def test_outputs_and_states(exported):
    model, folder = exported
    check_parity(model, folder, STATE, FEW)


def prompts(vocabulary: int):
    """Two prompts, the first with padding in front."""
    ids = torch.randint(1, vocabulary, (2, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    ids[0, :4], mask[0, :4] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("options", [{}, {"num_beams": 4}, {"do_sample": True, "top_k": 5}], ids=str)
def test_generation_is_token_identical(exported, options):
    model, folder = exported
    runtime = HoloORTModelForCausalLM.from_pretrained(folder)
    inputs = prompts(model.config.vocab_size) | {"max_new_tokens": 64, "pad_token_id": 0} | options
    outputs = []
    for generating in (model, runtime):
        torch.manual_seed(5)
        outputs.append(generating.generate(**inputs))
    assert torch.equal(*outputs)


def test_what_is_asked_for_is_given_or_refused(exported):
    model, folder = exported
    runtime = HoloORTModelForCausalLM.from_pretrained(folder)
    inputs = prompts(model.config.vocab_size)
    whole = runtime(**inputs).logits
    for kept in (1, 3, torch.tensor([0, 4])):
        wanted = model(**inputs, logits_to_keep=kept).logits
        torch.testing.assert_close(runtime(**inputs, logits_to_keep=kept).logits, wanted, rtol=0, atol=1e-4)
    logits, cache = runtime(**inputs, return_dict=False)
    assert torch.equal(logits, whole) and cache.get_seq_length() == 9
    counted = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    assert torch.equal(runtime(**inputs, position_ids=counted).logits, whole)
    packed = torch.tensor([[0] * 4 + [0, 1, 0, 1, 2], [*range(9)]])
    ids = inputs["input_ids"]
    for name, value in {"position_ids": packed, "seq_idx": ids, "labels": ids, "output_hidden_states": True}.items():
        with pytest.raises(HoloError, match=f"{name}: an exported graph"):
            runtime(**inputs, **{name: value})


def test_a_text_in_pieces_equals_the_whole(exported):
    model, folder = exported
    runtime = HoloORTModelForCausalLM.from_pretrained(folder)
    ids = torch.randint(1, model.config.vocab_size, (2, 33), generator=torch.Generator().manual_seed(4))
    cache, pieces = None, []
    for piece in ids.split([10, 1, 1, 8, 13], 1):
        output = runtime(piece, past_key_values=cache)
        cache = output.past_key_values
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), runtime(ids).logits, rtol=0, atol=1e-4)
    assert cache.get_seq_length() == 33


ALONE = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
assert not {"torch", "transformers", "hf_holo"} & set(sys.modules), sorted(sys.modules)
"""


def test_the_export_stands_alone(exported, tmp_path):
    """The script that goes with an export writes what PyTorch writes, and imports neither torch nor transformers."""
    model, folder = exported
    command = [sys.executable, "-c", ALONE, standalone_script(), TEXT, "--folder", folder, "--max_new_tokens", "20"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    tokens = model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert done.stdout.rstrip("\n") == tokenizer.decode(tokens[0], skip_special_tokens=True)


def test_every_family_and_head_is_known_to_optimum():
    from optimum.exporters.tasks import TasksManager

    register()
    for architecture in architectures().values():
        known = TasksManager.get_supported_tasks_for_model_type(architecture.name, "onnx", library_name="transformers")
        assert set(tasks(architecture)) == set(known)
        assert len(known) >= len(set(TASKS.values()) & architecture.models.keys()) >= 1


@pytest.mark.parametrize("damage", ["half", "unknown operator"])
def test_what_the_runtime_refuses_is_a_failed_format(hsn_folder, tmp_path, monkeypatch, capsys, damage):
    def write(source, folder):
        model = small_model()
        model.graph.node[0].op_type = "Nonsense"
        content = model.SerializeToString()
        (folder / "model.onnx").write_bytes(content[:99] if damage == "half" else content)

    monkeypatch.setitem(FORMATS, "onnx", replace(FORMATS["onnx"], write=write))
    with pytest.raises(SystemExit) as stopped:
        command_line(["export", str(hsn_folder), str(tmp_path), "--format", "onnx"])
    assert stopped.value.code == 1 and not list(tmp_path.iterdir())
    assert "hf-holo: onnx failed: " in capsys.readouterr().err


def test_models_of_transformers_are_folded_too():
    """Surgery may have put holographic layers into them, and Optimum has a patcher of its own for each."""
    from optimum.exporters.tasks import TasksManager

    register()
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes))
    apply_surgery(model, HoloSurgeryConfig(harmonics=4))
    before = dict(model.named_parameters())
    make = TasksManager.get_exporter_config_constructor("onnx", model=model, task="text-generation")
    with make(model.config).patch_model_for_export(model):
        assert not any(name.endswith(("amplitude", "phase")) for name, _ in model.named_parameters())
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.feature("export", "ONNX: every variant computes, continues and generates")
@pytest.mark.parametrize(("family", "variant"), MODELS, ids=map("-".join, MODELS))
def test_every_variant_computes_continues_and_generates(family, variant, tmp_path):
    model = tiny_model(family, variant)
    folder = export(model, tmp_path)
    check_size(model, folder)
    check_parity(model, folder, STATE, ALL)
    runtime = HoloORTModelForCausalLM.from_pretrained(folder)
    for beams in (1, 4):
        inputs = prompts(model.config.vocab_size) | {"max_new_tokens": 64, "pad_token_id": 0, "num_beams": beams}
        assert torch.equal(model.generate(**inputs), runtime.generate(**inputs))
    test_a_text_in_pieces_equals_the_whole((model, folder))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.feature("export", "ONNX: every head")
@pytest.mark.parametrize(("family", "task"), HEADS, ids=map("-".join, HEADS))
def test_every_head_computes_the_same(family, task, tmp_path):
    model = tiny_model(family, auto=auto_of(task))
    check_parity(model, export(model, tmp_path, task), task, ALL)


@pytest.mark.slow
def test_stock_classes_run_heads_without_state(tmp_path):
    from optimum.onnxruntime import ORTModelForSequenceClassification

    model = tiny_model("hsn", auto="AutoModelForSequenceClassification")
    runtime = ORTModelForSequenceClassification.from_pretrained(export(model, tmp_path, "text-classification"))
    inputs = prompts(model.config.vocab_size)
    torch.testing.assert_close(runtime(**inputs).logits, model(**inputs).logits, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "variant", "task"), HALF)
def test_half_precision(family, variant, task, tmp_path):
    """States of constant size stay in float32."""
    register()
    model = tiny_model(family, variant, auto_of(task))
    main_export(str(save(model, tmp_path / "saved")), output=tmp_path, task=task, dtype="fp16", do_validation=False)
    graph, half = Graph(task, model.config), Graph(task, model.config, torch.float16)
    assert all(state.dtype is torch.float32 for state in half.states if None not in state.shape)
    program = load_onnx(tmp_path / "model.onnx", half)
    given, wanted = (list(g.example(2, 17, past=0).values()) for g in (half, graph))
    for _ in range(2 if graph.states else 1):
        outputs, expected = program(given), graph.call(model, wanted)
        for state, output in zip(half.states, outputs[1:], strict=True):
            assert output.dtype is state.dtype
        for output, exact in zip(outputs, expected, strict=True):
            assert (output.double() - exact.double()).abs().max() <= 0.02 * max(1.0, exact.abs().max())
        if graph.states:
            given, wanted = half.again(given, outputs[1:]), graph.again(wanted, expected[1:])


@pytest.mark.slow
def test_a_converted_llama_generates(tmp_path):
    """Its state is keys and values that grow, its linear layers are holographic."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=2, **sizes)).eval()
    apply_surgery(model, HoloSurgeryConfig(harmonics=8))
    runtime = HoloORTModelForCausalLM.from_pretrained(export(model, tmp_path))
    assert len(runtime.states) == 4
    for beams in (1, 4):
        options = {"max_new_tokens": 64, "min_new_tokens": 64, "pad_token_id": 0, "num_beams": beams}
        inputs = prompts(40) | options
        assert torch.equal(model.generate(**inputs), runtime.generate(**inputs))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("family", "variant"), MODELS, ids=map("-".join, MODELS))
def test_every_variant_fills_masks(family, variant, tmp_path):
    model = tiny_model(family, variant, auto_of("fill-mask"))
    check_parity(model, export(model, tmp_path, "fill-mask"), "fill-mask", FEW)


@pytest.mark.slow
def test_key_heads_may_be_shared(tmp_path):
    model = tiny_model("holo", "dense-attention", num_attention_heads=4, num_key_value_heads=2)
    check_parity(model, export(model, tmp_path), STATE, FEW)


@pytest.mark.slow
def test_the_plain_command_of_optimum(hsn_folder, tmp_path):
    command = [Path(sys.executable).with_name("optimum-cli"), "export", "onnx", "--model", hsn_folder]
    done = subprocess.run([*command, "--task", STATE, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "model.onnx").is_file(), done.stderr
