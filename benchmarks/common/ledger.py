"""The ledger: headline claims of three projects, and the verdict on each, by a rule, from the results in `results/`.

A rule is a condition on figures that are read from result files; it is shown in the table as it is computed.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

from hf_holo.eval.markdown import filled
from hf_holo.files import write_text

from .claim import CONDITIONS, FALSE, MISSING, TRUE, UNTESTABLE, Claim, Figures, Results
from .report import BENCHMARKS, RESULTS, best_runs, markdown_table

PAGE = BENCHMARKS.parent / "docs" / "claims.md"
PROJECTS = ("holospectralnet", "holo", "resonance")


def _row(rows: list[dict], **wanted: object) -> dict:
    """The first of the rows that has these values."""
    for row in rows:
        if wanted.items() <= row.items():
            return row
    raise KeyError(f"no row has {wanted}")


def _best(rows: list[dict], **wanted: object) -> dict:
    """Of the rows that have these values, the one with the lowest loss."""
    return min((row for row in rows if wanted.items() <= row.items()), key=lambda row: row["loss"])


HSN = "[HoloSpectralNet's](https://github.com/s3nh/s3nh-holospectral-net) README"
HSN_CODE = "[HoloSpectralNet's](https://github.com/s3nh/s3nh-holospectral-net) `layers.py`"
HSN_NOTES = "[HoloSpectralNet's](https://github.com/s3nh/s3nh-holospectral-net) `todos.md`"
HOLO = "[HOLO-PyTorch's](https://github.com/anttiluode/HOLO-pytorch) README"
RESONANCE, RESONANCE_2 = "the Resonance reference, README", "the Resonance reference, page of V2 features"


# What the claims speak of -------------------------------------------------------------------------------------------
def _preset(name: str, claimed: int) -> Callable[[Results], Figures]:
    def figures(result: Results) -> Figures:
        sizes = result("claims")["hsn_sizes"][name]
        return {
            **sizes,
            "claimed": claimed,
            "of_claimed": sizes["all"] / claimed,
            "rest_of_claimed": sizes["rest"] / claimed,
        }

    return figures


def _layer(name: str, claimed: int) -> Callable[[Results], Figures]:
    def figures(result: Results) -> Figures:
        row = result("claims")["holo_layers"][name]
        return {**row, "claimed": claimed, "times": row["dense"] / row["trained"]}

    return figures


def _pairs(result: Results) -> Figures:
    run = _row(best_runs(result("pair_recall")["runs"], ("model",), lambda run: run["near"]), model="hsn")
    return {"near": run["near"], "far": run["far"]}


def _gate(result: Results) -> Figures:
    circular = _row(result("leaking_gate")["models"], gate="circular")
    return {
        "lookahead": circular["lookahead"],
        "whole": circular["teacher_forced"],
        "past": circular["prefix_only"],
        "gap": circular["prefix_only"] - circular["teacher_forced"],
    }


def _fewer(family: str) -> Callable[[Results], Figures]:
    def figures(result: Results) -> Figures:
        rows = result("claims")["fewer_parameters"]
        ours, llama = rows[family], rows["llama"]
        return {
            "times_fewer": llama["parameters"] / ours["parameters"],
            "loss": ours["loss"],
            "llama": llama["loss"],
            "behind": ours["loss"] - llama["loss"],
            "still_learning": llama["still_learning"],
        }

    return figures


def _linear_time(result: Results) -> Figures:
    matrix, ours = result("claims")["decay_matrix"], result("static_speed")["rows"][-1]
    growth = ours["times_time"] / ours["times_tokens"]
    return {"power": matrix["power"], "mib": matrix["peak_mib"], "tokens": matrix["tokens"], "growth": growth}


def _expressive(result: Results) -> Figures:
    runs = result("holo_curve")["runs"]
    dense = _best(runs, basis="dense")
    holo = [run for run in runs if run["basis"] != "dense"]
    equal = [run for run in holo if run["loss"] <= dense["loss"] + 0.02]
    tenth = [run for run in holo if run["block_parameters"] * 9 <= dense["block_parameters"]]
    return {
        "times": max((dense["block_parameters"] / run["block_parameters"] for run in equal), default=0.0),
        "lost": min(run["loss"] for run in tenth) - dense["loss"],
    }


def _converted(result: Results) -> Figures:
    rows, key = result("surgery")["rows"], "wikitext2-valid.txt, ratio"
    random, calibrated = (_row(rows, method=m, scope="all", ratio=0.8)[key] for m in ("random basis", "calibrated"))
    return {"random": random, "calibrated": calibrated}


def _distilled(result: Results) -> Figures:
    row = _row(result("distillation")["rows"], method="calibrated", scope="all", ratio=0.8)
    return {"before": row["wikitext2-valid.txt, ratio before"], "after": row["wikitext2-valid.txt, ratio"]}


def _holo_speed(result: Results) -> Figures:
    large = _row(result("holo_speed")["layers"], layer="amplitude, phase", threads=1)
    small = result("claims")["materialised"]
    return {"large": 1 / large["times_quicker"], "thin": small["thin"], "materialised": small["materialised"]}


def _long_memory(result: Results) -> Figures:
    positions = result("claims")["long_tensors"]["positions"]
    return {"ours": result("long_context")["reading"]["peak_gib"], "positions": positions}


def _hash(result: Results) -> Figures:
    found = result("vocabulary")
    return {"times": found["large_step"]["compression"], "lost": _row(found["runs"], strategy="hash")["excess"]}


def _frequency(result: Results) -> Figures:
    row = _row(result("vocabulary")["runs"], strategy="frequency_compressed")
    return {"times": row["compression"], "lost": row["excess"]}


def _gradients(result: Results) -> Figures:
    rows = result("gradient_norms")["rows"]
    ours, plain = (_row(rows, weights=kind) for kind in ("magnitude and phase", "real and imaginary"))
    over = ("varies_over_depth", "varies_over_length")
    return {"ours": max(ours[name] for name in over), "plain": max(plain[name] for name in over)}


def _bits(points: list[dict], dimension: int, good: float = 0.95) -> tuple[float, int]:
    """Bits of 1,000 codes in the most pairs of which nearly all are recalled one-shot, and that number of pairs."""
    pairs = max(p["pairs"] for p in points if p["dimension"] == dimension and p["one_shot"] >= good)
    return pairs * math.log2(1000), pairs


def _capacity(result: Results) -> Figures:
    """Against C = A log2(1 + SNR) for each pair, with λ = 1, A the phasors and the crosstalk of the others as noise."""
    points, shares = result("memory_recall")["points"], []
    for dimension in dict.fromkeys(point["dimension"] for point in points):
        bits, pairs = _bits(points, dimension)
        shares.append(bits / (pairs * dimension * math.log2(1 + 1 / max(1, pairs - 1))))
    return {"least": min(shares), "most": max(shares)}


def _sixteenfold(result: Results) -> Figures:
    points = result("memory_recall")["points"]
    small, large = (_bits(points, dimension)[0] for dimension in (512, 2048))
    return {"small": small, "large": large, "fold": large / small}


def _missing(result: Results) -> Figures:
    """Of the model that binds all senses: shares that are right with all, with one missing, and with one alone."""
    runs = [run for run in result("multimodal_digit")["runs"] if run["fusion"] == "binding"]
    most = max(run["senses"].count("+") for run in runs)
    right = max(
        (run["right"] for run in runs if run["senses"].count("+") == most), key=lambda shares: sum(shares.values())
    )
    by_count = [[share for senses, share in right.items() if senses.count("+") == count] for count in range(most + 1)]
    return {"whole": max(by_count[most]), "one_missing": min(by_count[most - 1]), "alone": min(by_count[0])}


CLAIMS: Mapping[str, Claim] = {
    "hsn-tiny": Claim(
        "holospectralnet",
        "`hsn_tiny` has about 400 K parameters with 32,000 tokens.",
        f"{HSN}, Model Configurations",
        ("claims",),
        _preset("tiny", 400_000),
        "{all:,} in all; the embedding alone has {embedding:,}, all else {rest:,}",
        "of_claimed <= 1.3",
        "rest_of_claimed <= 1.3",
        "without the embedding",
    ),
    "hsn-small": Claim(
        "holospectralnet",
        "`hsn_small` has about 1.5 M parameters with 32,000 tokens.",
        f"{HSN}, Model Configurations",
        ("claims",),
        _preset("small", 1_500_000),
        "{all:,} in all; the embedding alone has {embedding:,}, all else {rest:,}",
        "of_claimed <= 1.3",
        "rest_of_claimed <= 1.3",
        "without the embedding",
    ),
    "hsn-base": Claim(
        "holospectralnet",
        "`hsn_base` has about 8 M parameters with 32,000 tokens.",
        f"{HSN}, Model Configurations",
        ("claims",),
        _preset("base", 8_000_000),
        "{all:,} in all; the embedding alone has {embedding:,}, all else {rest:,}",
        "of_claimed <= 1.3",
        "rest_of_claimed <= 1.3",
        "without the embedding",
    ),
    "hsn-mixer": Claim(
        "holospectralnet",
        "The holographic mixer has about 2 · width parameters.",
        f"{HSN}, Core Components",
        ("claims",),
        lambda result: {"by_width": result("claims")["hsn_layers"]["mixer_by_width"]},
        "{by_width:.2f} · width, with static binding and its norm, decay and gate",
        "by_width <= 2.5",
        "by_width <= 8",
        "with a few vectors more",
    ),
    "hsn-channel-mix": Claim(
        "holospectralnet",
        "The channel mix has 2 · width · rank + width parameters.",
        f"{HSN}, Core Components",
        ("claims",),
        lambda result: {"of_claimed": result("claims")["hsn_layers"]["mix"]},
        "{of_claimed:.3f} times that",
        "abs(of_claimed - 1) <= 0.01",
    ),
    "hsn-linear": Claim(
        "holospectralnet",
        "Tokens are mixed in about linear time.",
        f"{HSN}, Why No Attention",
        ("claims", "static_speed"),
        _linear_time,
        "through the matrix of the reference code time grows with the power {power:.2f} of the length and "
        "{mib:,.0f} MiB are alive at {tokens:,} tokens; by a scan, a token takes {growth:.2f} times as long in a text "
        "four times as long",
        "power <= 1.3",
        "growth <= 1.3",
        "by a scan, not as that code computes it",
    ),
    "hsn-causal": Claim(
        "holospectralnet",
        "The spectral gate is causal because its FFT is taken in chunks.",
        f"{HSN_CODE}, `SpectralGate`",
        ("leaking_gate",),
        _gate,
        "a model with that gate looks {lookahead} tokens ahead",
        "lookahead == 0",
    ),
    "hsn-muon": Claim(
        "holospectralnet",
        "The loss falls to 0 without sensible output because of the optimizer, Muon.",
        HSN_NOTES,
        ("leaking_gate",),
        _gate,
        "with AdamW as well: {whole:.2f} nats with the whole window in view, {past:.2f} with only the past",
        "gap <= 0.5",
    ),
    "hsn-fewer": Claim(
        "holospectralnet",
        "It has 5 to 10 times fewer parameters than a transformer and stays as expressive.",
        f"{HSN}, Parameter Comparison",
        ("claims",),
        _fewer("hsn"),
        "with {times_fewer:.1f} times fewer parameters {loss:.2f} nats, a Llama {llama:.2f} (one seed, few steps)",
        "times_fewer >= 4 and behind <= 0.02 and still_learning <= 0.02",
        "times_fewer >= 4 and behind <= 0.02",
        "early in training, while the transformer still learns",
    ),
    "hsn-composition": Claim(
        "holospectralnet",
        "Binding and unbinding compose meanings without attention.",
        f"{HSN}, Why No Attention",
        ("pair_recall",),
        _pairs,
        "of 8 bound pairs it recalls {near:.1%} at the distance of training, {far:.1%} at 16 times that",
        "near >= 0.9 and far >= 0.9",
        "near >= 0.9",
        "with phases that the tokens decide on, and not far beyond what was trained",
    ),
    "holo-784": Claim(
        "holo",
        "784→256 with 32 harmonics has 8,192 parameters, 24.5 times fewer.",
        f"{HOLO}, Compression Results",
        ("claims",),
        _layer("784 to 256", 8_192),
        "amplitudes and phases are {trained:,}, {times:.1f} times fewer; one of the two is {amplitudes:,}",
        "abs(trained / claimed - 1) <= 0.02",
        "abs(amplitudes / claimed - 1) <= 0.02",
        "counting one of amplitudes and phases, as when they are folded for inference",
    ),
    "holo-2048": Claim(
        "holo",
        "512→2048 with 32 harmonics has 49,152 parameters, 21.3 times fewer.",
        f"{HOLO}, Compression Results",
        ("claims",),
        _layer("512 to 2048", 49_152),
        "amplitudes and phases are {trained:,}, {times:.1f} times fewer; one of the two is {amplitudes:,}",
        "abs(trained / claimed - 1) <= 0.02",
        "abs(amplitudes / claimed - 1) <= 0.02",
        "counting one of amplitudes and phases",
    ),
    "holo-4096": Claim(
        "holo",
        "4096→4096 with 32 harmonics has 262,144 parameters, 64 times fewer.",
        f"{HOLO}, Compression Results",
        ("claims",),
        _layer("4096 to 4096", 262_144),
        "amplitudes and phases are {trained:,}, {times:.1f} times fewer",
        "abs(trained / claimed - 1) <= 0.02",
    ),
    "holo-expressive": Claim(
        "holo",
        "10 to 90 times fewer parameters keep the expressiveness.",
        f"{HOLO}, Core Concept and Performance Notes",
        ("holo_curve",),
        _expressive,
        "within 0.02 nats of dense layers it takes {times:.2f} times fewer parameters; with about a tenth, {lost:.2f} "
        "nats are lost (one seed)",
        "times >= 10",
        "times >= 2",
        "with less compression",
    ),
    "holo-spiral": Claim(
        "holo",
        "Holographic layers learn the spiral better than ReLU, because they think in waves.",
        f"{HOLO}, Spiral Classification",
        ("claims",),
        lambda result: dict(result("claims")["spirals"]),
        "unseen points: ReLU {ReLU:.1%}, holographic and sines {holographic_sine:.1%}, dense and sines "
        "{dense_sine:.1%} (one seed)",
        "holographic_sine >= ReLU + 0.02 and holographic_sine >= dense_sine + 0.02",
        "holographic_sine >= ReLU + 0.02",
        "it is the sine that does it, dense layers as well",
    ),
    "holo-slower": Claim(
        "holo",
        "Holographic layers are 2 to 3 times slower than dense ones until there are CUDA kernels.",
        f"{HOLO}, Performance Notes",
        ("holo_speed", "claims"),
        _holo_speed,
        "as two thin products {large:.2f} of the time at width 4,096, {thin:.2f} at 512; through a tensor of every "
        "harmonic {materialised:.1f} times the time",
        "large >= 1.5",
        "materialised >= 1.2",
        "through a tensor of every harmonic, as the reference computes them; as two thin products they are not",
    ),
    "holo-phi-parameters": Claim(
        "holo",
        "Phi-3 with all layers holographic has 0.33 B parameters, 91.4 % fewer.",
        f"{HOLO}, The Phi-3 Experiment",
        ("claims",),
        lambda result: {k: result("claims")["phi3"][k] for k in ("holo", "fewer")},
        "{holo:,} with 64 harmonics, {fewer:.1%} fewer",
        "abs(fewer - 0.914) <= 0.005",
    ),
    "holo-phi-memory": Claim(
        "holo",
        "It takes 90 % less memory.",
        f"{HOLO}, The Phi-3 Experiment",
        ("claims",),
        lambda result: {"less": result("claims")["phi3"]["less_memory"]},
        "{less:.1%} less for the weights, bases included",
        "abs(less - 0.9) <= 0.02",
    ),
    "holo-no-conversion": Claim(
        "holo",
        "A pretrained model cannot be converted without training.",
        f"{HOLO}, Why It Failed",
        ("surgery",),
        _converted,
        "80 % of the linear layers of a 135 M Llama kept: perplexity {random:,.0f} times the teacher's with a random "
        "basis, {calibrated:.2f} times with one fitted to activations, untrained",
        "calibrated >= 2",
        "random >= 2",
        "with a random basis",
    ),
    "holo-distillation": Claim(
        "holo",
        "Distillation brings a converted model back.",
        f"{HOLO}, Why It Failed",
        ("distillation",),
        _distilled,
        "perplexity {after:.2f} times the teacher's after 14 minutes, {before:.2f} before (one seed)",
        "after <= 1.05",
        "after < before - 0.01",
        "a part of the way, in minutes",
    ),
    "holo-golden": Claim(
        "holo",
        "The golden ratio is the best choice of frequencies.",
        f"{HOLO}, Theoretical Background",
        ("claims",),
        lambda result: dict(result("claims")["bases"]),
        "nats per character with 16 harmonics: golden {golden:.2f}, random {random:.2f}, cosines {dct:.2f} (one seed, "
        "one learning rate)",
        "golden < min(random, dct) - 0.02",
    ),
    "holo-vae": Claim(
        "holo",
        "An autoencoder with a holographic block reconstructs images.",
        f"{HOLO}, UnitVAE-Holo",
        untestable="it is shown on a webcam, with no data, no figure and nothing to compare with",
    ),
    "resonance-time": Claim(
        "resonance",
        "Time grows as n log n.",
        f"{RESONANCE}, Key Features",
        ("long_context",),
        lambda result: {"growth": result("long_context")["speed"][-1]["relative"]},
        "our Resonance takes {growth:.2f} times as long for a token at 262,144 tokens as at 8,192",
        "growth <= 1.5",
    ),
    "resonance-fit": Claim(
        "resonance",
        "Measured times agree with n log n (R² above 0.95) and not with n² (R² below 0.62).",
        f"{RESONANCE}, Sequence Length Scaling",
        ("claims",),
        lambda result: dict(result("claims")["determination"]),
        "R² of its own table: n log n {n_log_n:.3f}, n {n:.3f}, n² {n_squared:.3f}; five lengths tell little apart",
        "n_log_n > 0.95 and n_squared < 0.62",
    ),
    "resonance-memory": Claim(
        "resonance",
        "262,144 tokens take about 3.5 GB.",
        RESONANCE_2,
        ("long_context", "claims"),
        _long_memory,
        "our Resonance reads them in {ours:.2f} GiB; the reference's tensor of positions would take {positions:,.0f}",
        "ours <= 3.5 and positions <= 3.5",
        "ours <= 3.5",
        "without that tensor, and a small model",
    ),
    "resonance-transformer-memory": Claim(
        "resonance",
        "A transformer takes more than 200 GB for as many.",
        RESONANCE_2,
        ("claims",),
        lambda result: {k: result("claims")["long_tensors"][k] for k in ("scores", "keys_and_values")},
        "scores of a head {scores:,.0f} GiB; keys and values of 12 layers of width 768 {keys_and_values:,.0f} GiB",
        "keys_and_values >= 200",
        "scores >= 200",
        "if it stores its scores, as transformers' usual attention does not",
    ),
    "resonance-hash": Claim(
        "resonance",
        "A hashed vocabulary of a million tokens has about 50 times fewer parameters.",
        f"{RESONANCE_2}, Large Vocabulary Support",
        ("vocabulary",),
        _hash,
        "{times:.0f} times fewer; at 32,768 tokens a hashed one loses {lost:.2f} nats (one seed)",
        "times >= 45 and lost <= 0.05",
        "times >= 10",
        "fewer by less, and it costs loss",
    ),
    "resonance-frequency": Claim(
        "resonance",
        "A vocabulary stored in about √V rows works.",
        f"{RESONANCE_2}, Large Vocabulary Support",
        ("vocabulary",),
        _frequency,
        "{times:.1f} times fewer parameters, {lost:+.3f} nats (one seed, frequent tokens kept dense)",
        "times >= 5 and lost <= 0.02",
        "times >= 2 and lost <= 0.1",
        "with a loss",
    ),
    "resonance-gradients": Claim(
        "resonance",
        "Weights in magnitude and phase have stable gradients where plain complex weights do not.",
        f"{RESONANCE}, Complex Weight Parameterization",
        ("gradient_norms",),
        _gradients,
        "over depth and length gradients vary by up to {ours:.2f} with magnitude and phase, {plain:.2f} without (two "
        "seeds)",
        "plain >= 2 * ours",
    ),
    "resonance-theorem-1-magnitude": Claim(
        "resonance",
        "Theorem 1: ∂L/∂\\|w\\| = Re(∂L/∂w · w/\\|w\\|).",
        f"{RESONANCE}, Theorem 1",
        ("claims",),
        lambda result: {"error": result("claims")["theorem_1"]["magnitude"]},
        "against autograd, with the best reading of ∂L/∂w, off by {error:.0e}",
        "error <= 1e-6",
    ),
    "resonance-theorem-1-phase": Claim(
        "resonance",
        "Theorem 1: ∂L/∂φ = Im(∂L/∂w · (−iw)/\\|w\\|).",
        f"{RESONANCE}, Theorem 1",
        ("claims",),
        lambda result: {"error": result("claims")["theorem_1"]["phase"]},
        "against autograd, with the best reading of ∂L/∂w, off by {error:.2f}",
        "error <= 1e-6",
    ),
    "resonance-theorem-2": Claim(
        "resonance",
        "Theorem 2: a hologram holds C = (A/λ²) log₂(1 + SNR) bits.",
        f"{RESONANCE}, Theorem 2",
        ("memory_recall",),
        _capacity,
        "with λ = 1 and crosstalk as noise, one-shot recall reaches {least:.0%} to {most:.0%} of it",
        "least >= 0.9 and most <= 1",
        "most <= 1",
        "as an upper bound",
    ),
    "resonance-bits": Claim(
        "resonance",
        "A hologram of 2,048 holds 65,536 bits, 16 times as many as one of 512.",
        f"{RESONANCE}, Holographic Memory Capacity",
        ("memory_recall",),
        _sixteenfold,
        "{large:,.0f} bits one-shot, {fold:.1f} times as many",
        "fold >= 12 and large >= 50000",
    ),
    "resonance-reconstruction": Claim(
        "resonance",
        "250 patterns in a hologram of 512 are reconstructed with an error of 0.04.",
        f"{RESONANCE}, Holographic Memory Capacity",
        ("claims",),
        lambda result: {"error": result("claims")["patterns"]["error"]},
        "random patterns come back with a relative error of {error:.1f}, without a codebook to compare with",
        "error <= 0.05",
    ),
    "resonance-theorem-4": Claim(
        "resonance",
        "Theorem 4: a resonance layer preserves mutual information.",
        f"{RESONANCE}, Theorem 4",
        ("claims",),
        lambda result: dict(result("claims")["frequencies_kept"]),
        "a layer that keeps {kept} frequencies of {tokens} tokens has {some:.0%} of the rank that loses nothing, one "
        "that keeps all {all:.0%}",
        "some >= 0.999",
        "all >= 0.999",
        "if it keeps every frequency, which it is made not to do",
    ),
    "resonance-fewer": Claim(
        "resonance",
        "4 to 6 times fewer parameters than a transformer compete with it.",
        f"{RESONANCE}, Key Features",
        ("claims",),
        _fewer("resonance"),
        "with {times_fewer:.1f} times fewer parameters {loss:.2f} nats, a Llama {llama:.2f} (one seed, few steps)",
        "times_fewer >= 4 and behind <= 0.02 and still_learning <= 0.02",
        "times_fewer >= 4 and behind <= 0.02",
        "early in training, while the transformer still learns",
    ),
    "resonance-text": Claim(
        "resonance",
        "Its layers, an FFT over the whole sequence, make a language model that generates.",
        f"{RESONANCE_2}, Specialized Models",
        ("claims",),
        lambda result: dict(result("claims")["whole_fft"]),
        "{from_later:.0%} of the influence on its outputs comes from later tokens",
        "from_later <= 1e-6",
    ),
    "resonance-throughput": Claim(
        "resonance",
        "It trains 4.5 times and infers 2.1 times as fast as a transformer.",
        f"{RESONANCE}, Performance Benchmarks",
        untestable="neither the task, nor the machine, nor the transformer is named",
    ),
    "resonance-missing": Claim(
        "resonance",
        "A missing sense is handled gracefully.",
        f"{RESONANCE_2}, Cross-Modal Fusion",
        ("multimodal_digit",),
        _missing,
        "digits right with all three senses {whole:.1%}, with one missing at least {one_missing:.1%}, with one alone "
        "at least {alone:.1%} (guessing 10 %)",
        "one_missing >= 0.9 * whole",
        "alone >= 0.2",
        "with a clear loss",
    ),
}


def verdicts(folder: Path = RESULTS) -> dict[str, str]:
    """The verdict on every claim."""
    return {name: claim.verdict(folder) for name, claim in CLAIMS.items()}


def table(project: str, folder: Path = RESULTS) -> str:
    """The claims of a project, as the page shows them."""
    head = ("claim", "measured", "verdict", "rule", "command")
    rows = [
        (
            f"{claim.says} ({claim.source})",
            claim.told(folder),
            f"**{claim.verdict(folder)}**",
            claim.rule,
            claim.command,
        )
        for claim in CLAIMS.values()
        if claim.project == project
    ]
    return markdown_table(head, rows)


def summary(folder: Path = RESULTS) -> str:
    """How many claims have which verdict."""
    found = list(verdicts(folder).values())
    counts = (f"{found.count(kind)} {kind}" for kind in (TRUE, CONDITIONS, FALSE, UNTESTABLE, MISSING) if kind in found)
    return f"{len(found)} claims: {', '.join(counts)}."


def write_page(folder: Path = RESULTS, page: Path = PAGE) -> None:
    """Write all tables of docs/claims.md between their marks."""
    text = PAGE.read_text(encoding="utf-8")
    for mark, content in {"summary": summary(folder), **{name: table(name, folder) for name in PROJECTS}}.items():
        text = filled(text, mark, content)
    write_text(page, text)
