"""Continue a prompt, or answer a message; the text goes to stdout as it is generated.

With one argument: a folder, a path or a name on the hub is MODEL, anything else is PROMPT. Without PROMPT, or where it
is -, the prompt is read from standard input.
"""

import argparse
import os
import queue
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ownpath.commands.arguments import add_engine_arguments, hub_name, model_folder, number, some_text, whole_number
from ownpath.engine.limits import MAX_TEMPERATURE, SEED_LIMIT
from ownpath.terminal.console import is_terminal, tell, write_data, write_prose
from ownpath.terminal.progress import Progress

if TYPE_CHECKING:
    from ownpath.commands.arguments import Subparsers
    from ownpath.commands.session import Session
    from ownpath.engine.request import Request, StepOutput

_USES = 'ownpath generate [MODEL] "PROMPT", or a prompt piped into ownpath generate [MODEL]'


class GenerationFailed(RuntimeError):
    """The engine could not go on with the request."""


def add_parser(subparsers: "Subparsers") -> argparse.ArgumentParser:
    """``ownpath generate [MODEL] [PROMPT]``"""
    parser = subparsers.add_parser(
        "generate",
        help="continue a prompt",
        description=__doc__,
        usage="ownpath generate [MODEL] [PROMPT] [options]",
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="MODEL, PROMPT",
        help="model folder (default: the embedded model); text to continue, in which special tokens are recognised",
    )
    parser.add_argument("--chat", action="store_true", help="PROMPT is a user's message, and plain text")
    parser.add_argument("--max-tokens", type=whole_number(0), default=128, metavar="N", help="default: 128")
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
    parser.add_argument("--token-ids", action="store_true", help="print token ids instead of text, one a line")
    add_engine_arguments(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Prints the answer; returns 1 if the engine fails on the way. Errors: ValueError for what the user can cause."""
    args.model, prompt = _model_and_prompt(args.words)
    with Progress("starting"):
        from ownpath.commands.session import open_session
        from ownpath.engine.request import Request, SamplingParams

    params = SamplingParams(args.max_tokens, args.temperature, args.top_p, args.seed)
    with open_session(args, max_num_seqs=1) as session:
        outputs: queue.SimpleQueue[StepOutput] = queue.SimpleQueue()
        request = Request(_prompt_ids(session, prompt, is_chat=args.chat), params, outputs.put)
        session.engine.submit([request])
        try:
            for piece in _pieces(session, request, outputs, args):
                write_data(piece) if args.token_ids else write_prose(piece)
        except GenerationFailed as error:
            tell(f"ownpath: {error}")
            return 1
    if not args.token_ids:
        write_data("")
    return 0


def _model_and_prompt(words: list[str]) -> tuple[Path | None, str]:
    """Returns the model folder (None: the embedded model) and the prompt. Errors: ValueError."""
    if len(words) > 2:
        raise ValueError(f"{len(words)} arguments are too many (is the prompt in quotes?): {_USES}")
    model = words[0] if len(words) == 2 or (words and _names_a_model(words[0])) else None
    prompts = words[1:] if model is not None else words
    try:
        folder = None if model is None else model_folder(model)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"MODEL: {error}") from None
    prompt = prompts[0] if prompts and prompts[0] != "-" else _piped_prompt()
    if not prompt:
        raise ValueError(f"the prompt is empty: {_USES}")
    return folder, prompt


def _names_a_model(word: str) -> bool:
    """True for a folder or file that is there, and for what is written like a path or a name on the hub."""
    is_written_so = word.startswith(("/", "./", "../", "~/")) or (hub_name(word) is not None)
    return is_written_so or (word != "-" and os.path.exists(word))  # noqa: PTH110 (no error for a long prompt)


def _piped_prompt() -> str:
    """Reads the prompt from standard input, without the line end that closes it. Errors: ValueError."""
    if sys.stdin is None or is_terminal(sys.stdin):
        raise ValueError(f"there is no prompt: {_USES}")
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8 text ({error})") from None
    return text.removesuffix("\n").removesuffix("\r")


def _prompt_ids(session: "Session", prompt: str, *, is_chat: bool) -> list[int]:
    from ownpath.chat.encode import encode_messages
    from ownpath.chat.messages import Message

    if is_chat:
        return session.tokenizer.encode_segments(encode_messages([Message("user", prompt)]))
    return session.tokenizer.encode_raw(prompt)


def _pieces(
    session: "Session",
    request: "Request",
    outputs: "queue.SimpleQueue[StepOutput]",
    args: argparse.Namespace,
) -> Iterator[str]:
    """Yields the output as it comes: text, or token ids (EOS and a stop string's tokens included)."""
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
            yield str(output.token.token_id) if args.token_ids else text
        if answer.is_stopped:
            session.engine.abort(request)
        if answer.is_stopped or output.finish_reason is not None:
            return
