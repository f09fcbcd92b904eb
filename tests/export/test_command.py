"""`hf-holo export`: a folder for each format, complete or not there at all."""

import errno
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from functools import partial

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, Phi3Config

from hf_holo import HoloError, HoloSurgeryConfig, apply_surgery
from hf_holo.cli import main
from hf_holo.export import command, formats
from hf_holo.export.formats import FORMATS, Format, SavedModel
from hf_holo.export.graph import Graph, folded
from hf_holo.export.report import generation

from .conftest import auto_of, bytes_in, save, tiny_model


def test_a_format_gets_a_folder_with_its_report(hsn_folder, tmp_path, quick_export, capsys):
    (tmp_path / "text.txt").write_text("To be or not to be. " * 10)
    text = str(tmp_path / "text.txt")
    assert main(["export", str(hsn_folder), str(tmp_path / "out"), "--format", "torchscript", "--text", text]) == 0
    folder = tmp_path / "out" / "torchscript"
    assert {"model.pt", "config.json", "tokenizer.json", "report.json", "README.md"} <= {
        p.name for p in folder.iterdir()
    }
    report = json.loads((folder / "report.json").read_text())
    assert report["generation"] == {"greedy": 1.0, "beams": 1.0}
    assert 0 < max(row["max"] for row in report["parity"]) < 1e-4
    assert report["perplexity"]["exported"] == pytest.approx(report["perplexity"]["float32"], rel=1e-4)
    assert set(report["milliseconds"]) == {"text", "token"}
    size, times = report["bytes"] / report["float32_bytes"], report["milliseconds"]["token"]
    (said,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("torchscript: ")]
    assert f"({size:.2f} of the float32 weights), text in " in said
    assert f"perplexity {report['perplexity']['exported']:.3f} (PyTorch " in said
    assert f"token in {times['exported']:.2f} ms (PyTorch {times['pytorch']:.2f})" in said
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: text-generation" in card and "torch::jit::load" in card
    assert "- past_key_values.0.memory: [batch_size, 1, 32, 32] float32" in card
    assert AutoConfig.from_pretrained(folder, trust_remote_code=True).hidden_size == 32  # no code is missed
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["torchscript"]


class Branching(torch.nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def refused_by_the_exporter(source, folder):
    (folder / "half").touch()
    torch.export.export(Branching(), (torch.ones(2),))


def refused_by_the_tracer(source, folder):
    torch.jit.script(lambda *tensors: tensors)


def damaged(source, folder):
    (folder / "model.pt").write_bytes(b"PK half an archive")


def out_of_disk(source, folder):
    (folder / "half").touch()
    raise OSError(errno.ENOSPC, "No space left on device")


def out_of_memory(source, folder):
    torch.empty(2**60)


@pytest.mark.parametrize("write", [refused_by_the_exporter, refused_by_the_tracer, damaged, out_of_disk, out_of_memory])
def test_a_failed_format_leaves_nothing_and_stops_no_other(
    hsn_folder, tmp_path, quick_export, monkeypatch, capsys, write
):
    """Whatever it raises, and wherever: when it is written, and when it is read again to be measured."""
    model = SavedModel(str(hsn_folder)).model
    eager = Format("model.eager", lambda *_: None, lambda _, graph: partial(graph.call, model))
    monkeypatch.setitem(FORMATS, "torchscript", replace(FORMATS["torchscript"], write=write))
    monkeypatch.setitem(FORMATS, "torch-export", eager)
    with pytest.raises(SystemExit) as stopped:
        main(["export", str(hsn_folder), str(tmp_path), "--format", "torchscript", "torch-export"])
    assert stopped.value.code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["torch-export"]
    (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hf-holo: ")]
    assert re.fullmatch(r"hf-holo: torchscript failed: \w+: .+ \(--verbose shows where\)", message)


def test_an_older_export_outlives_a_failure(hsn_folder, tmp_path, quick_export, monkeypatch):
    old = {"old", "model.pt", "report.json"}
    (tmp_path / "torchscript").mkdir()
    for name in old:
        (tmp_path / "torchscript" / name).touch()
    monkeypatch.setitem(FORMATS, "torchscript", replace(FORMATS["torchscript"], write=out_of_disk))
    with pytest.raises(SystemExit):
        main(["export", str(hsn_folder), str(tmp_path), "--format", "torchscript"])
    assert {path.name for path in (tmp_path / "torchscript").iterdir()} == old


@pytest.mark.parametrize("where", ["torchscript", "torchscript/best"])
def test_the_model_itself_is_not_replaced(hsn_folder, tmp_path, monkeypatch, capsys, where):
    """Not even where an export was before."""
    folder = shutil.copytree(hsn_folder, tmp_path / where)
    for name in ("model.pt", "report.json"):
        (tmp_path / "torchscript" / name).touch()
    files = {path: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["export", where, ".", "--format", "torchscript"])
    assert stopped.value.code == 1 and "is where the model is saved" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.iterdir()} == files


def test_a_folder_that_no_export_has_written_is_not_replaced(hsn_folder, tmp_path, capsys):
    (tmp_path / "torchscript").mkdir()
    (tmp_path / "torchscript" / "thesis.tex").write_text("years of work")
    with pytest.raises(SystemExit):
        main(["export", str(hsn_folder), str(tmp_path), "--format", "torchscript"])
    assert "holds files, but no earlier export" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "torchscript").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("names", [["all"], ["all", "onnx"], ["onnx", "all"]])
def test_all_formats_once(names):
    assert command._parse(["model", "out", "--format", *names]).format == list(FORMATS)
    assert command._parse(["model", "out", "--format", "onnx", "onnx"]).format == ["onnx"]


@pytest.mark.parametrize("content", [b"{", b"cut off"])
def test_a_damaged_checkpoint_is_one_line(hsn_folder, tmp_path, capsys, content):
    folder = shutil.copytree(hsn_folder, tmp_path / "model")
    (folder / "model.safetensors").write_bytes(content)
    assert main(["export", str(folder), str(tmp_path / "out"), "--format", "torchscript"]) == 2
    assert "cannot be loaded for export" in capsys.readouterr().err


def test_a_damaged_tokenizer_is_not_left_out(hsn_folder, tmp_path, capsys):
    folder = shutil.copytree(hsn_folder, tmp_path / "model")
    assert SavedModel(str(folder)).processor is not None
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(HoloError, match=r"tokenizer\.json.* cannot be read"):
        _ = SavedModel(str(folder)).processor
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert SavedModel(str(folder)).processor is None


def test_a_wrong_export_is_a_failed_one(hsn_folder, tmp_path, quick_export, monkeypatch, capsys):
    load = FORMATS["torchscript"].load

    def wrong(file, graph):
        program = load(file, graph)
        return lambda tensors: tuple(1.001 * tensor for tensor in program(tensors))

    monkeypatch.setitem(FORMATS, "torchscript", replace(FORMATS["torchscript"], load=wrong))
    with pytest.raises(SystemExit):
        main(["export", str(hsn_folder), str(tmp_path), "--format", "torchscript"])
    assert not list(tmp_path.iterdir()) and "allowed 1e-04" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "onx"], "unknown format 'onx': did you mean 'onnx'?"),
        (["--task", "text-generatio"], "did you mean 'text-generation'?"),
        (["--task", "image-classification"], "the family 'hsn' has no head for it"),
        (["--task", "fill-mask-with-past"], "unknown task 'fill-mask-with-past'"),
        (["--task", "text-generation-with-pasty"], "did you mean 'text-generation-with-past'?"),
        (["--text", "missing.txt"], "text: 'missing.txt' cannot be read"),
        (["--text", os.devnull], "text: '/dev/null': 0 tokens are too few; give at least 256"),
        (["--text", __file__, "--task", "feature-extraction"], "the task 'feature-extraction' has no perplexity"),
    ],
)
def test_bad_input_is_one_line(hsn_folder, tmp_path, capsys, arguments, message):
    assert main(["export", str(hsn_folder), str(tmp_path / "out"), *arguments]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hf-holo: ")]
    assert message in error


def test_a_folder_that_is_none_is_named(hsn_folder, tmp_path, capsys):
    assert main(["export", str(tmp_path / "missing"), str(tmp_path / "out")]) == 2
    assert "missing' is not a folder" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["export", str(hsn_folder), str(tmp_path / "file")]) == 2
    assert f"out: {str(tmp_path / 'file')!r} cannot be a folder" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "{"])
def test_a_text_needs_a_tokenizer_before_anything_is_written(hsn_folder, tmp_path, capsys, content):
    folder = shutil.copytree(hsn_folder, tmp_path / "model")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    if content is not None:
        (folder / "tokenizer.json").write_text(content)
    assert main(["export", str(folder), str(tmp_path / "out"), "--format", "torchscript", "--text", __file__]) == 2
    assert ("has no tokenizer" if content is None else "cannot be read") in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_what_is_not_installed_is_named(hsn_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(formats, "_installed", lambda name: not name.startswith("optimum"))
    with pytest.raises(SystemExit):
        main(["export", str(hsn_folder), str(tmp_path), "--format", "onnx"])
    error = capsys.readouterr().err
    assert (
        "optimum.exporters.onnx is not installed: `pip install 'hf-holo[onnx]'`, which needs transformers 4.57" in error
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", ["holo", "resonance"])
def test_torchscript_keeps_weights_and_not_what_follows_from_them(family, tmp_path):
    source = SavedModel(str(save(tiny_model(family, hidden_size=128), tmp_path / "saved")))
    with folded(source.model):
        FORMATS["torchscript"].write(source, tmp_path)
    assert (tmp_path / "model.pt").stat().st_size <= 1.25 * bytes_in(source.model) + 500_000


@pytest.mark.slow
@pytest.mark.parametrize("family", ["hsn", "holo", "resonance"])
def test_int8_takes_less_than_half(family, tmp_path):
    pytest.importorskip("optimum.exporters.onnx", reason="needs the extra `onnx`")
    source = SavedModel(str(save(tiny_model(family, hidden_size=256, vocab_size=4096), tmp_path / "saved")))
    sizes = {}
    for name in ("onnx", "onnx-int8"):
        FORMATS[name].write(source, tmp_path / name)
        sizes[name] = (tmp_path / name / "model.onnx").stat().st_size
    assert sizes["onnx-int8"] <= 0.45 * sizes["onnx"]
    assert sizes["onnx"] <= 1.25 * bytes_in(source.model)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.feature("export", "hf-holo export --format {name}")
@pytest.mark.parametrize("name", [name for name in FORMATS if all(map(formats._installed, FORMATS[name].modules))])
@pytest.mark.parametrize("family", ["hsn", "holo", "resonance"])
def test_every_format_of_every_family(family, name, tmp_path, quick_export):
    source = SavedModel(str(save(tiny_model(family), tmp_path / "saved")))
    record = command.export(source, name, tmp_path / name)
    if FORMATS[name].exact:
        assert record["generation"] == {"greedy": 1.0, "beams": 1.0}
    else:
        assert max(row["max_relative"] for row in record["parity"]) < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torch-export", "torchscript"])
@pytest.mark.parametrize(
    ("family", "task"),
    [("hsn", "fill-mask"), ("holo", "token-classification"), ("resonance", "text-classification")],
)
def test_a_head_of_every_family(family, task, name, tmp_path, quick_export):
    source = SavedModel(str(save(tiny_model(family, auto=auto_of(task)), tmp_path / "saved")))
    record = command.export(source, name, tmp_path / name)
    assert record["task"] == task and all(row["max"] < 1e-4 for row in record["parity"])


PROGRAM = r"""
#include <torch/script.h>
#include <iostream>

int main(int count, const char* files[]) {
  torch::NoGradGuard no_gradients;
  auto model = torch::jit::freeze(torch::jit::load(files[1]));
  auto inputs = torch::jit::load(files[2]).attr("inputs").toTensorVector();
  auto outputs = model.forward({inputs.begin(), inputs.end()}).toTuple()->elements();
  auto scores = outputs[0].toTensor().flatten().contiguous();
  std::cout.precision(9);
  for (int i = 0; i < scores.numel(); i++) std::cout << scores.data_ptr<float>()[i] << "\n";
}
"""


class Inputs(torch.nn.Module):
    def __init__(self, inputs: list[torch.Tensor]):
        super().__init__()
        self.inputs = inputs


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_torchscript_runs_in_libtorch(hsn_folder, tmp_path):
    from torch.utils import cpp_extension

    (tmp_path / "run.cpp").write_text(PROGRAM)
    source = SavedModel(str(hsn_folder))
    FORMATS["torchscript"].write(source, tmp_path)
    inputs = list(source.graph.example(3, 21).values())
    torch.jit.save(torch.jit.script(Inputs(inputs)), tmp_path / "inputs.pt")
    program = cpp_extension.load(
        "run", [str(tmp_path / "run.cpp")], build_directory=str(tmp_path), is_python_module=False, is_standalone=True
    )
    done = subprocess.run([program, tmp_path / "model.pt", tmp_path / "inputs.pt"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = source.graph.call(source.model, inputs)[0].flatten()
    found = torch.tensor([float(line) for line in done.stdout.split()])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
CONVERTED = {
    "llama": LlamaConfig(**DECODER, **SPECIAL, num_attention_heads=4, num_key_value_heads=2),
    "phi3": Phi3Config(**DECODER, **SPECIAL, num_attention_heads=4, num_key_value_heads=2),
    # a table of positions, in which padding must not be counted and which ends soon
    "gpt2": GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=48, **SPECIAL),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONVERTED)
def test_a_converted_checkpoint_exports(kind, tmp_path, quick_export):
    """With holographic linear layers it stays what it was, and Optimum knows it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONVERTED[kind]).eval()
    apply_surgery(model, HoloSurgeryConfig(harmonics=8))
    source = SavedModel(str(save(model, tmp_path / "saved")))
    assert [state.name for state in Graph(source.task, model.config).states] == ["key", "value"] * 2
    old = Version(transformers.__version__).major < 5  # its masks cannot be traced or saved by torch, in any of them
    for name in ("onnx",) if old else ("onnx", "torch-export", "torchscript"):
        if all(map(formats._installed, FORMATS[name].modules)):
            record = command.export(source, name, tmp_path / name)
            assert record["generation"] == {"greedy": 1.0, "beams": 1.0}


def test_texts_are_compared_where_the_config_knows_no_padding(hsn_folder, quick_export):
    """As that of a plug-in may, with transformers 5."""
    source = SavedModel(str(hsn_folder))
    model, forward = source.model, source.model.forward
    del model.config.pad_token_id
    with torch.no_grad():
        shares = generation(source, lambda tensors: source.graph.call(forward, tensors))
    assert shares == {"greedy": 1.0, "beams": 1.0}
