"""Write a checkpoint with NVFP4 weights, in ModelOpt's layout, from a BF16 or native DeepSeek-V4 one.

MXFP4 experts are cast: their codes stay, and nothing is lost unless a matrix spans more than 18 powers of two. Other
weights are quantised from their values. Everything else is carried over byte for byte. An interrupted run goes on
where it stopped. --calibrate runs the source model over a text and writes each weight's input_scale; without it that
is 1.0. Kernels with BF16 activations do not read it.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ownpath.commands.arguments import positive_int

if TYPE_CHECKING:
    from ownpath.commands.arguments import Subparsers


def add_parser(subparsers: "Subparsers") -> argparse.ArgumentParser:
    """``ownpath quantize SRC DST``"""
    parser = subparsers.add_parser("quantize", help="write an NVFP4 checkpoint", description=__doc__)
    parser.add_argument("source", type=Path, metavar="SRC", help="model folder to read")
    parser.add_argument("target", type=Path, metavar="DST", help="folder to write; it must hold no checkpoint")
    parser.add_argument(
        "--scope",
        choices=("experts", "full"),
        default="experts",
        help="routed experts only, or attention and shared experts too (default: experts)",
    )
    parser.add_argument("--calibrate", type=Path, metavar="TEXT", help="text file to run the source model over")
    parser.add_argument("--device", default="cpu", help="torch device for --calibrate (default: cpu)")
    parser.add_argument(
        "--max-shard-mb", type=positive_int, default=4096, metavar="MB", help="largest shard (default: 4096)"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Quantises and prints what became of the weights. Errors: ValueError naming the file, field or tensor."""
    from ownpath.calibration import calibrate
    from ownpath.quantize.run import Options, quantize_checkpoint, require_free
    from ownpath.quantize.steps import QuantizeScope
    from ownpath.startup import CountingBar

    require_free(args.source, args.target)
    scope, scales = QuantizeScope(args.scope), {}
    if args.calibrate is not None:
        scales = calibrate(args.source, _text(args.calibrate), scope, args.device)
    show = CountingBar("quantising")
    report = quantize_checkpoint(
        args.source,
        args.target,
        Options(scope, args.max_shard_mb * 10**6, scales),
        lambda done, total, num_bytes: show(done, total, f"{num_bytes / 1e9:.1f} GB"),
    )
    show.end()
    counts = report.counts
    print(f"{args.target}: {report.num_converted} weights are NVFP4, {report.num_bytes / 1e9:.2f} GB "
          f"in {report.num_shards} shards")  # fmt: skip
    if counts.num_cast:
        share = 100 * (1 - counts.num_rounded / counts.num_cast)
        print(f"cast from MXFP4: {counts.num_cast} blocks, {share:.4f}% without loss")
    if counts.num_quantized:
        print(f"quantised from their values: {counts.num_quantized} weights")
    if report.redone:
        print(f"made again, for they had changed since an earlier run: {', '.join(report.redone)}")
    for one in report.left_out:
        print(f"not copied: {one.name!r}: {one.left_out}")
    return 0


def _text(path: Path) -> str:
    """Reads the calibration text. Errors: ValueError naming a file that is no text."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from None
