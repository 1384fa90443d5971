"""Fields of a request that are accepted and change nothing: collected while it is read, then told to whoever asks."""

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ownpath.server.errors import bad_request, shorten
from ownpath.server.fields import FieldTable, asks_for_something

logger = logging.getLogger(__name__)

IGNORED_HEADER = "X-Ownpath-Ignored"
ADJUSTED_HEADER = "X-Ownpath-Adjusted"

_MAX_NAMES = 32
_MAX_NAME_CHARS = 64
_MAX_TOLD = 256
_NOT_PLAIN = re.compile(r"[^A-Za-z0-9_.\-]")


@dataclass
class Labels:
    """The labels of one request, by name and without the places of lists (``messages.name``).

    are_refused: a label is an error instead (``--strict-fields``).
    """

    are_refused: bool = False
    names: dict[str, None] = field(default_factory=dict)

    def keep_fields(
        self, body: Mapping[str, object], table: FieldTable, place: str = "", kind: str = ""
    ) -> dict[str, object]:
        """Returns the fields of an object that are honoured; notes its labels, and drops what asks for nothing.

        place, kind: its path in the request, with and without the places of lists. Errors: ApiError 400.
        """
        kept: dict[str, object] = {}
        for name, value in body.items():
            if value is None:
                continue
            if name in table.honoured:
                kept[name] = value
            elif name in table.neutral:
                if asks_for_something(value, table.neutral[name]):
                    param = place + name
                    raise bad_request(f"{param} is not supported yet", param, "unsupported_parameter")
            elif table.is_label(name):
                self.accept(place + name, kind + name)
            else:
                param = place + name
                raise bad_request(f"unknown field {shorten(param)}", param[:100], "unknown_parameter")
        return kept

    def accept(self, param: str, name: str) -> None:
        """Notes a label. param, name: its path with and without the places of lists. Errors: ApiError 400."""
        if self.are_refused:
            text = f"{shorten(param)} changes nothing, and this server refuses such fields (--strict-fields)"
            raise bad_request(text, param[:100], "unsupported_parameter")
        if len(self.names) <= _MAX_NAMES:
            self.names[name] = None

    def headers(self) -> dict[str, str]:
        """Returns the header that names them; none if there are none."""
        shown = [_plain(name) for name in self.names][:_MAX_NAMES]
        more = ["..."] if len(self.names) > _MAX_NAMES else []
        return {IGNORED_HEADER: ", ".join(shown + more)} if shown else {}


class LabelLog:
    """Names each label once in the log."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def tell(self, names: Iterable[str]) -> None:
        """Logs the names that were not logged before; after some hundreds of them, none any more."""
        fresh = [name for name in map(_plain, names) if name not in self._told]
        if fresh and len(self._told) < _MAX_TOLD:
            self._told.update(fresh)
            text = "fields that change no answer are ignored: %s (--strict-fields refuses them)"
            logger.warning(text, ", ".join(fresh))


def _plain(name: str) -> str:
    """Returns a client's name as a header and a line of the log can carry it."""
    return _NOT_PLAIN.sub("?", name[:_MAX_NAME_CHARS])
