"""What `hf-holo list` shows: every registered family and preset, with parameters counted on the meta device."""

import json
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..errors import Parser
from ..registry import preset_config, presets


def main(argv: list[str]) -> None:
    """Print a table of all presets, or the same as JSON."""
    parser = Parser(prog="hf-holo list", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--vocab_size", type=int, default=None, help="count those that read with this vocabulary; default: the preset's"
    )
    args = parser.parse_args(argv)
    overrides = {} if args.vocab_size is None else {"vocab_size": args.vocab_size}
    rows = catalogue(**overrides)
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        _print_table(rows)


def catalogue(**overrides: Any) -> list[dict[str, Any]]:
    """One record for each preset, in the order of registration and size.

    Args:
        overrides: config arguments that replace those of the presets, for example `vocab_size`; only for families that
            read, and nothing else.

    Returns:
        Records with `family`, `preset`, `vocab_size` (None for a family that does not read), `parameters`,
        `embedding_parameters` and `capabilities`.
    """
    rows = []
    for name, (architecture, _) in presets().items():
        config = preset_config(name)
        if getattr(config, "vocab_size", None) is not None:
            config = preset_config(name, **overrides)
        text = config.get_text_config()
        vocab_size = getattr(text, "vocab_size", None)
        with torch.device("meta"):
            model = architecture.model_for(config)(config)
        rows.append(
            {
                "family": architecture.name,
                "preset": name,
                "vocab_size": vocab_size,
                "parameters": sum(p.numel() for p in model.parameters()),
                "embedding_parameters": 0 if vocab_size is None else _count(model.get_input_embeddings()),
                "capabilities": sorted(architecture.capabilities),
            }
        )
    families = list(dict.fromkeys(row["family"] for row in rows))
    return sorted(rows, key=lambda row: (families.index(row["family"]), row["parameters"]))


def _count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _print_table(rows: list[dict[str, Any]]) -> None:
    table = Table("family")
    table.add_column("preset", no_wrap=True)
    for title in ("vocabulary", "parameters", "without embedding"):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(
            row["family"],
            row["preset"],
            "" if row["vocab_size"] is None else f"{row['vocab_size']:,}",
            f"{row['parameters']:,}",
            f"{row['parameters'] - row['embedding_parameters']:,}",
        )
    console = Console()
    console.print(table)
    for family, flags in {row["family"]: row["capabilities"] for row in rows}.items():
        console.print(f"{family}: {', '.join(flags)}")
