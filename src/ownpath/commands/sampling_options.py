"""The options of ``generate`` and ``chat`` that say how tokens are chosen, and when an answer ends."""

import argparse
from typing import TYPE_CHECKING

from ownpath.commands.arguments import number, some_text, whole_number
from ownpath.engine.limits import MAX_TEMPERATURE, SEED_LIMIT

if TYPE_CHECKING:
    from ownpath.engine.request import SamplingParams


def add_sampling_arguments(parser: argparse.ArgumentParser, max_tokens: int | None) -> None:
    """Adds the options. max_tokens: the default; None: as many as the context leaves."""
    shown = "as many as fit" if max_tokens is None else max_tokens
    parser.add_argument("--max-tokens", type=whole_number(0), default=max_tokens, metavar="N", help=f"default: {shown}")
    parser.add_argument(
        "--temperature",
        type=number(0, MAX_TEMPERATURE),
        default=0.0,
        metavar="T",
        help="default: 0, the likeliest token",
    )
    parser.add_argument(
        "--top-p", type=number(0, 1, above=True), default=1.0, metavar="P", help="default: 1, all tokens"
    )
    parser.add_argument("--seed", type=whole_number(-SEED_LIMIT, SEED_LIMIT - 1), help="same seed, same answer")
    parser.add_argument(
        "--stop", type=some_text, action="append", default=[], metavar="TEXT", help="end before TEXT; repeatable"
    )


def sampling_of(args: argparse.Namespace, max_tokens: int) -> "SamplingParams":
    """Returns the parameters of a request."""
    from ownpath.engine.request import SamplingParams

    return SamplingParams(max_tokens, args.temperature, args.top_p, args.seed)
