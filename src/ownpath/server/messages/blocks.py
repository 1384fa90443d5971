"""``system`` and ``messages`` of ``/v1/messages``: blocks of content, as chat's messages.

A user's results of tools are messages of their own, in their places between the texts. Reasoning comes back as its
text, or as the signature that this server made where the text was to be left out.
"""

from ownpath.chat.dsml import write_json
from ownpath.chat.turns import PART_SEPARATOR
from ownpath.server.carried import carried
from ownpath.server.counts import MAX_MESSAGES
from ownpath.server.errors import bad_request, shorten
from ownpath.server.fields import FieldTable
from ownpath.server.given import GivenObject
from ownpath.server.transcript import Transcript

BLOCK_TYPES = ("text", "tool_use", "tool_result", "thinking", "redacted_thinking")
MESSAGE_ROLES = ("user", "assistant", "system")
_MESSAGE = FieldTable(("role", "content"), {}, None)
_TEXT = FieldTable(("type", "text", "citations"), {}, None)
_THINKING = FieldTable(("type", "thinking", "signature"), {}, None)
_REDACTED = FieldTable(("type",), {}, None)
_CALL = FieldTable(("type", "id", "name", "input", "caller"), {}, None)
_RESULT = FieldTable(("type", "tool_use_id", "content", "is_error"), {}, None)
_TEXT_ONLY = "only text is, and results of tools"


def read_conversation_of(request: GivenObject) -> Transcript:
    """Reads ``system`` and ``messages``. Errors: ApiError 400 naming the message and the field."""
    transcript = Transcript()
    messages = [message.keep(_MESSAGE) for message in request.objects("messages", MAX_MESSAGES)]
    if not messages:
        raise bad_request("messages: at least one message is needed", "messages")
    for message in messages:
        if message.text("role") not in MESSAGE_ROLES:
            text = f"{shorten(message.text('role'))} is none of {', '.join(MESSAGE_ROLES)}"
            raise message.refusal("role", text, "unsupported_value")
    num_system = next((n for n, it in enumerate(messages) if it.value["role"] != "system"), len(messages))
    given = [request] if request.value.get("system") is not None else []
    system = [_texts(it, "system") for it in given] + [_texts(it, "content") for it in messages[:num_system]]
    if system:
        transcript.say("system", PART_SEPARATOR.join(system))
    for message in messages[num_system:]:
        _read_message(message, transcript)
    return transcript


def _read_message(message: GivenObject, transcript: Transcript) -> None:
    role = message.value["role"]
    if "content" not in message.value:
        raise message.refusal("content", "Field required")
    if role == "assistant":
        _read_answer(message, transcript)
    elif role == "user":
        _read_user(message, transcript)
    else:
        # The format has a place for the system's text at the start alone; a developer's has one anywhere.
        transcript.say("developer", _texts(message, "content"))


def _read_user(message: GivenObject, transcript: Transcript) -> None:
    if isinstance(message.value["content"], str):
        transcript.say("user", message.text("content"))
        return
    texts: list[str] = []
    is_said = False
    for block in message.objects("content"):
        if block.type_name() != "tool_result":
            texts.append(_text(block))
            continue
        if texts:
            transcript.say("user", PART_SEPARATOR.join(texts))
            texts = []
        _read_result(block, transcript)
        is_said = True
    if texts or not is_said:
        transcript.say("user", PART_SEPARATOR.join(texts))


def _read_result(block: GivenObject, transcript: Transcript) -> None:
    kept = block.keep(_RESULT)
    if kept.value.get("is_error") not in (None, False, True):
        raise kept.refusal("is_error", "must be true or false")
    if kept.value.get("is_error"):
        # The format has no mark for it; the text of the result says what failed.
        kept.labels.accept(f"{kept.place}is_error", f"{kept.kind}is_error")
    call_id = kept.text("tool_use_id")
    if call_id not in transcript.call_ids:
        raise kept.refusal("tool_use_id", f"{shorten(call_id)} is no tool_use of an earlier message")
    transcript.result(call_id, _texts(kept, "content"))


def _read_answer(message: GivenObject, transcript: Transcript) -> None:
    if isinstance(message.value["content"], str):
        transcript.answer(message.text("content"))
        return
    transcript.answer("")
    for block in message.objects("content"):
        kind = block.type_name()
        if kind == "thinking":
            transcript.reason(_reasoning(block.keep(_THINKING)))
        elif kind == "redacted_thinking":
            block.keep(_REDACTED)
        elif kind == "tool_use":
            _read_call(block.keep(_CALL), transcript)
        else:
            transcript.answer(_text(block))


def _reasoning(block: GivenObject) -> str:
    """Returns reasoning that is shown, or carried in the signature."""
    text, signature = block.text("thinking"), block.maybe_text("signature")
    return text or carried(signature or "") or ""


def _read_call(block: GivenObject, transcript: Transcript) -> None:
    name, given = block.text("name"), block.value.get("input", {})
    if not name or '"' in name:
        raise block.refusal("name", "must be a name, without quotation marks")
    transcript.call(block.text("id"), name, given if isinstance(given, str) else write_json(given))


def _texts(owner: GivenObject, name: str) -> str:
    """Returns the text of a field that is a text or a list of text blocks."""
    value = owner.value.get(name)
    if isinstance(value, str):
        return value
    return PART_SEPARATOR.join(_text(block) for block in owner.objects(name))


def _text(block: GivenObject) -> str:
    if block.type_name() != "text":
        raise block.unknown_type(_TEXT_ONLY)
    return block.keep(_TEXT).text("text")
