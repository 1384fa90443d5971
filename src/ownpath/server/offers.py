"""The tools that a request of another surface offers, as chat's functions, and how its client calls each."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from ownpath.server.errors import ApiError, bad_request, shorten
from ownpath.server.given import GivenObject
from ownpath.server.sse import JsonObject


@dataclass(frozen=True)
class ToolKey:
    """A tool as its client names it. kind: the type of its definition. namespace: of functions in one, else empty."""

    kind: str
    name: str
    namespace: str = ""

    @property
    def flat(self) -> str:
        """The one name that the model reads."""
        joint = "" if not self.namespace or self.namespace.endswith("__") else "__"
        return self.namespace + joint + self.name


@dataclass
class Offer:
    """Tools on offer.

    functions: in chat's shape. keys, places: of each in the request, by the name that the model reads.
    told: the definitions that count, as they were sent.
    hosted: types of tools that a vendor's server runs, which are left out.
    """

    functions: list[JsonObject] = field(default_factory=list)
    keys: dict[str, ToolKey] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    told: list[JsonObject] = field(default_factory=list)
    hosted: list[str] = field(default_factory=list)

    def add(self, tool: GivenObject, key: ToolKey, function: JsonObject) -> None:
        """Adds a function."""
        self.functions.append({"type": "function", "function": function | {"name": key.flat}})
        self.keys.setdefault(key.flat, key)
        self.places[key.flat] = tool.place.rstrip(".")

    def leave_out(self, tool: GivenObject) -> None:
        """Leaves a hosted tool out, and notes it as a label. Errors: ApiError 400 where labels are refused."""
        kind = tool.type_name()
        self.hosted.append(kind)
        tool.labels.accept(f"{tool.place}{kind}", f"{tool.kind}{kind}")

    def check(self) -> None:
        """Refuses a request that offers hosted tools alone: it is about them. Errors: ApiError 400."""
        if self.hosted and not self.functions:
            text = (
                f"tools: {shorten(self.hosted[0])} is a tool that a vendor's server runs, this one does not; only "
                "beside tools that the client runs is it left out"
            )
            raise bad_request(text, "tools", "unsupported_value")

    def names(self, functions: Sequence[JsonObject]) -> dict[str, str]:
        """Returns the places in the request of functions that chat is told, for errors."""
        named = (function["function"]["name"] for function in functions)
        return {f"tools.{index}.function": self.places[name] for index, name in enumerate(named)}

    def only(self, flat_names: Collection[str]) -> list[JsonObject]:
        """Returns the functions of these names."""
        return [tool for tool in self.functions if tool["function"]["name"] in flat_names]

    def find(self, key: ToolKey, param: str) -> str:
        """Returns the model's name of a tool on offer. Errors: ApiError 400 for one that is not."""
        if self.keys.get(key.flat) != key:
            raise bad_request(f"{param}: {shorten(key.name)} is not among the tools", param, "invalid_value")
        return key.flat


def choice_of(name: str) -> JsonObject:
    """Returns chat's ``tool_choice`` for one function."""
    return {"type": "function", "function": {"name": name}}


def not_run_here(tool: GivenObject, kind: str) -> ApiError:
    """Makes the 400 for a tool that the client runs, but whose parameters only a vendor's models know."""
    text = f"{shorten(kind)} has parameters that only its vendor's models know; offer it as a function with its own"
    return tool.refusal("type", text, "unsupported_value")
