"""HOLO from scratch on a text: the validation loss over the number of harmonics, compared with a dense model.

    python benchmarks/holo_curve.py tinyshakespeare.txt

All models have the same width, depth, embeddings at the start, windows, steps and AdamW; they differ in their
projections alone. The learning rate is tuned for each of them: from that of the model before it is doubled and halved
for as long as the loss falls. The basis "random" is made from a seed. The basis "data" is fixed too: for each
projection the R directions in which the input of the same projection of a trained dense model has the most energy (the
first eigenvectors of E[x xᵀ] on training windows); it is stored, and the coefficients start at random as ever. So
"data" has seen a trained model, and "random" has not.

Writes JSON, a CSV next to it and a figure. A finished run is kept and not repeated, except that of the dense
model, which gives the directions.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from common.characters import CharacterText, windowed_loss
from common.fitting import Fit, fit
from common.report import (
    RESULTS,
    best_runs,
    earlier_rows,
    image_path,
    markdown_table,
    measured_on,
    print_footer,
    print_table,
    write_report,
)
from matplotlib.figure import Figure
from torch import nn

from hf_holo.conversion.surgery.bases import fit_bases
from hf_holo.files import replacing, write_csv
from hf_holo.modeling.configuration_holo import HoloConfig
from hf_holo.modeling.harmonics import HoloLinear
from hf_holo.modeling.modeling_holo import HoloForCausalLM

NAME = "holo_curve"
BASES = ("random", "data")
HARMONICS = (8, 16, 32, 64, 128)
BATCHES = 8  # training batches on which the bases are fitted


def build(vocab_size: int, args: argparse.Namespace, basis: str = "dense", harmonics: int | None = None):
    """The dense model, or the one with `harmonics` in every projection of its blocks."""
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


def share_embeddings(model: HoloForCausalLM, dense: HoloForCausalLM) -> None:
    """Start from the embeddings that the dense model started from."""
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(dense.get_input_embeddings().weight)


def projections(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the blocks."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in f".{n}"}


def calibration_batches(text: CharacterText, args: argparse.Namespace) -> Iterator[dict[str, torch.Tensor]]:
    """Training windows on which the bases are fitted."""
    generator = torch.Generator().manual_seed(args.seed)
    for _ in range(BATCHES):
        yield {"input_ids": text.batch(args.rows, args.length, generator)[0]}


def counts(model: nn.Module) -> dict[str, int]:
    """Values in the blocks: trained, and stored in a checkpoint (with the bases, if they are)."""
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
    """The loss over the harmonics for each basis, and the dense model as a line."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    dense = next(run for run in runs if run["basis"] == "dense")
    size = dense["block_parameters"]
    axes.axhline(dense["loss"], color="black", linestyle="--", label=f"dense model: {dense['loss']:.3f}")
    for basis, colour in zip(BASES, ("tab:blue", "tab:orange"), strict=True):
        chosen = sorted((run for run in runs if run["basis"] == basis), key=lambda run: run["harmonics"])
        if chosen:
            x, y = [run["harmonics"] for run in chosen], [run["loss"] for run in chosen]
            axes.plot(x, y, "o-", color=colour, label=f"basis {basis!r}")
    axes.set_xscale("log", base=2)
    shares = {run["harmonics"]: run["block_parameters"] / size for run in runs if run["harmonics"]}
    axes.set_xticks(list(shares), [f"{harmonics}\n{share:.2f}" for harmonics, share in shares.items()])
    axes.set(
        xlabel="harmonics; below them the trained parameters in the blocks, those of the dense model being 1",
        ylabel="validation loss (nats per character)",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def at_a_quarter(runs: list[dict]) -> dict[str, float]:
    """For each basis the loss above the dense model's of the run that is nearest to a quarter of its parameters."""
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
    parser.add_argument("--image", type=Path, help="the figure, as PNG; default: where the results belong")
    args = parser.parse_args(argv)
    args.image = args.image or image_path(NAME, args.results)
    if not 1 <= min(args.harmonics) <= max(args.harmonics) <= args.width:
        parser.error(f"--harmonics must be between 1 and --width {args.width}")

    text = CharacterText(args.text)
    names = ("steps", "rows", "length", "width", "depth", "seed")
    settings = {name: getattr(args, name) for name in names} | {"characters": len(text.train) + len(text.validation)}
    runs, _ = earlier_rows(NAME, {"settings": settings}, args.results, "runs")
    fresh = build(text.vocab_size, args)
    dense = build(text.vocab_size, args)  # trained when its directions are asked for

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
            fit_bases(model, calibration_batches(text, args), source=dense)
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
            train(dense, text, dense_rate, args)
        for harmonics in args.harmonics:
            rate = tuned(basis, harmonics, rate)

    chosen = best(runs)
    print_table([{**run, "harmonics": run["harmonics"] or "-"} for run in chosen])
    for basis, gap in at_a_quarter(chosen).items():
        print(f"nearest to a quarter of the parameters, basis {basis!r}: {gap:+.4f} nats against the dense model")
    plot(chosen, args.image)
    print_footer(args.results / f"{NAME}.json", sum(run["seconds"] for run in runs))
    print(f"figure in {args.image}")


def sentence(result: dict) -> str:
    dense, *others = best(result["figures"]["runs"])
    rows = [f"dense model {dense['loss']:.3f}"]
    for run in others:
        share = run["block_parameters"] / dense["block_parameters"]
        rows.append(f"{run['basis']} {run['harmonics']} ({share:.2f} of the parameters) {run['loss']:.3f}")
    return f"HOLO from scratch, nats per character by basis and harmonics: {', '.join(rows)}; one seed"


def table(result: dict) -> str:
    """HOLO from scratch compared with a dense model, and the picture of the benchmark."""
    settings, (dense, *others) = result["figures"]["settings"], best(result["figures"]["runs"])
    head = ("basis", ">harmonics", ">trained in the blocks", ">of the dense model's", ">stored", ">nats per character")
    rows = [
        ("dense model", "", f"{dense['block_parameters']:,}", 1, f"{dense['stored']:,}", f"{dense['loss']:.3f}", "")
    ]
    for run in others:
        share, above = run["block_parameters"] / dense["block_parameters"], run["loss"] - dense["loss"]
        sizes = f"{run['block_parameters']:,}", f"{share:.2f}", f"{run['stored']:,}"
        rows.append((run["basis"], run["harmonics"], *sizes, f"{run['loss']:.3f}", f"{above:+.3f}"))
    return "\n".join(
        [
            markdown_table((*head, ">above the dense model"), rows),
            "",
            "![Validation loss over the harmonics](images/holo_curve.png)",
            "",
            f"{settings['steps']} steps of {settings['rows']}×{settings['length']} with AdamW, width "
            f"{settings['width']}, depth {settings['depth']}, one seed, {result['seconds']:,.0f} seconds for all "
            f"{len(result['figures']['runs'])} runs on: {measured_on(result)}.",
        ]
    )


if __name__ == "__main__":
    main()
