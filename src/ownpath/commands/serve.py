"""Test the model, then serve it over HTTP, in OpenAI's shape, until interrupted or terminated; then say which runners
ran. A model that fails the self-test is not served."""

import argparse
import os
import sys
from typing import TYPE_CHECKING

from ownpath.chat.effort import RELEASES, release_of_folder
from ownpath.commands.arguments import add_engine_arguments, add_list_argument, add_model_argument
from ownpath.commands.listings import fields_of_server

if TYPE_CHECKING:
    from ownpath.commands.arguments import Subparsers
    from ownpath.commands.session import Session
    from ownpath.server.debug import DebugPlan
    from ownpath.server.policy import RequestPolicy

ADMIN_KEY_VARIABLE = "OWNPATH_ADMIN_KEY"


def add_parser(subparsers: "Subparsers") -> argparse.ArgumentParser:
    """``ownpath serve [MODEL]``"""
    parser = subparsers.add_parser("serve", help="serve the model over HTTP", description=__doc__)
    add_model_argument(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=_port, default=8000, help="port; 0 takes a free one (default: 8000)")
    parser.add_argument(
        "--served-model-name",
        action="append",
        metavar="NAME",
        help="a name of the model for clients; repeatable, answers to all of them (default: the model folder's name)",
    )
    parser.add_argument(
        "--strict-fields",
        action="store_true",
        help="refuse fields that change no answer, instead of ignoring them",
    )
    parser.add_argument(
        "--strict-limits", action="store_true", help="refuse a max_tokens beyond the context, instead of clamping it"
    )
    parser.add_argument(
        "--chat-release",
        choices=RELEASES,
        help="whose words for reasoning_effort it knows (default: told by the folder)",
    )
    parser.add_argument(
        "--admin-key",
        metavar="KEY",
        help=f"opens /debug/plan to whoever sends it (default: ${ADMIN_KEY_VARIABLE}, which others cannot read off the "
        "command line; closed without either)",
    )
    parser.add_argument("--allow-unverified", action="store_true", help="serve even if the self-test fails")
    add_engine_arguments(parser)
    add_list_argument(parser, fields_of_server, "every request field, and the checks of the self-test")
    return parser


def run(args: argparse.Namespace) -> int:
    """Serves until SIGINT or SIGTERM; returns 1 if the self-test fails. Errors: ValueError for what the user can
    cause."""
    from ownpath.commands.session import open_session
    from ownpath.server.app import create_app
    from ownpath.server.run import run_server

    admin_key = _admin_key(args.admin_key)
    with open_session(args) as session:
        if not _is_served(session, args.allow_unverified):
            return 1
        model_id, policy = served_names(args, session.folder.resolve().name)
        release = args.chat_release or release_of_folder(session.folder)
        debug = None if admin_key is None else _debug_plan(session, admin_key, model_id)
        app = create_app(session.engine, session.tokenizer, model_id, release=release, debug=debug, policy=policy)
        code = run_server(app, session.engine, args.host, args.port, model_id)
        for runner, kernel, num_modules, num_calls in session.ledger.summary():
            print(f"ran: {num_modules} modules on {runner} ({kernel}), {num_calls} calls", file=sys.stderr)
        if session.lossless_casts:
            print(f"cast from MXFP4 without loss: {len(session.lossless_casts)} modules", file=sys.stderr)
        return code


def served_names(args: argparse.Namespace, folder: str) -> tuple[str, "RequestPolicy"]:
    """Returns the first served name, and what becomes of requests; the path of the command line is a name as well."""
    from ownpath.server.policy import RequestPolicy

    first, *others = dict.fromkeys(args.served_model_name or [folder])
    paths = () if args.model is None else (args.model, args.model.rstrip("/"))
    return first, RequestPolicy(tuple(others), paths, args.strict_fields, args.strict_limits)


def _admin_key(given: str | None) -> str | None:
    """Returns the key of the argument or the environment. Errors: ValueError for one that cannot be a key."""
    from ownpath.server.debug import require_admin_key

    key = os.environ.get(ADMIN_KEY_VARIABLE) or None if given is None else given
    return None if key is None else require_admin_key(key)


def _debug_plan(session: "Session", admin_key: str, model_id: str) -> "DebugPlan":
    """Builds the data of ``/debug/plan``. The plan is made from the headers again; it is the one that was loaded."""
    from ownpath.loading import planned
    from ownpath.plan.show import plan_dict
    from ownpath.server.body import Limits
    from ownpath.server.debug import DebugPlan
    from ownpath.versions import versions

    plan, _ = planned(session.folder, session.engine.config)
    device = {"type": plan.caps.device_type, "name": plan.caps.name, "sm": plan.caps.sm}
    facts = {"model": model_id, "versions": versions(), "device": device, "plan": plan_dict(plan)}
    return DebugPlan(admin_key, facts, session.ledger, Limits())


def _is_served(session: "Session", allow_unverified: bool) -> bool:
    """True if the self-test passed or may fail; prints failures on stderr. Resets the ledger."""
    from ownpath.selftest.run import known_question, report_text, self_test

    golden = known_question(session.folder, session.tokenizer)
    report = self_test(session.engine, session.tokenizer, session.model_config.sliding_window, golden)
    session.ledger.clear()
    if not report.failed:
        return True
    if allow_unverified:
        failed = report.failed_ids()
        print(f"warning: served unverified: the self-test failed {failed} (--allow-unverified)", file=sys.stderr)
        return True
    print(report_text(report), file=sys.stderr)
    print("ownpath: the model failed its self-test and is not served (--allow-unverified serves it)", file=sys.stderr)
    return False


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**16:
        raise argparse.ArgumentTypeError(f"must be between 0 and 65535, found {value}")
    return value
