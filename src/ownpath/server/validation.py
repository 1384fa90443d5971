"""Builds requests from their fields, and names the field that is wrong."""

from typing import TypeVar

from pydantic import ValidationError

from ownpath.server.conversation import FirstFailure, Strict
from ownpath.server.errors import ApiError, bad_request

RequestModel = TypeVar("RequestModel", bound=Strict)


def validate(model: type[RequestModel], body: dict[str, object]) -> RequestModel:
    """Builds a request from its fields. Errors: ApiError 400 naming the first that is wrong."""
    try:
        return model.model_validate(body, context=FirstFailure())
    except ValidationError as error:
        raise _first_error(error) from None


def _first_error(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = ".".join(str(part) for part in first["loc"])[:100]
    return bad_request(f"{param}: {first['msg'].removeprefix('Value error, ')}", param, "invalid_value")
