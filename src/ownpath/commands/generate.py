"""Continue a prompt, or answer a message; the text goes to stdout as it is generated.

With one argument: a folder, a path or a name on the hub is MODEL, anything else is PROMPT. Without PROMPT, or where it
is -, the prompt is read from standard input.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ownpath.commands.arguments import add_draft_argument, add_engine_arguments, hub_name, model_folder
from ownpath.commands.sampling_options import add_sampling_arguments, sampling_of
from ownpath.commands.start import starting
from ownpath.terminal.console import is_terminal, tell, write_data, write_prose

if TYPE_CHECKING:
    from ownpath.commands.arguments import Subparsers
    from ownpath.commands.session import Session

_USES = 'ownpath generate [MODEL] "PROMPT", or a prompt piped into ownpath generate [MODEL]'


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
    add_sampling_arguments(parser, 128)
    parser.add_argument("--token-ids", action="store_true", help="print token ids instead of text, one a line")
    add_engine_arguments(parser)
    add_draft_argument(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Prints the answer; returns 1 if the engine fails on the way. Errors: ValueError for what the user can cause."""
    args.model, prompt = _model_and_prompt(args.words)
    with starting(args.device):
        from ownpath.commands.answers import GenerationFailed
        from ownpath.commands.session import open_session

    with open_session(args, max_num_seqs=1) as session:
        try:
            for piece in _pieces(session, _prompt_ids(session, prompt, is_chat=args.chat), args):
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


def _pieces(session: "Session", prompt_ids: list[int], args: argparse.Namespace) -> Iterator[str]:
    """Yields the output as it comes: text, or token ids (EOS and a stop string's tokens included)."""
    from ownpath.chat.answer import Answer, content_of
    from ownpath.commands.answers import Reports, answer_parts

    answer, reports = Answer(session.tokenizer, args.stop), Reports()
    for output, parts in answer_parts(session.engine, prompt_ids, sampling_of(args, args.max_tokens), answer, reports):
        if output.token is not None:
            yield str(output.token.token_id) if args.token_ids else content_of(parts)
