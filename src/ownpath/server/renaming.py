"""Errors of a chat request, told in the names of the surface whose request was translated into it."""

import contextlib
from collections.abc import Iterator, Mapping

from ownpath.server.errors import ApiError


@contextlib.contextmanager
def renaming(names: Mapping[str, str]) -> Iterator[None]:
    """Tells errors inside of it in other names. names: a field of chat, or the beginning of its path -> its name."""
    try:
        yield
    except ApiError as error:
        raise _renamed(error, names) from None


def _renamed(error: ApiError, names: Mapping[str, str]) -> ApiError:
    old = error.param
    if old is None:
        return error
    known = max((name for name in names if old == name or old.startswith(f"{name}.")), key=len, default=None)
    if known is None:
        return error
    rest, text = old[len(known) :], str(error)
    if known == "messages" and rest:
        # One message may be several items: its place is none of the request's.
        rest, text = "", text.replace(old, f"{known}: {old.rpartition('.')[2]}", 1)
        old = known
    new = names[known] + rest
    text = new + text[len(old) :] if text.startswith(old) else text
    return ApiError(error.status, text, param=new[:100], code=error.code, headers=error.headers)
