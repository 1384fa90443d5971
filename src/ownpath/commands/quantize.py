"""Write a checkpoint with NVFP4 weights, in ModelOpt's layout, from a BF16 or native DeepSeek-V4 one.

MXFP4 experts are cast: their codes stay, and nothing is lost unless a matrix spans more than 18 powers of two. Other
weights are quantised from their values. Everything else is carried over byte for byte. An interrupted run goes on
where it stopped. --calibrate runs the source model over a text and writes each weight's input_scale; without it that
is 1.0. Kernels with BF16 activations do not read it.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ownpath.commands.arguments import device_here, file_to_read, folder_to_write, model_folder, whole_number
from ownpath.terminal.console import show
from ownpath.terminal.progress import Progress
from ownpath.terminal.text import counted, size_text

if TYPE_CHECKING:
    from ownpath.commands.arguments import Subparsers


def add_parser(subparsers: "Subparsers") -> argparse.ArgumentParser:
    """``ownpath quantize SRC DST``"""
    parser = subparsers.add_parser("quantize", help="write an NVFP4 checkpoint", description=__doc__)
    parser.add_argument("source", type=model_folder, metavar="SRC", help="model folder to read")
    parser.add_argument(
        "target", type=folder_to_write, metavar="DST", help="folder to write; it must hold no checkpoint"
    )
    parser.add_argument(
        "--scope",
        choices=("experts", "full"),
        default="experts",
        help="routed experts only, or attention and shared experts too (default: experts)",
    )
    parser.add_argument("--calibrate", type=file_to_read, metavar="TEXT", help="text file to run the source model over")
    parser.add_argument("--device", type=device_here, default="cpu", help="torch device for --calibrate (default: cpu)")
    parser.add_argument(
        "--max-shard-mb", type=whole_number(1), default=4096, metavar="MB", help="largest shard (default: 4096)"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Quantises and prints what became of the weights. Errors: ValueError naming the file, field or tensor."""
    with Progress("starting"):
        from ownpath.calibration import calibrate
        from ownpath.quantize.run import Options, quantize_checkpoint, require_free
        from ownpath.quantize.steps import QuantizeScope
        from ownpath.terminal.page import fact, facts

    require_free(args.source, args.target)
    scope, scales = QuantizeScope(args.scope), {}
    if args.calibrate is not None:
        text = _text(args.calibrate)
        with Progress("calibrating"):
            scales = calibrate(args.source, text, scope, args.device)
    with Progress("quantising") as progress:
        report = quantize_checkpoint(
            args.source,
            args.target,
            Options(scope, args.max_shard_mb * 10**6, scales),
            lambda done, total, num_bytes: progress(done, total, f"shards, {size_text(num_bytes)} written"),
        )
    counts = report.counts
    weights, shards = counted(report.num_converted, "weight is", "weights are"), counted(report.num_shards, "shard")
    rows: list[tuple[str, str]] = []
    if counts.num_cast:
        share = 100 * (1 - counts.num_rounded / counts.num_cast)
        rows.append(("cast from MXFP4", f"{counted(counts.num_cast, 'block')}, {share:.4f} % of them without loss"))
    if counts.num_quantized:
        rows.append(("quantised from their values", counted(counts.num_quantized, "weight")))
    if report.redone:
        rows.append(("made again, changed since an earlier run", ", ".join(report.redone)))
    rows += [("not copied", f"{one.name}: {one.left_out}") for one in report.left_out]
    show(fact(str(args.target), f"{weights} NVFP4, {size_text(report.num_bytes)} in {shards}"), facts(rows))
    return 0


def _text(path: Path) -> str:
    """Reads the calibration text. Errors: ValueError naming a file that is no text."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from None
