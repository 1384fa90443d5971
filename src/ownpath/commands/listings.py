"""Texts of ``--list``: the tables that the code itself uses, so that no page of the documentation repeats them."""

import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from ownpath.terminal.console import wrapped

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

    from ownpath.checkpoint.schema import PartSpec
    from ownpath.kernels.spec import KernelSpec
    from ownpath.server.fields import Neutral

_EXAMPLE = (256, 512)


def checks_of_verify() -> str:
    """Lists every check by id, with what makes it fail; then the combinations that E01 knows."""
    from ownpath.verify.checks import ENGINE_FAILS_ON, ENGINE_TITLES, FAILS_ON, TITLES
    from ownpath.verify.machine import KNOWN_BAD

    checks = _entries((id_, title, f"fails on: {FAILS_ON[id_]}") for id_, title in TITLES.items())
    engine = _entries((id_, title, f"fails on: {ENGINE_FAILS_ON[id_]}") for id_, title in ENGINE_TITLES.items())
    known = _entries((f"{bad.what}", f"remedy: {bad.remedy}", f"source: {bad.source}") for bad in KNOWN_BAD)
    return f"{checks}\n{engine}\n\nknown to fail (E01):\n{known}"


def problems_of_inspect() -> str:
    """Lists every kind of problem with its remedy; every encoding with its tensors; and what may stay unread."""
    from ownpath.checkpoint.needless import NEEDLESS
    from ownpath.checkpoint.problems import FOUND_WHEN, REMEDIES
    from ownpath.checkpoint.schema import ENCODINGS

    problems = _entries((check, f"found when {FOUND_WHEN[check]}", f"remedy: {REMEDIES[check]}") for check in REMEDIES)
    encodings = _entries((f"{it.name} ({it.format})", *map(_part, it.parts)) for it in ENCODINGS)
    unread = _entries((f"such as {kind.example}", kind.reason) for kind in NEEDLESS)
    listed = f"problems:\n{problems}\n\nencodings, tensors of a weight {list(_EXAMPLE)}:\n{encodings}"
    return f"{listed}\n\nread by nothing, and no problem:\n{unread}"


def _part(part: "PartSpec") -> str:
    meaning = f"1 / {part.role}" if part.is_divisor else part.role
    needed = ", needed where the kernel quantises its input" if part.role == "input_scale" else ""
    shape = [1] if part.is_divisor else list(part.shape(*_EXAMPLE))
    return f"{part.suffix}: {' or '.join(part.dtypes)} {shape}, {meaning}{needed}"


def kernels_of_plan() -> str:
    """Lists every kernel by operation, best first, with its contract; then the steps of official numerics."""
    from ownpath.kernels.registry import SPECS
    from ownpath.official import MEANING

    kernels = _entries((f"{it.kind}: {it.name}", _contract(it), it.why, *_evidence(it)) for it in SPECS)
    steps = _entries((step.value, meaning) for step, meaning in MEANING.items())
    return f"kernels, best first:\n{kernels}\n\nsteps of --numerics, where they are official:\n{steps}"


def _contract(spec: "KernelSpec") -> str:
    facts = [f"runner {spec.runner}", f"layout {spec.layout}"]
    facts += [f"formats {', '.join(map(str, spec.formats))}"] if spec.formats else []
    facts += [f"sm_{spec.min_sm} or later"] if spec.min_sm is not None else []
    facts += [f"before sm_{spec.end_sm}"] if spec.end_sm is not None else []
    facts += [f"dimensions a multiple of {spec.dim_multiple}"] if spec.dim_multiple > 1 else []
    facts += [f"first dimension {spec.first_dim}"] if spec.first_dim is not None else []
    facts += ["dimensions powers of two"] if spec.dim_power_of_two else []
    facts += [f"activations {', '.join(spec.activations)}"] if spec.activations else []
    facts += ["batch-invariant"] if spec.is_batch_invariant else []
    facts += [f"inputs rounded to {spec.rounding} from {spec.rounds_from} rows"] if spec.rounding != "exact" else []
    facts += [f"needs {', '.join(spec.packages)}"] if spec.packages else []
    facts += [f"official {', '.join(sorted(spec.official))}"] if spec.official else []
    return "; ".join(facts)


def _evidence(spec: "KernelSpec") -> tuple[str, ...]:
    held = spec.evidence
    return () if held is None else (f"twin {held.twin}; test {held.test}; bench {held.bench}",)


def fields_of_server() -> str:
    """Lists every request field of each endpoint, reasons for empty content, and the checks of the self-test."""
    from ownpath.selftest.checks import all_checks
    from ownpath.server import fields
    from ownpath.server.conversation import CalledFunction, CallInMessage, ChatMessage, TemplateOptions
    from ownpath.server.empty_content import MEANING
    from ownpath.server.protocol import ChatRequest, CompletionRequest, StreamOptions
    from ownpath.server.token_api import DetokenizeRequest, TokenizeTextRequest

    parts = []
    endpoints = (("chat/completions", ChatRequest, fields.CHAT), ("completions", CompletionRequest, fields.COMPLETION))
    for name, model, neutral in endpoints:
        parts += [f"/v1/{name}, honoured:", _entries(_honoured_fields(model)), ""]
        parts += [f"/v1/{name}, refused with 400 unless the value is one of these (null: not sent):"]
        parts += [_refusal(neutral), ""]
    parts += _fields_of_surfaces()
    parts += ["/tokenize of a prompt, honoured:", _entries(_honoured_fields(TokenizeTextRequest)), ""]
    parts += ["/tokenize of messages: every field of /v1/chat/completions, and return_token_strs", ""]
    parts += ["/detokenize, honoured:", _entries(_honoured_fields(DetokenizeRequest)), ""]
    parts += ["of all, labels: accepted, ignored and named in a header (--strict-fields refuses them):"]
    parts += [_words([f"{kind}: {', '.join(names)}"]) for kind, names in fields.LABEL_KINDS.items()]
    parts += [
        "",
        "of thinking and of a tool, labels likewise:",
        _words(fields.THINKING_LABELS + fields.TOOL_LABELS),
        "",
    ]
    parts += ["of a message, honoured:", _words(ChatMessage.model_fields), ""]
    parts += [
        "of a call in a message, honoured:",
        _words([*CallInMessage.model_fields, *CalledFunction.model_fields]),
        "",
    ]
    parts += ["of a message, refused likewise; every other is a label, in its parts and calls too:"]
    parts += [_refusal(fields.MESSAGE), ""]
    parts += _nested_fields("stream_options", StreamOptions, fields.STREAM_OPTIONS)
    parts += _nested_fields("chat_template_kwargs", TemplateOptions, fields.TEMPLATE)
    parts += ["empty_content:", _entries((reason.value, meaning) for reason, meaning in MEANING.items()), ""]
    parts += ["self-test:"]
    parts += [_entries((it.id, f"{it.message}: {it.allowed}", f"remedy: {it.remedy}") for it in all_checks())]
    return "\n".join(parts)


def _fields_of_surfaces() -> list[str]:
    """Lists the fields of the surfaces that are translated into chat requests."""
    from ownpath.server.messages import request as messages
    from ownpath.server.passed import PASSED_EVERYWHERE
    from ownpath.server.responses import request as responses

    surfaces = (
        ("responses", responses.ResponsesRequest, responses.PASSED, responses.NEUTRAL),
        ("messages", messages.MessagesRequest, PASSED_EVERYWHERE, messages.MESSAGES_NEUTRAL),
    )
    parts = []
    for name, model, passed, neutral in surfaces:
        parts += [f"/v1/{name}, honoured:", _entries(_honoured_fields(model)), ""]
        parts += [f"/v1/{name}, honoured as in /v1/chat/completions:", _words(passed), ""]
        parts += [f"/v1/{name}, refused with 400 unless the value is one of these (null: not sent):"]
        parts += [_refusal(neutral), ""]
    parts += ["of /v1/messages, labels beside those of all:", _words(messages.OWN_LABELS), ""]
    return parts


def _nested_fields(name: str, model: type["BaseModel"], neutral: "Neutral") -> list[str]:
    honoured = [f"of {name}, honoured:", _words(model.model_fields), ""]
    return [*honoured, f"of {name}, refused likewise:", _refusal(neutral), ""]


def _honoured_fields(model: type["BaseModel"]) -> Iterator[tuple[str, ...]]:
    for name, field in model.model_fields.items():
        yield name, f"{field.description}{_range(field)}"


def _range(field: "FieldInfo") -> str:
    """Formats bounds and default of a field; leaves out bounds of 2**31 - 1 and beyond."""
    from annotated_types import Ge, Gt, Le

    facts = []
    for bound in field.metadata:
        match bound:
            case Ge(float() | int() as limit) if limit > -(2**31):
                facts.append(f">= {limit:g}")
            case Gt(float() | int() as limit):
                facts.append(f"> {limit:g}")
            case Le(float() | int() as limit) if limit < 2**31 - 1:
                facts.append(f"<= {limit:g}")
    if isinstance(field.default, bool | float | str):
        facts.append(f"default {json.dumps(field.default)}")
    return f" ({', '.join(facts)})" if facts else ""


def _words(names: Iterable[str]) -> str:
    return wrapped(", ".join(names), "  ")


def _refusal(neutral: "Neutral") -> str:
    shown = (f"{name} {' or '.join(map(json.dumps, values)) or 'null'}" for name, values in neutral.items())
    return wrapped(", ".join(shown), "  ")


def checks_of_diff() -> str:
    """Lists every check of another server, causes before their consequences."""
    from ownpath.diff.checks import CHECKS

    return _entries((it.id, it.finds, f"remedy: {it.remedy}") for it in CHECKS)


def _entries(entries: Iterable[tuple[str, ...]]) -> str:
    """Formats entries: the name on a line of its own, its texts indented below."""
    lines = []
    for name, *said in entries:
        lines.append(name)
        for text in said:
            lines.append(wrapped(text, "  ", "    "))
    return "\n".join(lines)
