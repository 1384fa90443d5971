"""Measure kernels beside other systems' kernels, or a whole decode step; or tune a kernel family's table."""

import argparse
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ownpath.bench.benches import BENCHES
from ownpath.commands.arguments import cache_format_of, device_here, file_to_write, number, numerics_of, whole_number
from ownpath.commands.rank_options import add_ranks_arguments, parallel_of
from ownpath.commands.ranks import beside, rank_of
from ownpath.commands.start import starting
from ownpath.formats import CacheFormat
from ownpath.official import numerics_name
from ownpath.ranks.started import end_with_parent, is_rank
from ownpath.terminal.console import show
from ownpath.terminal.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Callable

    from ownpath.bench.measure import Settings
    from ownpath.bench.request import BenchRequest
    from ownpath.bench.row import Row
    from ownpath.commands.arguments import Subparsers
    from ownpath.ranks.group import Group

_STARTS_RANKS = "parallel"
"""The bench that starts its ranks itself, a rank for each GPU unless ``--ranks`` says how many."""
_SHARED_OPTIONS = ("layers", "export", "expert_sets")
_OWN_OPTIONS = {
    "step": ("context", *_SHARED_OPTIONS, "by_gate", "slots"),
    "prompt": (*_SHARED_OPTIONS, "by_gate", "slots", "chunks", "cache_format", "numerics"),
    "drafts": ("context", *_SHARED_OPTIONS, "accepted"),
}
_STEP_OPTIONS = tuple(dict.fromkeys(name for names in _OWN_OPTIONS.values() for name in names))


def add_parser(subparsers: "Subparsers") -> argparse.ArgumentParser:
    """``ownpath bench moe|linear|...``, ``ownpath bench --tune FAMILY``"""
    parser = subparsers.add_parser("bench", help="measure kernels beside other systems'", description=__doc__)
    told = "; ".join(f"{name}: {bench.about}" for name, bench in BENCHES.items())
    parser.add_argument("bench", nargs="?", choices=BENCHES, metavar="BENCH", help=told)
    parser.add_argument("--tune", metavar="FAMILY", help="run a kernel family's candidates and write its table")
    parser.add_argument(
        "--shape",
        action="append",
        default=[],
        metavar="NAME",
        help="repeatable; of cases with several words in their names, all that have these (default: V4-Flash's or all)",
    )
    parser.add_argument(
        "--tokens", type=_counts, metavar="N,N,...", help="token counts (default: those of the published tables)"
    )
    parser.add_argument(
        "--contenders", metavar="A,B,...", help="who takes part; a kernel of ours by its name too (default: everyone)"
    )
    parser.add_argument(
        "--library",
        action="append",
        default=[],
        type=_library,
        metavar="SYSTEM=FILE",
        help="another system's library: flashmla=.../_flashmla_C.abi3.so, vllm=.../_C.abi3.so",
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
    _add_step_options(parser.add_argument_group("bench step, bench prompt and bench drafts"))
    add_ranks_arguments(parser.add_argument_group("bench step and bench parallel"))
    return parser


def _add_step_options(group: "argparse._ArgumentGroup") -> None:
    group.add_argument("--context", type=whole_number(1), metavar="N", help="step: tokens in each row's caches (1024)")
    group.add_argument("--layers", type=whole_number(1), metavar="N", help="the first layers only (default: all)")
    group.add_argument(
        "--export",
        choices=("nvidia", "full", "native"),
        help="experts and dense weights: NVFP4 and FP8 (nvidia), NVFP4 both (full), MXFP4 and FP8 (native)",
    )
    group.add_argument(
        "--expert-sets",
        type=whole_number(1),
        metavar="N",
        help="sets of experts that the layers share (24; over several ranks each layer has its own)",
    )
    group.add_argument(
        "--by-gate",
        action="store_true",
        default=None,
        help="let the gate choose; with random weights rows then choose the same experts too often (default: uniform)",
    )
    group.add_argument(
        "--slots", action="store_true", default=None, help="also the time of each kind of slot, by the profiler"
    )
    group.add_argument("--chunks", type=_counts, metavar="N,N,...", help="prompt: most tokens of a step (8192)")
    names = "|".join(CacheFormat)
    group.add_argument("--cache-format", type=cache_format_of, metavar=names, help="prompt: of the keys (bf16)")
    group.add_argument(
        "--numerics",
        type=numerics_of,
        metavar="plain|official|STEP,...",
        help="prompt: official steps, such as fp8_inputs, which products on FP8 tensor cores need (plain)",
    )
    group.add_argument(
        "--accepted",
        type=number(0, 1),
        metavar="P",
        help="bench drafts: the share of guesses that are accepted by force, as random weights guess none (0.8)",
    )


def run(args: argparse.Namespace) -> int:
    """Prints the table and writes the requested files; returns 1 if one of our own rows has a wrong answer.

    Errors: ValueError for an unknown name or a device that is not there.
    """
    if (args.bench is None) == (args.tune is None):
        *names, last = BENCHES
        raise ValueError(f"bench: name one of {', '.join(names)} and {last}, or give --tune FAMILY")
    if args.tune is not None:
        return _tune(args)
    _check_names(args)
    if args.bench == _STARTS_RANKS:
        end_with_parent(os.environ)
        args.device = _own_device(args)
        with starting(args.device):
            asked = _asked(args, None)
        return _follow(args, asked) if _is_follower(os.environ) else _measure(args, asked)
    rank = rank_of(args, takes_data=True)
    if args.ranks > 1 and args.device != "cpu":
        args.device = f"{args.device}:{rank}"
    with starting(args.device):
        BENCHES[args.bench].load()
        asked = _asked(args, None)
    with beside(args, rank) as group:
        asked = asked if group is None else _asked(args, group)
        return _measure(args, asked) if rank == 0 else _follow(args, asked)


def _own_device(args: argparse.Namespace) -> str:
    """Returns this process's device: of several ranks each has the one of its number."""
    is_numbered = args.device == "cuda" and is_rank(os.environ)
    return f"cuda:{os.environ['LOCAL_RANK']}" if is_numbered else str(args.device)


def _is_follower(environment: Mapping[str, str]) -> bool:
    """Returns True in a rank that measures with the first one, which shows the rows."""
    return is_rank(environment) and environment["RANK"] != "0"


def _measure(args: argparse.Namespace, asked: "BenchRequest") -> int:
    from ownpath.bench.table import table_page

    rows: list[Row] = []
    keep = _keeper(args, asked.settings)
    with Progress("measuring") as progress:
        for row in BENCHES[args.bench].load()(asked):
            rows.append(row)
            keep(row)
            progress.told(f"{len(rows)} measured, the last {row.contender} on {row.case.shape}")
    show(*table_page(rows, _title(args, asked.settings)))
    if args.plot is not None:
        from ownpath.bench.plot import plot_rows

        plot_rows(rows, _title(args, asked.settings), args.plot)
    return 0 if all(row.status in ("ok", "not applicable") for row in rows if not row.is_peer) else 1


def _follow(args: argparse.Namespace, asked: "BenchRequest") -> int:
    """Measures with the first rank, which tells."""
    for _ in BENCHES[args.bench].load()(asked):
        pass
    return 0


def _check_names(args: argparse.Namespace) -> None:
    """Looks names up before anything heavy is imported. Errors: ValueError for a shape that is unknown, or an option of
    another bench."""
    for shape in args.shape:
        BENCHES[args.bench].find(shape)
    for name in _STEP_OPTIONS:
        benches = [bench for bench, own in _OWN_OPTIONS.items() if name in own]
        if getattr(args, name) is not None and args.bench not in benches:
            raise ValueError(f"--{name.replace('_', '-')}: an option of bench {' and bench '.join(benches)}")
    if args.ranks > 1 and args.bench not in ("step", _STARTS_RANKS):
        raise ValueError(f"--ranks: an option of bench step and bench {_STARTS_RANKS}")


def _asked(args: argparse.Namespace, group: "Group | None") -> "BenchRequest":
    from ownpath.bench.measure import Settings
    from ownpath.bench.request import BenchRequest, StepOptions
    from ownpath.commands.rank_start import window_opener
    from ownpath.ranks.peers import Alone

    given = {name: value for name in _STEP_OPTIONS if (value := getattr(args, name)) is not None}
    settings = Settings.of(args.device, args.seed, args.seconds)
    shared = settings, args.shape, args.tokens, args.contenders, dict(args.library), StepOptions(**given)
    if args.bench == _STARTS_RANKS:
        return BenchRequest(*shared, ranks=args.ranks if args.ranks > 1 else None, command_line=args.command_line)
    peers = group or Alone()
    return BenchRequest(*shared, parallel_of(args, peers.rank), peers, window_opener(args.device, group))


def _counts(text: str) -> tuple[int, ...]:
    return tuple(map(whole_number(1), text.split(",")))


def _library(text: str) -> tuple[str, Path]:
    system, _, file = text.partition("=")
    if not (system and file):
        raise argparse.ArgumentTypeError(f"{text}: not SYSTEM=FILE")
    return system, Path(file)


def _title(args: argparse.Namespace, settings: "Settings") -> str:
    from ownpath.bench.record import device_name

    kind = "" if args.device.startswith("cuda") else " — a CPU's wall clock: says nothing about a GPU"
    return f"bench {args.bench} on {device_name(args.device)}, {settings.timer.name}, seed {args.seed}{kind}"


def _keeper(args: argparse.Namespace, settings: "Settings") -> "Callable[[Row], None]":
    """Returns what appends a row to the file of ``--out`` as soon as it is measured: a run that ends early keeps it."""
    from ownpath.bench.record import append_lines, provenance, row_dict

    if args.out is None:
        return lambda row: None
    origin = provenance(args.device, args.commit, _command(args), settings.timer.name)
    return lambda row: append_lines(args.out, [row_dict(row, args.seed, origin)])


def _tune(args: argparse.Namespace) -> int:
    from ownpath.bench.tune import chosen_cases, load_family, tune

    family = load_family(args.tune, args.device)
    from ownpath.bench.record import provenance
    from ownpath.bench.timing import choose_timer

    timer = choose_timer(args.device)
    origin = provenance(args.device, args.commit, _command(args), timer.name)
    cases = chosen_cases(family.candidates, args.shape, args.tokens)
    tune(args.tune, cases, family.run, args.out or family.table, origin, report=_show_line)
    return 0


def _show_line(told: str) -> None:
    from ownpath.terminal.page import line

    show(line(told))


def _command(args: argparse.Namespace) -> str:
    """Returns the command line that reproduces the rows, without paths."""
    words = ["ownpath", "bench", args.bench] if args.tune is None else ["ownpath", "bench", "--tune", args.tune]
    for shape in args.shape:
        words += ["--shape", shape]
    of_ranks = ("ranks", "attention", "experts") if args.ranks > 1 else ()
    for option in ("tokens", "contenders", "device", "seed", "seconds", *_STEP_OPTIONS, *of_ranks):
        value = getattr(args, option).partition(":")[0] if option == "device" and of_ranks else getattr(args, option)
        if value is not None:
            words.append(f"--{option.replace('_', '-')}")
            words += [] if value is True else [_word(value)]
    return shlex.join(words)


def _word(value: object) -> str:
    """Returns an option's value as it is given on the command line."""
    if isinstance(value, frozenset):
        return numerics_name(value)
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
