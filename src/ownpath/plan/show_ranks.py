"""Shows what one of several ranks holds and sends: parts of a plan's page, and JSON values."""

from dataclasses import asdict, dataclass

from rich.console import RenderableType

from ownpath.plan.links import LinkBytes, link_bytes, totals
from ownpath.plan.plan import Plan
from ownpath.splits import AttentionSplit
from ownpath.terminal.page import Listing, fact, line
from ownpath.terminal.text import size_text

_HEADINGS = ("between ranks", "exchange", "kernel", "times", "at least", "as planned")


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank. weights: all operands and tables. replicated: tensors, as stored, that every rank has whole.
    request, token: caches of one request at any length, and of one more token of it."""

    weights: int
    replicated: int
    request: int
    token: float


def rank_page(plan: Plan, memory: RankMemory) -> list[RenderableType]:
    """Returns what a rank holds, and what it sends for a token."""
    parallel, links = plan.parallel, link_bytes(plan)
    whose = "all requests" if parallel.attention is AttentionSplit.HEADS else "its own requests"
    caches = f"{size_text(memory.request)} a request and {memory.token:,.0f} bytes a token of it"
    held = f"{size_text(memory.weights)} of weights, {size_text(memory.replicated)} of which every rank has"
    return [
        line(""),
        fact("ranks", f"{parallel.size}, attention by {parallel.attention}, experts by {parallel.experts}"),
        fact("a rank holds", f"{held}; the caches of {whose}, {caches}"),
        Listing(_HEADINGS, [_cells(link) for link in links]),
        *(fact(name, told, indent=2) for name, told in _sent(links)),
    ]


def rank_dict(plan: Plan, memory: RankMemory) -> dict[str, object]:
    """Returns the same as JSON values."""
    links = link_bytes(plan)
    sent = {
        "scored_row" if is_scored else "token": {"least_bytes": least, "planned_bytes": planned}
        for is_scored, least, planned in totals(links)
    }
    return {"rank_memory": asdict(memory), "links": [asdict(link) for link in links], "sent_by_a_rank": sent}


def _cells(link: LinkBytes) -> tuple[str, ...]:
    least, sent = f"{link.least:,.0f} bytes", f"{link.sent:,.0f} bytes"
    return link.name, str(link.kind), link.kernel, str(link.count), least, sent


def _sent(links: tuple[LinkBytes, ...]) -> list[tuple[str, str]]:
    """Returns what a rank sends over its links, NVLink's or others."""
    told = []
    for is_scored, least, sent in totals(links):
        of = "row whose logits are wanted" if is_scored else "token of the step"
        told.append((f"sent by a rank for a {of}", f"at least {least:,.0f} bytes, as planned {sent:,.0f} (NVLink)"))
    return told
