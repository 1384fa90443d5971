"""Talk with a model in the terminal: each line is a message, and the model reads the whole conversation again.

A line that begins with / is a command, of which /help shows the list; // begins a message with one slash. Ctrl-C stops
an answer and keeps what there is of it, Ctrl-D ends. Lines that are piped in are answered one after the other.
"""

import argparse
from typing import TYPE_CHECKING

from ownpath.chat.levels import LEVEL_OF_WORD
from ownpath.commands.arguments import add_draft_argument, add_engine_arguments, add_model_argument
from ownpath.commands.prefix_options import SNAPSHOTS_PER_SEQUENCE, TAILS_PER_SEQUENCE
from ownpath.commands.sampling_options import add_sampling_arguments
from ownpath.terminal.progress import Progress

if TYPE_CHECKING:
    from ownpath.commands.arguments import Subparsers


def add_parser(subparsers: "Subparsers") -> argparse.ArgumentParser:
    """``ownpath chat [MODEL]``"""
    parser = subparsers.add_parser("chat", help="talk with the model in the terminal", description=__doc__)
    add_model_argument(parser)
    parser.add_argument("--system", default="", metavar="TEXT", help="the system message")
    parser.add_argument(
        "--reasoning-effort",
        choices=("none", *LEVEL_OF_WORD),
        default="none",
        help="think before answering, as the field of the API does; shown dimmed on a terminal (default: none)",
    )
    add_sampling_arguments(parser, None)
    add_engine_arguments(parser)
    add_draft_argument(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Talks until the lines end; returns 1 if the engine fails on the way. Errors: ValueError for what the user can
    cause."""
    with Progress("starting"):
        from ownpath.commands.dialogue import Dialogue
        from ownpath.commands.session import open_session
        from ownpath.engine.prefix import PrefixSettings

    # Each turn begins with all that was said before it.
    prefix = PrefixSettings(SNAPSHOTS_PER_SEQUENCE, num_tails=TAILS_PER_SEQUENCE)
    with open_session(args, 1, prefix) as session:
        session.ledger.clear()
        return Dialogue(session, args).talk()
