"""Fields that change logits before a token is chosen: penalties, bias, a minimum of tokens."""

import math
from typing import Annotated, TypedDict

from pydantic import BeforeValidator, Field, WithJsonSchema

from ownpath.engine.limits import LARGEST_BIAS, LARGEST_PENALTY, LARGEST_REPETITION, MAX_LOGIT_BIAS
from ownpath.server.conversation import Strict
from ownpath.server.errors import bad_request

BIAS_SCHEMA = {
    "anyOf": [
        {
            "type": "object",
            "additionalProperties": {"type": ["number", "null"], "minimum": -LARGEST_BIAS, "maximum": LARGEST_BIAS},
            "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,9})$"},
            "maxProperties": MAX_LOGIT_BIAS,
        },
        {"type": "array", "maxItems": 0},
    ]
}
"""The values that ``read_bias`` takes."""
_MAX_DIGITS = 10
MAX_TOKENS = 2**31 - 1


def read_bias(value: object) -> dict[int, float]:
    """Reads ``logit_bias``: token ids, which JSON makes strings. null is "not sent", an empty list an empty object.

    Errors: ValueError naming the entry.
    """
    if value == []:
        return {}
    if not isinstance(value, dict):
        raise ValueError("must be an object of token ids and numbers")
    if len(value) > MAX_LOGIT_BIAS:
        raise ValueError(f"has {len(value)} entries; at most {MAX_LOGIT_BIAS} are allowed")
    return {_token_id(name): _amount(name, item) for name, item in value.items() if item is not None}


def _token_id(name: object) -> int:
    text = str(name)
    is_id = text.isascii() and text.isdecimal() and len(text) <= _MAX_DIGITS and str(int(text)) == text
    if not is_id or isinstance(name, bool):
        raise ValueError(f"{text[:40]!r} is not a token id")
    return int(text)


def _amount(name: object, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"the value of token id {name} must be a number")
    if abs(value) > LARGEST_BIAS:
        raise ValueError(f"the value of token id {name} must be between {-LARGEST_BIAS:g} and {LARGEST_BIAS:g}")
    return float(value)


class LogitChanges(TypedDict):
    """Parameters of ``SamplingParams`` that change logits."""

    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: tuple[tuple[int, float], ...]
    min_tokens: int


class AdjustingRequest(Strict):
    """A request's fields that change logits."""

    presence_penalty: float = Field(
        0.0, ge=-LARGEST_PENALTY, le=LARGEST_PENALTY, description="taken from the logits of tokens that the answer has"
    )
    frequency_penalty: float = Field(
        0.0, ge=-LARGEST_PENALTY, le=LARGEST_PENALTY, description="the same, for each time that the answer has them"
    )
    repetition_penalty: float = Field(
        1.0,
        gt=0,
        le=LARGEST_REPETITION,
        description="divides positive logits of tokens of prompt and answer, multiplies others; 1: no change",
    )
    logit_bias: Annotated[dict[int, float], BeforeValidator(read_bias), WithJsonSchema(BIAS_SCHEMA)] = Field(
        default_factory=dict,
        description=f"up to {MAX_LOGIT_BIAS} token ids, and what is added to their logits, at most {LARGEST_BIAS:g} "
        "either way",
    )
    min_tokens: int = Field(
        0,
        ge=0,
        le=MAX_TOKENS,
        description="no end token, stop token or stop string ends the answer before",
    )

    def adjustments(self) -> LogitChanges:
        """Returns the sampler's parameters of the same names."""
        return {
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "logit_bias": tuple(self.logit_bias.items()),
            "min_tokens": self.min_tokens,
        }

    def check_minimum(self, name: str | None, max_tokens: int) -> None:
        """Checks the minimum against the limit that a client asks for, -1 for none. Errors: ApiError 400."""
        if 0 <= max_tokens < self.min_tokens:
            limit = f"{name or 'max_tokens'}, {max_tokens}"
            raise bad_request(f"min_tokens: {self.min_tokens} is more than {limit}", "min_tokens", "invalid_value")
