"""Parts of a page for people: lines, labelled facts and tables, as rich draws them.

Every string becomes ``rich.text.Text`` after its controls are escaped, so that neither a terminal's sequences nor
rich's own markup in a name is ever acted on. A table that is wider than the terminal takes two lines for each row.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ownpath.terminal.text import printable

GAP = 2
STYLES: Mapping[str, str] = {
    "pass": "green",
    "PASS": "bold green",
    "FAIL": "bold red",
    "AGREE": "bold green",
    "DIFFER": "bold red",
    "warning": "yellow",
    "skipped": "dim",
}
"""Cell or word -> its style on a terminal with colours."""


def line(*parts: str, style: str = "", indent: int = 0) -> RenderableType:
    """One line of text; wrapped lines keep its indent. A part that is a verdict's word gets its colour."""
    text = Text(style=style, overflow="fold")
    for part in parts:
        text.append(printable(part), STYLES.get(part.strip(" :"), ""))
    return Padding(text, (0, 0, 0, indent), expand=False) if indent else text


def heading(text: str) -> RenderableType:
    """A line that stands out, behind an empty one."""
    return Text(f"\n{printable(text)}", style="bold", overflow="fold")


def fact(label: str, told: str, indent: int = 0) -> RenderableType:
    """One line: a label, a colon, and what it says."""
    text = Text(overflow="fold").append(f"{printable(label)}: ", "bold").append(printable(told))
    return Padding(text, (0, 0, 0, indent), expand=False) if indent else text


def facts(rows: Iterable[tuple[str, str]], indent: int = 0) -> RenderableType:
    """Labels with what they say beside them."""
    table = Table.grid(padding=(0, GAP, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, told in rows:
        table.add_row(Text(printable(label)), Text(printable(told), STYLES.get(told, "")))
    return Padding(table, (0, 0, 0, indent), expand=False)


@dataclass(frozen=True)
class Listing:
    """A table. Where it is wider than the terminal, the first ``num_lead`` cells of a row take a line of their own.

    headings: one for each column. to_right: columns of numbers.
    """

    headings: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    num_lead: int = 1
    to_right: frozenset[int] = frozenset()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        cells = [tuple(map(printable, row)) for row in (self.headings, *self.rows)]
        widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
        if sum(widths) + GAP * (len(widths) - 1) <= options.max_width:
            yield self._grid(cells, widths, 0)
            return
        lead, rest = widths[: self.num_lead], _shrunk(widths[self.num_lead :], options.max_width - 2 * GAP)
        for idx, row in enumerate(cells):
            yield self._grid([row[: self.num_lead]], lead, 0, is_heading=idx == 0)
            below = self._grid([row[self.num_lead :]], rest, self.num_lead, is_heading=idx == 0)
            if any(row[self.num_lead :]):
                yield Padding(below, (0, 0, 0, 2 * GAP), expand=False)

    def _grid(
        self, cells: Sequence[tuple[str, ...]], widths: list[int], first: int, is_heading: bool = True
    ) -> RenderableType:
        """Draws columns from ``first`` on. is_heading: the first row is the headings."""
        table = Table.grid(padding=(0, GAP, 0, 0), pad_edge=False)
        for idx, width in enumerate(widths, start=first):
            table.add_column(width=width, overflow="fold", justify="right" if idx in self.to_right else "left")
        for number, row in enumerate(cells):
            style = "bold" if is_heading and number == 0 else ""
            table.add_row(*(Text(cell, STYLES.get(cell, "")) for cell in row), style=style)
        return table


def _shrunk(widths: list[int], available: int) -> list[int]:
    """Narrows the widest columns until all of them and their gaps fit."""
    shrunk = list(widths)
    while shrunk and max(shrunk) > 8 and sum(shrunk) + GAP * (len(shrunk) - 1) > available:
        shrunk[shrunk.index(max(shrunk))] -= 1
    return shrunk
