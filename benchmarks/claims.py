"""Claims of the three reference projects that a short measurement or a count can judge, and the ledger of all of them.

    python benchmarks/claims.py

The larger claims are judged by the results of the other benchmarks; `common/ledger.py` has every claim with its rule.
Afterwards docs/claims.md is written from all results. `--ledger_only` measures nothing.
"""

import argparse
import copy
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from common.characters import CharacterText, windowed_loss
from common.contenders import small_llama
from common.fitting import Fit, fit
from common.ledger import PAGE, PROJECTS, verdicts, write_page
from common.report import RESULTS, interleaved_medians, print_footer, print_table, write_report
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Phi3Config, Phi3ForCausalLM, PreTrainedModel

from hf_holo import (
    HoloConfig,
    HoloForCausalLM,
    HolographicMemory,
    HolographicMixer,
    HoloLinear,
    HsnConfig,
    LiteChannelMix,
    preset_model,
)
from hf_holo.data.documents import python_help
from hf_holo.eval.cost import LiveBytes
from hf_holo.eval.scope import compare
from hf_holo.modeling.memory import phasors

NAME = "claims"
HSN_VOCABULARY = 32_000
LAYERS = {"784 to 256": (784, 256), "512 to 2048": (512, 2048), "4096 to 4096": (4096, 4096)}
HARMONICS = 32
# Milliseconds by tokens, from the table of the Resonance reference's README.
SCALING = {64: 12.3, 128: 26.1, 256: 54.8, 512: 115.2, 1024: 241.5}
LONG = 262_144


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def hsn_sizes() -> dict[str, dict[str, int]]:
    """For each preset: parameters with HoloSpectralNet's vocabulary, in the embedding, and in all else."""
    sizes = {}
    for name in ("tiny", "small", "base"):
        with torch.device("meta"):
            model = preset_model(f"hsn-{name}", vocab_size=HSN_VOCABULARY)
        embedding = parameters(model.get_input_embeddings())
        sizes[name] = {"all": parameters(model), "embedding": embedding, "rest": parameters(model) - embedding}
    return sizes


def hsn_layers(width: int = 256, rank: int = 32) -> dict[str, float]:
    """Parameters of the mixer with static binding, by the width; of the channel mix, by 2 · width · rank + width."""
    config = HsnConfig(vocab_size=65, hidden_size=width, binding="static", gate_placement="sublayer")
    mix = 2 * width * rank + width
    return {
        "mixer_by_width": parameters(HolographicMixer(config)) / width,
        "mix": parameters(LiteChannelMix(width, rank)) / mix,
    }


def decay_matrix(lengths: Sequence[int] = (1024, 2048, 4096), width: int = 128) -> dict[str, float]:
    """An exponential moving average through a matrix [T, T], as HoloSpectralNet's reference code computes it: by what
    power of the length its time grows, and the bytes that are alive at the longest."""

    def average(x: torch.Tensor) -> torch.Tensor:
        times = torch.arange(len(x), dtype=torch.float32)
        apart = times[:, None] - times  # [T, T]
        return (0.9 ** apart.clamp(min=0) * (apart >= 0)) @ x

    inputs = {str(n): torch.randn(n, width) for n in lengths}
    medians = interleaved_medians({n: lambda x=x: average(x) for n, x in inputs.items()}, 5)
    with LiveBytes() as live:
        average(inputs[str(lengths[-1])])
    power = math.log(medians[str(lengths[-1])] / medians[str(lengths[0])], lengths[-1] / lengths[0])
    return {"power": power, "tokens": lengths[-1], "peak_mib": live.peak / 2**20}


def holo_layers() -> dict[str, dict[str, int]]:
    """Weights of a dense layer, and of a HoloLinear in its place: amplitudes and phases, or one of the two."""
    rows = {}
    for name, (inputs, outputs) in LAYERS.items():
        trained = HoloLinear(inputs, outputs, HARMONICS, bias=False).count_numbers()["trained"]
        rows[name] = {"dense": inputs * outputs, "trained": trained, "amplitudes": outputs * HARMONICS}
    return rows


def phi3(harmonics: int = 64) -> dict[str, float]:
    """Phi-3-mini with every linear layer of its blocks holographic: parameters, and bytes in float32 with the bases."""
    with torch.device("meta"):
        model = Phi3ForCausalLM(Phi3Config())
    linears = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    dense = parameters(model)
    holo = dense - sum(m.weight.numel() for m in linears) + sum(2 * m.out_features * harmonics for m in linears)
    bases = sum(m.in_features * harmonics for m in linears)
    return {"dense": dense, "holo": holo, "fewer": 1 - holo / dense, "less_memory": 1 - (holo + bases) / dense}


def materialised(width: int = 512, harmonics: int = 64, tokens: int = 64) -> dict[str, float]:
    """Times of HoloLinear relative to nn.Linear: as two thin products, and through [tokens, out, harmonics]."""
    dense, holo = nn.Linear(width, width), HoloLinear(width, width, harmonics)
    x = torch.randn(tokens, width)

    @torch.no_grad()
    def through_all() -> torch.Tensor:
        resonance = nn.functional.linear(x, holo.basis.matrix())  # [tokens, harmonics]
        return (holo.amplitude * holo.phase.cos() * resonance[:, None]).sum(-1) + holo.bias

    with torch.no_grad():
        torch.testing.assert_close(through_all(), holo(x), rtol=1e-3, atol=1e-3)
        medians = interleaved_medians(
            {"dense": lambda: dense(x), "thin": lambda: holo(x), "materialised": through_all}, 15
        )
    return {name: medians[name] / medians["dense"] for name in ("thin", "materialised")}


def spirals() -> dict[str, float]:
    """Share of unseen points of two spirals, by network, as `hf-holo scope` learns them."""
    return {view.network.replace(", ", "_"): view.accuracy for view in compare()}


def theorem_1() -> dict[str, float]:
    """The gradients that Theorem 1 of the Resonance reference states, against autograd: the smallest largest error,
    relative, over what ∂L/∂w may mean (the gradient, its conjugate, and Wirtinger's halves of both)."""
    generator = torch.Generator().manual_seed(0)
    size, angle = torch.rand(64, generator=generator).double() + 0.5, 6 * torch.rand(64, generator=generator).double()
    size, angle = size.requires_grad_(), angle.requires_grad_()
    w = torch.polar(size, angle)
    w.retain_grad()
    target = torch.randn(64, dtype=torch.complex128, generator=generator)
    (w - target).abs().pow(3).sum().backward()
    meanings = [factor * g for g in (w.grad, w.grad.conj()) for factor in (1.0, 0.5)]
    w = w.detach()
    stated = {
        "magnitude": lambda g: (g * w / w.abs()).real,
        "phase": lambda g: (g * (-1j * w) / w.abs()).imag,
    }
    true = {"magnitude": size.grad, "phase": angle.grad}
    return {
        name: min(((formula(g) - true[name]).abs().max() / true[name].abs().max()).item() for g in meanings)
        for name, formula in stated.items()
    }


def frequencies_kept(tokens: int = 512, kept: int = 64) -> dict[str, float]:
    """Rank of a layer that keeps some frequencies with random complex weights, by the rank that loses nothing."""
    torch.manual_seed(0)

    def rank(count: int) -> float:
        weights = torch.zeros(tokens // 2 + 1, dtype=torch.complex128)
        weights[:count] = torch.randn(count, dtype=torch.complex128)
        response = torch.fft.irfft(torch.fft.rfft(torch.eye(tokens, dtype=torch.float64)) * weights, n=tokens)
        return torch.linalg.matrix_rank(response).item() / tokens

    return {"some": rank(kept), "all": rank(tokens // 2 + 1), "kept": kept, "tokens": tokens}


def whole_fft(tokens: int = 64) -> dict[str, float]:
    """Of the influence on the outputs of an FFT layer over a whole text, the share that comes from later tokens."""
    torch.manual_seed(0)
    weights = torch.randn(tokens // 2 + 1, dtype=torch.complex128)
    response = torch.fft.irfft(torch.fft.rfft(torch.eye(tokens, dtype=torch.float64)) * weights, n=tokens)  # [in, out]
    energy = response.square()
    return {"from_later": (energy.tril(-1).sum() / energy.sum()).item()}


def determination() -> dict[str, float]:
    """R² of the reference's own table of times, as a + b f(n), for three functions f."""
    n, ms = (torch.tensor(list(values), dtype=torch.float64) for values in (SCALING, SCALING.values()))
    curves = {"n": n, "n_log_n": n * n.log(), "n_squared": n**2}
    return {name: torch.corrcoef(torch.stack([f, ms]))[0, 1].square().item() for name, f in curves.items()}


def patterns(dimension: int = 512, count: int = 250) -> dict[str, float]:
    """Relative error of random patterns read back from a memory that holds that many, without a codebook."""
    generator = torch.Generator().manual_seed(0)
    memory = HolographicMemory(dimension)
    keys = 2 * math.pi * torch.rand(count, dimension, generator=generator)
    values = phasors(2 * math.pi * torch.rand(count, dimension, generator=generator))
    read = memory.read(memory.write(memory.empty(), keys, values), keys)
    return {"error": ((read - values).norm(dim=-1) / values.norm(dim=-1)).mean().item()}


def long_tensors(width: int = 768, features: int = 256) -> dict[str, float]:
    """GiB in float32 at 262,144 tokens: positions [T, 256, width], which the reference allocates; the scores [T, T] of
    one head of attention; keys and values of 12 layers, which is all that attention without stored scores needs."""
    gib = 4 / 2**30
    return {
        "positions": LONG * features * width * gib,
        "scores": LONG**2 * gib,
        "keys_and_values": 2 * 12 * LONG * width * gib,
    }


def prose() -> CharacterText:
    """The help of Python, character by character."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "text.txt")
        path.write_text("".join(python_help()), encoding="utf-8")
        return CharacterText(path)


def learned(model: PreTrainedModel, text: CharacterText, how: Fit) -> float:
    """Nats per character of the validation part's beginning, after training."""
    fit(model, text, how)
    return windowed_loss(model, text.validation[:20_001], 128)


def bases(text: CharacterText, steps: int) -> dict[str, float]:
    """Loss of a HOLO model of 16 harmonics, by the basis."""
    how, losses = Fit(0.016, "adamw", steps=steps, rows=8, length=128), {}
    for basis in ("golden", "random", "dct"):
        torch.manual_seed(0)
        sizes = {"vocab_size": text.vocab_size, "hidden_size": 96, "num_hidden_layers": 2, "harmonics": 16}
        losses[basis] = learned(HoloForCausalLM(HoloConfig(**sizes, basis=basis)), text, how)
    return losses


def fewer_parameters(text: CharacterText, steps: int) -> dict[str, dict[str, float]]:
    """Loss of a Llama and of our families with about a fifth of its parameters, after the same steps on one text."""
    torch.manual_seed(0)
    models: dict[str, PreTrainedModel] = {"llama": small_llama(text.vocab_size, 96, 3, 256)}
    for family in ("hsn", "resonance"):
        models[family] = _near(family, text.vocab_size, parameters(models["llama"]) / 5)
    how = Fit(0.004, "adamw", steps=steps, rows=8, length=128)
    shorter = learned(copy.deepcopy(models["llama"]), text, replace(how, steps=steps // 2))
    found = {
        name: {"parameters": parameters(model), "loss": learned(model, text, how)} for name, model in models.items()
    }
    found["llama"]["still_learning"] = shorter - found["llama"]["loss"]  # what the second half of the steps gave it
    return found


def _near(family: str, vocab_size: int, wanted: float) -> PreTrainedModel:
    """The model of two layers whose width brings it closest to this many parameters."""

    def config(width: int):
        return AutoConfig.for_model(family, vocab_size=vocab_size, hidden_size=width, num_hidden_layers=2)

    def size(width: int) -> int:
        with torch.device("meta"):
            return parameters(AutoModelForCausalLM.from_config(config(width)))

    width = min(range(16, 129, 16), key=lambda w: abs(size(w) - wanted))
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(width))


MEASUREMENTS: Mapping[str, Callable[[], object]] = {
    "hsn_sizes": hsn_sizes,
    "hsn_layers": hsn_layers,
    "decay_matrix": decay_matrix,
    "holo_layers": holo_layers,
    "phi3": phi3,
    "materialised": materialised,
    "spirals": spirals,
    "theorem_1": theorem_1,
    "frequencies_kept": frequencies_kept,
    "whole_fft": whole_fft,
    "determination": determination,
    "patterns": patterns,
    "long_tensors": long_tensors,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="of training, for the claims about fewer parameters")
    parser.add_argument("--ledger_only", action="store_true", help="measure nothing, write the page")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page that is written")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args(argv)

    if not args.ledger_only:
        start = time.perf_counter()
        figures: dict[str, object] = {"settings": {"steps": args.steps}}
        for name, measure in MEASUREMENTS.items():
            print(name, flush=True)
            figures[name] = measure()
        text = prose()
        figures["bases"] = bases(text, args.steps)
        figures["fewer_parameters"] = fewer_parameters(text, args.steps)
        seconds = time.perf_counter() - start
        print_footer(write_report(NAME, figures, seed=0, seconds=seconds, folder=args.results), seconds)
    print_table([{"claim": claim, "verdict": verdict} for claim, verdict in verdicts(args.results).items()])
    write_page(args.results, args.page)
    print(f"written to {args.page}")


def sentence(result: dict) -> str:
    small = result["figures"]["fewer_parameters"]
    losses = ", ".join(f"{name} {row['loss']:.2f} with {row['parameters']:,} parameters" for name, row in small.items())
    steps = result["figures"]["settings"]["steps"]
    return (
        f"{len(MEASUREMENTS)} counts and short measurements for the ledger of claims of {len(PROJECTS)} projects; nats "
        f"per character after {steps} steps: {losses}; one seed"
    )


if __name__ == "__main__":
    main()
