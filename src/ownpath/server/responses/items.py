"""``input`` of ``/v1/responses``: the items that clients send back, as messages.

An item's id and status say nothing to the model. Reasoning comes back as its text, as ``encrypted_content`` that this
server made, or as a summary, which here is the whole reasoning too.
"""

from collections.abc import Callable

from ownpath.chat.turns import PART_SEPARATOR
from ownpath.server.carried import carried
from ownpath.server.counts import MAX_MESSAGES
from ownpath.server.errors import bad_request, shorten
from ownpath.server.fields import FieldTable
from ownpath.server.given import GivenObject
from ownpath.server.offers import ToolKey
from ownpath.server.responses.tools import arguments_of_input
from ownpath.server.transcript import Transcript

INPUT_ROLES = ("user", "system", "developer", "assistant")
TEXT_TYPES = ("input_text", "output_text", "text", "refusal", "reasoning_text", "summary_text")

_OWN = ("type", "id", "status")
_MESSAGE = FieldTable((*_OWN, "role", "content", "phase"), {}, None)
_CALL = FieldTable((*_OWN, "call_id", "name", "namespace", "arguments", "input", "caller"), {"async": (False,)}, None)
_RESULT = FieldTable((*_OWN, "call_id", "output", "name", "namespace", "caller"), {}, None)
_REASONING = FieldTable((*_OWN, "summary", "content", "encrypted_content"), {}, None)
_PART = FieldTable(("type", "text", "refusal", "annotations", "logprobs"), {}, None)


def read_input(request: GivenObject, instructions: str | None) -> Transcript:
    """Reads ``input`` behind the instructions. Errors: ApiError 400 naming the item and the field."""
    transcript = Transcript()
    given = request.value.get("input")
    system = [] if instructions is None else [instructions]
    if isinstance(given, str):
        _begin(transcript, system)
        transcript.say("user", given)
        return transcript
    if given == [] or given is None:
        raise bad_request("input: Field required, a text or at least one item", "input")
    items = list(request.objects("input", MAX_MESSAGES))
    num_system = next((n for n, item in enumerate(items) if item.value.get("role") != "system"), len(items))
    system += [_content(item.keep(_MESSAGE), "content") for item in items[:num_system]]
    _begin(transcript, system)
    for item in items[num_system:]:
        _read_item(item, transcript)
    return transcript


def check_end(transcript: Transcript) -> None:
    """Refuses an input that leaves nothing to answer. Errors: ApiError 400."""
    if transcript.whole()[-1]["role"] not in ("user", "developer", "tool"):
        text = "input: the last item must be a user's or a developer's message, or the output of a call"
        raise bad_request(text, "input", "invalid_value")


def _begin(transcript: Transcript, system: list[str]) -> None:
    if system:
        transcript.say("system", PART_SEPARATOR.join(system))


def _read_item(item: GivenObject, transcript: Transcript) -> None:
    kind = item.type_name("message" if "role" in item.value else None)
    if kind not in _READERS:
        known = f"{', '.join(_READERS)} are (this server keeps no items and runs no tools)"
        raise item.unknown_type(known)
    _READERS[kind](item, transcript)


def _read_message(item: GivenObject, transcript: Transcript) -> None:
    kept = item.keep(_MESSAGE)
    role = kept.text("role")
    if role not in INPUT_ROLES:
        raise kept.refusal("role", f"{shorten(role)} is none of {', '.join(INPUT_ROLES)}", "unsupported_value")
    text = _content(kept, "content")
    if role == "assistant":
        transcript.answer(text)
    else:
        transcript.say(role, text)


def _read_call(item: GivenObject, transcript: Transcript) -> None:
    kept = item.keep(_CALL)
    arguments = kept.maybe_text("arguments")
    transcript.call(kept.text("call_id"), _key(kept, "function").flat, "null" if arguments is None else arguments)


def _read_custom_call(item: GivenObject, transcript: Transcript) -> None:
    kept = item.keep(_CALL)
    transcript.call(kept.text("call_id"), _key(kept, "custom").flat, arguments_of_input(kept.text("input")))


def _key(item: GivenObject, kind: str) -> ToolKey:
    name = item.text("name")
    if not name or '"' in name:
        raise item.refusal("name", "must be a name, without quotation marks")
    return ToolKey(kind, name, item.maybe_text("namespace") or "")


def _read_result(item: GivenObject, transcript: Transcript) -> None:
    kept = item.keep(_RESULT)
    call_id = kept.text("call_id")
    if call_id not in transcript.call_ids:
        raise kept.refusal("call_id", f"{shorten(call_id)} is no call of an earlier item")
    transcript.result(call_id, _content(kept, "output"))


def _read_reasoning(item: GivenObject, transcript: Transcript) -> None:
    kept = item.keep(_REASONING)
    text = "".join(_texts(kept, "content"))
    word = kept.maybe_text("encrypted_content")
    if not text and word is not None:
        own = carried(word)
        if own is None:
            kept.labels.accept(f"{kept.place}encrypted_content", f"{kept.kind}encrypted_content")
        text = own or ""
    transcript.reason(text or PART_SEPARATOR.join(_texts(kept, "summary")))


_READERS: dict[str, Callable[[GivenObject, Transcript], None]] = {
    "message": _read_message,
    "function_call": _read_call,
    "function_call_output": _read_result,
    "custom_tool_call": _read_custom_call,
    "custom_tool_call_output": _read_result,
    "reasoning": _read_reasoning,
}
ITEM_TYPES = tuple(_READERS)


def _content(item: GivenObject, name: str) -> str:
    """Returns the text of a field that is a text or a list of parts."""
    value = item.value.get(name)
    return value if isinstance(value, str) else PART_SEPARATOR.join(_texts(item, name))


def _texts(item: GivenObject, name: str) -> list[str]:
    """Returns the texts of a field's parts."""
    return [_part_text(part) for part in item.objects(name)]


def _part_text(part: GivenObject) -> str:
    kind = part.type_name()
    if kind not in TEXT_TYPES:
        raise part.unknown_type("only text is")
    return part.keep(_PART).text("refusal" if kind == "refusal" else "text")
