"""The code goes with every checkpoint: what hf_holo saves loads where it is not installed, with the same outputs."""

import importlib
import json
import sys
import types
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files, get_relative_imports

import hf_holo
from hf_holo import (
    HoloError,
    HoloSurgeryConfig,
    HsnForCausalLM,
    apply_surgery,
    architectures,
    quantize_linears,
    registry,
)
from hf_holo.cli import main
from hf_holo.hub.code import add_code, missing_code
from hf_holo.modeling import remote_code
from hf_holo.registry import register_architecture

TEXT = "a small text, seen by all"
MODELING = Path(remote_code.__file__).parent
ENTRIES = [path for kind in ("configuration", "modeling", "tokenization") for path in MODELING.glob(f"{kind}_*.py")]

LOAD = """
import sys
from pathlib import Path
import torch, transformers
from safetensors.torch import load_file

for folder in sorted(Path(sys.argv[1]).iterdir()):
    text, auto_class = folder.joinpath("about").read_text().split("|")
    auto_class = getattr(transformers, auto_class)
    for source in (folder, folder / "again"):  # what is saved there takes the code along, too
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=True)
        model = auto_class.from_pretrained(source, trust_remote_code=True).eval()
        with torch.no_grad():
            output = model(**tokenizer(text, return_tensors="pt"))
        output = output.logits if "logits" in output else output.last_hidden_state
        # not to the bit: products of matrices round by where their values are in memory
        same = torch.allclose(output, load_file(folder / "expected")["output"], rtol=0, atol=1e-6)
        print(folder.name, source.name == "again", type(model).__module__.partition(".")[0], same)
        if source is folder:
            model.save_pretrained(folder / "again")
            tokenizer.save_pretrained(folder / "again")
"""


@pytest.fixture
def forget(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(registry, "_ARCHITECTURES", architectures())


@pytest.mark.parametrize("path", ENTRIES, ids=lambda path: path.stem)
def test_the_copy_of_what_an_auto_class_loads_imports_all_that_its_siblings_import(path, tmp_path):
    copy = tmp_path / path.name
    copy.write_text(remote_code.code_of(path))
    needed = {Path(file).stem for file in get_relative_import_files(path)} - {path.stem}
    assert needed <= set(get_relative_imports(copy))


def converted(tokenizer) -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    apply_surgery(model, HoloSurgeryConfig(harmonics=8))
    return model


PLUGIN = """
from transformers import LlamaConfig, LlamaForCausalLM
{extra}

class {name}Config(LlamaConfig):
    model_type = "{type}"


class {name}ForCausalLM(LlamaForCausalLM):
    config_class = {name}Config
"""


def plugin(folder: Path, monkeypatch, name: str, extra: str = "") -> LlamaForCausalLM:
    """A model of a new family whose module is the package `folder`."""
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / f"modeling_{name.lower()}.py").write_text(PLUGIN.format(name=name, type=name.lower(), extra=extra))
    monkeypatch.syspath_prepend(folder.parents[1])
    module = importlib.import_module(f"{folder.parent.name}.{folder.name}.modeling_{name.lower()}")
    config, model = getattr(module, f"{name}Config"), getattr(module, f"{name}ForCausalLM")
    register_architecture(name.lower(), config, {"AutoModelForCausalLM": model})
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return model(config(vocab_size=61, **sizes))


def models_of(families: Iterable[str], variants: slice) -> Iterator[tuple[str, str, PreTrainedModel]]:
    """Name, Auto class and model: every head of the first variant of each family, the main one of the others."""
    for family in families:
        architecture = architectures()[family]
        for number, (variant, kwargs) in enumerate([*architecture.variants.items()][variants]):
            for auto_class, model_class in architecture.models.items():
                if number == 0 or model_class is architecture.main_model:
                    torch.manual_seed(number)
                    yield f"{auto_class}-{family}-{variant}", auto_class, model_class(architecture.config(**kwargs))


ALL = ["hsn", "holo", "resonance"]
LOADS = partial(pytest.mark.feature, "Hub", "loads where hf_holo is not installed")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("families", "variants"),
    [
        pytest.param(["hsn"], slice(1), id="quick", marks=LOADS(family="hsn")),
        pytest.param(ALL, slice(None), id="all", marks=[pytest.mark.slow, LOADS(family=ALL)]),
    ],
)
def test_every_head_loads_elsewhere(elsewhere, expected, tokenizer, tmp_path, monkeypatch, forget, families, variants):
    """Those of this package, converted ones of transformers, and plug-ins."""
    completed = {
        "converted": converted(tokenizer),
        "integers": quantize_linears(converted(tokenizer), "int4"),
        "plug-in": plugin(tmp_path / f"code_{len(families)}" / "inner", monkeypatch, f"Pluggy{len(families)}"),
    }
    others = [(name, "AutoModelForCausalLM", model) for name, model in completed.items()]
    models = [*models_of(families, variants), *others]
    for name, auto_class, model in models:
        folder = tmp_path / "models" / name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        assert bool(add_code(folder)) == (name == "plug-in")  # all others have taken theirs along
        save_file({"output": expected(model, tokenizer)}, folder / "expected")
        folder.joinpath("about").write_text(f"{TEXT}|{auto_class}")
    lines = elsewhere(LOAD, tmp_path / "models").split("\n")[:-1]
    names = sorted(name for name, *_ in models)
    assert lines == [f"{name} {again} transformers_modules True" for name in names for again in (False, True)]


def test_a_local_model_is_preferred_to_the_code_of_its_checkpoint(saved):
    """With hf_holo installed nothing of a checkpoint is run, unless it is trusted."""
    (saved / "modeling_hsn.py").write_text("raise SystemExit('code of the checkpoint was run')")
    assert type(transformers.AutoModelForCausalLM.from_pretrained(saved)) is HsnForCausalLM
    assert type(transformers.AutoTokenizer.from_pretrained(saved)) is hf_holo.HoloTokenizer


def test_an_auto_map_names_all_heads(saved):
    heads = {auto: f"modeling_hsn.{cls.__name__}" for auto, cls in architectures()["hsn"].models.items()}
    stored = json.loads((saved / "config.json").read_text())["auto_map"]
    assert stored == {"AutoConfig": "configuration_hsn.HsnConfig", **heads}


def test_a_folder_of_an_earlier_release_is_completed(saved):
    before = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({k: v for k, v in before.items() if k != "auto_map"}))
    (saved / "scans.py").unlink()
    assert sorted(add_code(saved)) == ["config.json", "scans.py"]
    assert json.loads((saved / "config.json").read_text()) == before
    assert missing_code(saved) == {}


def test_code_of_another_version_is_brought_up_to_date(saved, capsys):
    """Copies that hf_holo saved before transformers 5.24 ignore its renamed cache argument."""
    current = (saved / "cache.py").read_bytes()
    (saved / "cache.py").write_text("OLD = True\n")
    assert main(["push", str(saved), "me/tiny", "--dry-run"]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if " cache.py " in line]
    assert "brought up to date" in row and (saved / "cache.py").read_text() == "OLD = True\n"
    assert add_code(saved) == ["cache.py"]
    assert (saved / "cache.py").read_bytes() == current and add_code(saved) == []


def test_a_class_of_a_notebook_is_saved_with_a_warning(saved, tmp_path):
    module = types.ModuleType("of_a_notebook")
    made = type("Mine", (HsnForCausalLM,), {"__module__": module.__name__})
    sys.modules[module.__name__] = module
    try:
        with pytest.warns(UserWarning, match="saved without its code: Mine cannot be imported from a file"):
            made.from_pretrained(saved).save_pretrained(tmp_path / "mine")
        remote_code.complete_code(tmp_path / "mine", (made, made.config_class))  # as push_to_hub does
    finally:
        del sys.modules[module.__name__]
    assert made._auto_class == "AutoModelForCausalLM"
    assert not (tmp_path / "mine" / "modeling_hsn.py").exists()


def test_code_that_cannot_go_along_is_named(tmp_path, monkeypatch, forget):
    (tmp_path / "nested_code").mkdir()
    (tmp_path / "nested_code" / "shared.py").write_text("SIZE = 1\n")
    model = plugin(tmp_path / "nested_code" / "inner", monkeypatch, "Nested", "from ..shared import SIZE")
    model.save_pretrained(tmp_path / "model")
    with pytest.warns(UserWarning, match=r"stays without code, .*: modeling_nested\.py imports '\.shared'"):
        assert add_code(tmp_path / "model") == []


def test_a_family_of_this_package_after_surgery_is_named(saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "holo"}}))
    with pytest.warns(UserWarning, match="HsnForCausalLM with holographic layers is not a class of transformers"):
        assert add_code(saved) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no config.json"),
        ("{", "no config.json"),
        ("[" * 100_000, "no config.json"),
        ("[]", "mapping"),
        ('{"auto_map": [1]}', r"says auto_map=\[1\], which is not a value for it"),
        ('{"architectures": [3]}', r"says architectures=\[3\]"),
        ('{"architectures": "Hsn"}', "says architectures='Hsn'"),
        ('{"model_type": {}}', "says model_type={}"),
        ('{"quantization_config": "holo"}', "says quantization_config='holo'"),
    ],
)
def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(HoloError, match=message):
        missing_code(tmp_path)
