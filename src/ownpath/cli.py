"""The ``ownpath`` command: composes the subcommands. Each is a module with ``add_parser`` and ``run``."""

import argparse
import importlib
import io
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn

from ownpath.commands.settings import parse_arguments
from ownpath.ranks.peers import PeerLost, RanksDiffer
from ownpath.terminal.console import start_log, trace_text
from ownpath.terminal.text import printable

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

_COMMANDS = ("inspect", "plan", "verify", "generate", "chat", "serve", "diff", "quantize", "bench")
_USAGE_ERROR, _BUG, _RANK_LOST, _INTERRUPTED, _NOBODY_READS = 2, 70, 75, 130, 141


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line that names the option; it is escaped, since it repeats what was typed."""

    def error(self, message: str) -> NoReturn:
        told = printable(message.removeprefix("argument "))
        self.exit(_USAGE_ERROR, f"{self.prog}: {told} (`{self.prog} --help` explains the usage)\n")

    def _print_message(self, message: str, file: "SupportsWrite[str] | None" = None) -> None:
        """Writes as argparse does, and does not hide that it could not."""
        (file or sys.stderr).write(message)


class _Version(argparse.Action):
    """Prints the version; it is looked up only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"ownpath {version('ownpath')}")
        except PackageNotFoundError:
            print("ownpath, from a source tree that is not installed")
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    2 with one line on stderr for what users can cause, 70 with a traceback for what they cannot, 75 when another rank
    is lost, 130 when interrupted, 141 when nobody reads standard output any more; other codes are the command's own.
    """
    _open_streams()
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except BrokenPipeError:
        return _drop_output(_NOBODY_READS)
    except OSError as error:  # a full disk: the page is not whole
        print(f"ownpath: standard output cannot be written: {error.strerror}", file=sys.stderr)
        return _drop_output(_USAGE_ERROR)
    except KeyboardInterrupt:
        return _INTERRUPTED
    return code


def _open_streams() -> None:
    """Makes both streams writable whatever the shell did: closed ones go nowhere, characters that the terminal's
    encoding lacks are escaped."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _drop_output(code: int) -> int:
    """Sends what standard output still holds nowhere, or Python would complain at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def _run(argv: list[str]) -> int:
    try:
        code: int = _command(argv)
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        print(f"ownpath: {printable(str(error))}", file=sys.stderr)
        return _USAGE_ERROR
    except MemoryError:
        print("ownpath: there is not enough memory; `ownpath inspect` says how much the model takes", file=sys.stderr)
        return _USAGE_ERROR
    except (PeerLost, RanksDiffer) as error:
        print(f"ownpath: {printable(str(error))}", file=sys.stderr)
        return _RANK_LOST
    except Exception as error:
        print(trace_text(error), file=sys.stderr)
        print("ownpath: this is a bug in ownpath; please report it with the lines above", file=sys.stderr)
        return _BUG
    return code


def _command(argv: list[str]) -> int:
    """Parses one command's arguments, with options between its positional arguments too, and runs it."""
    parser, commands = _parser()
    try:
        if not argv:
            parser.print_help()
            return 0
        known = commands.get(argv[0])
        args = parser.parse_args(argv) if known is None else parse_arguments(known, argv[1:], os.environ)
    except SystemExit as end:  # --help, --version, --list, wrong usage
        return end.code if isinstance(end.code, int) else 0
    start_log()
    args.command_line = argv
    code: int = args.run(args)
    return code


def _parser() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """Returns the parser, and that of each command by its name."""
    parser = _Parser(
        prog="ownpath",
        description="Runs DeepSeek-V4 NVFP4 checkpoints on a path whose every step has a name.",
        epilog="`ownpath COMMAND --help` shows a command's options. Without a MODEL, each command takes the small "
        "model that comes with ownpath.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version, and end")
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name in _COMMANDS:
        # Command modules import nothing heavy at their top, so that --help is quick.
        module = importlib.import_module(f"ownpath.commands.{name}")
        module.add_parser(subparsers).set_defaults(run=module.run)
    return parser, subparsers.choices
