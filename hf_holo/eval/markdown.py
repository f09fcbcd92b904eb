"""Tables in Markdown, and pages of which a part is written by a command."""

from collections.abc import Iterable, Sequence

from ..errors import HoloError


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown. Columns whose name starts with ">" are aligned to the right."""
    names = [name.removeprefix(">") for name in head]
    rules = ["--:" if name.startswith(">") else "---" for name in head]
    lines = [_markdown_row(names), f"|{'|'.join(rules)}|"]
    return "\n".join([*lines, *map(_markdown_row, rows)])


def filled(page: str, mark: str, content: str) -> str:
    """The page with `content` between the two marks of that name, in place of what is there.

    Raises:
        HoloError: the page has no such marks.
    """
    begin, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
    if begin not in page or end not in page:
        raise HoloError(f"page: it has no marks {begin} and {end}")
    return f"{page.partition(begin)[0]}{begin}\n{content}\n{end}{page.partition(end)[2]}"


def _markdown_row(cells: Sequence[object]) -> str:
    return "|" + "".join(f" {cell} |" if str(cell) else " |" for cell in cells)
