"""Arguments that several commands share. Nothing heavy is imported here."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from ownpath.official import PLAIN, Step, parse_numerics

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the optional model folder, ``args.model``."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="model folder (default: the embedded model)")


class _Print(argparse.Action):
    """Prints a text and exits before other arguments are required."""

    def __init__(self, option_strings: list[str], dest: str, const: Callable[[], str], help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, const=const, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        assert callable(self.const)
        print(self.const())
        parser.exit()


def add_list_argument(parser: argparse.ArgumentParser, text: Callable[[], str], what: str) -> None:
    """Adds ``--list``: prints ``text()`` and exits with code 0. what: the content of the list, for ``--help``."""
    parser.add_argument("--list", action=_Print, const=text, help=f"print {what}, and end")


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds where to run, which properties kernels must have, and how long a sequence may get."""
    add_plan_arguments(parser)
    parser.add_argument(
        "--max-model-len",
        type=positive_int,
        default=4096,
        metavar="N",
        help="most tokens of one prompt and its answer (default: 4096)",
    )


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what a plan depends on besides the checkpoint."""
    parser.add_argument("--device", default="cpu", help="torch device to run on (default: cpu)")
    parser.add_argument(
        "--batch-invariant",
        action="store_true",
        help="only kernels whose result for a token does not depend on the other tokens of the step",
    )
    parser.add_argument(
        "--numerics",
        type=_numerics,
        default=PLAIN,
        metavar="plain|official|STEP,...",
        help="round nowhere but in the kernels, or where DeepSeek's published code does (default: plain); steps: "
        + ", ".join(Step),
    )
    add_reference_argument(parser)


def add_reference_argument(parser: argparse.ArgumentParser) -> None:
    """Adds ``--reference``, repeatable; ``args.reference`` is a list of names."""
    parser.add_argument(
        "--reference",
        action="append",
        default=[],
        metavar="MODULE",
        help="have the torch reference compute this module, or all of layers.3, from what is stored: slow, and right "
        "where a kernel's form of the weight would not be; repeatable",
    )


def _numerics(text: str) -> frozenset[Step]:
    try:
        return parse_numerics(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def positive_int(text: str) -> int:
    """Parses a positive integer; an argparse type."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, found {value}")
    return value
