"""The ends of a step with drafts, on Hopper: one launch between the model and its module, and one behind the module.

How it works. A program has a request, and so both of its rows. Nothing of another request is read or written.

Roofline. Launch latency: a few hundred bytes a request, of which the results go to the host's memory, as the plain
step's sampler sends them: a copy behind the graph would make the next graph late by 7 us.

Limits. The arrays keep their addresses: graphs have them. A request's results are up to 2 x 128 numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from ownpath.kernels.checks import check, check_rank
from ownpath.kernels.contract import Config
from ownpath.kernels.drafts.types import ACCEPTED, GUESS, ROWS, DraftRows
from ownpath.kernels.dsl.driver import current_stream
from ownpath.kernels.dsl.triton import TritonCall, launch
from ownpath.kernels.launch_cache import LaunchCache

INTERPRETED = triton.knobs.runtime.interpret
RIGHT, NEXT_GUESS = tl.constexpr(ACCEPTED), tl.constexpr(GUESS)
MAX_FIELDS = 128


@triton.jit
def accept_kernel(
    token_ptr,
    pad_ptr,
    known_ptr,
    counts_ptr,
    results_ptr,
    following_ptr,
    place_ptr,
    index_ptr,
    width,
    IS_JUDGED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Compares one request's guess with the token drawn before it."""
    r = tl.program_id(0)
    t = 2 * r
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    first, second = tl.load(results_ptr + t), tl.load(results_ptr + t + 1)
    pad, drawn = tl.load(pad_ptr + t), tl.load(counts_ptr + width + t)
    known, known_next = tl.load(known_ptr + t), tl.load(known_ptr + t + 1)
    if IS_JUDGED:
        accepted = tl.load(results_ptr + RIGHT * width + t)
    else:
        accepted = (first == tl.load(token_ptr + t + 1)).to(tl.int32)
    accepted = tl.where(known >= 0, 1, accepted) & (pad + 1)
    first, second = tl.where(known >= 0, known, first), tl.where(known_next >= 0, known_next, second)
    tl.debug_barrier()  # one thread writes below what all have read above
    tl.store(results_ptr + RIGHT * width + t, accepted)
    tl.store(following_ptr + t, first | pad)
    tl.store(following_ptr + t + 1, second | pad)
    tl.store(place_ptr + r, t + accepted)
    tl.store(index_ptr + r, (drawn + 1 + accepted) * (pad + 1))


@triton.jit
def go_on_kernel(
    token_ptr,
    pad_ptr,
    known_ptr,
    counts_ptr,
    turn_ptr,
    results_ptr,
    shared_ptr,
    following_ptr,
    place_ptr,
    width,
    num_fields,
    FIELDS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Writes one request's rows for the next step, and its results for the host. FIELDS: a power of two with room for a
    row's results."""
    r = tl.program_id(0)
    t = 2 * r
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    place, pad, turn = tl.load(place_ptr + r), tl.load(pad_ptr + t), tl.load(turn_ptr + t)
    last, guess = tl.load(following_ptr + place), tl.load(results_ptr + NEXT_GUESS * width + place)
    moved = (1 + place - t) * (pad + 1)
    n, c = tl.arange(0, FIELDS), tl.arange(0, 2)
    inside = (n < num_fields)[:, None] & (c < 2)[None, :]
    at = n[:, None] * width + t + c[None, :]
    found = tl.load(results_ptr + at, mask=inside)
    counts_at = counts_ptr + c[:, None] * width + t + c[None, :]
    counts = tl.load(counts_at)
    tl.debug_barrier()  # one thread writes below what all have read above
    tl.store(shared_ptr + turn * num_fields * width + at, found, mask=inside)
    tl.store(counts_at, counts + moved)
    tl.store(token_ptr + t, last)
    tl.store(token_ptr + t + 1, guess | pad)
    tl.store(turn_ptr + t + c, 1 - turn + tl.zeros((2,), tl.int32))
    tl.store(known_ptr + t + c, tl.full((2,), -1, tl.int32))


@dataclass(frozen=True)
class DraftOperand:
    """launches: by everything that a compiled call fixes, for arrays that have passed every check."""

    launches: LaunchCache[tuple[object, ...], TritonCall] = field(default_factory=LaunchCache, compare=False)
    lock: Lock = field(default_factory=Lock, compare=False)

    def run(
        self,
        kernel: "JITFunction[Any]",
        rows: DraftRows,
        num_requests: int,
        args: Sequence[Any],
        constants: Mapping[str, object],
    ) -> None:
        """Launches a program for each request. args: the kernel's, in order."""
        check_rank("token_W", rows.token_W, 1, INTERPRETED)
        if not num_requests:
            return
        device_index = rows.token_W.get_device()
        key = (num_requests, device_index, *constants.values(), *(one.data_ptr() for one in rows))
        with self.lock:
            call = self.launches.get(key)
            if call is not None:
                call.start(current_stream(device_index))
                return
            _check(rows, num_requests)
            pdl = not INTERPRETED
            options = {**constants, "PDL": pdl, "num_warps": 1, "launch_pdl": pdl}
            made = launch(kernel, (num_requests,), args, options, moving=())
            if made is not None:
                self.launches.add(key, made)


class _DraftKernel:
    """The parts that both kernels have."""

    def prepare(self) -> DraftOperand:
        """Makes the operand: launches of one stream of calls."""
        return DraftOperand()

    def configs(self, operand: DraftOperand) -> Sequence[Config]:
        """Returns nothing: Triton compiles at the first call."""
        return ()

    def variant(self, rows: DraftRows, num_requests: int, operand: DraftOperand) -> None:
        """Returns ``None``: the kernel has no variants."""


class TritonAcceptDrafts(_DraftKernel):
    """The judgement of guesses by the tokens drawn."""

    def run(self, rows: DraftRows, num_requests: int, operand: DraftOperand, *, is_judged: bool = False) -> None:
        """Computes ``ref.accept_drafts``. See ``AcceptKernel``."""
        token_W, pad_W, known_W, counts_2W, _, results_NW, _, *made = rows
        args = (token_W, pad_W, known_W, counts_2W, results_NW, *made, len(token_W))
        operand.run(accept_kernel, rows, num_requests, args, {"IS_JUDGED": is_judged})


class TritonGoOnDrafting(_DraftKernel):
    """The last of a step with drafts."""

    def run(self, rows: DraftRows, num_requests: int, operand: DraftOperand) -> None:
        """Computes ``ref.go_on_drafting``. See ``GoOnKernel``."""
        num_fields, width = rows.results_NW.shape
        args = (*rows[:-1], width, num_fields)
        constants = {"FIELDS": triton.next_power_of_2(num_fields)}
        operand.run(go_on_kernel, rows, num_requests, args, constants)


def _check(rows: DraftRows, num_requests: int) -> None:
    """Checks the arrays. The shared copies may be in the host's memory. Errors: ValueError naming what does not fit."""
    num_fields, width = rows.results_NW.shape
    device, num_places = rows.token_W.device, len(rows.place_R)
    if not GUESS < num_fields <= MAX_FIELDS:
        raise ValueError(f"results_NW must have {GUESS + 1} to {MAX_FIELDS} rows, found {num_fields}")
    if width < ROWS * num_requests or num_places < num_requests:
        raise ValueError(f"token_W and place_R must have room for {num_requests} requests")
    shapes = (width,), (width,), (width,), (2, width), (width,), (num_fields, width)
    for name, one, shape in zip(rows._fields, rows, shapes, strict=False):
        check(name, one, (torch.int32,), shape, device)
    check("following_W", rows.following_W, (torch.int32,), (width,), device)
    for name, one in (("place_R", rows.place_R), ("index_R", rows.index_R)):
        check(name, one, (torch.int32,), (num_places,), device)
    shared = rows.shared_2NW
    check("shared_2NW", shared, (torch.int32,), (2, num_fields, width), shared.device)
    if device.type == "cuda" and not (shared.device == device or shared.is_pinned()):
        raise ValueError(f"shared_2NW must be on {device} or in pinned memory")


ACCEPT_DRAFTS = TritonAcceptDrafts()
GO_ON_DRAFTING = TritonGoOnDrafting()
