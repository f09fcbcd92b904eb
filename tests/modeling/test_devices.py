"""Devices that lack a dtype: Apple's MPS has no float64, and no FFT takes half precision."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_holo import HsnForMaskedLM, bind, get_architecture, unbind
from hf_holo.modeling import phases


class NoFloat64(TorchDispatchMode):
    """Acts the device by "meta" and refuses float64 there; what is read or fetched from it is made up."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operation is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1
        if operation is torch.ops.aten._to_copy.default and args[0].is_meta and str(kwargs.get("device")) == "cpu":
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        result = operation(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                assert tensor.dtype != torch.float64, operation
        return result


@pytest.fixture(autouse=True)
def autocast_knows_meta(monkeypatch):
    autocast = torch.autocast

    def acted(kind, *args, **kwargs):
        return contextlib.nullcontext() if kind == "meta" else autocast(kind, *args, **kwargs)

    monkeypatch.setattr(torch, "autocast", acted)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("family", ["hsn", "holo", "resonance"])
def test_no_float64_on_the_device_of_the_model(family):
    architecture = get_architecture(family)
    for options in architecture.variants.values():
        model = architecture.main_model(architecture.config(**options)).eval().to("meta")
        ids = torch.ones(2, 70, dtype=torch.long, device="meta")
        for mask in (None, torch.ones_like(ids)):
            with NoFloat64():
                output = model(ids, attention_mask=mask, use_cache=True)
                again = model(ids[:, :1], past_key_values=output.past_key_values, use_cache=True)
            assert again.logits.shape == (2, 1, model.config.vocab_size)


@torch.no_grad()
def test_no_float64_on_the_device_of_a_bidirectional_model():
    model = HsnForMaskedLM(get_architecture("hsn").config(**get_architecture("hsn").variants["bundle"])).to("meta")
    with NoFloat64():
        model(torch.ones(2, 70, dtype=torch.long, device="meta"))


def test_angles_are_computed_where_there_is_float64():
    assert phases.home_of_float64(torch.device("cpu")).type == phases.home_of_float64(None).type == "cpu"
    assert phases.home_of_float64(torch.device("cuda", 1)) == torch.device("cuda", 1)  # where it always was
    assert phases.home_of_float64(torch.device("mps")).type == "cpu"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("operation", [bind, unbind])
def test_binding_in_half_precision(operation, dtype):
    torch.manual_seed(0)
    a, b = torch.randn(3, 64).to(dtype), torch.randn(64).to(dtype)
    found = operation(a, b)
    assert found.dtype == dtype
    assert torch.equal(found, operation(a.float(), b.float()).to(dtype))
