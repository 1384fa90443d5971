"""Sends traces by OpenTelemetry's protocol. Needs the extra ``otel``; imported only where traces are asked for.

A request is a span of kind SERVER, a child of the caller's (W3C ``traceparent``), with the attributes of the
conventions for generative AI, no text among them. Each answer's queue, prefill and decode are its children.
"""

import os
import threading

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.propagate import extract
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context

from ownpath.server.timeline import Timeline
from ownpath.server.traces import OPERATIONS, TracedRequest
from ownpath.versions import versions

_CLOSE_S = 2.0
"""Longest wait for a collector at the end."""
Attributes = dict[str, str | int | float | list[str]]


def exporting_recorder(endpoint: str | None) -> "OtelRecorder":
    """Returns a recorder that sends spans in batches from a thread of its own.

    endpoint: the collector's whole URL; None: as the environment says (OTEL_EXPORTER_OTLP_...).
    """
    return OtelRecorder(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))


class OtelRecorder:
    """Makes spans of requests, and gives them to a processor."""

    def __init__(self, processor: SpanProcessor) -> None:
        named = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": "ownpath"}
        resource = Resource.create(named | {"service.version": versions()["ownpath"]})
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("ownpath")

    def record(self, request: TracedRequest) -> None:
        """Makes a request's spans. They are sent later."""
        operation = OPERATIONS[request.path]
        span: Span = self._tracer.start_span(
            operation if request.model is None else f"{operation} {request.model}",
            context=extract(request.headers),
            kind=SpanKind.SERVER,
            attributes=_request_attributes(request, operation) | _generation_attributes(request),
            start_time=request.begun_ns,
        )
        if span.is_recording() and request.generating is not None:
            for index, timeline in enumerate(request.generating.timelines):
                self._record_phases(request, span, index, timeline)
        fault = _fault_of(request)
        if fault is not None:
            span.set_attribute("error.type", fault)
            span.set_status(StatusCode.ERROR)
        span.end(request.ended_ns)

    def _record_phases(self, request: TracedRequest, parent: Span, index: int, timeline: Timeline) -> None:
        for name, (begin, end) in timeline.phases().items():
            attributes: Attributes = {"ownpath.choice.index": index}
            if name == "decode":
                attributes["gen_ai.usage.output_tokens"] = timeline.num_tokens
            span = self._tracer.start_span(
                name,
                context=set_span_in_context(parent),
                attributes=attributes,
                start_time=request.at_ns(begin),
            )
            span.end(request.at_ns(end))

    def close(self) -> None:
        """Sends what is left, for two seconds at most: a collector that is gone holds up no end."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(_CLOSE_S)


def _fault_of(request: TracedRequest) -> str | None:
    """Returns what went wrong on our side, or that the client left; an answer may fail behind a status of 200."""
    timelines = [] if request.generating is None else request.generating.timelines
    if request.status is not None and request.status >= 500:
        return str(request.status)
    if any(timeline.reason == "error" for timeline in timelines):
        return "generation_failed"
    is_left = request.status in (None, 499) or any(timeline.reason == "abandoned" for timeline in timelines)
    return "abandoned" if is_left else None


def _request_attributes(request: TracedRequest, operation: str) -> Attributes:
    attributes: Attributes = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "ownpath",
        "http.request.method": "POST",
        "http.route": request.path,
        "ownpath.request.id": request.request_id,
    }
    if request.status is not None:
        attributes["http.response.status_code"] = request.status
    return attributes


def _generation_attributes(request: TracedRequest) -> Attributes:
    generating = request.generating
    if generating is None or request.model is None:
        return {}
    attributes: Attributes = {
        "gen_ai.request.model": request.model,
        "gen_ai.response.model": request.model,
        "gen_ai.usage.input_tokens": generating.num_prompt_tokens,
        "gen_ai.usage.output_tokens": generating.num_generated_tokens,
        "gen_ai.response.finish_reasons": [timeline.reason or "" for timeline in generating.timelines],
        "gen_ai.request.choice.count": len(generating.timelines),
    }
    params = generating.params
    if params is None:
        return attributes
    attributes |= {
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.frequency_penalty": params.frequency_penalty,
        "gen_ai.request.presence_penalty": params.presence_penalty,
    }
    attributes |= {} if params.seed is None else {"gen_ai.request.seed": params.seed}
    return attributes | ({"gen_ai.request.top_k": params.top_k} if params.top_k else {})
