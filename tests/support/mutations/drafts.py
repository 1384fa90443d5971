"""The MTP module with a wrong part, and steps with drafts that go on wrongly."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ownpath.assembly import LoadedPart
from ownpath.engine.drafting import Drafting
from ownpath.kernels.drafts.ref import AcceptReference, GoOnReference
from ownpath.kernels.drafts.types import ACCEPTED, ROWS, DraftRows
from ownpath.model.mtp import Mtp
from ownpath.weights.load import LoadedWeights
from support.mutations.interference import Interference
from support.mutations.mutation import Mutation, on_part, on_slot, on_weights

MODULE = "mtp.0"
OPTIONS: dict[str, Any] = {"stages": ("layers",), "model": "drafting", "drafts": True}


def of_module(what: str, where: str, interference: Interference) -> Mutation:
    """A fault that V11 names."""
    return Mutation(what, "V11", f"{MODULE}.{where}", None, interference, **OPTIONS)


def of_step(what: str, owner: Any, name: str, made: Callable[[Any], Any]) -> Mutation:
    """A fault that V12 sees: something that runs, with another in its place."""
    changed = Interference(replaced=((owner, name, made),))
    return Mutation(what, "V12", MODULE, None, changed, **OPTIONS)


def norms_exchanged(weights: LoadedWeights) -> None:
    norms = [weights.params.get(f"{MODULE}.{name}.weight") for name in ("enorm", "hnorm")]
    if None not in norms:
        enorm, hnorm = norms
        kept = enorm.clone()
        enorm.copy_(hnorm)
        hnorm.copy_(kept)


def products_exchanged(part: LoadedPart) -> None:
    runners, names = part.builder.runners, [f"{MODULE}.{name}" for name in ("e_proj", "h_proj")]
    if all(name in runners for name in names):
        runners[names[0]], runners[names[1]] = runners[names[1]], runners[names[0]]


def own_token(right: Any) -> Any:
    """The module reads the token before the one that follows each row."""
    return lambda mtp, before, next_ids, *rest: right(mtp, before, next_ids.roll(1), *rest)


def keys_late(right: Any) -> Any:
    """The keys of a step go where the next step's belong, as if positions were counted up before the module runs."""

    def decode(mtp: Mtp, before: Any, next_ids: torch.Tensor, step: Any) -> Any:
        tables = replace(step.tables, positions_T=step.tables.positions_T + 1)
        return right(mtp, before, next_ids, replace(step, tables=tables))

    return decode


def always_right(right: Any) -> Any:
    """Every guess counts, whatever the target drew."""

    def run(kernel: Any, rows: DraftRows, count: int, operand: Any, *, is_judged: bool = False) -> None:
        rows.results_NW[ACCEPTED] = 1
        right(kernel, rows, count, operand, is_judged=True)

    return run


def never_right(right: Any) -> Any:
    """The row of a right guess is taken back all the same."""

    def run(kernel: Any, rows: DraftRows, count: int, operand: Any, *, is_judged: bool = False) -> None:
        rows.results_NW[ACCEPTED] = 0
        right(kernel, rows, count, operand, is_judged=True)

    return run


def one_too_few_taken_back(right: Any) -> Any:
    """Behind a wrong guess a request goes on one position late."""

    def run(kernel: Any, rows: DraftRows, count: int, operand: Any) -> None:
        wrong_R = 1 - rows.results_NW[ACCEPTED, : ROWS * count : ROWS]
        right(kernel, rows, count, operand)
        rows.counts_2W[0, : ROWS * count] += wrong_R.repeat_interleave(ROWS)

    return run


def first_rows_guess(right: Any) -> Any:
    """The guess is that behind a request's first row, also where its second one counts."""

    def run(kernel: Any, rows: DraftRows, count: int, operand: Any) -> None:
        right(kernel, rows, count, operand)
        rows.token_W[1 : ROWS * count : ROWS] = rows.following_W[1 : ROWS * count : ROWS]

    return run


def prompt_unread(right: Any) -> Any:
    """The module does not read what prompts have."""
    return lambda *given: None


MUTATIONS = {
    "module: enorm and hnorm exchanged": of_module("weights of both norms", "enorm", on_weights(norms_exchanged)),
    "module: e_proj and h_proj exchanged": of_module("both products", "e_proj", on_part(products_exchanged)),
    "module: the token before": of_module(
        "the token that follows each row", "enorm", Interference(replaced=((Mtp, "_hidden", own_token),))
    ),
    "module: another head": of_module(
        "the head, by one token", "head", on_slot("head.weight", lambda weight: weight.roll(1, 0))
    ),
    "module: another collapse": of_module(
        "the module's own hc_head", "head", on_slot(f"{MODULE}.hc_head_base", lambda base: base.flip(0) + 1)
    ),
    "drafts: keys one place late": of_step("the module's window in steps with drafts", Mtp, "decode", keys_late),
    "drafts: prompts unread": of_step("the module's window behind prompts", Drafting, "read", prompt_unread),
    "drafts: a wrong guess counts": of_step("the judgement", AcceptReference, "run", always_right),
    "drafts: a right guess is taken back": of_step("the judgement", AcceptReference, "run", never_right),
    "drafts: one position late behind a wrong guess": of_step(
        "where a request goes on", GoOnReference, "run", one_too_few_taken_back
    ),
    "drafts: guesses of the first row": of_step("the guess that is verified", GoOnReference, "run", first_rows_guess),
}
