"""Draws the loss curve that ``train_tiny.py`` saved.

    python tools/plot_tiny.py --curve runs/tiny-v4/curve.json --out docs

Writes ``tiny-v4-loss.json`` (the recipe and the curve, rounded) and ``tiny-v4-loss.png`` into ``--out``.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def round_curve(content: dict[str, Any]) -> dict[str, Any]:
    """Returns the saved run with the curve's numbers rounded to five significant digits."""
    curve = [{key: float(f"{value:.5g}") for key, value in entry.items()} for entry in content["curve"]]
    return {**content, "curve": curve}


def draw(content: dict[str, Any], path: Path) -> None:
    """Writes a PNG: the loss of each kind of rows over the steps."""
    curve, recipe = content["curve"], content["recipe"]
    figure = Figure(figsize=(7.5, 3.75), layout="constrained")
    axes = figure.subplots()
    for kind in recipe["num_rows"]:
        seen = [(entry["step"], entry[f"{kind}_loss"]) for entry in curve if f"{kind}_loss" in entry]
        axes.plot(*zip(*seen, strict=True), label=f"{kind} rows", linewidth=1)
    last_part = recipe["quantised_from"] * recipe["num_steps"]
    axes.axvline(last_part, color="grey", linestyle="--", label="quantised weights")
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.grid(visible=True, alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curve", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    content = round_curve(json.loads(arguments.curve.read_text(encoding="utf-8")))
    text = json.dumps(content).replace('{"step"', '\n{"step"')
    (arguments.out / "tiny-v4-loss.json").write_text(text + "\n", encoding="utf-8")
    draw(content, arguments.out / "tiny-v4-loss.png")


if __name__ == "__main__":
    main()
