"""Mixtures of experts: what is converted, experts that no token came to, and refitting where tokens go elsewhere."""

import csv
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from packaging import version
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers import __version__ as transformers_version

from hf_holo import HoloSurgeryConfig, apply_surgery, quantize_linears
from hf_holo.cli import main
from hf_holo.conversion.surgery.calibration import is_expert
from hf_holo.conversion.surgery.plan import is_router, other_matrices
from hf_holo.data.tokenizers import make_tokenizer
from hf_holo.modeling.quantizer import holo_layers, integer_linears, integer_matrices

MAJOR = version.parse(transformers_version).major
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.15, "pad_token_id": 0}
SIZES |= {"bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 1}
    | {"topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8}
    | {"qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
SMALL = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
WITHOUT_USE_CACHE = {
    "distilbert": SMALL,
    "modernbert": {"cls_token_id": 1, "sep_token_id": 2},
    "albert": {"embedding_size": 16},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8},
    "mpnet": {},
}
RUN = [
    "--block_size",
    "48",
    "--tokens",
    "768",
    "--fisher_tokens",
    "192",
    "--eval_windows",
    "2",
    "--sample_tokens",
    "2",
    "--ratio",
    "0.8",
]


REST = ("qwen2_moe", "olmoe", "deepseek_v3", "phimoe")
OTHERS = ("distilbert", "modernbert", "deberta", "deberta-v2", "mpnet")


def build(name: str, sizes: dict, auto: type, vocabulary: int) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**SIZES, "vocab_size": vocabulary, **sizes})
    return auto.from_config(config).eval()


def relative_error(name: str, sizes: dict, auto: type, folder: Path, *options: str, change=None) -> float:
    """Of the logits of a converted model, relative to the teacher's."""
    tokenizer = make_tokenizer("bytes", [], masked=auto is AutoModelForMaskedLM)
    text = "\n".join(topics[key] for key in sorted(topics))[:7000]
    (folder / "text.txt").write_text(text, encoding="utf-8")
    teacher = build(name, sizes, auto, len(tokenizer))
    if change is not None:
        change(teacher)
    teacher.save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    words = ["convert", str(folder / "teacher"), str(folder / "student"), *RUN, *options]
    assert main([*words, "--train_file", str(folder / "text.txt")]) == 0
    x = torch.tensor([tokenizer(text[:48], add_special_tokens=False).input_ids])
    with torch.no_grad():
        right = teacher(input_ids=x).logits
        got = auto.from_pretrained(folder / "student").eval()(input_ids=x).logits
    return float((got - right).square().mean() / right.var())


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_in_integers_routers_and_fused_experts_stay(name, tmp_path):
    model = build(name, EXPERTS[name], AutoModelForCausalLM, 80)
    fused = {n: p.detach().clone() for n, p in model.named_parameters() if p.dim() == 3}
    routers = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and is_router(model, n)]
    apply_surgery(model, HoloSurgeryConfig(modules=["self_attn"], ratio=0.9))
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        right = model(ids).logits
        found = quantize_linears(model).eval()(ids).logits
    assert (found - right).norm() < 0.1 * right.norm()
    assert all(torch.equal(model.get_parameter(n), weight) for n, weight in fused.items())
    assert all(type(model.get_submodule(n)) is torch.nn.Linear for n in routers) and integer_matrices(model)
    if not fused:
        assert any("experts" in name for name in model.config.quantization_config.dense)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, found) and len(integer_linears(loaded)) == len(integer_linears(model))


@pytest.mark.parametrize("name", EXPERTS)
def test_routers_stay_and_everything_else_is_converted_or_named(name):
    model = build(name, EXPERTS[name], AutoModelForCausalLM, 80)
    dense = {n: p.numel() for n, p in model.named_parameters() if ".layers." in n and p.dim() > 1}
    others = other_matrices(model)
    linears = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n]
    routers = {n for n in linears if is_router(model, n)}
    exclude = "shared_expert_gate" if name == "qwen2_moe" else None  # of one output
    apply_surgery(model, HoloSurgeryConfig(harmonics=4, exclude=exclude))
    converted = model.config.quantization_config.layers
    kept = {n: size for n, size in dense.items() if n.removesuffix(".weight") not in converted}
    stay = routers | {n for n in linears if exclude and exclude in n}
    assert sum(others.values()) == sum(size for n, size in kept.items() if n.removesuffix(".weight") not in stay)
    assert not any(layer.out_features == 4 for layer in holo_layers(model))
    if MAJOR >= 5:
        assert any("experts" in kind for kind in others)
    elif name == "mixtral":
        assert len(routers) == 2 and not others


@pytest.mark.skipif(MAJOR >= 5, reason="routers are not linear layers")
def test_routers_are_converted_where_they_are_named():
    model = build("mixtral", EXPERTS["mixtral"], AutoModelForCausalLM, 80)
    report = apply_surgery(model, HoloSurgeryConfig(harmonics=4, modules=r"moe\.gate"))
    assert len(report.converted) == 2


def test_a_router_in_a_module_of_its_own():
    """Switch Transformers: `mlp.router.classifier` next to `mlp.experts`."""
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "num_experts": 4}
    config = AutoConfig.for_model("switch_transformers", vocab_size=80, **sizes)
    model = AutoModelForSeq2SeqLM.from_config(config)
    routers = [n for n, m in model.named_modules() if n.endswith("router.classifier")]
    assert routers and all(is_router(model, name) for name in routers)


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("model.layers.0.block_sparse_moe.experts.3.w1", True),
        ("encoder.block.1.layer.1.mlp.experts.expert_0.wi", True),
        ("model.layers.0.mlp.expert.up", True),
        ("model.layers.0.mlp.shared_expert_gate", False),
        ("model.layers.0.mlp.up_proj", False),
    ],
)
def test_experts_by_name(name, expert):
    assert is_expert(name) == expert


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", *(pytest.param(n, marks=pytest.mark.slow) for n in REST)])
def test_refitting_experts(name, tmp_path):
    for folder in ("plain", "refitted"):
        (tmp_path / folder).mkdir()
    auto = AutoModelForCausalLM
    plain = relative_error(name, EXPERTS[name], auto, tmp_path / "plain", "--refit", "false")
    refitted = relative_error(name, EXPERTS[name], auto, tmp_path / "refitted", "--refit", "true")
    assert refitted < 2 * plain + 0.02 and plain < 0.5


@pytest.mark.parametrize("name", ["albert", *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERS)])
def test_refitting_without_use_cache(name, tmp_path):
    for folder in ("plain", "refitted"):
        (tmp_path / folder).mkdir()
    auto = AutoModelForMaskedLM
    plain = relative_error(name, WITHOUT_USE_CACHE[name], auto, tmp_path / "plain", "--refit", "false")
    refitted = relative_error(name, WITHOUT_USE_CACHE[name], auto, tmp_path / "refitted", "--refit", "true")
    assert refitted < 2 * plain + 0.02 and plain < 0.5


@pytest.mark.skipif(MAJOR >= 5, reason="experts are fused, and stay dense")
@pytest.mark.parametrize("refit", ["false", pytest.param("true", marks=pytest.mark.slow)])
def test_an_expert_that_no_token_comes_to(refit, tmp_path):
    def close(model: PreTrainedModel) -> None:
        """The last expert's score is between the others', so it is never the best."""
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith("gate.weight"):
                    weight[3] = weight[:3].mean(0)

    sizes = {**EXPERTS["mixtral"], "num_experts_per_tok": 1}
    error = relative_error("mixtral", sizes, AutoModelForCausalLM, tmp_path, "--refit", refit, change=close)
    assert error < 0.4
    rows = list(csv.DictReader((tmp_path / "student/layers.csv").open()))
    closed = [row for row in rows if ".experts.3." in row["layers"]]
    assert len(closed) == 6
    assert all(0.6 < int(row["stored"]) / int(row["dense"]) <= 0.8 for row in closed)
    assert all(0 < float(row["relative_squared_error"]) < 0.3 for row in closed)
    assert "6 layers of experts" in (tmp_path / "student/README.md").read_text()
