"""Objects of a request that are read by hand, each with its place, so that an error can name it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from ownpath.server.counts import MAX_PARTS
from ownpath.server.errors import ApiError, bad_request, shorten
from ownpath.server.fields import FieldTable
from ownpath.server.labels import Labels


@dataclass(frozen=True)
class GivenObject:
    """An object of a request. place: where it stands (``input.3.``). kind: the same without places of lists
    (``input.``), as labels are named."""

    value: Mapping[str, object]
    place: str
    kind: str
    labels: Labels

    def keep(self, table: FieldTable) -> "GivenObject":
        """Returns the object with a table's fields; null is not sent. Errors: ApiError 400 naming another."""
        return replace(self, value=self.labels.keep_fields(self.value, table, self.place, self.kind))

    def refusal(self, name: str, text: str, code: str = "invalid_value") -> ApiError:
        """Makes a 400 about one of its fields, or about the object itself if the name is empty."""
        param = (self.place + name).rstrip(".")
        return bad_request(f"{param}: {text}", param[:100], code)

    def text(self, name: str) -> str:
        """Returns a text that must be there. Errors: ApiError 400."""
        value = self.maybe_text(name)
        if value is None:
            raise self.refusal(name, "Field required")
        return value

    def maybe_text(self, name: str) -> str | None:
        """Returns a text; None if it was not sent. Errors: ApiError 400 for what is none."""
        value = self.value.get(name)
        if value is not None and not isinstance(value, str):
            raise self.refusal(name, "must be a string")
        return value

    def maybe_object(self, name: str) -> "GivenObject | None":
        """Returns an object; None if it was not sent. Errors: ApiError 400 for what is none."""
        value = self.value.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.refusal(name, "must be an object")
        return GivenObject(value, f"{self.place}{name}.", f"{self.kind}{name}.", self.labels)

    def objects(self, name: str, most: int = MAX_PARTS) -> Iterator["GivenObject"]:
        """Yields the objects of a list; none if it was not sent. Errors: ApiError 400 for what is no such list."""
        value = self.value.get(name)
        if value is not None and not isinstance(value, list):
            raise self.refusal(name, "must be a list of objects")
        if value is not None and len(value) > most:
            raise self.refusal(name, f"{len(value)} entries; at most {most} are allowed")
        for index, item in enumerate(value or ()):
            place = f"{self.place}{name}.{index}."
            if not isinstance(item, dict):
                raise self.refusal(f"{name}.{index}", "must be an object")
            yield GivenObject(item, place, f"{self.kind}{name}.", self.labels)

    def type_name(self, default: str | None = None) -> str:
        """Returns its ``type``. Errors: ApiError 400 without one, if there is no default."""
        value = self.value.get("type")
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self.refusal("type", "must be the name of a type")
        return value

    def unknown_type(self, known: str) -> ApiError:
        """Makes the 400 for a ``type`` that is not read here. known: the types that are."""
        text = f"{shorten(self.type_name(''))} is not supported yet; {known}"
        return self.refusal("type", text, "unsupported_value")
