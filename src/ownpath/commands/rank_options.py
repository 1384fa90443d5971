"""Options of several ranks: how many run the model together, and what they divide."""

import argparse
from typing import TYPE_CHECKING

from ownpath.commands.arguments import OptionHolder, whole_number
from ownpath.splits import AttentionSplit, ExpertSplit

if TYPE_CHECKING:
    from ownpath.config import Parallel

MOST_RANKS = 8


def add_ranks_arguments(parser: OptionHolder) -> None:
    """Adds ``--ranks``, ``--attention`` and ``--experts``."""
    parser.add_argument(
        "--ranks",
        type=whole_number(1, MOST_RANKS),
        default=1,
        metavar="N",
        help="processes of one host that run the model together, each with its part of the weights (default: 1)",
    )
    parser.add_argument(
        "--attention",
        choices=[str(split) for split in AttentionSplit],
        default=str(AttentionSplit.HEADS),
        help="what ranks divide of attention and the shared expert: heads, or tokens (data) (default: heads)",
    )
    parser.add_argument(
        "--experts",
        choices=[str(split) for split in ExpertSplit],
        default=str(ExpertSplit.WIDTH),
        help="what ranks divide of routed experts: the width of each, or the experts by their ids (default: width)",
    )


def add_rank_limit(parser: OptionHolder) -> None:
    """Adds ``--rank-timeout``."""
    parser.add_argument(
        "--rank-timeout",
        type=whole_number(1, 10**6),
        default=5,
        metavar="SECONDS",
        help="of several ranks: one that does not answer for longer is lost, and the server ends (default: 5)",
    )


def parallel_of(args: argparse.Namespace, rank: int = 0) -> "Parallel":
    """Returns what the options say, for one of the ranks.

    By data steps are padded: every rank has as many rows, also one that has nothing to do.
    """
    from ownpath.config import Parallel

    attention = AttentionSplit(args.attention)
    return Parallel(rank, args.ranks, attention, ExpertSplit(args.experts), is_even=attention is AttentionSplit.DATA)
