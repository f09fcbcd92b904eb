"""What each token mixer of a model is worth: the loss of a text with all of them, and without one or without a kind.

A mixer is switched off by zeros in place of its output; the residual stream stays as it is. Hybrids may learn to do
without one kind of their mixers (Benfeghoul et al., 2025, arXiv:2510.05901), which no loss of the whole model shows.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...data.scoring import held_out_loss
from ...data.windows import encode, scoring_windows
from ...errors import HoloError
from ..figures import draw_bars
from ..markdown import markdown_table
from .language import TEXT, block_of, chosen, pad_id
from .models import Evaluated
from .options import Options
from .run import Part, Row, Tables

NOTHING = "none of its blocks has a `mixer` that could be switched off"


def parts(models: Sequence[Evaluated], options: Options) -> Iterator[Part]:
    """All ablations of every model.

    Raises:
        HoloError: the text is not there, or a model has no tokenizer.
    """
    documents = options.documents()
    for model in models:
        settings = {"model": model.fingerprint, **options.chosen(*TEXT), "characters": sum(map(len, documents))}
        if not mixers_of(model.model):
            yield Part("left_out", f"{model.name}, without mixers", settings, partial(_nothing_to_ablate, model))
            continue
        model.needed_tokenizer()
        yield Part("ablations", f"{model.name}, ablations", settings, partial(score, model, documents, options))


def mixers_of(model: nn.Module) -> list[nn.Module]:
    """What its blocks call `mixer`, from the first block to the last."""
    called = (getattr(block, "mixer", None) for block in model.modules())
    return [mixer for mixer in called if isinstance(mixer, nn.Module)]


def kind_of(mixer: nn.Module) -> str:
    """A word for it, from the name of its class: "holographic", "attention", "window", "resonance", ..."""
    return type(mixer).__name__.removesuffix("Mixer").lower()


@contextmanager
def without(mixers: Sequence[nn.Module]) -> Iterator[None]:
    """In this block these mixers give zeros."""
    with ExitStack() as hooks:
        for mixer in mixers:
            hooks.enter_context(mixer.register_forward_hook(_zeros))
        yield


def _zeros(mixer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """The output of a mixer with zeros in place of what it adds to the residual stream, the first tensor of several."""
    if isinstance(output, tuple):
        return torch.zeros_like(output[0]), *output[1:]
    return torch.zeros_like(output)


def score(model: Evaluated, documents: Sequence[str], options: Options, seconds: float | None = None) -> list[Row]:
    """What the mixers of a model are worth, one by one and all of a kind.

    Args:
        model: with its tokenizer.
        documents: the text, in blocks side by side.
        options: sizes.
        seconds: to spend; fewer windows are scored where they would take longer.

    Returns:
        A row for every mixer, with its `layer` from 0 on and its `kind`, and one for all mixers of a kind, whose
        `layer` is None: the `loss` of the whole model in nats per token, the loss `without` them, and the difference,
        what they are `worth`.

    Raises:
        HoloError: none of its blocks has a mixer.
    """
    mixers = mixers_of(model.model)
    if not mixers:
        raise HoloError(f"MODEL: {model.name!r}: {NOTHING}")
    ablations = _ablations(mixers)
    everything = scoring_windows(encode(model.needed_tokenizer(), documents), block_of(model, options))
    each = None if seconds is None else seconds / (1 + len(ablations))
    windows = chosen(model, everything, options, each)
    scored = partial(held_out_loss, model.model, windows, options.batch_size, pad_id(model))
    loss, rows = scored(), []
    for layer, kind, switched_off in ablations:
        with without(switched_off):
            lost = scored()
        row: Row = {"model": model.name, "layer": layer, "kind": kind, "mixers": len(switched_off)}
        rows.append(row | {"loss": loss, "without": lost, "worth": lost - loss, "windows": len(windows)})
    return rows


def _ablations(mixers: Sequence[nn.Module]) -> list[tuple[int | None, str, list[nn.Module]]]:
    """Layer, kind and what is switched off: every mixer, and then all of every kind."""
    kinds = [kind_of(mixer) for mixer in mixers]
    ablations: list[tuple[int | None, str, list[nn.Module]]] = [
        (layer, kind, [mixer]) for layer, (kind, mixer) in enumerate(zip(kinds, mixers, strict=True))
    ]
    for kind in dict.fromkeys(kinds):
        ablations.append((None, kind, [mixer for mixer in mixers if kind_of(mixer) == kind]))
    return ablations


def _nothing_to_ablate(model: Evaluated, seconds: float | None = None) -> list[Row]:
    return [{"model": model.name, "reason": NOTHING}]


def told(tables: Tables, folder: Path) -> str:
    """The section of the report."""
    pieces = []
    if rows := tables.get("ablations"):
        head = ("model", "without", ">mixers", ">nats per token", ">without", ">worth")
        cells = [
            (
                row["model"],
                _name(row),
                row["mixers"],
                f"{row['loss']:.3f}",
                f"{row['without']:.3f}",
                f"{row['worth']:.3f}",
            )
            for row in rows
        ]
        pieces.append(markdown_table(head, cells))
        pieces.append("A mixer that is worth nothing is one that the model does without; less than nothing, it harms.")
        bars = [row | {"name": f"{row['model']}, {_name(row)}"} for row in rows]
        draw_bars(
            bars, "name", "worth", folder / "branches.png", "What mixers are worth", "nats per token lost without them"
        )
        pieces.append("![What mixers are worth](branches.png)")
    pieces += [f"{row['model']} is left out: {row['reason']}." for row in tables.get("left_out", [])]
    return "\n\n".join(pieces)


def _name(row: Row) -> str:
    return f"all {row['kind']}" if row["layer"] is None else f"layer {row['layer']}, {row['kind']}"
