"""Settings of a command beside its command line: a TOML file and the environment.

The command line wins over the environment, and the environment over the file. A value in each place is read as the
option itself reads it. Messages name the place, never a value that may be a secret.
"""

import argparse
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ownpath.commands.arguments import OptionHolder, some_text
from ownpath.files import FileError, read_bytes
from ownpath.terminal.text import quoted

_CONFIG = "config"
PASSED_ON = "passed_on"
"""The default of a parser that keeps options which it does not know: they are another program's."""
_NO_SETTINGS = frozenset({"help", "list", _CONFIG})
_MAX_BYTES = 2**20
_YES_OR_NO = {"true": True, "1": True, "false": False, "0": False}


class _Found(NamedTuple):
    """A value as it was found, and its place for messages."""

    value: object
    place: str


def add_config_argument(parser: OptionHolder) -> None:
    """Adds ``--config FILE``. A parser that has it takes settings from the file and the environment."""
    parser.add_argument(
        "--config",
        type=some_text,
        metavar="FILE",
        help=f"TOML file of settings: long options without dashes (max-num-seqs = 8), and model (default: "
        f"${variable_of(_CONFIG)})",
    )


def variable_of(dest: str) -> str:
    """Returns the variable of the environment that holds an option: ``OWNPATH_MAX_NUM_SEQS`` for --max-num-seqs."""
    return f"OWNPATH_{dest.upper()}"


def parse_arguments(
    parser: argparse.ArgumentParser, argv: Sequence[str], environment: Mapping[str, str]
) -> argparse.Namespace:
    """Parses one command's arguments, and completes them by its settings where it has ``--config``.

    Errors: ValueError naming the file and the setting, or the variable; SystemExit as argparse's.
    """
    actions = {action.dest: action for action in parser._actions if action.dest not in _NO_SETTINGS}
    if not any(action.dest == _CONFIG for action in parser._actions):
        if parser.get_default(PASSED_ON) is None:
            return parser.parse_intermixed_args(argv)
        own, others = _split(parser, argv)
        args = parser.parse_intermixed_args(own)
        setattr(args, PASSED_ON, others)
        return args
    # None stands for what the command line leaves out; no option reads a value as None.
    args = parser.parse_intermixed_args(argv, argparse.Namespace(**dict.fromkeys([*actions, _CONFIG])))
    if args.config is None:
        args.config = environment.get(variable_of(_CONFIG)) or None
    given = {} if args.config is None else dict(_of_file(Path(args.config), actions))
    given |= _of_environment(environment, actions)
    for dest, action in actions.items():
        if getattr(args, dest) is None:
            setattr(args, dest, _read(action, given[dest]) if dest in given else _default(action))
    return args


def _split(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """Splits a command line into what the parser knows and long options that it does not, with the values that follow
    them."""
    known, own, others = list(parser._option_string_actions), list[str](), list[str]()
    is_value = False
    for word in argv:
        is_option = word.startswith("-") and len(word) > 1
        name = word.partition("=")[0]
        is_other = name.startswith("--") and not any(option.startswith(name) for option in known)
        is_value = is_other or (is_value and not is_option)
        (others if is_value else own).append(word)
    return own, tuple(others)


def _of_file(path: Path, actions: Mapping[str, argparse.Action]) -> Iterator[tuple[str, _Found]]:
    found: dict[str, str] = {}
    for name, value in _table(path).items():
        dest = name.replace("-", "_")
        if dest not in actions:
            raise ValueError(f"{path}: {quoted(name)} is no setting; they are long options without dashes, and model")
        if dest in found:
            raise ValueError(f"{path}: {quoted(name)} and {quoted(found[dest])} are one setting")
        found[dest] = name
        yield dest, _Found(value, f"{path}: {name}")


def _table(path: Path) -> dict[str, object]:
    try:
        return tomllib.loads(read_bytes(path, _MAX_BYTES).decode("utf-8"))
    except FileError:
        raise
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8; a TOML file is expected") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not TOML: {error}") from None
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply") from None


def _of_environment(environment: Mapping[str, str], actions: Mapping[str, argparse.Action]) -> dict[str, _Found]:
    """Returns what is set; an empty variable is not."""
    given = {}
    for dest, action in actions.items():
        text = environment.get(variable_of(dest))
        if text:
            items = [item.strip() for item in text.split(",")] if _is_repeatable(action) else text
            given[dest] = _Found(items, variable_of(dest))
    return given


def _read(action: argparse.Action, given: _Found) -> object:
    """Reads a value as the option does. Errors: ValueError naming the place."""
    value, place = given
    if action.nargs == 0:
        value = _YES_OR_NO.get(value.lower()) if isinstance(value, str) else value
        if not isinstance(value, bool):
            raise ValueError(f"{place}: must be true or false")
        return value
    if _is_repeatable(action):
        items = value if isinstance(value, list) else [value]
        return [_one(action, item, place) for item in items]
    return _one(action, value, place)


def _one(action: argparse.Action, value: object, place: str) -> object:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{place}: must be a text or a number")
    text = str(value)
    try:
        read = action.type(text) if callable(action.type) else text
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise ValueError(f"{place}: {error}") from None
    if action.choices is not None and read not in action.choices:
        raise ValueError(f"{place}: {quoted(text)} is none of {', '.join(map(str, action.choices))}")
    return read


def _is_repeatable(action: argparse.Action) -> bool:
    return isinstance(action, argparse._AppendAction)


def _default(action: argparse.Action) -> object:
    return list(action.default) if isinstance(action.default, list) else action.default
