"""Test the model, then serve it over HTTP, in OpenAI's shape, until interrupted or terminated; then say which runners
ran. A model that fails the self-test is not served."""

import argparse
import os
import socket
import ssl
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from ownpath.chat.effort import RELEASES, Release, find_release
from ownpath.commands.arguments import (
    add_engine_arguments,
    add_list_argument,
    add_model_argument,
    some_text,
    whole_number,
)
from ownpath.commands.listings import fields_of_server
from ownpath.commands.serve_options import (
    access_of,
    add_server_arguments,
    rules_of,
    settings_of,
    start_server_log,
    tls_of,
)
from ownpath.server.access import AccessPolicy
from ownpath.server.admin_key import ADMIN_KEY_VARIABLE, admin_key
from ownpath.terminal.console import tell, tell_page
from ownpath.terminal.progress import Progress
from ownpath.terminal.text import counted

if TYPE_CHECKING:
    import socket

    from ownpath.commands.arguments import Subparsers
    from ownpath.commands.session import Session
    from ownpath.server.debug import DebugPlan
    from ownpath.server.policy import RequestPolicy


def add_parser(subparsers: "Subparsers") -> argparse.ArgumentParser:
    """``ownpath serve [MODEL]``"""
    parser = subparsers.add_parser("serve", help="serve the model over HTTP", description=__doc__)
    add_model_argument(parser)
    parser.add_argument("--host", type=some_text, default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument(
        "--port", type=whole_number(0, 65535), default=8000, help="port; 0 takes a free one (default: 8000)"
    )
    parser.add_argument(
        "--served-model-name",
        type=some_text,
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
    parser.add_argument(
        "--max-num-seqs",
        type=whole_number(1),
        default=16,
        metavar="N",
        help="requests that run together; others wait (default: 16)",
    )
    parser.add_argument("--allow-unverified", action="store_true", help="serve even if the self-test fails")
    add_engine_arguments(parser)
    add_server_arguments(parser)
    add_list_argument(parser, fields_of_server, "every request field, and the checks of the self-test")
    return parser


def run(args: argparse.Namespace) -> int:
    """Serves until SIGINT or SIGTERM; returns 1 if the self-test fails, 75 if the engine stops by itself. Errors:
    ValueError for what the user can cause."""
    from ownpath.server.listen import take_port

    key, tls = admin_key(args.admin_key, os.environ), tls_of(args)
    with take_port(args.host, args.port) as listener:
        access = access_of(args, listener)
        start_server_log(args)
        return _serve(args, _Opened(listener, access, tls, key))


class _Opened(NamedTuple):
    """Settled before the model is loaded: the port, who may use it, and the admin key."""

    listener: socket.socket
    access: AccessPolicy
    tls: ssl.SSLContext | None
    admin_key: str | None


def _serve(args: argparse.Namespace, opened: _Opened) -> int:
    with Progress("starting"):
        from ownpath.commands.session import open_session
        from ownpath.server.app import create_app
        from ownpath.server.run import ENGINE_FAILED, run_server
        from ownpath.server.vitals import Vitals

    with open_session(args, args.max_num_seqs) as session:
        failed = _self_test(session, args.allow_unverified)
        if failed and not args.allow_unverified:
            return 1
        model_id, policy = served_names(args, session.folder.resolve().name)
        release = find_release(session.folder, args.release)
        tell(f"release {release}")
        debug = None if opened.admin_key is None else _debug_plan(session, opened.admin_key, model_id, release)
        vitals = Vitals(session.engine, args.step_timeout, failed)
        app = create_app(vitals, session.tokenizer, model_id, rules_of(args, opened.access), release, debug, policy)
        code = run_server(app, vitals, opened.listener, model_id, settings_of(args, opened.tls))
        if code == ENGINE_FAILED:
            _leave(code)
        for runner, kernel, num_modules, num_calls in session.ledger.summary():
            modules, calls = counted(num_modules, "module"), counted(num_calls, "call")
            tell(f"ran: {modules} on {runner} ({kernel}), {calls}")
        if session.lossless_casts:
            tell(f"cast from MXFP4 without loss: {counted(len(session.lossless_casts), 'module')}")
        return code


def _leave(code: int) -> NoReturn:
    """Ends the process at once: a step that hangs, or a device that is lost, would hold up an ordinary end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def served_names(args: argparse.Namespace, folder: str) -> tuple[str, "RequestPolicy"]:
    """Returns the first served name, and what becomes of requests; the path of the command line is a name as well."""
    from ownpath.server.policy import RequestPolicy

    first, *others = dict.fromkeys(args.served_model_name or [folder])
    path = None if args.model is None else str(args.model)
    return first, RequestPolicy(tuple(others), path, args.strict_fields, args.strict_limits)


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


def _self_test(session: "Session", allow_unverified: bool) -> str:
    """Tests the model; returns the ids of the checks that failed, empty if none did. Prints failures on stderr. Resets
    the ledger."""
    from ownpath.selftest.run import known_question, report_page, self_test

    golden = known_question(session.folder, session.tokenizer)
    with Progress("testing the model"):
        report = self_test(session.engine, session.tokenizer, session.model_config.sliding_window, golden)
    session.ledger.clear()
    if not report.failed:
        return ""
    if allow_unverified:
        tell("warning", f": served unverified: the self-test failed {report.failed_ids()} (--allow-unverified)")
    else:
        tell_page(*report_page(report))
        tell("ownpath: the model failed its self-test and is not served (--allow-unverified serves it)")
    return report.failed_ids()
