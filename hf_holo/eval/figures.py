"""Pictures of results: lines of one measure over another, a line for each model; and bars."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import replacing


def draw_lines(
    rows: Sequence[Mapping[str, Any]],
    x: str,
    y: str,
    path: Path,
    title: str,
    labels: tuple[str, str],
    by: str = "model",
    log_y: bool = False,
) -> None:
    """Draw a PNG with a line for each value of `by`.

    Args:
        rows: with the columns `x`, `y` and `by`; those whose `y` is None are left out.
        x, y: names of columns; the axis of `x` has steps of two.
        path: of the picture.
        title: above it.
        labels: of both axes.
        by: name of the column that tells lines apart.
        log_y: whether the other axis is logarithmic.
    """
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(row[by] for row in rows):
        points = sorted((row[x], row[y]) for row in rows if row[by] == name and row.get(y) is not None)
        if points:
            axes.plot(*zip(*points, strict=True), "o-", markersize=4, linewidth=1.4, label=name)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    if log_y:
        axes.set_yscale("log")
    axes.set(xlabel=labels[0], ylabel=labels[1], title=title)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def draw_bars(
    rows: Sequence[Mapping[str, Any]], name: str, value: str, path: Path, title: str, label: str, by: str = "kind"
) -> None:
    """Draw a PNG with a bar for each row, the first at the top.

    Args:
        rows: with the columns `name`, `value` and `by`.
        name, value: names of columns: what stands next to a bar, and how long it is.
        path: of the picture.
        title: above it.
        label: of the axis of values.
        by: name of the column whose values have a colour each.
    """
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(8, 1.2 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for group in dict.fromkeys(row[by] for row in rows):
        places = [place for place, row in enumerate(rows) if row[by] == group]
        axes.barh(places, [rows[place][value] for place in places], label=group)
    axes.set_yticks(range(len(rows)), [row[name] for row in rows])
    axes.invert_yaxis()
    axes.set(xlabel=label, title=title)
    axes.grid(axis="x", alpha=0.3)
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
