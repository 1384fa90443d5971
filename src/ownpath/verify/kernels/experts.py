"""K01, K04 and K06 of the routed experts: each chosen expert alone and by name, then mixtures of them.

Every chosen expert is decoded once and run in float64 on a few drawn rows. All calls consist of these rows, so that the
expected result of a call is a weighted sum of known results.

Legend: R drawn rows, E chosen experts, D hidden, T tokens of a call, K experts per token.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ownpath.conformance.bounds import Deviation, Exact, deviation, ratios, rounding
from ownpath.conformance.exact import expert
from ownpath.conformance.params import LOUD, ORDINARY
from ownpath.finding import Finding
from ownpath.official import Step
from ownpath.ops import OpKind
from ownpath.plan.ops import PlannedOp
from ownpath.verify.kernels.diagnosis import explain
from ownpath.verify.kernels.operands import matrices_of, steps_of
from ownpath.verify.kernels.probe import Probe
from ownpath.verify.kernels.products import ONE_FORM, REMEDY
from ownpath.verify.kernels.row_counts import placeholder, row_counts, variants_of
from ownpath.verify.kernels.tally import Tally

NUM_ORDINARY = len(ORDINARY)
PERIOD = NUM_ORDINARY + len(LOUD)
MAX_DIAGNOSED = 4
"""Most wrong experts that are diagnosed; with more of them, the fault is not an expert's own."""
CLAMP_REMEDY = "swiglu_limit is not applied, or with another value: see the kernel's call"


@dataclass(frozen=True)
class ExactRows:
    """Exact results. value, bound [R, E, D]: each drawn row through each chosen expert. loud [R, E]: gates beyond the
    limit."""

    value: Tensor
    bound: Tensor
    loud: Tensor


@dataclass(frozen=True)
class RoutedCall:
    """One call: the drawn row of each token [T], its chosen experts as indices [T, K], and weights [T, K]."""

    rows: Tensor
    places: Tensor
    weights: Tensor


@dataclass(frozen=True)
class RoutedExperts:
    """The routed experts of one layer."""

    probe: Probe
    slot: str

    @property
    def op(self) -> PlannedOp:
        (op,) = self.probe.ops[self.slot]
        return op

    @cached_property
    def ids(self) -> Tensor:
        """The chosen experts' ids [E]."""
        assert self.probe.layer is not None
        return torch.tensor(self.probe.subject.expert_ids(self.probe.layer.layer_idx), device=self.probe.device)

    @cached_property
    def x(self) -> Tensor:
        """The drawn rows [R, D]: ordinary ones, then large ones."""
        x = self.probe.normal(self.slot, PERIOD, self.probe.config.hidden_size)
        return self.probe.draw.scale_rows(x, (*ORDINARY, *LOUD))

    def name(self, place: int) -> str:
        return f"{self.slot}.{int(self.ids[place])}"

    @cached_property
    def known(self) -> ExactRows:
        """The exact results, computed one expert at a time, so that never more than one is decoded."""
        config, stored = self.probe.config, self.probe.stored
        shape = (len(self.x), len(self.ids), config.hidden_size)
        value = torch.empty(shape, dtype=torch.float64, device=self.probe.device)
        bound, loud = torch.empty_like(value), torch.empty_like(value[..., 0])
        for place in range(len(self.ids)):
            steps = steps_of(self.op, stored, self.name(place), config.swiglu_limit, self.probe.dtype)
            matrices = matrices_of(self.op, stored, self.name(place))
            exact = expert(self.x, matrices, steps)
            # A kernel may round each expert's output before it sums them.
            exact = exact.plus(rounding(self.probe.dtype) * exact.value.abs())
            value[:, place], bound[:, place] = exact.value, exact.bound
            gate = steps.inputs(self.x) @ matrices.w1.T
            loud[:, place] = (gate > config.swiglu_limit).double().mean(-1)
        return ExactRows(value, bound, loud)

    def call(self, routing: RoutedCall) -> Tensor:
        """Calls the slot: returns [T, D]."""
        ids_TK, weights_TK = self.ids[routing.places].contiguous(), routing.weights.contiguous()
        y: Tensor = self.probe.slots[self.slot](self.x[routing.rows], ids_TK, weights_TK)
        return y

    def placeholders(self, num_tokens: int) -> tuple[object, ...]:
        """Makes arguments of a call with so many tokens, without values."""
        slots, device = self.probe.config.num_experts_per_tok, self.x.device
        x = placeholder(self.x.dtype, device, num_tokens, self.x.shape[1])
        weights = placeholder(torch.float32, device, num_tokens, slots)
        return x, placeholder(torch.int64, device, num_tokens, slots), weights

    def exact(self, routing: RoutedCall) -> Exact:
        """Returns the expected result."""
        known = self.known
        weights = routing.weights.double()[..., None]
        rows = routing.rows[:, None]
        value = (known.value[rows, routing.places] * weights).sum(1)
        return Exact(value, (known.bound[rows, routing.places] * weights).sum(1))


def check_experts(probe: Probe) -> Iterator[Finding]:
    """K01, K04 and K06: checks the routed experts."""
    for slot in probe.slots_of(OpKind.MOE):
        experts = RoutedExperts(probe, slot)
        each = Tally("K01", slot, "experts against dequantise-then-matmul in float64", REMEDY)
        clamp = Tally("K06", slot, "experts beyond the clamp", CLAMP_REMEDY, "no gate of any expert came near it")
        with each.catch_errors(slot, probe.kernels[slot]):
            wrong = _check_alone(experts, each, clamp)
            # One wrong expert spoils every mixture, so mixtures would add nothing.
            if not wrong:
                _check_mixtures(experts, each)
        yield from each.findings()
        yield from clamp.findings()
        if not each.failures:
            yield from _check_variants(experts)


def _check_alone(experts: RoutedExperts, each: Tally, clamp: Tally) -> bool:
    """Runs every chosen expert by itself with weight 1, all in one call; returns whether one is wrong."""
    kernel = experts.probe.kernels[experts.slot]
    num_rows, num_experts = len(experts.x), len(experts.ids)
    rows = torch.arange(num_rows, device=experts.x.device).repeat_interleave(num_experts)
    places = torch.arange(num_experts, device=experts.x.device).repeat(num_rows)
    call = RoutedCall(rows, places[:, None], torch.ones(len(rows), 1, device=experts.x.device))
    found = experts.call(call)
    exact = experts.exact(call)
    if found.shape != exact.value.shape:
        each.fail(experts.slot, kernel, f"gives {list(found.shape)} for {list(exact.value.shape)}")
        return True
    worst = ratios(found, exact).amax(-1).view(num_rows, num_experts)
    y = found.view(num_rows, num_experts, -1)
    _tally_alone(experts, each, y, worst, slice(NUM_ORDINARY))
    if bool((experts.known.loud[NUM_ORDINARY:] > 0).any()):
        _tally_alone(experts, clamp, y, worst, slice(NUM_ORDINARY, None))
    return bool((worst > 1).any())


def _tally_alone(experts: RoutedExperts, tally: Tally, y: Tensor, worst: Tensor, rows: slice) -> None:
    """Adds the experts' worst elements among some rows to the tally."""
    kernel, known = experts.probe.kernels[experts.slot], experts.known
    by_expert = worst[rows].amax(0).tolist()
    for place, ratio in enumerate(by_expert):
        if ratio <= 1.0:
            tally.add(experts.name(place), kernel, Deviation(ratio))
            continue
        exact = Exact(known.value[rows, place], known.bound[rows, place])
        found = deviation(y[rows, place], exact)
        what = "differs"
        if len(tally.failures) < MAX_DIAGNOSED:
            what = explain(experts.probe, experts.op, experts.name(place), experts.x, y[:, place])
        tally.add(experts.name(place), kernel, found, f"{what}; {found}")


def _check_mixtures(experts: RoutedExperts, tally: Tally) -> None:
    """Runs several numbers of tokens: random choices, all tokens at one expert, and most experts left out."""
    kernel = experts.probe.kernels[experts.slot]
    for num_tokens in row_counts(experts.probe.is_cuda, experts.probe.config.hidden_size):
        for routing, call in routings(experts, num_tokens).items():
            found = deviation(experts.call(call), experts.exact(call))
            tally.add(experts.slot, kernel, found, f"{num_tokens} tokens, {routing}: {found}")


def routings(experts: RoutedExperts, num_tokens: int) -> dict[str, RoutedCall]:
    """Makes calls of so many tokens, ordinary rows only."""
    num_experts, device = len(experts.ids), experts.x.device
    num_slots = min(experts.probe.config.num_experts_per_tok, num_experts)
    rows = torch.arange(num_tokens, device=device) % NUM_ORDINARY
    generator = torch.Generator().manual_seed(num_tokens)
    order = torch.rand(num_tokens, num_experts, generator=generator).topk(num_slots).indices.to(device)
    weights = _weights(experts, torch.rand(num_tokens, num_slots, generator=generator).to(device))
    return {
        "random experts": RoutedCall(rows, order, weights),
        "all at one expert": RoutedCall(rows, torch.full_like(order[:, :1], num_experts - 1), weights[:, :1]),
        "few of the experts": RoutedCall(rows, (order % max(1, num_experts // 4))[:, :1], weights[:, :1]),
    }


def _weights(experts: RoutedExperts, drawn: Tensor) -> Tensor:
    """Draws weights; ones where the weight precedes a quantiser, since it would change the quantised row."""
    return torch.ones_like(drawn) if Step.ROUTING_WEIGHT in experts.op.choice.kernel.official else drawn + 0.1


def _check_variants(experts: RoutedExperts) -> Iterator[Finding]:
    """K04: runs both ends of the range that each variant of the kernel serves."""
    probe = experts.probe
    kernel = probe.kernels[experts.slot]
    tally = Tally("K04", experts.slot, "each variant that the experts' chooser can pick", REMEDY, ONE_FORM)
    for variant, num_tokens in variants_of(probe.part.runners[experts.slot], experts.placeholders):
        call = routings(experts, num_tokens)["random experts"]
        found = deviation(experts.call(call), experts.exact(call))
        where = f"{experts.slot} at {num_tokens} tokens"
        tally.add(where, f"{kernel} {variant}", found)
    yield from tally.findings()
