"""Measure the runners beside other systems' kernels, or tune a kernel family's table."""

import argparse
import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeVar

from ownpath.commands.arguments import device_here, file_to_write, number, whole_number
from ownpath.formats import FP8_BLOCK, NVFP4
from ownpath.ops import OpKind
from ownpath.terminal.console import show
from ownpath.terminal.progress import Progress

if TYPE_CHECKING:
    from ownpath.bench.contender import Contender
    from ownpath.bench.measure import Settings
    from ownpath.bench.row import Row
    from ownpath.bench.shapes import LinearShape, MoeShape
    from ownpath.commands.arguments import Subparsers

KINDS = {"moe": (OpKind.MOE, NVFP4), "linear": (OpKind.LINEAR, NVFP4), "fp8": (OpKind.LINEAR, FP8_BLOCK)}
"""Benchmark -> the operation and the weights' format: every registered kernel of these may take part by its name."""
_Some = TypeVar("_Some", bound="Contender")


def add_parser(subparsers: "Subparsers") -> argparse.ArgumentParser:
    """``ownpath bench moe|linear|fp8``, ``ownpath bench --tune FAMILY``"""
    parser = subparsers.add_parser("bench", help="measure kernels beside other systems'", description=__doc__)
    parser.add_argument("bench", nargs="?", choices=KINDS, metavar="BENCH", help="moe, linear (NVFP4) or fp8")
    parser.add_argument("--tune", metavar="FAMILY", help="run a kernel family's candidates and write its table")
    parser.add_argument("--shape", action="append", default=[], metavar="NAME", help="repeatable (default: V4-Flash's)")
    parser.add_argument(
        "--tokens", type=_counts, metavar="N,N,...", help="token counts (default: those of the published tables)"
    )
    parser.add_argument(
        "--contenders", metavar="A,B,...", help="who takes part; a kernel of ours by its name too (default: everyone)"
    )
    parser.add_argument(
        "--device", type=device_here, default="cuda", help="cuda; cpu only tries the harness (default: cuda)"
    )
    parser.add_argument("--seed", type=whole_number(0), default=0, help="of operands and routing (default: 0)")
    parser.add_argument(
        "--seconds", type=number(0), default=0.5, help="least replay time of a measurement (default: 0.5)"
    )
    parser.add_argument("--out", type=file_to_write, metavar="FILE", help="append one JSON line for each row")
    parser.add_argument("--plot", type=file_to_write, metavar="FILE", help="write a PNG (needs the extra 'bench')")
    parser.add_argument("--commit", default="unknown", metavar="ID", help="recorded with every row")
    return parser


def run(args: argparse.Namespace) -> int:
    """Prints the table and writes the requested files; returns 1 if one of our own rows has a wrong answer.

    Errors: ValueError for an unknown name or a device that is not there.
    """
    if (args.bench is None) == (args.tune is None):
        raise ValueError("bench: name one of moe, linear and fp8, or give --tune FAMILY")
    if args.tune is not None:
        return _tune(args)
    _check_shapes(args)
    with Progress("starting"):
        from ownpath.bench.measure import Settings
        from ownpath.bench.table import table_page

        settings = Settings.of(args.device, args.seed, args.seconds)
    rows: list[Row] = []
    with Progress("measuring") as progress:
        for row in _rows(args, settings):
            rows.append(row)
            progress.told(f"{len(rows)} measured, the last {row.contender} on {row.case.shape}")
    show(*table_page(rows, _title(args, settings)))
    _keep(args, settings, rows)
    return 0 if all(row.status == "ok" for row in rows if not row.is_peer) else 1


def _check_shapes(args: argparse.Namespace) -> None:
    """Looks the shapes up before anything heavy is imported. Errors: ValueError naming one that is unknown."""
    from ownpath.bench import shapes

    for name in args.shape:
        (shapes.moe_shape if args.bench == "moe" else shapes.linear_shape)(name)


def _rows(args: argparse.Namespace, settings: "Settings") -> "Iterator[Row]":
    """Benchmarks shape by shape, so that only one shape's weights are in memory."""
    from ownpath.bench import shapes

    if args.bench == "moe":
        for moe_shape in map(shapes.moe_shape, args.shape or ["v4-flash"]):
            yield from _moe_rows(args, settings, moe_shape)
        return
    for shape in [shapes.linear_shape(name) for name in args.shape] or shapes.LINEAR_SHAPES[:5]:
        yield from (_nvfp4_rows if args.bench == "linear" else _fp8_rows)(args, settings, shape)


def _moe_rows(args: argparse.Namespace, settings: "Settings", shape: "MoeShape") -> "Iterator[Row]":
    from ownpath.bench.contender import MoeContender
    from ownpath.bench.moe import run_moe
    from ownpath.bench.ours import OwnMoe, own_kernels
    from ownpath.bench.peers.humming import HummingMoe
    from ownpath.bench.shapes import MOE_TOKENS

    everyone: list[MoeContender] = [OwnMoe(), HummingMoe()]
    named: list[MoeContender] = [OwnMoe(kernel) for kernel in own_kernels(*KINDS["moe"], args.device)]
    return run_moe(settings, shape, args.tokens or MOE_TOKENS, _chosen(everyone, named, args.contenders))


def _nvfp4_rows(args: argparse.Namespace, settings: "Settings", shape: "LinearShape") -> "Iterator[Row]":
    from ownpath.bench.contender import Nvfp4Contender
    from ownpath.bench.linear import NVFP4_BENCH, run_linear
    from ownpath.bench.ours import OwnNvfp4Linear, own_kernels
    from ownpath.bench.peers.cublas import CublasNvfp4
    from ownpath.bench.peers.humming import HummingNvfp4
    from ownpath.bench.peers.quack import QuackNvfp4
    from ownpath.bench.shapes import LINEAR_TOKENS

    everyone: list[Nvfp4Contender] = [OwnNvfp4Linear(), HummingNvfp4(), QuackNvfp4(), CublasNvfp4()]
    named: list[Nvfp4Contender] = [OwnNvfp4Linear(kernel) for kernel in own_kernels(*KINDS["linear"], args.device)]
    chosen = _chosen(everyone, named, args.contenders)
    return run_linear(NVFP4_BENCH, settings, shape, args.tokens or LINEAR_TOKENS, chosen)


def _fp8_rows(args: argparse.Namespace, settings: "Settings", shape: "LinearShape") -> "Iterator[Row]":
    from ownpath.bench.contender import Fp8Contender
    from ownpath.bench.linear import FP8_BENCH, run_linear
    from ownpath.bench.ours import OwnFp8Linear, own_kernels
    from ownpath.bench.peers.cublas import CublasFp8
    from ownpath.bench.shapes import LINEAR_TOKENS

    everyone: list[Fp8Contender] = [OwnFp8Linear(), CublasFp8()]
    named: list[Fp8Contender] = [OwnFp8Linear(kernel) for kernel in own_kernels(*KINDS["fp8"], args.device)]
    chosen = _chosen(everyone, named, args.contenders)
    return run_linear(FP8_BENCH, settings, shape, args.tokens or LINEAR_TOKENS, chosen)


def _chosen(everyone: list[_Some], named: list[_Some], names: str | None) -> list[_Some]:
    """Selects contenders by name. named: those that take part only when asked for."""
    if names is None:
        return everyone
    known = {contender.name: contender for contender in (*everyone, *named)}
    wanted = names.split(",")
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"--contenders: {', '.join(unknown)} not among {', '.join(known)}")
    return [known[name] for name in wanted]


def _counts(text: str) -> tuple[int, ...]:
    return tuple(map(whole_number(1), text.split(",")))


def _title(args: argparse.Namespace, settings: "Settings") -> str:
    from ownpath.bench.record import device_name

    kind = "" if args.device.startswith("cuda") else " — a CPU's wall clock: says nothing about a GPU"
    return f"bench {args.bench} on {device_name(args.device)}, {settings.timer.name}, seed {args.seed}{kind}"


def _keep(args: argparse.Namespace, settings: "Settings", rows: "list[Row]") -> None:
    """Writes JSON lines before the plot, so that a missing matplotlib does not cost the numbers."""
    from ownpath.bench.plot import plot_rows
    from ownpath.bench.record import append_lines, provenance, row_dict

    if args.out is not None:
        origin = provenance(args.device, args.commit, _command(args), settings.timer.name)
        append_lines(args.out, [row_dict(row, args.seed, origin) for row in rows])
    if args.plot is not None:
        plot_rows(rows, _title(args, settings), args.plot)


def _tune(args: argparse.Namespace) -> int:
    from ownpath.bench.tune import load_family, tune

    family = load_family(args.tune, args.device)
    from ownpath.bench.record import provenance
    from ownpath.bench.timing import choose_timer

    timer = choose_timer(args.device)
    origin = provenance(args.device, args.commit, _command(args), timer.name)
    tune(args.tune, family.candidates, family.run, args.out or family.table, origin, report=_show_line)
    return 0


def _show_line(told: str) -> None:
    from ownpath.terminal.page import line

    show(line(told))


def _command(args: argparse.Namespace) -> str:
    """Returns the command line that reproduces the rows, without output paths."""
    words = ["ownpath", "bench", args.bench] if args.tune is None else ["ownpath", "bench", "--tune", args.tune]
    for shape in args.shape:
        words += ["--shape", shape]
    for option in ("tokens", "contenders", "device", "seed", "seconds"):
        if (value := getattr(args, option)) is not None:
            words += [f"--{option}", ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return shlex.join(words)
