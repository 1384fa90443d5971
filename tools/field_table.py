"""Writes the table of fields and routes in docs/serving.md, from the description that the server gives of itself.

    PYTHONPATH=src python tools/field_table.py          # writes it; --check only compares

Fields that share a fate and the routes that take them share a row.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ownpath.server.api_reference import description

PAGE = Path(__file__).parents[1] / "docs" / "serving.md"
BEGIN, END = "<!-- made by tools/field_table.py -->\n", "<!-- end -->\n"
HEAD = "| route | fields | become |\n|---|---|---|\n"
HONOURED, IGNORED = "honoured", "ignored, and named in a header"
NOT_SERVED = {
    "OpenAI's lists of what a server keeps": (
        *("/v1/files", "/v1/uploads", "/v1/batches", "/v1/assistants", "/v1/threads", "/v1/conversations"),
        *("/v1/vector_stores", "/v1/containers", "/v1/evals", "/v1/fine_tuning/jobs"),
        *("/v1/responses/{id}", "/v1/chat/completions/{id}", "/v1/messages/batches"),
    ),
    "other models' work": (
        *("/v1/embeddings", "/v1/moderations", "/v1/images/generations", "/v1/audio/speech", "/v1/realtime"),
        *("/v1/audio/transcriptions", "/v1/audio/translations", "/pooling", "/classify", "/score", "/v1/score"),
        *("/rerank", "/v1/rerank", "/v2/rerank", "/v2/embed", "/generative_scoring"),
    ),
    "vLLM's prompts and tokens of another shape": (
        *("/inference/v1/generate", "/invocations", "/cohere/v2/chat", "/v1/chat/completions/batch"),
        *("/v1/chat/completions/render", "/v1/completions/render", "/v1/responses/render", "/v1/messages/render"),
        "/v1/complete",
    ),
    "vLLM's controls": (
        *("/load", "/ping", "/server_info", "/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache"),
        *("/sleep", "/wake_up", "/is_sleeping", "/pause", "/resume", "/abort_requests", "/collective_rpc"),
        *("/start_profile", "/stop_profile", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/scale_elastic_ep"),
        *("/update_weights", "/fault_tolerance/apply"),
    ),
}
"""Reason -> paths that other servers have. Here they are 404."""


def fate_of(schema: dict[str, Any]) -> str:
    """Returns what becomes of a field, by its schema."""
    said = schema.get("description", "")
    if said == "changes nothing":
        return IGNORED
    if not said.startswith("not supported"):
        return HONOURED
    values = [f"`{json.dumps(value)}`" for value in schema["enum"] if value is not None]
    return f"400, except {' and '.join(values)}" if values else "400"


def fates() -> dict[str, dict[str, str]]:
    """Returns each route that has a body -> its fields -> their fates."""
    api = description(has_debug=True)
    schemas, found = api["components"]["schemas"], {}
    for path, methods in api["paths"].items():
        for method, operation in methods.items():
            if "requestBody" in operation:
                (content,) = operation["requestBody"]["content"].values()
                forms = content["schema"].get("anyOf", [content["schema"]])
                names = [form["$ref"].rsplit("/", 1)[1] for form in forms]
                fields = {name: schema for form in names for name, schema in schemas[form]["properties"].items()}
                found[f"{method.upper()} {path}"] = {name: fate_of(schema) for name, schema in fields.items()}
    return found


def rows() -> Iterator[str]:
    """Yields the table's rows: what is honoured, refused, ignored; then the routes without a body; then those that are
    not served."""
    routes_of: dict[tuple[str, str], list[str]] = {}
    for route, fields in fates().items():
        for name, fate in fields.items():
            routes_of.setdefault((name, fate), []).append(route)
    names_of: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (name, fate), routes in routes_of.items():
        names_of.setdefault((fate, tuple(routes)), []).append(name)
    order = {HONOURED: 0, IGNORED: 2}
    for (fate, takers), names in sorted(names_of.items(), key=lambda row: (order.get(row[0][0], 1), row[0])):
        paths_of_row = [route.removeprefix("POST ") for route in takers]
        yield f"| {_code(paths_of_row)} | {_code(names)} | {fate} |"
    paths = description(has_debug=True)["paths"]
    asked = [(f"{method.upper()} {path}", it) for path, methods in paths.items() for method, it in methods.items()]
    yield f"| {_code([route for route, operation in asked if 'requestBody' not in operation])} | | answered |"
    for why, others in NOT_SERVED.items():
        yield f"| {_code(others)} | | 404: {why} |"


def _code(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def split_page(page: str) -> tuple[str, str, str]:
    """Returns the page before the table, the table, and the rest. Errors: ValueError without the two marks."""
    before, rest = page.split(BEGIN)
    table, after = rest.split(END)
    return before + BEGIN, table, END + after


def table() -> str:
    """Returns the whole table."""
    return HEAD + "".join(f"{row}\n" for row in rows())


def main() -> None:
    """Writes the page, or with ``--check`` exits with 1 if its table is another."""
    before, found, after = split_page(PAGE.read_text(encoding="utf-8"))
    if "--check" in sys.argv:
        sys.exit(found != table())
    PAGE.write_text(before + table() + after, encoding="utf-8")


if __name__ == "__main__":
    main()
