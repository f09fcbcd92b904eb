"""Two processes on a CPU (gloo) train as one does: data parallel, sharded, and from one to the other."""

import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import Accelerator, PartialState, debug_launcher
from accelerate.state import AcceleratorState
from packaging.version import Version
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing import ProcessRaisedException
from torch.optim import AdamW, Optimizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_holo import HoloSurgeryConfig, MuonAdamW
from hf_holo.conversion.surgery.calibration import find_sites, surgery_plan
from hf_holo.modeling.harmonics import HarmonicBasis
from hf_holo.modeling.quantizer import swap

pytestmark = pytest.mark.slow
STEPS, ROWS, LENGTH, VOCABULARY = 50, 8, 16, 61
DENSE = {"holo": "dense-mlp"}  # variants with matrices for Muon, where the first has none


@pytest.fixture(autouse=True)
def nothing_chosen():
    """Other tests have trained in this process, alone and on the CPU; a process that starts from it inherits that."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def batches() -> torch.Tensor:
    """The global batch of every step `[STEPS, ROWS, LENGTH]`."""
    return torch.randint(1, VOCABULARY, (STEPS, ROWS, LENGTH), generator=torch.Generator().manual_seed(0))


def make_optimizer(name: str, model: nn.Module) -> Optimizer:
    """Muon works in bfloat16, which makes more of a gradient that was summed in another order: it takes small steps."""
    return MuonAdamW.for_model(model, lr=4e-4) if name == "muon" else AdamW(model.parameters(), lr=1e-3)


def alone(model: nn.Module, optimizer: str) -> list[float]:
    """The losses of one process, without Accelerate."""
    optimizer = make_optimizer(optimizer, model.train())
    losses = []
    for ids in batches():
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def in_parallel(model, optimizer, out, first=0, last=STEPS, load=None, save=None, precision="no") -> None:
    """One process of several: its share of every batch, through Accelerate; the losses go to the file `out`."""
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    assert accelerator.num_processes == int(os.environ["WORLD_SIZE"])
    model, optimizer = accelerator.prepare(model.train(), make_optimizer(optimizer, model))
    if load:
        accelerator.load_state(load)
    share = ROWS // accelerator.num_processes
    losses = []
    for ids in batches()[first:last]:
        mine = ids[accelerator.process_index * share :][:share]
        loss = model(input_ids=mine, labels=mine).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    if save:
        accelerator.save_state(save)
    if accelerator.is_main_process:
        Path(out).write_text(json.dumps(losses))


def sharded(model, optimizer, out) -> None:
    """One process of two, each of which holds half of every parameter."""
    state = PartialState(cpu=True)
    mesh = init_device_mesh("cpu", (state.num_processes,))
    for block in model.train().base_model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    parameters = list(model.parameters())
    assert all(isinstance(parameter, DTensor) for parameter in parameters)
    held = sum(parameter.to_local().numel() for parameter in parameters)
    assert held < 0.55 * sum(parameter.numel() for parameter in parameters)  # a vector of one entry has no halves
    optimizer = make_optimizer(optimizer, model)
    share = ROWS // state.num_processes
    losses = []
    for ids in batches():
        mine = ids[state.process_index * share :][:share]
        loss = model(input_ids=mine, labels=mine).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        torch.distributed.all_reduce(mean)
        losses.append(mean.item() / state.num_processes)
    if state.is_main_process:
        Path(out).write_text(json.dumps(losses))


def launched(function, processes: int, out: Path, *arguments) -> list[float]:
    """The losses of a function that this many processes run."""
    debug_launcher(function, (*arguments[:2], str(out), *arguments[2:]), num_processes=processes)
    return json.loads(out.read_text())


@pytest.mark.feature("Accelerate", "two processes, data parallel")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_data_parallel_is_as_alone(tiny, family, optimizer, tmp_path):
    variant = DENSE.get(family, 0) if optimizer == "muon" else 0
    expected = alone(tiny(family, variant=variant), optimizer)
    model, ids = tiny(family, variant=variant), batches()[-1]
    assert abs(expected[-1] - model(input_ids=ids, labels=ids).loss) > 1e-3  # training has made a difference
    assert launched(in_parallel, 2, tmp_path / "losses", model, optimizer) == pytest.approx(expected, abs=1e-4)


@pytest.mark.feature("Accelerate", "two processes, fully_shard")
def test_sharded_is_as_alone(tiny, family, tmp_path):
    expected = alone(tiny(family), "adamw")
    assert launched(sharded, 2, tmp_path / "losses", tiny(family), "adamw") == pytest.approx(expected, abs=1e-4)


def test_muon_refuses_sharded_matrices(tiny, tmp_path):
    with pytest.raises(ProcessRaisedException, match="Muon takes whole matrices, and these are sharded"):
        launched(sharded, 2, tmp_path / "losses", tiny("hsn"), "muon")


@pytest.mark.feature("Accelerate", "another number of processes on resuming")
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(tiny, family, before, after, tmp_path):
    half, state = STEPS // 2, str(tmp_path / "state")
    expected, one, other = (tiny(family, variant=DENSE.get(family, 0)) for _ in range(3))
    first = launched(in_parallel, before, tmp_path / "first", one, "muon", 0, half, None, state)
    second = launched(in_parallel, after, tmp_path / "second", other, "muon", half, STEPS, state)
    assert first + second == pytest.approx(alone(expected, "muon"), abs=1e-4)


@pytest.mark.feature("Accelerate", "bf16")
def test_bf16_learns(tiny, family, tmp_path):
    losses = launched(in_parallel, 1, tmp_path / "losses", tiny(family), "adamw", 0, STEPS, None, None, "bf16")
    expected = alone(tiny(family), "adamw")
    assert losses != expected and losses == pytest.approx(expected, abs=0.05)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="autocast in fp16 does nothing on a CPU")
def test_fp16_learns(tiny, family):
    accelerator = Accelerator(mixed_precision="fp16")
    model = tiny(family).train()
    model, optimizer = accelerator.prepare(model, make_optimizer("adamw", model))
    losses = []
    ids = batches()[0].to(accelerator.device)
    for _ in range(STEPS):
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def accumulate(model, ids, out) -> None:
    """The gradients of four small batches, as the norm of their difference to those of one large batch."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    prepared, optimizer = accelerator.prepare(model.train(), AdamW(model.parameters(), lr=0.0))
    for part in ids.chunk(4):
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(input_ids=part, labels=part).loss)
    small = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    optimizer.zero_grad()
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    large = [p.grad for p in model.parameters() if p.grad is not None]
    difference = max((a - b).abs().max().item() for a, b in zip(small, large, strict=True))
    Path(out).write_text(json.dumps([difference, max(g.abs().max().item() for g in large)]))


@pytest.mark.feature("Accelerate", "gradient accumulation")
def test_accumulated_gradients_are_those_of_one_large_batch(tiny, family, tmp_path):
    difference, size = launched(accumulate, 1, tmp_path / "out", tiny(family), batches()[0])
    assert difference < 1e-5 < size


@pytest.mark.parametrize("kind", ["family", "converted"])
def test_stored_bases_are_read_from_the_disk_or_it_is_refused(tiny, kind, tmp_path):
    """transformers 5 reads them; 4.57 leaves those of our families at zero, and has no values for those of a converted
    model."""
    if kind == "family":
        model = tiny("holo", variant="data", num_hidden_layers=4)
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes, pad_token_id=0)).eval()
        sites = find_sites(model, HoloSurgeryConfig(shared=True))
        surgery = HoloSurgeryConfig(basis="data", layers=surgery_plan(sites, [8] * len(sites)))
        swap(model, surgery)
        model.config.quantization_config = surgery
    for basis in (module for module in model.modules() if isinstance(module, HarmonicBasis)):
        basis.store(torch.randn(basis.harmonics, basis.in_features))
    model.save_pretrained(tmp_path / "model")
    ids, base = batches()[0], model.base_model_prefix
    places = {f"{base}.layers.{i}": "disk" if i > 1 else "cpu" for i in range(4)}
    places |= {f"{base}.{name}": "cpu" for name, _ in model.base_model.named_children() if name != "layers"}
    load = partial(
        AutoModelForCausalLM.from_pretrained,
        tmp_path / "model",
        device_map=places | {"lm_head": "cpu"},
        offload_folder=tmp_path / "disk",
    )
    if Version(transformers.__version__).major < 5:
        with pytest.raises(ValueError, match="not read it" if kind == "family" else "tail is on the meta device"):
            load()
        return
    with torch.no_grad():
        torch.testing.assert_close(load()(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=1e-6)


@pytest.mark.feature("Accelerate", "device_map with layers on the disk")
@pytest.mark.parametrize(("family", "variant"), [("hsn", 0), ("holo", 0), ("resonance", "hierarchical")])
def test_a_model_that_lies_on_the_disk_in_part(tiny, family, variant, tmp_path):
    model, ids = tiny(family, variant=variant, num_hidden_layers=4), batches()[0]
    model.save_pretrained(tmp_path / "model")
    total = sum(p.nbytes for p in model.parameters())
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": int(0.6 * total)}, offload_folder=tmp_path / "disk"
    )
    assert {"cpu", "disk"} == set(map(str, offloaded.hf_device_map.values()))
    with torch.no_grad():
        torch.testing.assert_close(offloaded(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=1e-6)
        start, token = ids[:, :-1], ids[:, -1:]
        continued = offloaded(input_ids=token, past_key_values=offloaded(input_ids=start).past_key_values).logits
        torch.testing.assert_close(continued, model(input_ids=ids).logits[:, -1:], rtol=0, atol=1e-5)
