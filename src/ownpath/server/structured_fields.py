"""Fields that bind an answer to a grammar: ``structured_outputs``, and vLLM's older names for its parts."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import from_json

from ownpath.server.adjust_fields import AdjustingRequest
from ownpath.server.conversation import ResponseFormat, Strict
from ownpath.server.errors import bad_request
from ownpath.structured.limits import MAX_CHOICES, MAX_GRAMMAR_CHARS


def _schema(value: object) -> object:
    """Reads a schema that is sent as text, as vLLM's clients may. Errors: ValueError."""
    if not isinstance(value, str):
        return value
    if len(value) > MAX_GRAMMAR_CHARS:
        raise ValueError(f"has {len(value)} characters; at most {MAX_GRAMMAR_CHARS} are read")
    return from_json(value, allow_inf_nan=False)


SchemaField = Annotated[
    dict[str, Any],
    BeforeValidator(_schema),
    WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "string"}]}),
]
GrammarText = Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_CHARS)]
ChoiceTexts = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MAX_CHOICES)]

_JSON = "the answer is JSON that fits this schema, an object or its text"
_REGEX = "the whole answer matches this regular expression, of Rust's kind"
_CHOICE = "the answer is one of these texts"
_GRAMMAR = "the answer fits this grammar, Lark (the start is `start`) or GBNF (`root`)"


class StructuredOutputs(Strict):
    """One way to bind the answer."""

    # The name "json" is taken by the base class.
    schema_value: SchemaField | None = Field(None, alias="json", description=_JSON)
    regex: GrammarText | None = Field(None, description=_REGEX)
    choice: ChoiceTexts | None = Field(None, description=_CHOICE)
    grammar: GrammarText | None = Field(None, description=_GRAMMAR)
    json_object: bool | None = Field(None, description="true: the answer is a JSON object")


class StructuredRequest(AdjustingRequest):
    """A request whose answers may have to fit a grammar."""

    response_format: ResponseFormat | None = Field(
        None,
        description="json_object: the answer is a JSON object. json_schema: it fits the schema, strict or not",
    )
    structured_outputs: StructuredOutputs | None = Field(
        None, description="one of json, regex, choice, grammar, json_object: what the answer must fit"
    )
    guided_json: SchemaField | None = Field(None, description=f"older name of structured_outputs.json: {_JSON}")
    guided_regex: GrammarText | None = Field(None, description=f"of structured_outputs.regex: {_REGEX}")
    guided_choice: ChoiceTexts | None = Field(None, description=f"of structured_outputs.choice: {_CHOICE}")
    guided_grammar: GrammarText | None = Field(None, description=f"of structured_outputs.grammar: {_GRAMMAR}")

    def bound_by(self) -> tuple[str, Any] | None:
        """Returns the field that binds the answer's text, and its value; ``None`` for a free answer.

        Errors: ApiError 400 for several, or for an empty one.
        """
        given: dict[str, Any] = {}
        if self.response_format is not None and self.response_format.type != "text":
            given["response_format"] = self.response_format
        if self.structured_outputs is not None:
            inner = self.structured_outputs.model_dump(by_alias=True)
            chosen = {
                f"structured_outputs.{name}": value for name, value in inner.items() if value not in (None, False)
            }
            if len(chosen) != 1:
                text = "structured_outputs: needs exactly one of json, regex, choice, grammar and json_object"
                raise bad_request(text, "structured_outputs", "invalid_value")
            given |= chosen
        for name in ("guided_json", "guided_regex", "guided_choice", "guided_grammar"):
            if (value := getattr(self, name)) is not None:
                given[name] = value
        if len(given) > 1:
            first, second = list(given)[:2]
            raise bad_request(f"{second} and {first} contradict each other: both bind the answer", second)
        return next(iter(given.items()), None)
