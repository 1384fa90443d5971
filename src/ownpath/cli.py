"""The ``ownpath`` command: composes the subcommands. Each is a module with ``add_parser`` and ``run``."""

import argparse
import importlib
import sys
from collections.abc import Mapping, Sequence

_COMMANDS = ("inspect", "plan", "verify", "generate", "serve", "diff", "quantize", "bench")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code: 0, or 2 with one line on stderr for what users can cause."""
    parser = argparse.ArgumentParser(
        prog="ownpath", description="Runs DeepSeek-V4 NVFP4 checkpoints on a path whose every step has a name."
    )
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name in _COMMANDS:
        # Command modules import nothing heavy at their top, so that --help is quick.
        module = importlib.import_module(f"ownpath.commands.{name}")
        module.add_parser(subparsers).set_defaults(run=module.run)
    try:
        args = _parse(parser, subparsers.choices, list(sys.argv[1:] if argv is None else argv))
        code: int = args.run(args)
    except (ValueError, OSError) as error:
        print(f"ownpath: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return code


def _parse(
    parser: argparse.ArgumentParser, commands: Mapping[str, argparse.ArgumentParser], argv: list[str]
) -> argparse.Namespace:
    """Parses one command's arguments, with options allowed between its positional arguments too."""
    if argv and argv[0] in commands:
        return commands[argv[0]].parse_intermixed_args(argv[1:])
    return parser.parse_args(argv)
