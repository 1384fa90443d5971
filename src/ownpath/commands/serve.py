"""Test the model, then serve it over HTTP, in OpenAI's shape, until interrupted or terminated; then say which runners
ran. A model that fails the self-test is not served."""

import argparse
import os
from dataclasses import asdict
from typing import TYPE_CHECKING

from ownpath.chat.effort import RELEASES, Release, find_release
from ownpath.commands.arguments import (
    add_engine_arguments,
    add_list_argument,
    add_model_argument,
    some_text,
    whole_number,
)
from ownpath.commands.listings import fields_of_server
from ownpath.server.admin_key import ADMIN_KEY_VARIABLE, admin_key
from ownpath.terminal.console import tell, tell_page
from ownpath.terminal.progress import Progress
from ownpath.terminal.text import counted

if TYPE_CHECKING:
    import socket

    from ownpath.commands.arguments import Subparsers
    from ownpath.commands.session import Session
    from ownpath.server.debug import DebugPlan


def add_parser(subparsers: "Subparsers") -> argparse.ArgumentParser:
    """``ownpath serve [MODEL]``"""
    parser = subparsers.add_parser("serve", help="serve the model over HTTP", description=__doc__)
    add_model_argument(parser)
    parser.add_argument("--host", type=some_text, default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument(
        "--port", type=whole_number(0, 65535), default=8000, help="port; 0 takes a free one (default: 8000)"
    )
    parser.add_argument("--served-model-name", type=some_text, metavar="NAME", help="default: the model folder's name")
    parser.add_argument(
        "--release",
        choices=RELEASES,
        help="whose words for reasoning_effort it knows (default: told by the folder, or guessed)",
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
    from ownpath.server.listen import take_port

    key = admin_key(args.admin_key, os.environ)
    with take_port(args.host, args.port) as listener:
        return _serve(args, listener, key)


def _serve(args: argparse.Namespace, listener: "socket.socket", key: str | None) -> int:
    with Progress("starting"):
        from ownpath.commands.session import open_session
        from ownpath.server.app import create_app
        from ownpath.server.run import run_server

    with open_session(args) as session:
        if not _is_served(session, args.allow_unverified):
            return 1
        model_id = args.served_model_name or session.folder.resolve().name
        release = find_release(session.folder, args.release)
        tell(f"release {release}")
        debug = None if key is None else _debug_plan(session, key, model_id, release)
        app = create_app(session.engine, session.tokenizer, model_id, release=release, debug=debug)
        code = run_server(app, session.engine, listener, model_id)
        for runner, kernel, num_modules, num_calls in session.ledger.summary():
            modules, calls = counted(num_modules, "module"), counted(num_calls, "call")
            tell(f"ran: {modules} on {runner} ({kernel}), {calls}")
        if session.lossless_casts:
            tell(f"cast from MXFP4 without loss: {counted(len(session.lossless_casts), 'module')}")
        return code


def _debug_plan(session: "Session", admin_key: str, model_id: str, release: Release) -> "DebugPlan":
    """Builds the data of ``/debug/plan``. The plan is made from the headers again; it is the one that was loaded."""
    from ownpath.loading import planned
    from ownpath.plan.show import plan_dict
    from ownpath.server.body import Limits
    from ownpath.server.debug import DebugPlan
    from ownpath.versions import versions

    plan, _ = planned(session.folder, session.engine.config)
    device = {"type": plan.caps.device_type, "name": plan.caps.name, "sm": plan.caps.sm}
    facts: dict[str, object] = {"model": model_id, "versions": versions(), "device": device, "plan": plan_dict(plan)}
    facts["release"] = asdict(release)
    return DebugPlan(admin_key, facts, session.ledger, Limits())


def _is_served(session: "Session", allow_unverified: bool) -> bool:
    """True if the self-test passed or may fail; prints failures on stderr. Resets the ledger."""
    from ownpath.selftest.run import known_question, report_page, self_test

    golden = known_question(session.folder, session.tokenizer)
    with Progress("testing the model"):
        report = self_test(session.engine, session.tokenizer, session.model_config.sliding_window, golden)
    session.ledger.clear()
    if not report.failed:
        return True
    if allow_unverified:
        failed = report.failed_ids()
        tell("warning", f": served unverified: the self-test failed {failed} (--allow-unverified)")
        return True
    tell_page(*report_page(report))
    tell("ownpath: the model failed its self-test and is not served (--allow-unverified serves it)")
    return False
