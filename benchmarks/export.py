"""What exporting costs and brings: differences, sizes, perplexity and speed of a trained model in every format.

    python benchmarks/export.py runs/shakespeare held_out.txt

Without a model it takes hsn-small with random weights, for the speed of decoding alone. Formats that are not installed
here are left out. Every figure is measured on the written file.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from report import RESULTS, print_footer, print_table, write_report

from hf_holo import hsn_small
from hf_holo.errors import HoloError
from hf_holo.export.command import export
from hf_holo.export.formats import FORMATS, Source


def row_of(name: str, record: dict) -> dict[str, object]:
    """The figures of one format that fit into a line of a table."""
    decode, perplexity = record["milliseconds"]["token"], record.get("perplexity")
    worse = None if perplexity is None else perplexity["exported"] / perplexity["float32"] - 1
    return {
        "format": name,
        "max_difference": max(row["max"] for row in record["parity"]),
        "equal_tokens": min(record["generation"].values()),
        "size": record["bytes"] / record["float32_bytes"],
        "perplexity_rise": worse,
        "ms_per_token": decode["exported"],
        "pytorch_ms_per_token": decode["pytorch"],
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder of a trained causal language model with its tokenizer")
    parser.add_argument("text", nargs="?", type=Path, help="text that it was not trained on")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    start = time.perf_counter()
    text = None if args.text is None else args.text.read_text(encoding="utf-8")
    rows = []
    with TemporaryDirectory() as folder:
        if args.model is None:
            hsn_small(vocab_size=4096).save_pretrained(f"{folder}/model")
        source = Source(args.model or f"{folder}/model")
        for name in args.formats:
            try:
                FORMATS[name].require()
            except HoloError as missing:
                print(f"{name} is left out: {missing}")
                continue
            rows.append(row_of(name, export(source, name, Path(folder) / name, text)))
    print_table(rows)
    seconds = time.perf_counter() - start
    trained = args.model is not None
    figures = {"trained": trained, "parameters": source.model.num_parameters(), "rows": rows}
    name = "export_trained" if trained else "export_hsn_small"
    print_footer(write_report(name, figures, seed=0, seconds=seconds, folder=args.results), seconds)


if __name__ == "__main__":
    main()
