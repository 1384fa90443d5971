"""Builds HTML from elements: text is escaped unless it came out of ``render``, so that none can be forgotten."""

from html import escape

from ownpath.terminal.text import printable


class Html(str):
    """Finished markup. Any other string is text, and is escaped where it becomes part of an element."""

    __slots__ = ()


def render(tag: str, *children: str, **attributes: str | tuple[str, ...]) -> Html:
    """Renders one element with its children.

    attributes: those without a value are left out; ``class_`` is ``class``; a tuple has one line for each string.
    """
    told = "".join(f' {name.rstrip("_")}="{_quote(value)}"' for name, value in attributes.items() if value)
    return Html(f"<{tag}{told}>{join(*children)}</{tag}>")


def join(*children: str) -> Html:
    """Renders elements and texts one after the other."""
    return Html("".join(child if isinstance(child, Html) else escape(printable(child)) for child in children))


def _quote(value: str | tuple[str, ...]) -> str:
    lines = (value,) if isinstance(value, str) else value
    return "\n".join(escape(printable(line)) for line in lines)
