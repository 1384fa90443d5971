"""Draws the loss curve that ``train_tiny.py`` saved.

    python tools/plot_tiny.py --curve runs/tiny-v4/curve.json --out docs

Writes ``tiny-v4-loss.json`` (the recipe and the curve, rounded) and ``tiny-v4-loss.svg`` into ``--out``.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

WIDTH, HEIGHT, MARGIN = 720, 360, 48
COLOURS = {
    "brief": "#1b6ca8",
    "short": "#3aa655",
    "request": "#7a3fb0",
    "middle": "#d17b0f",
    "long": "#b0305c",
    "tools": "#222222",
    "many tools": "#8a8a8a",
}
LOWEST, HIGHEST = 0.05, 10.0


def rounded(content: dict[str, Any]) -> dict[str, Any]:
    """Returns the saved run with the curve's numbers rounded to five significant digits."""
    curve = [{key: float(f"{value:.5g}") for key, value in entry.items()} for entry in content["curve"]]
    return {**content, "curve": curve}


def place(step: float, loss: float, num_steps: float) -> tuple[float, float]:
    """Returns a pixel position: steps linear from left to right, loss logarithmic from bottom to top."""
    height = math.log(max(loss, LOWEST) / LOWEST) / math.log(HIGHEST / LOWEST)
    x = MARGIN + (WIDTH - 2 * MARGIN) * step / num_steps
    return round(x, 1), round(HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * height, 1)


def svg(content: dict[str, Any]) -> str:
    curve, recipe = content["curve"], content["recipe"]
    num_steps = recipe["num_steps"]
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"',
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for loss in (0.1, 0.3, 1.0, 3.0, 10.0):
        x, y = place(0, loss, num_steps)
        lines.append(f'<path d="M{x} {y}H{WIDTH - MARGIN}" stroke="#ddd"/><text x="8" y="{y + 4}">{loss:g}</text>')
    x, y = place(recipe["quantised_from"] * num_steps, LOWEST, num_steps)
    lines.append(f'<path d="M{x} {MARGIN}V{y}" stroke="#888" stroke-dasharray="4"/>')
    lines.append(f'<text x="{x + 4}" y="{MARGIN + 12}">quantised weights from here</text>')
    for number, (kind, colour) in enumerate(COLOURS.items()):
        seen = [(e["step"], e[f"{kind}_loss"]) for e in curve if f"{kind}_loss" in e]  # not every kind from the start
        points = " ".join("{},{}".format(*place(step, loss, num_steps)) for step, loss in seen)
        lines.append(f'<polyline points="{points}" fill="none" stroke="{colour}"/>')
        lines.append(f'<text x="{WIDTH - 120}" y="{MARGIN + 14 * number + 30}" fill="{colour}">{kind} rows</text>')
    lines.append(f'<text x="{WIDTH // 2 - 60}" y="{HEIGHT - 14}">step (0 to {num_steps}), loss</text></svg>')
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curve", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    content = rounded(json.loads(arguments.curve.read_text(encoding="utf-8")))
    text = json.dumps(content).replace('{"step"', '\n{"step"')
    (arguments.out / "tiny-v4-loss.json").write_text(text + "\n", encoding="utf-8")
    (arguments.out / "tiny-v4-loss.svg").write_text(svg(content), encoding="utf-8")


if __name__ == "__main__":
    main()
