"""How a causal model cheats: the loss of a gate that looks forward, with the future in view and without it.

    python benchmarks/leaking_gate.py tinyshakespeare.txt

Two character models differ in one layer. The circular gate scales the Fourier bins of each chunk of 32 tokens, as in
HoloSpectralNet's reference code: that is a circular filter, and every token of a chunk hears all the others. The
minimum-phase gate of hf_holo has the same kind of response and hears the past only. Over training, both are asked to
predict the same characters of the validation split twice: with the whole window in view (teacher-forced, as in every
training loop), and with nothing but the characters before (as when writing).
"""

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from common.characters import CharacterText
from common.fitting import Fit, fit
from common.report import RESULTS, image_path, markdown_table, measured_on, print_footer, print_table, write_report
from matplotlib.figure import Figure
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from hf_holo import SpectralGate
from hf_holo.eval.conformance import check_causality
from hf_holo.files import replacing, write_csv
from hf_holo.modeling.filters import interpolate_gate

NAME = "leaking_gate"
CHUNK = 32  # tokens that the circular gate filters at once, and taps of the causal one
WINDOWS, ENDS = 16, 24  # windows of the validation split, and positions in each, to predict


class CircularGate(nn.Module):
    """A learned gain σ(logits) for each channel and Fourier bin of every chunk, times a learned scale.

    It has the parameters of a `SpectralGate` of 32 taps, but the filter wraps around in the chunk. A last chunk that is
    not full is filtered as it is, with the gains at its own frequencies.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.logits = nn.Parameter(torch.randn(dim, CHUNK // 2 + 1))
        self.scale = nn.Parameter(torch.full((dim,), 2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, T, D]` to `[B, T, D]`."""
        return self.scale * torch.cat([self._filter(chunk) for chunk in x.split(CHUNK, dim=1)], 1)

    def _filter(self, chunk: torch.Tensor) -> torch.Tensor:
        length = chunk.shape[1]
        gains = interpolate_gate(self.logits, length // 2 + 1).sigmoid()  # [D, bins]
        return torch.fft.irfft(torch.fft.rfft(chunk, dim=1) * gains.T, n=length, dim=1)


GATES = {"circular": CircularGate, "minimum-phase": lambda dim: SpectralGate(dim, taps=CHUNK)}


class GatedConfig(PretrainedConfig):
    model_type = "leaking_gate"

    def __init__(self, gate: str = "circular", vocab_size: int = 65, width: int = 128, depth: int = 3, **kwargs):
        self.gate, self.vocab_size, self.width, self.depth = gate, vocab_size, width, depth
        super().__init__(tie_word_embeddings=False, **kwargs)


class Block(nn.Module):
    """Gate over the tokens, then channel mix, each after a norm and with a residual path."""

    def __init__(self, config: GatedConfig):
        super().__init__()
        width = config.width
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.gate = GATES[config.gate](width)
        self.up_proj, self.down_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, T, D]` to `[B, T, D]`."""
        prompt, late = self.gate(self.norms[0](x)).chunk(2, -1)
        # Half of the channels one token late: a symmetric filter could not tell a token from its mirror image.
        x = x + torch.cat([prompt, F.pad(late, (0, 0, 1, 0))[:, :-1]], -1)
        return x + self.down_proj(F.gelu(self.up_proj(self.norms[1](x))))


class GatedForCausalLM(PreTrainedModel, GenerationMixin):
    """A small character model in which nothing but the gate mixes tokens."""

    config_class = GatedConfig

    def __init__(self, config: GatedConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.width)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool = False,
    ) -> CausalLMOutput:
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # [B, T, D]
        for block in self.blocks:
            x = block(x)
        return CausalLMOutput(logits=self.lm_head(self.norm(x)))


class Question:
    """The same characters of the validation split to predict, at every step and by every model.

    Args:
        ids: the validation split.
        length: characters of context in a window.
        seed: which windows, and which positions in them.
    """

    def __init__(self, ids: torch.Tensor, length: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(ids) - length, (WINDOWS, 1), generator=generator)
        self.windows = ids[starts + torch.arange(length + 1)]  # [R, length + 1]
        self.ends = 1 + torch.randperm(length, generator=generator)[:ENDS].sort().values  # lengths of the prefixes

    @torch.no_grad()
    def losses(self, model: nn.Module) -> dict[str, float]:
        """Nats per character with the whole window in view, and with only the characters before."""
        teacher_forced = model(input_ids=self.windows[:, :-1]).logits[:, self.ends - 1]  # [R, ends, V]
        prefix_only = [model(input_ids=self.windows[:, :end]).logits[:, -1] for end in self.ends]
        targets = self.windows[:, self.ends].flatten()
        return {
            name: F.cross_entropy(logits.flatten(0, 1), targets).item()
            for name, logits in (("teacher_forced", teacher_forced), ("prefix_only", torch.stack(prefix_only, 1)))
        }


def train(gate: str, text: CharacterText, how: Fit, width: int, depth: int, every: int) -> tuple[nn.Module, list[dict]]:
    """The trained model, and its losses before the first step, after every `every` steps, and after the last."""
    torch.manual_seed(how.seed)
    model = GatedForCausalLM(GatedConfig(gate, text.vocab_size, width, depth))
    question = Question(text.validation, how.length, how.seed)
    rows = []

    def ask(step: int) -> None:
        if step % every == 0 or step == how.steps:
            losses = question.losses(model)
            print("  " + ", ".join(f"{name} {loss:.2f}" for name, loss in losses.items()), flush=True)
            rows.append({"gate": gate, "step": step, **losses})

    ask(0)
    fit(model, text, how, ask)
    return model, rows


def summary(model: nn.Module, rows: list[dict]) -> dict[str, float | int | str]:
    """The last losses, and what the conformance kit says of the model."""
    report = check_causality(model)
    return {**rows[-1], "parameters": model.num_parameters(), "lookahead": report.lookahead}


def plot(rows: list[dict], vocab_size: int, path: Path) -> None:
    """Both losses of both models over the steps."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for gate, colour in (("circular", "tab:red"), ("minimum-phase", "tab:blue")):
        chosen = [row for row in rows if row["gate"] == gate]
        steps = [row["step"] for row in chosen]
        for key, view, style in (("teacher_forced", "whole window", "-"), ("prefix_only", "only the past", "o:")):
            losses = [row[key] for row in chosen]
            label = f"{gate} gate, {view} in view: {losses[-1]:.2f}"
            axes.plot(steps, losses, style, color=colour, markersize=4, label=label)
    guessing = math.log(vocab_size)
    axes.axhline(guessing, color="grey", linestyle="--", label=f"guessing any character: {guessing:.2f}")
    axes.set(
        xlabel="training step",
        ylabel="validation loss (nats per character)",
        title="A gate that looks forward learns to copy, not to predict",
        ylim=(0, None),
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right", bbox_to_anchor=(1, 0.7))  # between the curves
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="text file; the last tenth validates")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--every", type=int, default=50, help="steps between two points of the figure")
    parser.add_argument("--learning_rate", type=float, default=0.002)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--image", type=Path, help="the figure, as PNG; default: where the results belong")
    args = parser.parse_args(argv)
    args.image = args.image or image_path(NAME, args.results)

    start = time.perf_counter()
    text = CharacterText(args.text)
    how = Fit(args.learning_rate, "adamw", steps=args.steps, rows=args.rows, length=args.length, seed=args.seed)
    points, models = [], []
    for gate in GATES:
        print(f"{gate} gate", flush=True)
        model, rows = train(gate, text, how, args.width, args.depth, args.every)
        points += rows
        models.append(summary(model, rows))
    print_table(models)
    seconds = time.perf_counter() - start
    names = ("steps", "learning_rate", "width", "depth", "rows", "length")
    figures = {
        "settings": {name: getattr(args, name) for name in names} | {"predictions": WINDOWS * min(ENDS, args.length)},
        "guessing": math.log(text.vocab_size),
        "models": models,
    }
    path = write_report(NAME, figures, seed=args.seed, seconds=seconds, folder=args.results)
    write_csv(points, path.with_suffix(".csv"))
    plot(points, text.vocab_size, args.image)
    print_footer(path, seconds)


def sentence(result: dict) -> str:
    f = result["figures"]
    rows = [
        f"{row['gate']} gate {row['teacher_forced']:.2f} with the whole window in view, "
        f"{row['prefix_only']:.2f} with only the past"
        for row in f["models"]
    ]
    steps, guessing = f["settings"]["steps"], f["guessing"]
    return f"nats per character after {steps:,} steps: {'; '.join(rows)}; guessing {guessing:.2f}; one seed"


def table(result: dict) -> str:
    """Both losses of both gates."""
    f = result["figures"]
    head = ("gate", ">whole window in view", ">only the past in view", ">`check_causality(model).lookahead`")
    rows = [
        (row["gate"], f"{row['teacher_forced']:.2f}", f"{row['prefix_only']:.2f}", f"{row['lookahead']} tokens")
        for row in f["models"]
    ]
    return "\n".join(
        [
            markdown_table(head, rows),
            "",
            f"Nats per character after {f['settings']['steps']:,} steps, over {f['settings']['predictions']} "
            f"predictions; guessing has {f['guessing']:.2f}. One seed.",
            f"It took {result['seconds']:.0f} seconds for both models on: {measured_on(result)}.",
        ]
    )


if __name__ == "__main__":
    main()
