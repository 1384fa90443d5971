"""Compare MODEL, run here, with a server: the same token ids, both log-probs, and a diagnosis of the difference.

Any server in OpenAI's shape. Exit code: 0 they agree, 1 they differ, 2 the server could not be asked (or wrong usage).
"""

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ownpath.commands.arguments import (
    add_engine_arguments,
    add_list_argument,
    add_model_argument,
    number,
    some_text,
    whole_number,
)
from ownpath.commands.listings import checks_of_diff
from ownpath.commands.start import starting
from ownpath.terminal.console import show, tell, write_data
from ownpath.terminal.progress import Progress
from ownpath.terminal.text import quoted

if TYPE_CHECKING:
    from ownpath.commands.arguments import Subparsers


def add_parser(subparsers: "Subparsers") -> argparse.ArgumentParser:
    """``ownpath diff [MODEL] --against URL``"""
    parser = subparsers.add_parser("diff", help="compare with a server, and say what is wrong", description=__doc__)
    add_model_argument(parser)
    parser.add_argument("--against", required=True, metavar="URL", help="the server, as http://HOST:PORT or .../v1")
    parser.add_argument(
        "--served-model-name", type=some_text, metavar="NAME", help="default: the first that the server lists"
    )
    parser.add_argument("--api-key-env", metavar="VARIABLE", help="environment variable that holds the server's key")
    parser.add_argument(
        "--prompt", type=some_text, action="append", default=[], metavar="TEXT", help="instead of ours; repeatable"
    )
    parser.add_argument(
        "--max-tokens", type=whole_number(1), default=16, metavar="N", help="of each answer (default: 16)"
    )
    parser.add_argument(
        "--together", type=whole_number(1), default=2, metavar="N", help="requests a prompt, all at once (default: 2)"
    )
    parser.add_argument(
        "--tolerance",
        type=number(0),
        default=0.25,
        metavar="NATS",
        help="a position further away diverges; all budgets grow with it (default: 0.25)",
    )
    parser.add_argument(
        "--timeout", type=number(0, above=True), default=60.0, metavar="S", help="for one answer (default: 60)"
    )
    parser.add_argument(
        "--seed",
        type=whole_number(0, 2**32 - 1),
        help="of the numbers that open our prompts (default: another each time)",
    )
    parser.add_argument("--json", action="store_true", help="one object, for programs")
    add_engine_arguments(parser)
    parser.set_defaults(draft=False)
    add_list_argument(parser, checks_of_diff, "what it looks for")
    return parser


def run(args: argparse.Namespace) -> int:
    """Prints the difference. Errors: CannotAsk and others (all ValueError) for what the user can cause."""
    import secrets

    from ownpath.diff.client import Client

    client = Client.of_url(args.against, args.timeout, _api_key(args.api_key_env))
    seed = secrets.randbelow(2**32) if args.seed is None else args.seed
    with Progress("asking the server"):
        from ownpath.diff.server import first_model, open_server

        listed = first_model(client)  # before minutes of loading: is the server there?
    with starting(args.device):
        from ownpath.commands.session import load_for
        from ownpath.diff.local_model import LocalModel
        from ownpath.diff.prompts import make_prompts, probe_prompt
        from ownpath.diff.report import difference_dict, difference_page
        from ownpath.diff.responses import TokenNames
        from ownpath.diff.survey import SurveySize, survey

    loaded = load_for(args, max_num_seqs=1)
    prompts = make_prompts(loaded.tokenizer, seed, args.prompt)
    probe = probe_prompt(loaded.tokenizer)
    server = open_server(client, TokenNames(loaded.tokenizer), probe, args.served_model_name or listed)
    effort = SurveySize(args.max_tokens, args.together, args.tolerance)
    with Progress("comparing"):
        difference = survey(server, LocalModel(loaded.model, loaded.tokenizer), prompts, effort)
        suspects = _suspects(loaded.folder) if any(it.id == "computes-otherwise" for it in difference.found) else ()
    name = loaded.folder.resolve().name
    if args.json:
        write_data(json.dumps(difference_dict(difference, server, name, seed, suspects), indent=1))
    else:
        show(*difference_page(difference, server, loaded.tokenizer, name, suspects))
    if not server.request_form.sends_ids:
        tell("warning", ": the server takes no token ids, so text was sent; it may be split into other tokens there")
    return 0 if difference.agrees else 1


def _suspects(folder: Path) -> tuple[str, ...]:
    """Reads the checkpoint's scalars for what other engines compute wrongly."""
    from ownpath.diff.suspects import joined_scales
    from ownpath.inspect.inspection import inspect_folder

    contents = inspect_folder(folder).contents
    scalars = () if contents is None else contents.scalars
    return joined_scales({it.module: it.value for it in scalars if it.role == "global_scale"})


def _api_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    if not os.environ.get(variable):
        raise ValueError(f"--api-key-env: there is no environment variable {quoted(variable)}, or it is empty")
    return os.environ[variable]
