"""Continue a prompt, or answer a message; the text goes to stdout as it is generated."""

import argparse
import queue
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ownpath.commands.arguments import add_engine_arguments, add_model_argument

if TYPE_CHECKING:
    from ownpath.commands.arguments import Subparsers
    from ownpath.commands.session import Session
    from ownpath.engine.request import Request, StepOutput


class GenerationFailed(RuntimeError):
    """The engine could not go on with the request."""


def add_parser(subparsers: "Subparsers") -> argparse.ArgumentParser:
    """``ownpath generate [MODEL] PROMPT``"""
    parser = subparsers.add_parser("generate", help="continue a prompt", description=__doc__)
    add_model_argument(parser)
    parser.add_argument("prompt", metavar="PROMPT", help="text to continue; special tokens in it are recognised")
    parser.add_argument("--chat", action="store_true", help="PROMPT is a user's message, and plain text")
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N", help="default: 128")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default: 0, the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="default: 1, all tokens")
    parser.add_argument("--seed", type=int, help="same seed, same answer")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; repeatable")
    parser.add_argument("--token-ids", action="store_true", help="print token ids instead of text, one a line")
    add_engine_arguments(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Prints the answer; returns 1 if the engine fails on the way. Errors: ValueError for what the user can cause."""
    from ownpath.commands.session import open_session
    from ownpath.engine.request import Request, SamplingParams

    if not all(args.stop):
        raise ValueError("--stop: an empty text would stop everything")
    params = SamplingParams(args.max_tokens, args.temperature, args.top_p, args.seed)
    with open_session(args) as session:
        outputs: queue.SimpleQueue[StepOutput] = queue.SimpleQueue()
        request = Request(_prompt_ids(session, args), params, outputs.put)
        session.engine.submit([request])
        try:
            for piece in _pieces(session, request, outputs, args):
                print(piece, end="", flush=True)
        except GenerationFailed as error:
            print(f"ownpath: {error}", file=sys.stderr)
            return 1
    if not args.token_ids:
        print()
    return 0


def _prompt_ids(session: "Session", args: argparse.Namespace) -> list[int]:
    from ownpath.chat.encode import encode_messages
    from ownpath.chat.messages import Message

    if args.chat:
        return session.tokenizer.encode_segments(encode_messages([Message("user", args.prompt)]))
    return session.tokenizer.encode_raw(args.prompt)


def _pieces(
    session: "Session",
    request: "Request",
    outputs: "queue.SimpleQueue[StepOutput]",
    args: argparse.Namespace,
) -> Iterator[str]:
    """Yields the output as it comes: text, or one token id a line (EOS and a stop string's tokens included)."""
    from ownpath.chat.answer import Answer, content_of
    from ownpath.engine.request import FinishReason

    answer = Answer(session.tokenizer, args.stop)
    while True:
        output = outputs.get()
        if output.error is not None:
            raise GenerationFailed(output.error)
        text = ""
        if output.token is not None and output.finish_reason is not FinishReason.STOP:
            text = content_of(answer.feed(output.token.token_id))
        if output.finish_reason is not None:
            text += content_of(answer.finish())
        if output.token is not None:
            yield f"{output.token.token_id}\n" if args.token_ids else text
        if answer.is_stopped:
            session.engine.abort(request)
        if answer.is_stopped or output.finish_reason is not None:
            return
