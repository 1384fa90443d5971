"""Plots the table: time over tokens for each shape, every contender, and the floor."""

from collections.abc import Sequence
from pathlib import Path

from ownpath.bench.row import Row


def plot_rows(rows: Sequence[Row], title: str, path: Path) -> None:
    """Writes a PNG with one panel for each shape.

    Errors: ValueError when matplotlib is not installed, or when there is nothing to draw.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install 'ownpath[bench]'") from error
    timed = [row for row in rows if row.timing is not None]
    shapes = list(dict.fromkeys(row.case.shape for row in timed))
    if not shapes:
        raise ValueError("--plot: no contender has a time to draw")
    columns = min(len(shapes), 3)
    lines = -(-len(shapes) // columns)
    figure = Figure(figsize=(5.5 * columns, 4.2 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel in panels[len(shapes) :]:
        panel.set_axis_off()
    for panel, shape in zip(panels, shapes, strict=False):
        _draw(panel, [row for row in timed if row.case.shape == shape], shape)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _draw(panel: object, rows: Sequence[Row], shape: str) -> None:
    """Draws a panel with logarithmic axes. A contender with wrong results is dashed and labelled as wrong."""
    from matplotlib.axes import Axes

    assert isinstance(panel, Axes)
    for name in dict.fromkeys(row.contender for row in rows):
        own = [row for row in rows if row.contender == name]
        wrong = any(row.status != "ok" for row in own)
        times = [row.timing.us for row in own if row.timing is not None]
        label, style = (f"{name} (wrong)", "--") if wrong else (name, "-")
        panel.plot([row.case.num_tokens for row in own], times, style, marker="o", label=label)
    floors = sorted({(row.case.num_tokens, row.case.floor_us) for row in rows if row.case.floor_us is not None})
    if floors:
        panel.plot([tokens for tokens, _ in floors], [us for _, us in floors], ":", color="black", label="floor")
    panel.set(title=shape, xlabel="tokens", ylabel="us", xscale="log", yscale="log")
    panel.grid(visible=True, which="both", alpha=0.3)
    panel.legend()
