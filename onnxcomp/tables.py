"""Lines and tables for the terminal. Names come from models: never markup, and escaped where they cannot be printed."""

from collections.abc import Iterable, Iterator, Sequence

from rich.table import Table
from rich.text import Text

from onnxcomp.wording import printable

_NAMES = 3
_WORDS = {
    "crossing",
    "layers",
    "made by",
    "note",
    "op",
    "output",
    "read by",
    "reason",
    "verdict",
    "what",
    "what it does",
}
"""Headings of columns that hold words."""


def line(text: str = "", style: str = "") -> Text:
    """One line, in one of rich's styles."""
    return Text(printable(text), style=style)


def columns(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table without lines, its numbers aligned to the right."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for place, heading in enumerate(headings):
        numbers = place > 0 and heading not in _WORDS
        table.add_column(line(heading), justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(line, row))
    return table


def heading(text: str) -> Iterator[Text]:
    """What stands above a part."""
    yield line()
    yield line(text, "bold")


def notes(told: Sequence[str]) -> Iterator[Text]:
    """What the user should know, where there is anything."""
    if told:
        yield from heading("Notes")
        yield from (line(f"- {note}") for note in told)


def some(names: Sequence[str]) -> str:
    """The first few of many names."""
    return ", ".join(names[:_NAMES]) + (", ..." if len(names) > _NAMES else "")
