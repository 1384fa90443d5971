"""Bytes that a step's exchanges send between ranks, for each token. Pure.

Counted is what one rank sends for one token of the step, whichever rank the token is of; as much comes in. Not counted
are tokens that rank 0 has drawn again, some bytes each. For w bytes of a token and N ranks, at least:

| exchange | at least | by the references |
|---|---|---|
| all_reduce | 2 (N - 1) / N w: to add up parts, then to hand out sums | (N - 1) w, in one trip; as few with 2 ranks |
| all_gather of rows | (N - 1) / N w: a token's rank sends it to all others | the same |
| all_gather of columns | (N - 1) / N w | the same |
| reduce_scatter | (N - 1) / N w | the same |
| all_to_all | (N - 1) / N w / N: columns of a token, to its rank | (N - 1) / N w: to all, which draw for all |
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from ownpath.ops import OpKind
from ownpath.plan.caches import ACTIVATION_BYTES
from ownpath.plan.ops import PlannedCompanion
from ownpath.plan.plan import Plan
from ownpath.splits import DRAWN

_ID_AND_WEIGHT_BYTES = 12
_LOGIT_BYTES = 4


@dataclass(frozen=True)
class LinkBytes:
    """One kind of exchange of a step. name: within a layer. count: of such exchanges.

    least, sent: bytes that one rank sends for one token of the step, in all of them; at least, and by the planned
    kernels. is_scored: of tokens whose logits are wanted, and no others.
    """

    name: str
    kind: OpKind
    kernel: str
    count: int
    least: float
    sent: float
    is_scored: bool


def link_bytes(plan: Plan) -> tuple[LinkBytes, ...]:
    """Returns the exchanges of a plan by kind; empty for one rank."""
    exchanges = (one for one in plan.companions if one.spec.kind.is_exchange and one.spec.slot != DRAWN)
    found = [one for one in exchanges if not one.spec.slot.startswith("mtp.")]
    found.sort(key=lambda one: (one.spec.slot.startswith("head."), _name(one)))
    return tuple(_of_kind(plan, name, [*same]) for name, same in groupby(found, _name))


def totals(links: tuple[LinkBytes, ...]) -> Iterator[tuple[bool, float, float]]:
    """Yields (is_scored, least, sent) of the exchanges of every token, then of those of scored rows."""
    for is_scored in (False, True):
        same = [link for link in links if link.is_scored == is_scored]
        yield is_scored, sum(link.least for link in same), sum(link.sent for link in same)


def _name(planned: PlannedCompanion) -> str:
    slot = planned.spec.slot
    return slot if slot.startswith("head.") else slot.split(".", 2)[2]


def _of_kind(plan: Plan, name: str, same: list[PlannedCompanion]) -> LinkBytes:
    spec, size, count = same[0].spec, plan.parallel.size, len(same)
    is_logits = spec.dims[0] == plan.config.vocab_size and name.startswith("head.")
    width = spec.dims[0] * (_LOGIT_BYTES if is_logits else ACTIVATION_BYTES[plan.demands.activations])
    width += sum(spec.dims[1:]) * _ID_AND_WEIGHT_BYTES
    others = (size - 1) * width
    least, sent = {
        OpKind.REDUCE: (2 * others / size, others),
        OpKind.GATHER: (others / size, others / size),
        OpKind.SCATTER: (others / size, others / size),
        OpKind.TURN: (others / size**2, others / size),
    }[spec.kind]
    kernel = "+".join(dict.fromkeys(one.choice.kernel.name for one in same))
    return LinkBytes(name, spec.kind, kernel, count, count * least, count * sent, name.startswith("head."))
