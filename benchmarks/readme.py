"""Write the figures of results/*.json into the section "Measured" of the README.

    python benchmarks/readme.py

Every row names the command that it comes from, and the seconds that the command took.
"""

from collections.abc import Callable
from pathlib import Path

from report import RESULTS, read_report

README = Path(__file__).parents[1] / "README.md"
OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon"}
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def shakespeare(f: dict) -> str:
    return (
        f"{f['validation_loss']:.3f} nats per character over the whole validation split of tinyshakespeare "
        f"({f['parameters']:,} parameters, {f['tokens'] / 1e6:.1f} M tokens, windows of {f['window']})"
    )


def llama_comparison(f: dict) -> str:
    settings, best = f["settings"], f["best"]
    rates = sorted({run["learning_rate"] for run in f["runs"]})
    chosen = f"each at its best of the learning rates {rates}" if len(rates) > 1 else f"learning rate {rates[0]}"
    return (
        f"{best['hsn']:.3f} nats, Llama of the same size {best['llama']:.3f}, after {settings['steps']} steps of "
        f"{settings['rows']}×{settings['length']} with {OPTIMIZERS[settings['optimizer']]}, {chosen}"
    )


def stepwise_loss(f: dict) -> str:
    return f"loss one token at a time {f['stepwise']:.5f}, over the whole window {f['teacher_forced']:.5f}"


def block_speed(f: dict) -> str:
    rows = [f"{r['time_ratio']:.2f} ({r['tokens']:,} tokens, width {r['width']})" for r in f["against_llama"]]
    growth = [row["relative"] for row in f["time_per_token"]]
    lengths = [row["tokens"] for row in f["time_per_token"]]
    return (
        f"time of a training step of one block, Llama's being 1: {', '.join(rows)}; time per token between "
        f"{lengths[0]:,} and {lengths[-1]:,} tokens: {min(growth):.2f} to {max(growth):.2f} of the first"
    )


def decode_speed(f: dict) -> str:
    first, last = f["rows"][0], f["rows"][-1]
    return (
        f"time per token after {last['context']:,} tokens is {last['relative']:.2f} of that after {first['context']:,}"
    )


def static_speed(f: dict) -> str:
    first, last = f["rows"][0], f["rows"][-1]
    return (
        f"static binding: {last['tokens'] / first['tokens']:.0f} times the tokens ({last['tokens']:,}) "
        f"take {last['times_time']:.2f} times the time"
    )


def design_choices(f: dict) -> str:
    rows = [f"{row['variant']} {row['loss']:.3f}" for row in f["runs"]]
    return f"validation loss after {f['settings']['seconds']:.0f} seconds of training: {', '.join(rows)}"


ROWS: dict[str, Callable[[dict], str]] = {
    "shakespeare": shakespeare,
    "llama_comparison_adamw": llama_comparison,
    "llama_comparison_muon": llama_comparison,
    "stepwise_loss": stepwise_loss,
    "block_speed": block_speed,
    "decode_speed": decode_speed,
    "static_speed": static_speed,
    "design_choices": design_choices,
}


def table(folder: Path = RESULTS) -> str:
    """The figures as a Markdown table; benchmarks that have not run are left out."""
    lines, machines = ["| benchmark | measured | seconds |", "|---|---|--:|"], {}
    for name, describe in ROWS.items():
        report = read_report(name, folder)
        if report["figures"]:
            lines.append(f"| `{name}` | {describe(report['figures'])} | {report['seconds']:.0f} |")
            machines[_machine(report)] = None
    return "\n".join([*lines, "", f"Measured on: {'; '.join(machines)}."])


def _machine(report: dict) -> str:
    machine, versions = report["machine"], report["versions"]
    return (
        f"{machine['processor']}, {machine['threads']} threads, torch {versions['torch']}, "
        f"transformers {versions['transformers']}"
    )


def main() -> None:
    text = README.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    README.write_text(f"{head}{BEGIN}\n{table()}\n{END}{tail}", encoding="utf-8")
    print(table())


if __name__ == "__main__":
    main()
