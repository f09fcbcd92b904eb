"""On a GPU everything is as on a CPU: values, gradients, generation, training, conversion; and memory stays linear.

Fast: the whole file takes a few minutes on one GPU. `hf-holo check NAME --device cuda` checks more.
"""

import copy
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainingArguments, pipeline

from hf_holo import HolographicMemory, MuonAdamW, architectures
from hf_holo.conversion import HoloSurgeryConfig, apply_surgery, restore_linears
from hf_holo.conversion.distill.command import feature_grams
from hf_holo.conversion.surgery.calibration import allocate, collect, factorise, find_sites, install, stacked_weight
from hf_holo.conversion.surgery.refit import refit
from hf_holo.data.tokenizers import character_tokenizer
from hf_holo.eval.conformance import Subject, run_check, select
from hf_holo.eval.conformance.generation import Speaker
from hf_holo.eval.conformance.state import cache_tensors
from hf_holo.eval.conformance.subject import main_output
from hf_holo.eval.conformance.targets import family_subjects
from hf_holo.modeling.backbone import Backbone
from hf_holo.modeling.harmonics import HoloLinear
from hf_holo.modeling.memory import phasors
from hf_holo.modeling.quantizer import checksum_of_bases
from hf_holo.training.optim import WhitenedAdamW
from hf_holo.training.trainer import HoloTrainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

FAMILIES = list(architectures())
SUBJECTS = [subject for family in architectures().values() for subject in family_subjects(family)]
COMMON = [subject for family in architectures().values() for subject in family_subjects(family, quick=True)]
GENERATORS = [subject for subject in COMMON if subject.model_class.can_generate()]
BACKBONES = [subject for subject in SUBJECTS if issubclass(subject.model_class, Backbone)]
DENSE = {"holo": "dense-mlp"}  # variants with matrices for Muon, where the first has none
LENGTHS = (1, 17, 100, 1000)


def each(subjects: list[Subject]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("subject", subjects, ids=str)


def assert_near(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Up to a share of the largest expected value."""
    expected = expected.detach()
    torch.testing.assert_close(got.detach().to(expected), expected, rtol=0, atol=tolerance * expected.abs().max())


def padded(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Inputs whose last row is padded on the left."""
    mask = torch.ones_like(ids)
    mask[-1, : ids.shape[1] // 4] = 0
    return {"input_ids": ids.where(mask.bool(), 0), "attention_mask": mask}


def moved(inputs: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: x.to(device) for name, x in inputs.items()}


def values_and_gradients(
    model: nn.Module, inputs: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The outputs at real tokens, and the gradients of a random reading of them, on the CPU."""
    y = main_output(model(**inputs, use_cache=False))
    real = inputs["attention_mask"].bool()
    y = y[real] if y.shape[:2] == real.shape else y
    reading = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad((y * reading).sum(), list(named.values()), allow_unused=True)
    return y.detach().cpu(), {n: g.cpu() for n, g in zip(named, gradients, strict=True) if g is not None}


def assert_same_as_on_the_cpu(subject: Subject, dtype: torch.dtype, length: int, device, tolerance: float) -> None:
    model, inputs = subject.copy(dtype), padded(subject.ids(2, length))
    expected, expected_gradients = values_and_gradients(model, inputs)
    got, gradients = values_and_gradients(model.to(device), moved(inputs, device))
    assert_near(got, expected, tolerance)
    assert gradients.keys() == expected_gradients.keys()
    largest = max(gradient.abs().max() for gradient in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(
            gradients[name], gradient, rtol=0, atol=tolerance * largest, msg=lambda text, n=name: f"{n}: {text}"
        )


# ---------------------------------------------------------------------------------------------- values
@each(SUBJECTS)
def test_float32_is_as_on_the_cpu(subject, device):
    assert_same_as_on_the_cpu(subject, torch.float32, 70, device, 1e-4)


@each(BACKBONES)
def test_float64_is_as_on_the_cpu(subject, device):
    """Over several segments, chunks and documents' worth of tokens."""
    assert_same_as_on_the_cpu(subject, torch.float64, 600, device, 1e-9)


@each(GENERATORS)
@torch.no_grad()
def test_no_token_sees_a_later_one(subject, device):
    model, ids = subject.copy().to(device), subject.ids(2, 90)
    other = ids.clone()
    other[:, 50:] = subject.other_ids(ids[:, 50:])
    y, z = (model(input_ids=x.to(device), use_cache=False).logits for x in (ids, other))
    assert_near(z[:, :50], y[:, :50], 1e-9)
    assert (y[:, 50] - z[:, 50]).abs().max() > 1e-3 * y.abs().max()


@each(GENERATORS)
@torch.no_grad()
def test_token_by_token_is_as_all_at_once(subject, device):
    model, ids = subject.copy().to(device), subject.ids(2, 40).to(device)
    expected = model(input_ids=ids, use_cache=False).logits
    got, cache = subject.feed([ids[:, :20], *ids[:, 20:].split(1, 1)], model=model)
    assert_near(got, expected, 1e-9)
    assert all(x.device == ids.device for x in cache_tensors(cache).values())


@each(GENERATORS)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_it_generates_as_on_the_cpu(subject, options, device):
    """In float64, where no tie is broken by rounding, and with left padding."""
    speaker, inputs = Speaker(subject), padded(subject.ids(3, 12))
    expected = speaker.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], **options)
    speaker.model.to(device)
    inputs = moved(inputs, device)
    got = speaker.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], **options)
    torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("group", ["causality", "equivalence", "generation", "state"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_conformance_kit_passes(family, group, device):
    """The checks that are not slow, on the main model of the first variant; compiling has a test of its own."""
    subject = next(s for s in GENERATORS if s.config.model_type == family)
    with device:
        subject = Subject(subject.model_class, subject.config)
        results = [run_check(c, subject) for c in select([group], quick=True) if "compile" not in c.name]
    assert any(result.status == "passed" for result in results)
    assert [f"{result.check}: {result.detail}" for result in results if result.status == "failed"] == []


# ---------------------------------------------------------------------------------------------- precision
@each(COMMON)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@torch.no_grad()
def test_half_precision_is_near_float32(subject, dtype, device):
    """Of weights that both hold exactly; the tolerance is for the rounding of activations."""
    model = subject.copy(dtype).to(device)
    exact = copy.deepcopy(model).float()
    for length in LENGTHS:
        ids = subject.ids(2, length).to(device)
        got, expected = (main_output(m(input_ids=ids)).float() for m in (model, exact))
        assert got.isfinite().all()
        error = (got - expected).norm() / expected.norm()
        assert error < (0.15 if dtype == torch.bfloat16 else 0.03), f"{length} tokens: {error:.3f}"


@each([s for s in GENERATORS if hasattr(s.model_class, "state_spec")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_states_keep_their_precision(subject, dtype, device):
    if "constant_state" not in subject.capabilities:
        pytest.skip("attention keeps its keys in the precision of the model")
    _, cache = subject.feed([subject.ids(2, 20).to(device)], model=subject.copy(dtype).to(device))
    states = [x for x in cache_tensors(cache).values() if x.is_floating_point()]
    assert states and all(state.dtype == torch.float32 for state in states)


# ---------------------------------------------------------------------------------------------- training
def repeating_rows(rows: int = 16, length: int = 32) -> list[dict[str, torch.Tensor]]:
    """Texts that are easily learned: a word of four tokens, again and again."""
    words = torch.randint(1, 61, (rows, 4), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": ids, "labels": ids} for ids in words.repeat(1, length // 4)]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_trains_in_mixed_precision(small, family, precision, optimizer, tmp_path):
    """With gradient checkpointing; fp16 scales the loss, and leaves steps out where a gradient overflows."""
    model = small(family, variant=DENSE.get(family) if optimizer == "muon" else None)
    make = {"adamw": lambda: AdamW(model.parameters(), lr=3e-3), "muon": lambda: MuonAdamW.for_model(model, lr=3e-3)}
    args = TrainingArguments(
        tmp_path,
        max_steps=25,
        per_device_train_batch_size=8,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        lr_scheduler_type="constant",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        **{precision: True},
    )
    trainer = HoloTrainer(model, args, train_dataset=repeating_rows(), optimizers=(make[optimizer](), None))
    trainer.train()
    losses = torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert model.device.type == "cuda" and all(p.dtype == torch.float32 for p in model.parameters())
    assert losses.isfinite().all()
    assert losses[-5:].mean() < 0.9 * losses[:5].mean()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_goes_on_from_a_checkpoint(small, family, tmp_path):
    """Optimizer state and averages come back to the GPU: interrupted and uninterrupted end with the same weights."""
    common = {"per_device_train_batch_size": 4, "report_to": "none", "disable_tqdm": True, "save_steps": 4}
    ended = []
    for folder, stops in (("whole", [8]), ("parts", [4, 8])):
        for steps in stops:
            model = small(family, variant=DENSE.get(family))
            args = TrainingArguments(tmp_path / folder, max_steps=steps, lr_scheduler_type="constant", **common)
            optimizer = MuonAdamW.for_model(model, lr=1e-3)
            trainer = HoloTrainer(
                model, args, train_dataset=repeating_rows(), optimizers=(optimizer, None), ema_decay=0.9
            )
            checkpoint = tmp_path / folder / "checkpoint-4"
            trainer.train(str(checkpoint) if steps == 8 and len(stops) == 2 else None)
        ended.append(model)
    for (name, p), q in zip(ended[0].named_parameters(), ended[1].parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=0, atol=1e-3, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.skipif(not (shutil.which("gcc") and shutil.which("g++")), reason="torch.compile needs gcc and g++")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_compiled_model_is_as_the_eager_one(small, random_ids, family, device):
    torch._dynamo.reset()
    model = small(family, num_hidden_layers=1).double().to(device)
    inputs = moved(padded(random_ids(2, 48)), device)
    expected, expected_gradients = values_and_gradients(model, inputs)
    got, gradients = values_and_gradients(torch.compile(model), inputs)
    assert_near(got, expected, 1e-8)
    largest = max(gradient.abs().max() for gradient in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[f"_orig_mod.{name}"], gradient, rtol=0, atol=1e-8 * largest)


# ---------------------------------------------------------------------------------------------- where it is
@pytest.mark.parametrize(("family", "variant"), [(f.name, v) for f in architectures().values() for v in f.variants])
@torch.no_grad()
def test_a_model_that_lies_on_gpu_and_cpu(small, random_ids, family, variant, tmp_path):
    """Forward pass with padding, and generation from the cache."""
    mixers = architectures()[family].variants[variant].get("mixer_types")
    layers = {"num_hidden_layers": 6} | ({"mixer_types": 3 * mixers} if mixers else {})
    model, inputs = small(family, variant=variant, **layers), padded(random_ids(2, 24))
    model.save_pretrained(tmp_path)
    total = sum(p.nbytes for p in model.parameters())
    split = AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map="auto", max_memory={0: int(0.7 * total), "cpu": 2**30}
    )
    assert {"0", "cpu"} == set(map(str, split.hf_device_map.values()))
    real = inputs["attention_mask"].bool()
    assert_near(split(**inputs).logits.cpu()[real], model(**inputs).logits[real], 1e-4)
    generated = split.generate(**moved(inputs, split.device), max_new_tokens=8, do_sample=False)
    assert generated.shape == (2, 32)
    again = split(input_ids=generated[:1]).logits[0, 23:-1]  # the row without padding
    chosen = again.gather(1, generated[0, 24:, None].to(again.device))[:, 0]
    assert_near(chosen, again.max(1).values, 1e-4)  # greedy, up to rounding


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_on_the_gpu_and_loaded_on_the_cpu(small, random_ids, family, device, tmp_path):
    model, ids = small(family), random_ids(2, 20)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        model.to(device).save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert loaded.device.type == "cpu"
        assert_near(loaded(input_ids=ids).logits, expected, 1e-6)
        back = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": device.type})
        assert back.device.type == device.type
        assert_near(back(input_ids=ids.to(device)).logits, expected, 1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pipeline_on_the_gpu(small, family, device):
    tokenizer = character_tokenizer(["the wave binds a key "])
    model = small(family, vocab_size=len(tokenizer))
    speaker = pipeline("text-generation", model=model, tokenizer=tokenizer, device=device)
    (first,), (second,) = speaker(["the wave", "a key"], max_new_tokens=5, do_sample=False, batch_size=2)
    assert model.device.type == device.type
    assert first["generated_text"].startswith("the wave") and second["generated_text"].startswith("a key")


# ---------------------------------------------------------------------------------------------- surgery
def llama() -> LlamaForCausalLM:
    """In float64 and evaluation mode, with weights large and uneven enough that layers and directions differ."""
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {"vocab_size": 80, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **special, num_attention_heads=4, num_key_value_heads=2))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5 * torch.rand(parameter.shape[-1]) ** 2)
    return model.double().eval()


def holographic_layers(model: nn.Module) -> list[HoloLinear]:
    return [module for module in model.modules() if isinstance(module, HoloLinear)]


@pytest.mark.parametrize("options", [{}, {"basis": "dct", "folded": True, "shared": True}], ids=["random", "dct"])
@torch.no_grad()
def test_surgery_on_the_gpu_is_as_on_the_cpu(random_ids, options, device, tmp_path):
    ids, config = random_ids(2, 20), HoloSurgeryConfig(harmonics=8, **options)
    on_cpu, on_gpu = llama(), llama().to(device)
    for model in (on_cpu, on_gpu):
        apply_surgery(model, config)
    assert on_gpu.config.quantization_config.checksum == on_cpu.config.quantization_config.checksum is not None
    assert all(x.device.type == device.type for x in (*on_gpu.parameters(), *on_gpu.buffers()))
    expected = on_cpu(input_ids=ids).logits
    assert_near(on_gpu(input_ids=ids.to(device)).logits, expected, 1e-5)  # Llama normalises in float32
    on_gpu.save_pretrained(tmp_path)
    for where in ("cpu", device.type):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, device_map={"": where})
        assert_near(loaded(input_ids=ids.to(where)).logits, expected, 1e-5)
    restore_linears(on_gpu)
    assert not holographic_layers(on_gpu)
    assert_near(on_gpu(input_ids=ids.to(device)).logits, expected, 1e-5)


def test_bases_are_the_same_wherever_the_model_goes(device):
    model = llama()
    apply_surgery(model, HoloSurgeryConfig(harmonics=8))
    bases = [layer.basis.matrix().clone() for layer in holographic_layers(model)]
    for stage in (model.to(device), model.half(), model.double(), model.cpu(), model.to(device)):
        assert checksum_of_bases(stage) == model.config.quantization_config.checksum
    for layer, basis in zip(holographic_layers(model), bases, strict=True):
        assert layer.basis.matrix().device.type == device.type
        torch.testing.assert_close(layer.basis.matrix().cpu(), basis, rtol=0, atol=0)


@torch.no_grad()
def test_merging_on_the_gpu(random_ids, device):
    model, ids = llama().to(device), random_ids(2, 20).to(device)
    apply_surgery(model, HoloSurgeryConfig(harmonics=8))
    expected = model(input_ids=ids).logits
    for layer in holographic_layers(model):
        layer.merge()
        assert layer.merged.device.type == device.type
    assert_near(model(input_ids=ids).logits, expected, 1e-5)


def windows(count: int) -> torch.Tensor:
    return torch.randint(3, 80, (count, 32), generator=torch.Generator().manual_seed(0))


def calibrated(model: LlamaForCausalLM, refitted: bool) -> list[int | None]:
    """Convert in place to 60 % of the values, as `hf-holo convert --method calibrated` does; returns the ranks."""
    sites = find_sites(model, HoloSurgeryConfig(shared=True))
    statistics = collect(model, sites, windows(24), windows(4))
    factors = [factorise(site, stacked_weight(model, site), s) for site, s in zip(sites, statistics, strict=True)]
    ranks = allocate(sites, [f.loss for f in factors], 0.6)
    if refitted:
        refit(model, sites, ranks, [s.fisher for s in statistics], windows(24))
    else:
        for site, numbers, rank in zip(sites, factors, ranks, strict=True):
            if rank is not None:
                install(model, site, numbers, rank)
    return ranks


@pytest.mark.parametrize("refitted", [False, True], ids=["plain", "refitted"])
@torch.no_grad()
def test_calibrated_conversion_is_as_on_the_cpu(refitted, device):
    on_cpu, on_gpu = llama(), llama().to(device)
    assert calibrated(on_gpu, refitted) == calibrated(on_cpu, refitted)
    assert holographic_layers(on_gpu)
    assert all(x.device.type == device.type for x in (*on_gpu.parameters(), *on_gpu.buffers()))
    ids = windows(2)
    assert_near(on_gpu(input_ids=ids.to(device)).logits, on_cpu(input_ids=ids).logits, 1e-3)


def test_whitened_adamw_is_as_on_the_cpu(device):
    """Five steps on the coefficients of a converted model towards its teacher."""
    teacher, ended, losses = llama(), {}, []
    for where in ("cpu", device.type):
        student, ids = llama(), windows(8)
        calibrated(student, refitted=False)
        student.requires_grad_(False).to(where)
        for layer in holographic_layers(student):
            layer.coefficients.requires_grad_(True)
        optimizer = WhitenedAdamW(feature_grams(student, ids), lr=1e-3)
        wanted = teacher(input_ids=ids).logits.detach().to(where).softmax(-1)
        for _ in range(5):
            loss = F.cross_entropy(student(input_ids=ids.to(where)).logits.flatten(0, 1), wanted.flatten(0, 1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        ended[where] = [layer.coefficients.detach().cpu() for layer in holographic_layers(student)]
    assert losses[4] < losses[0] and losses[9] < losses[5]
    for got, expected in zip(ended[device.type], ended["cpu"], strict=True):
        assert_near(got, expected, 1e-3)


# ---------------------------------------------------------------------------------------------- losses and memory
@each([s for s in COMMON if "LM" in s.model_class.__name__])
def test_losses_are_as_on_the_cpu(subject, device):
    """In training, where large vocabularies have their loss computed in pieces."""
    found = []
    for where in ("cpu", device.type):
        model, ids = subject.copy().to(where).train(), subject.ids(2, 40).to(where)
        labels = ids.clone()
        labels[0, :10] = -100
        torch.manual_seed(0)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        found.append((loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (expected, wanted), (got, gradients) = found
    assert_near(got, expected, 1e-6)  # the loss is computed in float32
    largest = max(gradient.abs().max() for gradient in wanted.values())
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name].cpu(), gradient, rtol=0, atol=1e-6 * largest)


def test_a_holographic_memory_is_as_on_the_cpu(device):
    generator = torch.Generator().manual_seed(0)
    memory = HolographicMemory(256)
    keys, angles = (6.28 * torch.rand(n, 256, generator=generator, dtype=torch.float64) for n in (20, 50))
    stored = torch.randint(50, (20,), generator=generator)
    found = []
    for where in ("cpu", device):
        phases, codebook = keys.detach().to(where).requires_grad_(), phasors(angles).to(where)
        state = memory.write(memory.empty(dtype=torch.float64, device=where), phases, codebook[stored.to(where)])
        recalled = memory.recall(memory.decay(state, 0.9), phases, codebook, phases.new_full((20,), 0.9))
        F.nll_loss(recalled, stored.to(where)).backward()
        found.append((state.detach(), memory.read(state, phases).detach(), recalled.detach(), phases.grad))
        assert torch.equal(recalled.argmax(-1).cpu(), stored)
    for got, expected in zip(found[1], found[0], strict=True):
        assert got.device.type == device.type
        assert_near(got, expected, 1e-8)


@pytest.mark.parametrize("family", ["hsn", "resonance"])
@torch.no_grad()
def test_memory_grows_linearly(small, family, device):
    model = small(family, hidden_size=128).to(device)
    peaks = []
    for length in (2**15, 2**16):
        ids = torch.ones(1, length, dtype=torch.long, device=device)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        assert model(input_ids=ids, logits_to_keep=1).logits.isfinite().all()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] <= 2.3 * peaks[0]
