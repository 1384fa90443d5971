"""The option of ``serve`` that asks for traces, and OpenTelemetry's own variables that do."""

import argparse
import os
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from ownpath.commands.arguments import OptionHolder, some_text
from ownpath.terminal.console import tell

if TYPE_CHECKING:
    from ownpath.server.traces import TraceRecorder

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_PROTOCOL = "http/protobuf"


def add_traces(group: OptionHolder) -> None:
    """Adds where traces are sent."""
    group.add_argument(
        "--otlp-traces-endpoint",
        type=some_text,
        metavar="URL",
        help=f"send OpenTelemetry traces there, whole URL, {_PROTOCOL}, as http://127.0.0.1:4318/v1/traces; needs the "
        f"extra 'otel' (default: as ${_ENDPOINTS[0]} or ${_ENDPOINTS[1]} say; without any, no traces)",
    )


def recorder_of(args: argparse.Namespace) -> "TraceRecorder | None":
    """Returns what makes traces; None if none are asked for. Only then is OpenTelemetry imported.

    Errors: ValueError if the option asks for what is not there. Where only the environment asks, which may be set for
    everything on a machine, a line on stderr says so and there are no traces.
    """
    endpoint: str | None = args.otlp_traces_endpoint
    if endpoint is None and not _environment_asks():
        return None
    problem = _problem_of(endpoint)
    if problem is None:
        try:
            from ownpath.server.otel import exporting_recorder

            return exporting_recorder(endpoint)
        except ModuleNotFoundError as error:
            if not _is_missing(error):
                raise
            problem = "traces need the extra 'otel': pip install 'ownpath[otel]'"
    if endpoint is not None:
        raise ValueError(f"--otlp-traces-endpoint: {problem}")
    tell("warning", f": no traces, although OpenTelemetry's variables are set: {problem}")
    return None


def _is_missing(error: ModuleNotFoundError) -> bool:
    return (error.name or "").startswith("opentelemetry")


def _environment_asks() -> bool:
    is_off = (
        os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or os.environ.get("OTEL_TRACES_EXPORTER") == "none"
    )
    return not is_off and any(os.environ.get(name) for name in _ENDPOINTS)


def _problem_of(endpoint: str | None) -> str | None:
    if endpoint is not None:
        url = urlsplit(endpoint)
        if url.scheme not in ("http", "https") or not url.hostname:
            return f"{endpoint!r} is no URL of http or https"
    protocol = next(filter(None, (os.environ.get(name) for name in _PROTOCOLS)), _PROTOCOL)
    return None if protocol == _PROTOCOL else f"only {_PROTOCOL} is spoken, not {protocol!r}"
