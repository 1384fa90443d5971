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
    OptionHolder,
    add_draft_argument,
    add_engine_arguments,
    add_list_argument,
    add_model_argument,
    some_text,
)
from ownpath.commands.listings import fields_of_server
from ownpath.commands.prefix_options import add_prefix_arguments, prefix_settings
from ownpath.commands.rank_options import add_rank_limit, add_ranks_arguments
from ownpath.commands.ranks import follow, leading, rank_of
from ownpath.commands.serve_options import (
    access_of,
    add_access,
    add_address,
    add_limits,
    add_logs,
    rules_of,
    settings_of,
    start_server_log,
    tls_of,
)
from ownpath.commands.settings import add_config_argument, variable_of
from ownpath.commands.start import starting
from ownpath.commands.trace_options import add_traces, recorder_of
from ownpath.server.access import AccessPolicy
from ownpath.server.admin_key import admin_key
from ownpath.terminal.console import tell, tell_page
from ownpath.terminal.progress import Progress
from ownpath.terminal.text import counted

if TYPE_CHECKING:
    import socket

    from ownpath.commands.arguments import Subparsers
    from ownpath.commands.session import Session
    from ownpath.server.debug import DebugPlan
    from ownpath.server.policy import RequestPolicy
    from ownpath.server.traces import TraceRecorder


_SETTINGS = (
    f"Each option may also stand in the environment (--max-num-seqs as {variable_of('max_num_seqs')}; of several "
    "values, commas between them; of a switch, true or false) and in the TOML file of --config. The command line wins "
    "over the environment, and the environment over the file."
)


def add_parser(subparsers: "Subparsers") -> argparse.ArgumentParser:
    """``ownpath serve [MODEL]``"""
    parser = subparsers.add_parser("serve", help="serve the model over HTTP", description=__doc__, epilog=_SETTINGS)
    _add_model_group(parser.add_argument_group("model"))
    numerics = parser.add_argument_group("numerics and kernels")
    limits = parser.add_argument_group("limits")
    add_engine_arguments(numerics, limits)
    add_draft_argument(numerics)
    add_limits(limits)
    add_prefix_arguments(parser.add_argument_group("prefix cache"))
    ranks = parser.add_argument_group("ranks")
    add_ranks_arguments(ranks)
    add_rank_limit(ranks)
    _add_request_group(parser.add_argument_group("requests"))
    add_address(parser.add_argument_group("server"))
    add_access(parser.add_argument_group("access"))
    logs = parser.add_argument_group("logs and traces")
    add_logs(logs)
    add_traces(logs)
    add_config_argument(parser.add_argument_group("settings"))
    add_list_argument(parser, fields_of_server, "every request field, and the checks of the self-test")
    return parser


def _add_model_group(group: OptionHolder) -> None:
    add_model_argument(group)
    group.add_argument(
        "--served-model-name",
        type=some_text,
        action="append",
        metavar="NAME",
        help="a name of the model for clients; repeatable, answers to all of them (default: the model folder's name)",
    )
    group.add_argument(
        "--release",
        choices=RELEASES,
        help="whose words for reasoning_effort it knows (default: told by the folder, or guessed)",
    )
    group.add_argument("--allow-unverified", action="store_true", help="serve even if the self-test fails")


def _add_request_group(group: OptionHolder) -> None:
    group.add_argument(
        "--strict-fields",
        action="store_true",
        help="refuse fields that change no answer, instead of ignoring them",
    )
    group.add_argument(
        "--strict-limits", action="store_true", help="refuse a max_tokens beyond the context, instead of clamping it"
    )


def run(args: argparse.Namespace) -> int:
    """Serves until SIGINT or SIGTERM; returns 1 if the self-test fails, 75 if the engine stops by itself. Errors:
    ValueError for what the user can cause."""
    from ownpath.server.listen import take_port

    rank = rank_of(args, takes_data=True)
    if args.draft and args.ranks > 1:
        raise ValueError("--draft: several ranks (--ranks) do not draft")
    if rank:
        follow(args, prefix_settings(args))
    key, tls = admin_key(args.admin_key, os.environ), tls_of(args)
    with take_port(args.host, args.port) as listener:
        access = access_of(args, listener)
        start_server_log(args)
        return _serve(args, _Opened(listener, access, tls, key, recorder_of(args)))


class _Opened(NamedTuple):
    """Settled before the model is loaded: the port, who may use it, the admin key, and what makes traces."""

    listener: socket.socket
    access: AccessPolicy
    tls: ssl.SSLContext | None
    admin_key: str | None
    recorder: "TraceRecorder | None"


def _serve(args: argparse.Namespace, opened: _Opened) -> int:
    with starting(args.device):
        from ownpath.commands.session import open_session
        from ownpath.server.app import create_app
        from ownpath.server.grammar_desk import GrammarDesk
        from ownpath.server.run import ENGINE_FAILED, run_server
        from ownpath.server.vitals import Vitals

    prefix, blocks = prefix_settings(args), args.num_cache_blocks
    with leading(args) as group, open_session(args, args.max_num_seqs, prefix, blocks, group) as session:
        failed = _self_test(session, args.allow_unverified)
        if failed and not args.allow_unverified:
            return 1
        model_id, policy = served_names(args, session.folder.resolve().name)
        release = find_release(session.folder, args.release)
        tell(f"release {release}")
        if session.engine.prefix is not None:
            tell("prefix cache", f": {session.engine.prefix.store}")
        if session.engine.prompt_graphs is not None:
            tell("prompts", f": {session.engine.prompt_graphs}")
        debug = None if opened.admin_key is None else _debug_plan(session, opened.admin_key, model_id, release)
        vitals = Vitals(session.engine, args.step_timeout, failed)
        grammars = GrammarDesk(session.tokenizer, session.engine.end_token_ids)
        grammars.warm_up()
        rules = rules_of(args, opened.access, opened.recorder)
        app = create_app(vitals, session.tokenizer, model_id, rules, release, debug, policy, grammars)
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
    return first, RequestPolicy(
        tuple(others), path, args.strict_fields, args.strict_limits, salts_by_key=args.prefix_salt_per_key
    )


def _debug_plan(session: "Session", admin_key: str, model_id: str, release: Release) -> "DebugPlan":
    """Builds the data of ``/debug/plan``. The plan is made from the headers again; it is the one that was loaded."""
    from ownpath.cache.pools import CacheSpec
    from ownpath.inspect.memory import cache_bytes, weights_bytes
    from ownpath.loading import planned
    from ownpath.plan.show import plan_dict
    from ownpath.server.body import Limits
    from ownpath.server.debug import DebugPlan
    from ownpath.versions import versions

    config = session.engine.config
    plan, index = planned(session.folder, config)
    device = {"type": plan.caps.device_type, "name": plan.caps.name, "sm": plan.caps.sm}
    facts: dict[str, object] = {"model": model_id, "versions": versions(), "device": device, "plan": plan_dict(plan)}
    facts["release"] = asdict(release)
    blocks, one = config.num_cache_blocks, cache_bytes(plan, config.max_model_len, config.dtype, config.cache_format)
    store = None if session.engine.prefix is None else session.engine.prefix.store
    facts["memory"] = {
        "weights_bytes": weights_bytes(plan, index),
        "cache_bytes": one * config.max_num_seqs if blocks is None else CacheSpec.of(plan.config, config).pool_bytes,
        "requests": config.max_num_seqs,
        "tokens_each": config.max_model_len,
        "snapshots": 0 if store is None else store.num_places,
        "snapshot_bytes": 0 if store is None else store.num_bytes,
        "tails": 0 if store is None else store.num_tails,
        "tail_bytes": 0 if store is None else store.num_tail_bytes,
    }
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
