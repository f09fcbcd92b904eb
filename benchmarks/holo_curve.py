"""HOLO from scratch on a text: the validation loss over the number of harmonics, beside its dense twin.

    python benchmarks/holo_curve.py tinyshakespeare.txt

All models have the same width, depth, embeddings at the start, windows, steps and AdamW; they differ in their
projections alone. The learning rate is tuned for each of them: from that of the model before it is doubled and halved
for as long as the loss falls. The basis "random" is made from a seed. The basis "data" is fixed too: for each
projection the R directions in which the input of the same projection of the trained dense twin has the most energy (the
first eigenvectors of E[x xᵀ] on training windows); it is stored, and the coefficients start at random as ever. So
"data" has seen a trained model, and "random" has not.

Writes JSON, a CSV beside it and a figure. A finished run is kept and not repeated, but for that of the dense twin,
which gives the directions.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from characters import CharacterText, windowed_loss
from fitting import Fit, fit
from matplotlib.figure import Figure
from report import RESULTS, best_runs, earlier_rows, print_footer, print_table, write_report
from torch import nn

from hf_holo.conversion.bases import fit_bases
from hf_holo.files import replacing, write_csv
from hf_holo.modeling.configuration_holo import HoloConfig
from hf_holo.modeling.harmonics import HoloLinear
from hf_holo.modeling.modeling_holo import HoloForCausalLM

NAME = "holo_curve"
IMAGE = Path(__file__).parents[1] / "docs" / "images" / f"{NAME}.png"
BASES = ("random", "data")
HARMONICS = (8, 16, 32, 64, 128)
BATCHES = 8  # training batches on which the bases are fitted


def build(vocab_size: int, args: argparse.Namespace, basis: str = "dense", harmonics: int | None = None):
    """The dense twin, or the model with `harmonics` in every projection of its blocks."""
    kind = "dense" if basis == "dense" else "holographic"
    torch.manual_seed(args.seed)
    return HoloForCausalLM(
        HoloConfig(
            vocab_size=vocab_size,
            hidden_size=args.width,
            num_hidden_layers=args.depth,
            attention_projections=kind,
            mlp_projections=kind,
            harmonics=harmonics,
            basis="random" if basis == "dense" else basis,
        )
    )


def share_embeddings(model: HoloForCausalLM, twin: HoloForCausalLM) -> None:
    """Start from the embeddings that the twin started from."""
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(twin.get_input_embeddings().weight)


def projections(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the blocks."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in f".{n}"}


def calibration_batches(text: CharacterText, args: argparse.Namespace) -> Iterator[dict[str, torch.Tensor]]:
    """Training windows on which the bases are fitted."""
    generator = torch.Generator().manual_seed(args.seed)
    for _ in range(BATCHES):
        yield {"input_ids": text.batch(args.rows, args.length, generator)[0]}


def counts(model: nn.Module) -> dict[str, int]:
    """Numbers in the blocks: trained, and stored in a checkpoint (with the bases, if they are)."""
    trained = sum(p.numel() for p in model.base_model.layers.parameters())
    bases = sum(p.basis.stored_numbers() for p in projections(model).values() if isinstance(p, HoloLinear))
    return {"block_parameters": trained, "stored": trained + bases}


def train(model: nn.Module, text: CharacterText, rate: float, args: argparse.Namespace) -> dict[str, float]:
    start = time.perf_counter()
    how = Fit(rate, "adamw", steps=args.steps, rows=args.rows, length=args.length, seed=args.seed)
    fit(model, text, how)
    loss = windowed_loss(model, text.validation, args.length)
    return {"learning_rate": rate, **counts(model), "loss": loss, "seconds": round(time.perf_counter() - start, 1)}


def best(runs: list[dict]) -> list[dict]:
    """For each basis and number of harmonics the run with the best learning rate."""
    chosen = best_runs(runs, ("basis", "harmonics"), lambda run: -run["loss"])
    return sorted(chosen, key=lambda run: (run["basis"] != "dense", run["basis"] == "data", run["harmonics"]))


def plot(runs: list[dict], path: Path) -> None:
    """The loss over the harmonics for each basis, and the dense twin as a line."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    dense = next(run for run in runs if run["basis"] == "dense")
    size = dense["block_parameters"]
    axes.axhline(dense["loss"], color="black", linestyle="--", label=f"dense twin: {dense['loss']:.3f}")
    for basis, colour in zip(BASES, ("tab:blue", "tab:orange"), strict=True):
        chosen = sorted((run for run in runs if run["basis"] == basis), key=lambda run: run["harmonics"])
        if chosen:
            x, y = [run["harmonics"] for run in chosen], [run["loss"] for run in chosen]
            axes.plot(x, y, "o-", color=colour, label=f"basis {basis!r}")
    axes.set_xscale("log", base=2)
    shares = {run["harmonics"]: run["block_parameters"] / size for run in runs if run["harmonics"]}
    axes.set_xticks(list(shares), [f"{harmonics}\n{share:.2f}" for harmonics, share in shares.items()])
    axes.set(
        xlabel="harmonics; below them the trained parameters in the blocks, those of the dense twin being 1",
        ylabel="validation loss (nats per character)",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def at_a_quarter(runs: list[dict]) -> dict[str, float]:
    """For each basis the loss above the dense twin's of the run that is nearest to a quarter of its parameters."""
    dense = next(run for run in runs if run["basis"] == "dense")
    quarter = dense["block_parameters"] / 4
    gaps = {}
    for basis in BASES:
        chosen = [run for run in runs if run["basis"] == basis]
        if chosen:
            nearest = min(chosen, key=lambda run: abs(run["block_parameters"] - quarter))
            gaps[basis] = nearest["loss"] - dense["loss"]
    return gaps


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="text file; the last tenth validates")
    parser.add_argument("--harmonics", nargs="+", type=int, default=HARMONICS, help="at most --width")
    parser.add_argument("--bases", nargs="+", choices=BASES, default=BASES)
    parser.add_argument("--learning_rate", type=float, default=0.004, help="of AdamW, to start with")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--image", type=Path, default=IMAGE, help="the figure, as PNG")
    args = parser.parse_args(argv)
    if not 1 <= min(args.harmonics) <= max(args.harmonics) <= args.width:
        parser.error(f"--harmonics must lie between 1 and --width {args.width}")

    text = CharacterText(args.text)
    names = ("steps", "rows", "length", "width", "depth", "seed")
    settings = {name: getattr(args, name) for name in names} | {"characters": len(text.train) + len(text.validation)}
    runs, _ = earlier_rows(NAME, {"settings": settings}, args.results, "runs")
    fresh = build(text.vocab_size, args)
    twin = build(text.vocab_size, args)  # trained when its directions are asked for

    def loss_of(basis: str, harmonics: int | None, rate: float) -> float:
        """Of a run that is there already, or else of a new one."""
        key = (basis, harmonics, rate)
        found = next((r for r in runs if (r["basis"], r["harmonics"], r["learning_rate"]) == key), None)
        if found:
            return found["loss"]
        print(f"{basis}, {harmonics or 'no'} harmonics, learning rate {rate}", flush=True)
        model = build(text.vocab_size, args, basis, harmonics)
        share_embeddings(model, fresh)
        if basis == "data":
            fit_bases(model, calibration_batches(text, args), source=twin)
        runs.append({"basis": basis, "harmonics": harmonics, **train(model, text, rate, args)})
        figures = {"settings": settings, "runs": runs, "above_dense_at_a_quarter": at_a_quarter(best(runs))}
        seconds = sum(run["seconds"] for run in runs)
        path = write_report(NAME, figures, seed=args.seed, seconds=seconds, folder=args.results)
        write_csv(runs, path.with_suffix(".csv"))
        return runs[-1]["loss"]

    def tuned(basis: str, harmonics: int | None, rate: float) -> float:
        """The learning rate that neither doubling nor halving makes better."""
        loss = loss_of(basis, harmonics, rate)
        for factor in (2, 1 / 2):
            while (further := loss_of(basis, harmonics, factor * rate)) < loss:
                rate, loss = factor * rate, further
        return rate

    dense_rate = tuned("dense", None, args.learning_rate)
    for basis in args.bases:
        rate = dense_rate
        if basis == "data":
            train(twin, text, dense_rate, args)
        for harmonics in args.harmonics:
            rate = tuned(basis, harmonics, rate)

    chosen = best(runs)
    print_table([{**run, "harmonics": run["harmonics"] or "-"} for run in chosen])
    for basis, gap in at_a_quarter(chosen).items():
        print(f"nearest to a quarter of the parameters, basis {basis!r}: {gap:+.4f} nats against the dense twin")
    plot(chosen, args.image)
    print_footer(args.results / f"{NAME}.json", sum(run["seconds"] for run in runs))
    print(f"figure in {args.image}")


if __name__ == "__main__":
    main()
