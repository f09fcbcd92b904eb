"""Bases fitted to data, for HOLO models that train from scratch."""

import copy

import pytest
import torch

from hf_holo import HoloConfig, HoloError, HoloForCausalLM, HoloLinear, HoloSurgeryConfig, fit_bases
from hf_holo.conversion.surgery.calibration import find_sites
from hf_holo.modeling import modeling_holo
from hf_holo.modeling.quantizer import swap

SIZES = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2}


def model(**options) -> HoloForCausalLM:
    torch.manual_seed(0)
    return HoloForCausalLM(HoloConfig(**SIZES, harmonics=8, basis="data", **options)).double()


def twin() -> HoloForCausalLM:
    torch.manual_seed(1)
    return HoloForCausalLM(HoloConfig(**SIZES, attention_projections="dense", mlp_projections="dense")).double()


def batches(count: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(40, (2, 16), generator=generator)} for _ in range(count)]


@torch.no_grad()
def inputs_of(source, name: str) -> torch.Tensor:
    """What a layer reads, `[tokens, I]`."""
    read = []
    handle = source.get_submodule(name).register_forward_pre_hook(
        lambda layer, args: read.append(args[0].flatten(0, 1))
    )
    for batch in batches():
        source(**batch)
    handle.remove()
    return torch.cat(read)


@pytest.mark.parametrize("name", ["model.layers.0.attention.q_proj", "model.layers.1.mlp.down_proj"])
def test_no_other_basis_of_that_rank_keeps_more_of_the_inputs(name):
    """By the theorem of Eckart and Young: what is left out is the tail of the singular values."""
    student, source = model(), twin()
    kept = fit_bases(student, batches(), source)
    x, basis = inputs_of(source, name), student.get_submodule(name).basis.matrix()
    torch.testing.assert_close(basis @ basis.T, torch.eye(8).double())
    energies = torch.linalg.svdvals(x).square()
    left_out = (x - x @ basis.T @ basis).square().sum()
    torch.testing.assert_close(left_out, energies[8:].sum())
    assert kept[name] == pytest.approx(float(energies[:8].sum() / energies.sum()))
    assert len(kept) == sum(isinstance(module, HoloLinear) for module in student.modules()) == 14


def test_only_bases_change():
    student, source = model(), twin().train()
    before, theirs = copy.deepcopy(student.state_dict()), copy.deepcopy(source.state_dict())
    fit_bases(student, batches(), source)
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.endswith("own_basis.table")}
    assert all(torch.equal(value, theirs[name]) for name, value in source.state_dict().items())
    assert student.training and source.training and not any(m._forward_pre_hooks for m in source.modules())


def test_it_needs_no_other_model():
    student = model().eval()
    name = "model.layers.0.mlp.up_proj"
    x = inputs_of(student, name)
    kept = fit_bases(student, batches())
    energies = torch.linalg.svdvals(x).square()
    assert kept[name] == pytest.approx(float(energies[:8].sum() / energies.sum()))
    assert not student.training


def test_hidden_tokens_and_labels_count_for_nothing():
    plain, padded = model(), model()
    fit_bases(plain, batches(), twin())
    rows = []
    for batch in batches():
        ids = torch.nn.functional.pad(batch["input_ids"], (0, 5), value=7)
        mask = torch.ones_like(ids)
        mask[:, -5:] = 0
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": ids})
    fit_bases(padded, rows, twin())
    for name, table in plain.state_dict().items():
        torch.testing.assert_close(padded.state_dict()[name], table)


def test_fitted_bases_are_saved(tmp_path):
    student = model()
    fit_bases(student, batches(), twin())
    student.save_pretrained(tmp_path)
    loaded = HoloForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert all(torch.equal(value, student.state_dict()[name]) for name, value in loaded.state_dict().items())


def shallow() -> HoloForCausalLM:
    return HoloForCausalLM(HoloConfig(**{**SIZES, "num_hidden_layers": 1}))


def silent() -> HoloForCausalLM:
    source = twin()
    torch.nn.init.zeros_(source.model.layers[1].attention.v_proj.weight)
    return source


def converted() -> HoloForCausalLM:
    source = twin()
    swap(source, HoloSurgeryConfig(layers=find_sites(source, HoloSurgeryConfig())[0].plan(harmonics=4)))
    return source


@pytest.mark.parametrize(
    ("make", "data", "source", "said"),
    [
        (twin, batches(), None, "basis='data'"),
        (converted, batches(), None, "surgery has fitted it"),
        (model, batches(), shallow, "source: it has no linear layer 'model.layers.1"),
        (model, batches(), silent, "'model.layers.1.attention.o_proj' are all zero"),
        (model, [], None, "batches: 0 tokens"),
    ],
)
def test_what_cannot_be_fitted_is_refused_and_stays(make, data, source, said):
    student = make()
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(HoloError, match=said):
        fit_bases(student, data, source and source())
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


@pytest.fixture
def warned(monkeypatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(modeling_holo.logger, "warning_once", said.append)
    return said


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_with_bases_that_saw_no_data_is_told(warned, dtype, tmp_path):
    student = model().to(dtype)
    student.eval()
    assert not warned
    student.train()
    assert warned and "fit_bases" in warned[0]
    student.save_pretrained(tmp_path)
    warned.clear()
    HoloForCausalLM.from_pretrained(tmp_path, dtype=dtype).train()
    assert warned


def test_after_fitting_nothing_is_told(warned, tmp_path):
    student = model()
    fit_bases(student, batches())
    student.train()
    student.save_pretrained(tmp_path)
    HoloForCausalLM.from_pretrained(tmp_path).train()
    twin().train()
    with torch.device("meta"):
        HoloForCausalLM(student.config).train()
    assert not warned
