"""Turns a request's fields into the one grammar that its answers must fit, and says where in an answer that begins."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ownpath.chat.encode import Ending
from ownpath.chat.markers import DSML, THINK_END
from ownpath.chat.tokenizer import MissingMarkerError, Tokenizer
from ownpath.server.conversation import NamedTool, ResponseFormat
from ownpath.server.errors import ApiError, bad_request
from ownpath.server.prompts import missing_marker
from ownpath.server.protocol import ChatRequest
from ownpath.server.structured_fields import StructuredRequest
from ownpath.structured.calls import call_rules
from ownpath.structured.errors import GrammarRefused
from ownpath.structured.grammar import Grammar, GrammarKind, choice_rule, schema_rule
from ownpath.structured.matcher import FreePart

_ANY_OBJECT = {"type": "object"}
_REFUSED = "unsupported_value"


@dataclass(frozen=True)
class AnswerGrammar:
    """The grammar of a request's answers. param: the field that asks for it. free: parts of an answer before it."""

    param: str
    grammar: Grammar
    free: tuple[FreePart, ...] = ()

    def refusal(self, error: GrammarRefused) -> ApiError:
        """Makes the error for a grammar that cannot be enforced."""
        return _refusal(self.param, error)


def text_grammar(request: StructuredRequest) -> AnswerGrammar | None:
    """Returns what a request without a conversation asks of its answers. Errors: ApiError 400."""
    bound = request.bound_by()
    return None if bound is None else _bound_grammar(*bound)


def chat_grammar(request: ChatRequest, tokenizer: Tokenizer) -> AnswerGrammar | None:
    """Returns what a conversation's answers must fit, calls of tools included. Errors: ApiError 400."""
    bound = request.bound_by()
    if bound is not None and request.ending is Ending.REST:
        text = f"{bound[0]}: nothing is enforced of the rest of a message that has begun"
        raise bad_request(text, bound[0], _REFUSED)
    try:
        found = _with_calls(request, bound, tokenizer) if request.functions else text_grammar(request)
        if found is None or not request.opens_reasoning:
            return found
        barred = (tokenizer.special_id(DSML),) if request.functions else ()
        reasoning = FreePart(tokenizer.special_id(THINK_END), barred=barred)
    except MissingMarkerError as error:
        raise missing_marker(error) from None
    return AnswerGrammar(found.param, found.grammar, (reasoning, *found.free))


def _bound_grammar(param: str, value: Any) -> AnswerGrammar:
    """Writes the grammar that one field asks for. Errors: ApiError 400."""
    try:
        if param.endswith("regex"):
            return AnswerGrammar(param, Grammar(GrammarKind.REGEX, value))
        if param.endswith("grammar"):
            return AnswerGrammar(param, Grammar(GrammarKind.CLIENT, value))
        where, rule = _rule_of(param, value)
        return AnswerGrammar(where, Grammar(GrammarKind.LARK, f"start: {rule}"))
    except GrammarRefused as error:
        raise _refusal(param, error) from None


def _rule_of(param: str, value: Any) -> tuple[str, str]:
    """Returns the field that a rule is made of, and the rule. Errors: ApiError 400."""
    if param.endswith("choice"):
        return param, choice_rule(value)
    schema = value if isinstance(value, dict) else _ANY_OBJECT
    if isinstance(value, ResponseFormat) and value.json_schema is not None:
        param, schema = f"{param}.json_schema.schema", value.json_schema.value
    try:
        return param, schema_rule(schema)
    except GrammarRefused as error:
        raise _refusal(param, error) from None


def _with_calls(request: ChatRequest, bound: tuple[str, Any] | None, tokenizer: Tokenizer) -> AnswerGrammar | None:
    """Returns the grammar of a request that offers tools; ``None`` if nothing binds its answers."""
    choice = request.tool_choice
    must_call = choice == "required" or isinstance(choice, NamedTool)
    is_strict = any(function.get("strict") for function in request.functions)
    if bound is not None and not isinstance(bound[1], ResponseFormat):
        text = f"{bound[0]}: does not go with tools on offer; response_format does, and tool_choice 'none'"
        raise bad_request(text, bound[0], _REFUSED)
    if not (must_call or is_strict or bound):
        return None
    marker = tokenizer.special_id(DSML)
    try:
        calls = call_rules(_callable(request), marker, is_one=not request.parallel_tool_calls).text()
    except GrammarRefused as error:
        raise _refusal("tools", error) from None
    opening = r'"\n\n<" mark calls'
    if must_call:
        return AnswerGrammar("tool_choice", Grammar(GrammarKind.LARK, f"start: {opening}\n{calls}"))
    if bound is not None:
        param, rule = _rule_of(*bound)
        text = f"start: answer | {opening}\nanswer: {rule}\n{calls}"
        return AnswerGrammar(param, Grammar(GrammarKind.LARK, text))
    content = FreePart(marker, before=b"<", may_end=True)
    return AnswerGrammar("tools", Grammar(GrammarKind.LARK, f"start: calls\n{calls}"), (content,))


def _callable(request: ChatRequest) -> Sequence[tuple[int, dict[str, object]]]:
    """Returns the functions that may be called, with their numbers among the tools."""
    choice = request.tool_choice
    named = choice.function.name if isinstance(choice, NamedTool) else None
    numbered = enumerate(request.functions)
    return [(number, function) for number, function in numbered if named in (None, function["name"])]


def _refusal(param: str, error: GrammarRefused) -> ApiError:
    place = f"{param}.{error.place}" if error.place else param
    return bad_request(f"{place}: {error}", place, _REFUSED)
