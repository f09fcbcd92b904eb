"""A long text is read once and saved: how long a question to it waits for its first token, in a process of its own.

    python benchmarks/saved_prefix.py

The text is random tokens and the weights are random: neither changes the time. What is timed is loading the file and
generating one token after a question of 16; the model is in memory already.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from common.report import RESULTS, print_footer, print_table, write_report

from hf_holo import Prefix, preset_model

QUESTION = 16


def first_token(model: torch.nn.Module, path: Path) -> float:
    """Seconds from a file to the first new token after a question."""
    question = torch.arange(QUESTION)[None]
    start = time.perf_counter()
    inputs = Prefix.load(path, model).followed_by(question)
    model.generate(**inputs, max_new_tokens=1, do_sample=False, pad_token_id=0)
    return time.perf_counter() - start


def new_model(preset: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return preset_model(preset).eval()


def measure(preset: str, path: Path, repeats: int) -> None:
    """In a process of its own: prints the seconds of the first time, and of later ones."""
    model = new_model(preset)
    print(json.dumps([first_token(model, path) for _ in range(repeats)]))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="resonance-small")
    parser.add_argument("--tokens", type=int, default=100_000, help="tokens of the text")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure is not None:
        measure(args.preset, args.measure, args.repeats)
        return

    start = time.perf_counter()
    model = new_model(args.preset)
    ids = torch.randint(model.config.vocab_size, (1, args.tokens), generator=torch.Generator().manual_seed(0))
    with TemporaryDirectory() as folder:
        path = Path(folder, "text.prefix")
        began = time.perf_counter()
        Prefix.read(model, ids).save(path)
        reading = time.perf_counter() - began
        command = [sys.executable, __file__, "--preset", args.preset, "--repeats", str(args.repeats)]
        output = subprocess.run([*command, "--measure", str(path)], check=True, capture_output=True, text=True).stdout
        times, size = json.loads(output.splitlines()[-1]), path.stat().st_size
    figures = {
        "model": args.preset,
        "parameters": model.num_parameters(),
        "tokens": args.tokens,
        "read_seconds": reading,
        "file_bytes": size,
        "first_ms": 1e3 * times[0],
        "later_ms": 1e3 * statistics.median(times[1:]),
    }
    print_table([figures])
    seconds = time.perf_counter() - start
    print_footer(write_report("saved_prefix", figures, seed=0, seconds=seconds, folder=args.results), seconds)


def sentence(result: dict) -> str:
    figures = result["figures"]
    return (
        f"{figures['tokens']:,} tokens are read in {figures['read_seconds']:.0f} s and saved in "
        f"{figures['file_bytes'] / 2**20:.1f} MiB; from that file to the first new token after a question it takes "
        f"{figures['first_ms']:.0f} ms the first time in a process and {figures['later_ms']:.0f} ms after that "
        f"(a median; `{figures['model']}` with random weights)"
    )


if __name__ == "__main__":
    main()
