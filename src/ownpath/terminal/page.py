"""Parts of a page for people: lines, labelled facts and tables, as rich draws them.

Every string becomes ``rich.text.Text`` after its controls are escaped, so that neither a terminal's sequences nor
rich's own markup in a name is ever acted on. A table that is wider than the terminal takes two lines for each row.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, JustifyMethod, RenderableType, RenderResult
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
    """One line of text. A part that is a verdict's word gets its colour."""
    text = Text(style=style)
    for part in parts:
        text.append(printable(part), STYLES.get(part.strip(" :"), ""))
    return Wrapped(text, indent)


def fact(label: str, told: str, indent: int = 0) -> RenderableType:
    """One line: a label, a colon, and what it says."""
    return Wrapped(Text().append(f"{printable(label)}: ", "bold").append(printable(told)), indent)


def facts(rows: Iterable[tuple[str, str]]) -> RenderableType:
    """Labels with what they say beside them."""
    table = Table.grid(padding=(0, GAP, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, told in rows:
        table.add_row(Text(printable(label)), Text(printable(told), STYLES.get(told, "")))
    return table


@dataclass(frozen=True)
class Wrapped:
    """A text whose second and later lines on a terminal are indented further than its first."""

    text: Text
    indent: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        room = max(8, options.max_width - self.indent - GAP)
        for idx, wrapped in enumerate(self.text.wrap(console, room, overflow="fold")):
            wrapped.rstrip()
            yield Text(" " * (self.indent + (GAP if idx else 0))).append_text(wrapped)


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
        gap = _fitting_gap(widths, options.max_width)
        if gap:
            yield self._grid(cells, 0, widths, gap)
        else:
            for idx, row in enumerate(cells):
                yield from self._two_lines(row, widths, options.max_width, "" if idx else "bold")

    def _two_lines(self, row: tuple[str, ...], widths: list[int], width: int, style: str) -> RenderResult:
        """Draws the first cells, and the others below: in columns where these fit, else one after the other."""
        lead, rest, indent = row[: self.num_lead], row[self.num_lead :], 2 * GAP
        yield self._grid([lead], 0, widths, GAP, style) if len(lead) > 1 else Text(lead[0], style, overflow="fold")
        gap = _fitting_gap(widths[self.num_lead :], width - indent)
        if gap:
            yield Padding(self._grid([rest], self.num_lead, widths, gap, style), (0, 0, 0, indent), expand=False)
        elif any(rest):
            yield Wrapped(Text((" " * GAP).join(rest), style), indent)

    def _grid(
        self, cells: Sequence[tuple[str, ...]], first: int, widths: list[int], gap: int, style: str = ""
    ) -> RenderableType:
        """Draws columns from ``first`` on; of several rows, the first is the headings."""
        table = Table.grid(padding=(0, gap, 0, 0))
        for idx in range(first, first + len(cells[0])):
            justify: JustifyMethod = "right" if idx in self.to_right else "left"
            table.add_column(width=widths[idx], overflow="fold", justify=justify)
        for number, row in enumerate(cells):
            row_style = "bold" if len(cells) > 1 and number == 0 else style
            table.add_row(*(Text(cell, STYLES.get(cell, "")) for cell in row), style=row_style)
        return table


def _fitting_gap(widths: list[int], available: int) -> int:
    """Returns how many spaces can be between columns, at most ``GAP``; 0 where they do not fit."""
    return next((gap for gap in range(GAP, 0, -1) if sum(widths) + gap * len(widths) <= available), 0)
