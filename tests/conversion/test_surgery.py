"""Layer surgery: what it replaces, what it counts, and that a converted model stays a model of transformers."""

import copy
import subprocess
import sys

import pytest
import torch
import transformers
from packaging import version
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    LlamaConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    T5Config,
    Trainer,
    TrainingArguments,
    ViTConfig,
    XGLMConfig,
)
from transformers.pytorch_utils import Conv1D

from hf_holo import HoloError
from hf_holo.conversion import HoloSurgeryConfig, apply_surgery, restore_linears
from hf_holo.eval.conformance import Subject, run_check, select
from hf_holo.modeling import harmonics
from hf_holo.modeling.harmonics import HarmonicBasis, HoloLinear

DECODER = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENCODER = {**DECODER, "num_attention_heads": 4, "num_hidden_layers": 2}
CONFIGS = {
    "phi3": Phi3Config(**DECODER, **SPECIAL, num_attention_heads=4, num_key_value_heads=2),
    "llama": LlamaConfig(**DECODER, **SPECIAL, num_attention_heads=4, num_key_value_heads=2),
    "gpt2": GPT2Config(vocab_size=50, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2),
    "bert": BertConfig(**ENCODER),
    "vit": ViTConfig(**ENCODER, image_size=8, patch_size=4),
    # no table of this project names it
    "xglm": XGLMConfig(
        vocab_size=50, d_model=32, ffn_dim=48, num_layers=3, attention_heads=4, max_position_embeddings=64, **SPECIAL
    ),
}
AUTO = {"bert": AutoModelForMaskedLM, "vit": AutoModelForImageClassification}
INSIDE = {  # linear layers of one block
    "phi3": ["self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"],
    "llama": [
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    ],
    "gpt2": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
    "bert": [
        *(f"attention.self.{name}" for name in ("query", "key", "value")),
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ],
    "vit": [
        *(f"attention.attention.{name}" for name in ("query", "key", "value")),
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ]
    if version.parse(transformers.__version__).major < 5
    else [*(f"attention.{name}_proj" for name in "qkvo"), "mlp.fc1", "mlp.fc2"],
    "xglm": [*(f"self_attn.{name}_proj" for name in "kvq"), "self_attn.out_proj", "fc1", "fc2"],
}
GENERATORS = ("phi3", "llama", "gpt2", "xglm")


def dense_model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AUTO.get(name, AutoModelForCausalLM).from_config(copy.deepcopy(CONFIGS[name])).eval()


def converted_model(name: str, **options) -> PreTrainedModel:
    model = dense_model(name)
    apply_surgery(model, HoloSurgeryConfig(**{"harmonics": 8, **options}))
    return model


def inputs_of(model: PreTrainedModel, rows: int = 2, length: int = 9) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=generator)}
    return {"input_ids": torch.randint(3, 50, (rows, length), generator=generator)}


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(**inputs_of(model)).logits


def state(model: nn.Module) -> tuple:
    """All that an operation could change: modules, config, values."""
    kinds = {name: type(module) for name, module in model.named_modules()}
    return kinds, model.config.to_dict(), {name: x.clone() for name, x in model.state_dict().items()}


def assert_same_state(model: nn.Module, before: tuple) -> None:
    kinds, config, numbers = state(model)
    assert kinds == before[0] and config == before[1] and numbers.keys() == before[2].keys()
    assert all(torch.equal(x, before[2][name]) for name, x in numbers.items())


@pytest.fixture(params=CONFIGS)
def name(request) -> str:
    return request.param


@pytest.fixture(params=GENERATORS)
def generator_name(request) -> str:
    return request.param


# ---------------------------------------------------------------------------------------------- what is replaced
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_every_linear_layer_in_the_blocks_becomes_holographic(name, device):
    model = dense_model(name).to(device)
    report = apply_surgery(model, HoloSurgeryConfig(harmonics=8))
    holographic = [n for n, module in model.named_modules() if isinstance(module, HoloLinear)]
    depth = model.config.num_hidden_layers
    assert len(holographic) == depth * len(INSIDE[name])
    for ending in INSIDE[name]:
        assert sum(n.endswith(f".{ending}") for n in holographic) >= depth
    assert sorted(holographic) == sorted(row["module"] for row in report.converted)
    blocks = [m for n, m in model.named_modules() if any(n.endswith(f".{e}") for e in INSIDE[name])]
    assert not any(isinstance(m, Conv1D) for m in blocks)
    if device == "cpu":
        assert logits(model).isfinite().all()
    else:
        assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("options", [{}, {"shared": True}, {"basis": "dct", "folded": True}], ids=str)
def test_the_report_covers_every_parameter_once(name, options):
    model = dense_model(name)
    before = sum(p.numel() for p in model.parameters())
    report = apply_surgery(model, HoloSurgeryConfig(harmonics=8, **options))
    assert report.total("numbers_before") == before
    assert report.total("trained") == report.total("stored") == sum(p.numel() for p in model.parameters())
    names = [row["module"] for row in report.rows]
    assert len(set(names)) == len(names)
    covered = {id(p) for name in names for p in model.get_submodule(name).parameters()}
    assert covered == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("basis", ["random", "dct", "golden"])
def test_the_fit_is_the_nearest_matrix(name, basis):
    model = dense_model(name).double()
    dense = copy.deepcopy(model)
    apply_surgery(model, HoloSurgeryConfig(harmonics=8, basis=basis))
    for n, layer in model.named_modules():
        if isinstance(layer, HoloLinear):
            old = dense.get_submodule(n)
            weight = old.weight.T if isinstance(old, Conv1D) else old.weight  # [O, I]
            table = layer.basis.table.double()
            nearest = weight @ torch.linalg.pinv(table) @ table
            torch.testing.assert_close(layer.weight, nearest)
            if old.bias is not None:
                assert torch.equal(layer.bias, old.bias)


def test_full_rank_changes_nothing():
    dense = dense_model("llama").double()
    model = copy.deepcopy(dense)
    apply_surgery(model, HoloSurgeryConfig(modules=r"q_proj|up_proj", harmonics=32, basis="dct"))
    torch.testing.assert_close(logits(model), logits(dense))


def test_phi3_mini_gives_the_table_of_the_original():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Phi3Config())
    report = apply_surgery(model)
    assert report.total("numbers_before") == 3_821_079_552
    assert report.total("trained") == sum(p.numel() for p in model.parameters()) == 327_224_320
    assert report.total("stored") == 327_224_320
    assert len(report.converted) == 4 * 32
    merged = sum(m.count_numbers()["dense"] for m in model.modules() if isinstance(m, HoloLinear))
    assert merged == sum(row["numbers_before"] for row in report.converted) == 3_623_878_656


def t5(**options) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return AutoModelForSeq2SeqLM.from_config(T5Config(**sizes, decoder_start_token_id=0, **options)).eval()


def bart() -> PreTrainedModel:
    torch.manual_seed(0)
    sides = {f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in (("layers", 2), ("ffn_dim", 48))}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    return AutoModelForSeq2SeqLM.from_config(BartConfig(vocab_size=50, d_model=32, **sides, **heads)).eval()


def clip() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**sizes, "vocab_size": 50, **SPECIAL}
    vision = {**sizes, "image_size": 8, "patch_size": 4}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()


@pytest.mark.parametrize(
    ("make", "lists", "in_a_block"),
    [
        (t5, ("encoder.block", "decoder.block"), (6, 10)),
        (lambda: t5(feed_forward_proj="gated-gelu"), ("encoder.block", "decoder.block"), (7, 11)),
        (bart, ("model.encoder.layers", "model.decoder.layers"), (6, 10)),
        (clip, ("text_model.encoder.layers", "vision_model.encoder.layers"), (6, 6)),
    ],
    ids=["t5", "gated t5", "bart", "clip"],
)
def test_every_list_of_blocks_is_converted(make, lists, in_a_block, tmp_path):
    def outputs(model: PreTrainedModel) -> torch.Tensor:
        ids = torch.arange(3, 12)[None]
        if isinstance(model, CLIPModel):
            return model(input_ids=ids, pixel_values=torch.linspace(-1, 1, 192).view(1, 3, 8, 8)).logits_per_text
        return model(input_ids=ids, decoder_input_ids=ids).logits

    model = make()
    converted = [row["module"] for row in apply_surgery(model, HoloSurgeryConfig(harmonics=8)).converted]
    for blocks, count in zip(lists, in_a_block, strict=True):
        assert sum(name.startswith(f"{blocks}.") for name in converted) == 2 * count
    assert len(converted) == 2 * sum(in_a_block)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(outputs(type(model).from_pretrained(tmp_path)), outputs(model))
    kept = apply_surgery(make(), HoloSurgeryConfig(harmonics=8, keep_first=1))
    assert [row["module"] for row in kept.converted] == [n for n in converted if ".0." not in n.split("layer.")[0]]


# ---------------------------------------------------------------------------------------------- the choice of layers
def blocks_of(report) -> set[int]:
    return {int(part) for row in report.converted for part in row["module"].split(".") if part.isdigit()}


@pytest.mark.parametrize(
    ("options", "blocks"),
    [({}, {0, 1, 2}), ({"keep_first": 1}, {1, 2}), ({"keep_last": 2}, {0}), ({"keep_first": 1, "keep_last": 1}, {1})],
)
def test_first_and_last_blocks_stay(generator_name, options, blocks):
    report = apply_surgery(dense_model(generator_name), HoloSurgeryConfig(harmonics=8, **options))
    assert blocks_of(report) == blocks


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"modules": "mlp"}, 9),
        ({"modules": ["q_proj", "k_proj"]}, 6),
        ({"exclude": "self_attn"}, 9),
        ({"modules": "proj", "exclude": [r"layers\.0\.", "down"]}, 12),
        ({"modules": "lm_head"}, 1),
        ({"modules": "lm_head|o_proj", "keep_first": 2}, 2),
    ],
)
def test_patterns(options, count):
    assert len(apply_surgery(dense_model("llama"), HoloSurgeryConfig(harmonics=8, **options)).converted) == count


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("folded", [False, True])
def test_a_ratio_is_kept_and_never_exceeded(ratio, folded):
    config = LlamaConfig(**{**DECODER, "hidden_size": 512, "intermediate_size": 768}, num_attention_heads=4)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    report = apply_surgery(model, HoloSurgeryConfig(ratio=ratio, folded=folded))
    assert ratio - 0.01 <= report.kept <= ratio
    for row in report.converted:
        assert row["stored"] <= ratio * row["numbers_before"]


@pytest.mark.parametrize("bias_model", ["bert", "gpt2"])
def test_a_ratio_counts_biases(bias_model):
    report = apply_surgery(dense_model(bias_model), HoloSurgeryConfig(ratio=0.5))
    assert all(row["stored"] <= 0.5 * row["numbers_before"] for row in report.converted)


@pytest.mark.parametrize(("model_name", "groups"), [("llama", 4), ("bert", 4), ("vit", 4), ("phi3", 4), ("xglm", 6)])
def test_layers_with_the_same_input_share_a_basis(model_name, groups):
    model = converted_model(model_name, shared=True)
    layers = [module for module in model.modules() if isinstance(module, HoloLinear)]
    owners = {id(layer.basis) for layer in layers}
    assert len(owners) == groups * model.config.num_hidden_layers
    assert sum(isinstance(module, HarmonicBasis) for module in model.modules()) == len(owners)
    assert logits(model).isfinite().all()


# ---------------------------------------------------------------------------------------------- saving and loading
@pytest.mark.parametrize("options", [{}, {"shared": True, "folded": True, "basis": "golden"}], ids=str)
def test_plain_from_pretrained_is_exact(name, options, tmp_path):
    model = converted_model(name, **options)
    model.save_pretrained(tmp_path)
    assert not any(path.suffix in {".bin", ".pt"} for path in tmp_path.iterdir())
    loaded = AUTO.get(name, AutoModelForCausalLM).from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded), logits(model))
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert torch.equal(logits(type(model).from_pretrained(again)), logits(model))


def test_in_bfloat16_every_number_is_rounded_once(tmp_path):
    model = converted_model("llama")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, layer in loaded.named_modules():
        if isinstance(layer, HoloLinear):
            saved = model.get_submodule(name)
            for ours, theirs in ((layer.basis.table, saved.basis.table), (layer.amplitude, saved.amplitude)):
                assert ours.dtype == torch.bfloat16 and torch.equal(ours, theirs.bfloat16())


@torch.no_grad()
def test_a_device_map_places_bases_too(tmp_path):
    """A basis that is not stored has no data before the weights are placed; layers may be on the disk."""
    model = converted_model("llama")
    model.save_pretrained(tmp_path / "model")
    total = sum(parameter.nbytes for parameter in model.parameters())
    for limits in ({}, {"max_memory": {"cpu": int(0.6 * total)}, "offload_folder": tmp_path / "disk"}):
        placed = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map="auto", **limits)
        torch.testing.assert_close(logits(placed), logits(model), rtol=0, atol=1e-6)


def test_a_stored_basis_is_loaded(tmp_path):
    """What `hf-holo convert` leaves: "data" bases, shared and pivoted."""
    plan = {}
    for name in ("q", "k", "v"):
        lender = None if name == "q" else "model.layers.1.self_attn.q_proj"
        entry = {"harmonics": 8, "basis": "data", "folded": True, "pivoted": True, "lender": lender}
        plan[f"model.layers.1.self_attn.{name}_proj"] = entry
    model = dense_model("llama")
    config = HoloSurgeryConfig(basis="data", pivoted=True, layers=plan)
    from hf_holo.modeling.quantizer import swap

    for name, layer in swap(model, config).items():
        factors = torch.randn(layer.out_features, 8), torch.randn(8, 32)
        layer.load_factors(*factors[: 2 if plan[name]["lender"] is None else 1])
    model.config.quantization_config = config
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))


FRESH = """
import sys, torch
import hf_holo
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
inputs, expected = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    assert torch.equal(model(input_ids=inputs).logits, expected)
"""


@pytest.mark.slow
def test_a_fresh_process_loads_it(tmp_path):
    model = converted_model("phi3")
    model.save_pretrained(tmp_path / "model")
    torch.save((inputs_of(model)["input_ids"], logits(model)), tmp_path / "expected")
    command = [sys.executable, "-c", FRESH, str(tmp_path / "model"), str(tmp_path / "expected")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_dense_checkpoint_is_swapped_while_it_loads(name, tmp_path):
    dense = dense_model(name)
    dense.save_pretrained(tmp_path / "dense")
    loader = AUTO.get(name, AutoModelForCausalLM)
    model = loader.from_pretrained(tmp_path / "dense", quantization_config=HoloSurgeryConfig(harmonics=8))
    layers = [module for module in model.modules() if isinstance(module, HoloLinear)]
    assert len(layers) == model.config.num_hidden_layers * len(INSIDE[name])
    assert all(p.isfinite().all() and p.abs().max() < 10 for p in model.parameters())
    assert all(layer.amplitude.std() > 0 and layer.basis.table.std() > 0 for layer in layers)
    kept = {n: p for n, p in dense.state_dict().items() if n in model.state_dict() and not n.endswith("bias")}
    assert kept and all(torch.equal(model.state_dict()[n], p) for n, p in kept.items())
    model.eval().save_pretrained(tmp_path / "converted")
    assert torch.equal(logits(loader.from_pretrained(tmp_path / "converted")), logits(model))


def test_a_base_model_is_converted_too(tmp_path):
    model = AutoModel.from_config(copy.deepcopy(CONFIGS["bert"])).eval()
    apply_surgery(model, HoloSurgeryConfig(harmonics=8))
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs_of(model))[0], model(**inputs_of(model))[0])


def test_restored_linears_say_the_same(name):
    model = converted_model(name)
    expected = logits(model)
    restore_linears(model)
    assert not any(isinstance(module, HoloLinear) for module in model.modules())
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"modules": r"attn\.c_proj"}], ids=["all layers", "square layers"])
@pytest.mark.parametrize("loaded", [False, True])
def test_restored_layers_are_of_the_class_that_they_were(options, loaded, tmp_path):
    """GPT-2's `Conv1D` keeps its matrix transposed; a square one of the other class would load, with other weights."""
    model = converted_model("gpt2", **options)
    if loaded:
        model.save_pretrained(tmp_path / "converted")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
    expected = logits(model)
    restore_linears(copy.deepcopy(model)).save_pretrained(tmp_path / "dense")
    restored = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    kinds = {name: type(module) for name, module in restored.named_modules()}
    assert kinds == {name: type(module) for name, module in dense_model("gpt2").named_modules()}
    torch.testing.assert_close(logits(restored), expected, rtol=1e-3, atol=1e-3)


def test_adapters_are_merged_into_restored_layers(tmp_path):
    """An adapter takes a holographic `Conv1D` for an `nn.Linear`, whose matrix is the other way round."""
    model = converted_model("gpt2", modules=r"attn\.c_proj|mlp\.c_fc")
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["c_proj", "c_fc"], init_lora_weights=False))
    expected = logits(wrapped.base_model.model)
    merged = restore_linears(wrapped).merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)


def test_a_loaded_model_is_restored_to_a_dense_checkpoint(tmp_path):
    model = converted_model("phi3")
    model.save_pretrained(tmp_path / "converted")
    dense = restore_linears(AutoModelForCausalLM.from_pretrained(tmp_path / "converted"))
    dense.save_pretrained(tmp_path / "dense")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert not any(isinstance(module, HoloLinear) for module in loaded.modules())
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)
    assert dense.half().dtype == torch.float16  # no longer a quantized model


# ---------------------------------------------------------------------------------------------- using it
class Tokens(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(3, 50, (12,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("loaded", [False, True])
def test_trainer_trains_it(loaded, tmp_path):
    model = converted_model("phi3")
    if loaded:
        model.save_pretrained(tmp_path / "model")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    Trainer(model=model, args=arguments, train_dataset=Tokens()).train()
    assert all(p.isfinite().all() for p in model.parameters())
    moved = {name.rpartition(".")[2] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {"amplitude", "phase"} <= moved


def test_generation_with_and_without_a_cache(generator_name):
    model = converted_model(generator_name)
    ids = inputs_of(model)["input_ids"]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with_cache = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    without = model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **options)
    assert with_cache.shape == (2, 15) and torch.equal(with_cache, without)


def test_lora_trains_and_is_saved(tmp_path):
    model = converted_model("llama")
    model.save_pretrained(tmp_path / "model")
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    before = logits(wrapped.base_model.model)
    optimizer = torch.optim.Adam((p for p in wrapped.parameters() if p.requires_grad), lr=1e-2)
    ids = inputs_of(model)["input_ids"]
    losses = []
    for _ in range(5):
        losses.append(wrapped(input_ids=ids, labels=ids).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    after = logits(wrapped.base_model.model)
    assert not torch.allclose(before, after)
    wrapped.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    loaded.load_adapter(str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(loaded.eval()), after)
    merged = restore_linears(wrapped).merge_and_unload()
    torch.testing.assert_close(logits(merged), after, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("model_name", ["phi3", pytest.param("llama", marks=pytest.mark.slow)])
def test_a_converted_checkpoint_passes_the_conformance_kit(model_name, tmp_path):
    converted_model(model_name, shared=True).save_pretrained(tmp_path)
    subject = Subject(AutoModelForCausalLM.from_pretrained(tmp_path))
    results = [run_check(check, subject) for check in select(None, quick=True)]
    assert not [f"{r.check}: {r.detail}" for r in results if r.status == "failed"]
    assert sum(r.status == "passed" for r in results) > 20


# ---------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modules": "attention"}, "modules: 'attention' matches none of the linear layers, such as 'model.layers.0."),
        ({"exclude": "nothing"}, "exclude: 'nothing' matches none"),
        ({"exclude": "proj"}, "modules, exclude, keep_first and keep_last leave no linear layer"),
        ({"keep_first": 2, "keep_last": 1}, "leave no linear layer"),
        (
            {"harmonics": 40},
            "harmonics: 40 is more than the 32 inputs of 'model.layers.0.self_attn.q_proj'; use at most 32",
        ),
        ({"harmonics": None, "ratio": 0.01}, r"ratio: 0.01 leaves .* not one harmonic; give at least 0.0"),
        ({"basis": "data"}, "basis: 'data' has to be fitted to activations: use `hf-holo convert"),
    ],
)
def test_an_error_leaves_the_model_as_it_was(options, message):
    model = dense_model("llama")
    before = state(model)
    with pytest.raises(HoloError, match=message):
        apply_surgery(model, HoloSurgeryConfig(**{"harmonics": 8, **options}))
    assert_same_state(model, before)


def test_a_tied_output_layer_is_refused():
    config = copy.deepcopy(CONFIGS["llama"])
    config.tie_word_embeddings = True
    model = AutoModelForCausalLM.from_config(config)
    before = state(model)
    with pytest.raises(HoloError, match="modules: 'lm_head' is tied to the input embeddings"):
        apply_surgery(model, HoloSurgeryConfig(modules=["lm_head"], harmonics=8))
    assert_same_state(model, before)


def test_a_second_surgery_is_refused():
    model = converted_model("llama", modules="mlp")
    before = state(model)
    with pytest.raises(HoloError, match="model: it is converted or quantized already"):
        apply_surgery(model, HoloSurgeryConfig(modules="self_attn", harmonics=8))
    assert_same_state(model, before)
    apply_surgery(restore_linears(model), HoloSurgeryConfig(modules="self_attn", harmonics=8))


class WithoutBlocks(PreTrainedModel):
    config_class = PretrainedConfig

    def __init__(self):
        super().__init__(PretrainedConfig())
        self.inner = nn.Linear(4, 4)
        self.heads = nn.ModuleList([nn.Linear(4, 2)])


def test_a_model_without_blocks_wants_names():
    with pytest.raises(HoloError, match="has no list of blocks; name the layers with modules="):
        apply_surgery(WithoutBlocks())
    report = apply_surgery(WithoutBlocks(), HoloSurgeryConfig(modules="inner", harmonics=2))
    assert [row["module"] for row in report.converted] == ["inner"]


def test_a_module_that_is_no_model_of_transformers_is_refused():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 2)
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(HoloError, match="model: TransformerEncoder is not a model of transformers"):
        apply_surgery(model)
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_adapters_are_refused():
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    wrapped = get_peft_model(dense_model("llama"), lora)
    for model in (wrapped, wrapped.base_model.model):
        with pytest.raises(HoloError, match=r"self_attn\.q_proj' carries an adapter; merge the adapters"):
            apply_surgery(model, HoloSurgeryConfig(harmonics=2))
    apply_surgery(wrapped.merge_and_unload(), HoloSurgeryConfig(harmonics=2))


def test_weights_that_are_not_finite_are_refused():
    model = dense_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 2] = torch.nan
    with pytest.raises(HoloError, match=r"the weights of 'model\.layers\.1\.mlp\.up_proj' are not finite"):
        apply_surgery(model, HoloSurgeryConfig(harmonics=8))
    assert not any(isinstance(module, HoloLinear) for module in model.modules())
    apply_surgery(model, HoloSurgeryConfig(harmonics=8, exclude=r"1\.mlp\.up"))


@pytest.mark.parametrize("config", [{"harmonics": 8}, "random"])
def test_a_config_of_another_kind_is_refused(config):
    with pytest.raises(HoloError, match="is not a HoloSurgeryConfig"):
        apply_surgery(dense_model("llama"), config)


def test_an_empty_plan_is_refused():
    with pytest.raises(HoloError, match=r"layers: \{\} names no layer"):
        apply_surgery(dense_model("llama"), HoloSurgeryConfig(layers={}))


def test_a_plan_for_another_model_is_refused():
    config = converted_model("gpt2").config.quantization_config
    model = dense_model("llama")
    before = state(model)
    with pytest.raises(ValueError, match=r"layers: LlamaForCausalLM has no linear layer 'transformer\.h\.0\."):
        apply_surgery(model, config)
    assert_same_state(model, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"harmonics": 8, "ratio": 0.5}, "harmonics: 8 and ratio=0.5 exclude each other"),
        ({"harmonics": 0}, "harmonics: 0 is not a whole number of at least 1"),
        ({"harmonics": "8"}, "harmonics: '8' is not a whole number"),
        ({"harmonics": 8.0}, "harmonics: 8.0 is not a whole number"),
        ({"ratio": 0.0}, r"ratio: 0.0 is not a number in \(0, 1\]"),
        ({"ratio": 1.2}, r"ratio: 1.2 is not a number in \(0, 1\]"),
        ({"ratio": "0.5"}, r"ratio: '0.5' is not a number in \(0, 1\]"),
        ({"basis": "fourier"}, "basis: 'fourier' is unknown; choose one of random, dct, golden, data"),
        ({"keep_first": -1}, "keep_first: -1 is not a whole number of at least 0"),
        ({"keep_first": "1"}, "keep_first: '1' is not a whole number"),
        ({"keep_last": 1.5}, "keep_last: 1.5 is not a whole number"),
        ({"seed": "x"}, "seed: 'x' is not a whole number"),
        ({"seed": -1}, "seed: -1 is not a whole number of at least 0"),
        ({"shared": "yes"}, "shared: 'yes' is neither True nor False"),
        ({"basis": ["dct"]}, "is unknown; choose one of random"),
        ({"modules": 5}, "modules: 5 is not a regular expression or a list of them"),
        ({"exclude": [3]}, r"exclude: \[3\] is not a regular expression or a list of them"),
        ({"layers": [1]}, "layers: a plan gives basis, folded"),
        ({"harmonic": 8}, "unknown argument 'harmonic': did you mean 'harmonics'"),
        ({"modules": "(q"}, r"modules: '\(q' is not a regular expression"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(HoloError, match=message):
        HoloSurgeryConfig(**options)


def test_an_error_while_loading_is_clear(tmp_path):
    dense_model("llama").save_pretrained(tmp_path)
    for options, message in (({"basis": "data"}, "hf-holo convert"), ({"modules": "x"}, "modules: 'x' matches none")):
        with pytest.raises(HoloError, match=message):
            AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=HoloSurgeryConfig(**options))


def test_the_callers_config_stays_as_it_was(tmp_path):
    """One config converts models of different sizes: the plan is in the model's copy."""
    config = HoloSurgeryConfig(harmonics=4)
    for name in ("llama", "gpt2"):
        model = dense_model(name)
        model.save_pretrained(tmp_path / name)
        apply_surgery(model, config)
        assert len(model.config.quantization_config.layers) > 4
        type(model).from_pretrained(tmp_path / name, quantization_config=config)
    assert config.layers is None and config.checksum is None


def test_bases_that_are_not_the_models_own_are_refused(tmp_path, monkeypatch):
    """As if another release made other values."""
    model = converted_model("llama")
    model.save_pretrained(tmp_path)
    made = harmonics.harmonic_basis
    monkeypatch.setattr(harmonics, "harmonic_basis", lambda *args: 1.001 * made(*args))
    with pytest.raises(ValueError, match=r"checksum: \d+ of the bases that the model was made with is not that"):
        type(model).from_pretrained(tmp_path)
