"""Draw the picture of the README: what a model keeps of a text, and how long one more token takes.

    python docs/images/overview.py

The left side is counted from the configs; the right side is read from benchmarks/results.
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from hf_holo import HsnForCausalLM, ResonanceForCausalLM, preset_config

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "benchmarks" / "results"
FLOAT32 = 4  # bytes
COLOURS = {"attention": "#b0413e", "hsn": "#2a6f97", "resonance": "#468c5a"}


def state_bytes(model_class: type, preset: str) -> int:
    """What a recurrent model keeps of one text, of any length."""
    layers = model_class.state_spec(preset_config(preset))
    return FLOAT32 * sum(_numbers(shape) for states in layers for shape in states.values())


def _numbers(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def key_value_bytes(preset: str, tokens: int) -> int:
    """What a Llama of the same width and depth keeps of a text: a key and a value per token and layer."""
    config = preset_config(preset)
    return FLOAT32 * 2 * config.num_hidden_layers * config.hidden_size * tokens


def draw_memory(axes) -> None:
    lengths = [2**power for power in range(5, 19)]
    mib = 2**20
    grows = [key_value_bytes("hsn-small", tokens) / mib for tokens in lengths]
    axes.plot(lengths, grows, color=COLOURS["attention"], linewidth=2.5)
    models = {"hsn": (HsnForCausalLM, "hsn-small"), "resonance": (ResonanceForCausalLM, "resonance-small")}
    kept = {name: state_bytes(*model) / mib for name, model in models.items()}
    for (name, size), style in zip(kept.items(), ("solid", (0, (4, 4))), strict=True):  # one may cover the other
        axes.plot(lengths, [size] * len(lengths), color=COLOURS[name], linewidth=3, linestyle=style)
    for factor, (name, size) in zip((0.72, 0.36), kept.items(), strict=True):
        label = f"{name}: {size:.2f} MiB, however long the text"
        axes.text(lengths[-1], factor * min(kept.values()), label, color=COLOURS[name], ha="right", va="top")
    label = "attention (same width and depth)\nkeeps keys and values"
    axes.text(lengths[-1], 1.6, label, color=COLOURS["attention"], ha="right", va="center")
    axes.set(xscale="log", yscale="log", ylim=(0.03, 6000), xlabel="tokens read so far", ylabel="MiB")
    axes.set_title("What a model keeps of the text that it has read", fontsize=12, loc="left")
    ticks = [32, 1024, 32768, 262144]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_yticks([0.1, 1, 10, 100, 1000], ["0.1", "1", "10", "100", "1,000"])
    axes.minorticks_off()


def draw_time(axes) -> None:
    decode = json.loads((RESULTS / "decode_speed.json").read_text())["figures"]
    long = json.loads((RESULTS / "long_context.json").read_text())["figures"]
    rows = [(decode["model"], "hsn", decode["rows"]), (long["settings"]["preset"], "resonance", long["decoding"])]
    bars, names, place = [], [], 0.0
    for name, family, runs in rows:
        for run in (runs[0], runs[-1]):
            bars.append((place, run["ms_per_token"], COLOURS[family]))
            names.append((place, f"{name}, after {run['context']:,} tokens"))
            place -= 1.0
        place -= 0.5
    for height, milliseconds, colour in bars:
        axes.barh(height, milliseconds, 0.8, color=colour)
        axes.text(milliseconds + 0.2, height, f"{milliseconds:.1f} ms", va="center")
    axes.set_yticks([height for height, _ in names], [label for _, label in names])
    axes.set(xlim=(0, 16), xlabel="milliseconds on two threads of a CPU")
    axes.set_title("Time that one more token takes", fontsize=12, loc="left")


def main() -> None:
    plt.rcParams["font.size"] = 11
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 3.9), layout="constrained")
    draw_memory(left)
    draw_time(right)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "overview.png", dpi=110)


if __name__ == "__main__":
    main()
