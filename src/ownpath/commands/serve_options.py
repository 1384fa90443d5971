"""The options of ``serve`` that say who may use the server, how it listens and what it logs."""

import argparse
import logging
import os
import socket
import ssl
from pathlib import Path
from typing import TYPE_CHECKING

from ownpath.commands.arguments import OptionHolder, some_text, whole_number
from ownpath.server.access import API_KEYS_VARIABLE, AccessPolicy, access_policy, api_keys
from ownpath.server.admin_key import ADMIN_KEY_VARIABLE

if TYPE_CHECKING:
    from ownpath.server.app import Rules
    from ownpath.server.run import ServerSettings
    from ownpath.server.traces import TraceRecorder


def add_limits(group: OptionHolder) -> None:
    """Adds how many requests and connections there may be, and for how long."""
    seconds = whole_number(1, 10**6)
    group.add_argument(
        "--max-num-seqs",
        type=whole_number(1),
        default=16,
        metavar="N",
        help="requests that run together; others wait (default: 16)",
    )
    group.add_argument(
        "--num-cache-blocks",
        type=whole_number(1, 2**31),
        metavar="N",
        help="blocks of 256 tokens that the caches of all requests share; fewer take less memory, and requests that do "
        "not fit wait (default: enough for --max-num-seqs requests of --max-model-len tokens)",
    )
    group.add_argument(
        "--max-connections", type=whole_number(1, 10**5), default=1024, metavar="N", help="(default: 1024)"
    )
    group.add_argument(
        "--request-timeout",
        type=seconds,
        default=3600,
        metavar="SECONDS",
        help="from a request's prompt to the end of its answer (default: 3600)",
    )
    group.add_argument(
        "--drain-timeout",
        type=whole_number(0, 10**6),
        default=5,
        metavar="SECONDS",
        help="how long open answers may go on after SIGTERM or SIGINT (default: 5)",
    )
    group.add_argument(
        "--step-timeout",
        type=seconds,
        default=300,
        metavar="SECONDS",
        help="a step of the model that takes longer hangs: the server ends (default: 300)",
    )


def add_address(group: OptionHolder) -> None:
    """Adds the address to listen on, and TLS."""
    group.add_argument("--host", type=some_text, default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    group.add_argument(
        "--port", type=whole_number(0, 65535), default=8000, help="port; 0 takes a free one (default: 8000)"
    )
    group.add_argument("--tls-cert", type=some_text, metavar="FILE", help="certificate chain in PEM; serves https")
    group.add_argument("--tls-key", type=some_text, metavar="FILE", help="its private key, if that is another file")


def add_access(group: OptionHolder) -> None:
    """Adds the keys, and the names and web pages that are let in."""
    group.add_argument(
        "--api-key-file",
        type=some_text,
        metavar="FILE",
        help=f"API keys, one a line; more in ${API_KEYS_VARIABLE}, between commas. With any, every path but /health, "
        "/ready and the pages at / and /docs asks for one",
    )
    group.add_argument(
        "--admin-key",
        metavar="KEY",
        help=f"opens /debug/plan to whoever sends it (default: ${ADMIN_KEY_VARIABLE}, which others cannot read off the "
        "command line; closed without either)",
    )
    group.add_argument("--insecure", action="store_true", help="listen beyond this machine without any API key")
    group.add_argument(
        "--allowed-hosts",
        type=some_text,
        action="append",
        default=[],
        metavar="NAME",
        help="a name that clients may call the server by, or *.NAME; repeatable, * for all (default: loopback's names "
        "on loopback without keys, else all)",
    )
    group.add_argument(
        "--allowed-origins",
        type=some_text,
        action="append",
        default=[],
        metavar="ORIGIN",
        help="an origin whose web pages may read answers (CORS); repeatable (default: none)",
    )


def add_logs(group: OptionHolder) -> None:
    """Adds the content and the form of the log."""
    group.add_argument(
        "--log-requests",
        choices=("off", "access", "bodies"),
        default="access",
        help="log nothing of a request, its path and status, or also what it says (default: access)",
    )
    group.add_argument("--log-format", choices=("text", "json"), default="text", help="(default: text)")


def access_of(args: argparse.Namespace, listener: socket.socket) -> AccessPolicy:
    """Returns who may use a server on this socket. Errors: ValueError, OSError, before anything is loaded."""
    keys = api_keys(None if args.api_key_file is None else Path(args.api_key_file), os.environ)
    hosts, origins = tuple(args.allowed_hosts), tuple(args.allowed_origins)
    return access_policy(listener.getsockname()[0], keys, hosts, origins, is_insecure=args.insecure)


def tls_of(args: argparse.Namespace) -> ssl.SSLContext | None:
    """Returns the context of https; None for http. Errors: ValueError naming the file."""
    if args.tls_cert is None:
        if args.tls_key is not None:
            raise ValueError("--tls-key goes with --tls-cert")
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        # A password would be asked for on the terminal: a key that needs one is refused.
        context.load_cert_chain(args.tls_cert, args.tls_key, password="")
    except (ssl.SSLError, OSError) as error:
        files = " ".join(filter(None, (args.tls_cert, args.tls_key)))
        raise ValueError(f"--tls-cert, --tls-key: {files}: {error.strerror or error}") from None
    return context


def rules_of(args: argparse.Namespace, access: AccessPolicy, recorder: "TraceRecorder | None") -> "Rules":
    """Returns what holds for every request. recorder: makes traces."""
    from ownpath.server.app import Rules
    from ownpath.server.request_log import LogRequests

    log_requests = LogRequests(args.log_requests)
    return Rules(access=access, log_requests=log_requests, timeout_s=args.request_timeout, recorder=recorder)


def settings_of(args: argparse.Namespace, tls: ssl.SSLContext | None) -> "ServerSettings":
    """Returns how the server listens."""
    from ownpath.server.connection import ConnectionLimits
    from ownpath.server.run import ServerSettings

    num = args.max_connections
    limits = ConnectionLimits(max_total=num, max_per_site=max(num * 3 // 4, 1))
    return ServerSettings(limits, tls, drain_s=float(args.drain_timeout))


def start_server_log(args: argparse.Namespace) -> None:
    """Makes the log as asked for."""
    if args.log_format == "json":
        from ownpath.server.json_log import log_as_json

        log_as_json()
    if args.log_requests != "off":
        logging.getLogger("ownpath.access").setLevel(logging.INFO)
