"""The options of ``serve`` that say what caches keep of prompts for later ones. Imports nothing heavy."""

import argparse
from typing import TYPE_CHECKING

from ownpath.commands.arguments import OptionHolder, whole_number

if TYPE_CHECKING:
    from ownpath.engine.prefix import PrefixSettings

BLOCK_TOKENS = 256
"""As the caches' layout says, which imports torch; ``PrefixSettings`` checks it again."""
SNAPSHOTS_PER_SEQUENCE = 4
"""Snapshots for each sequence that may run, unless a number is asked for."""
TAILS_PER_SEQUENCE = 1
"""Tails, the same; each takes as much as a sequence that runs, and a block."""
_DEFAULT_INTERVAL = 4096


def add_prefix_arguments(group: OptionHolder) -> None:
    """Adds whether prompts go on from what caches hold of earlier ones, with how much memory, and who shares it."""
    group.add_argument(
        "--no-prefix-cache",
        action="store_true",
        help="compute every prompt from its first token, though an earlier one began alike",
    )
    group.add_argument(
        "--prefix-snapshots",
        type=whole_number(1, 10**6),
        metavar="N",
        help="beginnings to go on from that are kept at a time; the start says how many bytes they take (default: "
        f"{SNAPSHOTS_PER_SEQUENCE} for each of --max-num-seqs)",
    )
    group.add_argument(
        "--prefix-tails",
        type=whole_number(0, 10**6),
        metavar="N",
        help="prompts kept whole at a time, of which only the last token is computed when they are sent again; each "
        f"takes as much memory as a request that runs, and a block (default: {TAILS_PER_SEQUENCE} for each of "
        "--max-num-seqs)",
    )
    group.add_argument(
        "--prefix-interval",
        type=_interval,
        default=_DEFAULT_INTERVAL,
        metavar="TOKENS",
        help=f"tokens between two of them in a long prompt, a multiple of {BLOCK_TOKENS} (default: "
        f"{_DEFAULT_INTERVAL})",
    )
    group.add_argument(
        "--prefix-salt-per-key",
        action="store_true",
        help="clients with different API keys share nothing, so none learns by its waiting what another has sent",
    )


def _interval(text: str) -> int:
    value = whole_number(BLOCK_TOKENS, 2**30)(text)
    if value % BLOCK_TOKENS:
        raise argparse.ArgumentTypeError(f"must be a multiple of {BLOCK_TOKENS}, found {value}")
    return value


def prefix_settings(args: argparse.Namespace) -> "PrefixSettings | None":
    """Returns what the arguments ask for; ``None``: no prefix cache."""
    from ownpath.engine.prefix import PrefixSettings

    if args.no_prefix_cache:
        return None
    num_seqs = args.max_num_seqs
    num_tails = TAILS_PER_SEQUENCE * num_seqs if args.prefix_tails is None else args.prefix_tails
    return PrefixSettings(args.prefix_snapshots or SNAPSHOTS_PER_SEQUENCE * num_seqs, args.prefix_interval, num_tails)
