"""Weights of a transformer in a HoloSpectralNet: what must not change does not change."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from hf_holo import HsnForCausalLM
from hf_holo.conversion.surgery.transfer import SOURCES, compare, transfer_to_hsn
from hf_holo.errors import HoloError

SHAPE = {
    "vocab_size": 31,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def llama(**changes) -> LlamaForCausalLM:
    config = LlamaConfig(**{**SHAPE, "num_key_value_heads": 2, "tie_word_embeddings": True, **changes})
    return _with_uneven_norms(LlamaForCausalLM(config))


def phi3(**changes) -> Phi3ForCausalLM:
    config = Phi3Config(**{**SHAPE, "original_max_position_embeddings": 64, **changes})
    return _with_uneven_norms(Phi3ForCausalLM(config))


def mistral(**changes) -> MistralForCausalLM:
    config = MistralConfig(**{**SHAPE, "num_key_value_heads": 2, "sliding_window": None, **changes})
    return _with_uneven_norms(MistralForCausalLM(config))


FAMILIES = {"llama": llama, "mistral": mistral, "phi3": phi3}


@torch.no_grad()
def _with_uneven_norms(model):
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(params=sorted(SOURCES))
def teacher(request):
    """Of every family in the table."""
    return FAMILIES[request.param]()


def tokens(rows: int = 2, length: int = 20) -> torch.Tensor:
    return torch.randint(SHAPE["vocab_size"], (rows, length))


def test_with_all_attention_kept_the_student_is_the_teacher(teacher):
    student = transfer_to_hsn(teacher, layers=[])
    x = tokens()
    with torch.no_grad():
        torch.testing.assert_close(student(x).logits, teacher(x).logits, rtol=1e-4, atol=1e-4)


def test_kept_attention_counts_real_tokens_through_the_cache_and_past_padding(teacher):
    student, x = transfer_to_hsn(teacher, layers=[]), tokens()
    mask = torch.ones_like(x)
    mask[0, :7] = 0  # left padding
    with torch.no_grad():
        expected = teacher(x[:1, 7:]).logits
        first = student(x[:, :11], attention_mask=mask[:, :11])
        rest = student(x[:, 11:], attention_mask=mask, past_key_values=first.past_key_values).logits
    torch.testing.assert_close(first.logits[:1, 7:], expected[:, :4], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rest[:1], expected[:, 4:], rtol=1e-4, atol=1e-4)


def test_a_hybrid_generates_the_same_with_and_without_its_cache(teacher):
    student, x = transfer_to_hsn(teacher, layers=[1]), tokens(length=6)
    assert student.config.mixer_types == ["attention", "holographic", "attention"]
    for options in ({}, {"num_beams": 2}):
        with_cache, without = (
            student.generate(x, max_new_tokens=8, do_sample=False, use_cache=use, pad_token_id=0, **options)
            for use in (True, False)
        )
        assert torch.equal(with_cache, without)


def test_mlps_norms_embeddings_and_head_are_kept(teacher):
    student, x = transfer_to_hsn(teacher), tokens()
    assert student.config.mixer_types == ["holographic"] * 3
    h = torch.randn(2, 5, 32)
    with torch.no_grad():
        torch.testing.assert_close(student.model.embed_tokens(x), teacher.model.embed_tokens(x))
        torch.testing.assert_close(
            student.lm_head(student.model.norm(h)), teacher.lm_head(teacher.model.norm(h)), rtol=1e-4, atol=1e-4
        )
        for block, old in zip(student.model.layers, teacher.model.layers, strict=True):
            new_output = block.channel_mix(block.channel_norm(h))
            torch.testing.assert_close(new_output, old.mlp(old.post_attention_layernorm(h)))


def test_the_teacher_stays_and_the_student_saves(teacher, tmp_path):
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student, x = transfer_to_hsn(teacher, layers=[-1]), tokens()
    assert student.config.mixer_types[-1] == "holographic"
    student.save_pretrained(tmp_path)
    loaded = HsnForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(x).logits, student(x).logits)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_on_the_meta_device_it_has_the_same_shapes(teacher):
    with torch.device("meta"):
        twin = AutoModelForCausalLM.from_config(teacher.config)
    student, shapes = transfer_to_hsn(teacher, [1]), transfer_to_hsn(twin, [1])
    assert all(parameter.is_meta for parameter in shapes.parameters())
    assert shapes.config.to_diff_dict() == student.config.to_diff_dict()
    assert compare(twin, shapes) == compare(teacher, student)
    expected = {name: parameter.shape for name, parameter in student.named_parameters()}
    assert {name: parameter.shape for name, parameter in shapes.named_parameters()} == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_student_has_the_dtype_of_the_teacher(teacher, dtype):
    student = transfer_to_hsn(teacher.to(dtype), [0])
    assert {parameter.dtype for parameter in student.parameters()} == {dtype}
    with torch.no_grad():
        assert student(tokens()).logits.isfinite().all()


@pytest.mark.parametrize(
    ("make", "layers", "said"),
    [
        (lambda: llama(attention_bias=True), None, "is a bias"),
        (lambda: llama(head_dim=16), None, "do not fill"),
        (lambda: llama(hidden_act="gelu"), None, "silu"),
        (lambda: llama(rope_scaling={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}), [0], "rotary"),
        (lambda: phi3(sliding_window=8), [0], "sliding_window=8"),
        (lambda: mistral(sliding_window=8), [0], "sliding_window=8"),
        (llama, [3], "no layer 3"),
        (lambda: transfer_to_hsn(llama()), None, "'hsn' cannot become an hsn"),
    ],
)
def test_what_cannot_be_transferred_is_refused(make, layers, said):
    with pytest.raises(HoloError, match=said):
        transfer_to_hsn(make(), layers)
