"""What exporting costs and brings: differences, sizes, perplexity and speed of a model in every format.

    python benchmarks/export.py
    python benchmarks/export.py --model runs/shakespeare-char-hsn --text tinyshakespeare.txt

Without a model it takes hsn-small with random weights, for sizes and for the speed of decoding. With one and the text
that it was trained on, as by benchmarks/shakespeare.py, it measures the perplexity on the last tenth, which is held out
there. Formats that are not installed here are left out. Every figure is measured on the written file.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from common.report import RESULTS, print_footer, print_table, write_report
from tqdm.auto import tqdm

from hf_holo import hsn_small
from hf_holo.data.documents import split_documents
from hf_holo.errors import HoloError
from hf_holo.export.command import export
from hf_holo.export.formats import FORMATS, SavedModel


def row_of(name: str, record: dict) -> dict[str, object]:
    """The figures of one format that fit into a line of a table."""
    decode, perplexity = record["milliseconds"]["token"], record.get("perplexity")
    row = {
        "format": name,
        "max_difference": max(row["max"] for row in record["parity"]),
        "equal_tokens": min(record["generation"].values()),
        "bytes": record["bytes"],
        "of_the_weights": record["bytes"] / record["float32_bytes"],
        "ms_per_token": decode["exported"],
        "of_eager_pytorch": decode["exported"] / decode["pytorch"],
    }
    return row if perplexity is None else row | {"perplexity_rise": perplexity["exported"] / perplexity["float32"] - 1}


def measured(source: SavedModel, formats: Sequence[str], text: str | None, folder: Path) -> list[dict[str, object]]:
    """A row for every format that is installed here."""
    rows = []
    for name in (progress := tqdm(formats, desc="exporting", unit="format", leave=False)):
        progress.set_postfix_str(name)
        try:
            FORMATS[name].require()
        except HoloError as missing:
            progress.write(f"{name} is left out: {missing}")
            continue
        rows.append(row_of(name, export(source, name, folder / name, text)))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a trained causal language model with its tokenizer")
    parser.add_argument("--text", type=Path, help="text file; its last tenth is read")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args(argv)
    if (args.model is None) != (args.text is None):
        parser.error("--model and --text go together")

    torch.manual_seed(0)
    start = time.perf_counter()
    trained, text = args.model is not None, None
    with TemporaryDirectory() as folder:
        model = args.model or f"{folder}/hsn-small"
        if trained:
            text = split_documents([args.text.read_text(encoding="utf-8")], 0.1)[1][0]
        else:
            hsn_small(vocab_size=4096).save_pretrained(model)
        source = SavedModel(model)
        rows = measured(source, args.formats, text, Path(folder))
    print_table(rows)
    size = {row["format"]: row["bytes"] for row in rows}
    figures = {"parameters": source.model.num_parameters(), "rows": rows}
    if {"onnx", "onnx-int8"} <= size.keys():
        figures["int8_of_float32"] = size["onnx-int8"] / size["onnx"]
    name, seconds = "export_trained" if trained else "export_hsn_small", time.perf_counter() - start
    print_footer(write_report(name, figures, seed=0, seconds=seconds, folder=args.results), seconds)


def sentence(result: dict) -> str:
    rows = []
    for row in result["figures"]["rows"]:
        rise = f", perplexity {row['perplexity_rise']:+.2%}" if "perplexity_rise" in row else ""
        rows.append(
            f"{row['format']} {row['of_the_weights']:.2f} of the float32 weights, "
            f"{row['of_eager_pytorch']:.2f} of eager PyTorch's time per token, {row['equal_tokens']:.0%} of the "
            f"generated tokens equal{rise}"
        )
    return (
        f"a model of {result['figures']['parameters']:,} parameters out of Python, one seed, median times: "
        f"{'; '.join(rows)}"
    )


if __name__ == "__main__":
    main()
