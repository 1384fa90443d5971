"""Gate and router of few tokens on Hopper: expert ids and weights from the router's input, in one launch.

How it works. Programs share the gate's rows, and its columns where that helps; each adds its products in float32 and
writes its part of the logits. The program that finishes last of a group of tokens adds the parts, always in the same
order, and chooses for them as ``launch`` does. No weight changes, so each program has its own in registers before the
kernel in front of this one has ended; what then remains is the input's way through the second-level cache, a counter's,
and the choice. From ``MIN_DOT_TOKENS`` tokens on, the products run on tensor cores.

Roofline. 2 * E * D bytes, or 4 with float32 weights. At few tokens the time is latency.
Limits. bfloat16 or float32 on either side, tokens up to ``MAX_ROWS``; beyond ``GOOD_ROWS`` a product and ``launch`` are
faster. E up to 4096, K up to 16, D up to 16384. Calls with one operand must follow each other on one stream: they share
counters. Bits are the same on every repetition, but may depend on how many tokens run together.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import NamedTuple

import torch
import triton

from ownpath.kernels.checks import check, check_rank, is_dense
from ownpath.kernels.contract import Config, RouterWeights, RouteWeights
from ownpath.kernels.dsl.driver import current_stream
from ownpath.kernels.dsl.triton import TritonCall, launch
from ownpath.kernels.empty import EmptyOutput
from ownpath.kernels.launch_cache import LaunchCache
from ownpath.kernels.router.few import route_few, route_some
from ownpath.kernels.router.launch import INTERPRETED, RouterOut, check_choice, check_out, check_token_ids
from ownpath.kernels.variants import variant_name

FLOATS = (torch.bfloat16, torch.float32)
MAX_ROWS, GOOD_ROWS = 64, 8
"""The most rows of a call, and up to how many a decode step makes it: of more, two launches are much faster."""
MAX_WIDTH = 16384
MIN_DOT_TOKENS = 3


class RouteTiles(NamedTuple):
    """experts, width: rows and columns of the gate that a program multiplies. group: tokens of a program.

    slices: products side by side in which the tensor cores take its columns; 0 for plain sums.
    """

    experts: int
    width: int
    group: int
    slices: int
    num_warps: int


def choose_tiles(num_tokens: int, width: int, is_narrow: bool) -> RouteTiles:
    """Chooses tiles by tokens and columns. is_narrow: input and weights are bfloat16."""
    # The tensor cores' least depth is 16; what lies behind the last column is zero.
    tile = max(16, min(int(triton.next_power_of_2(width)), 1024))
    if num_tokens < MIN_DOT_TOKENS or not is_narrow:
        return RouteTiles(4 if is_narrow and width <= 4096 else 2, tile, 1, 0, 1)
    return RouteTiles(8, tile, 4, min(4, max(tile // 16, 1)), 4)


RouteKey = tuple[torch.Size, torch.dtype, torch.dtype | None, bool, torch.dtype, int]
"""Shape and dtype of x, dtype of the token ids, whether they are aligned, dtype of the ids written, device."""


class RouteCall(NamedTuple):
    """The prepared launch of one size, and its outputs."""

    launch: TritonCall
    ids: EmptyOutput
    weights: EmptyOutput


@dataclass(frozen=True)
class RouteOperand:
    """Weights, and the memory through which a call's programs exchange their results; captured graphs refer to it.

    counters: int32, a group's programs that have finished, 0 between calls. parts: float32. launches: by ``RouteKey``.
    """

    weights: RouteWeights
    counters: torch.Tensor
    parts: torch.Tensor
    launches: LaunchCache[RouteKey, RouteCall] = field(default_factory=LaunchCache, compare=False)
    lock: Lock = field(default_factory=Lock, compare=False)


class TritonRoute:
    """Expert ids [T, K] and weights [T, K] of few tokens; see ``TritonRouter`` for what they are.

    tiles: chosen by the number of tokens if they are not given. max_rows: the most that it is meant for.
    """

    max_rows = GOOD_ROWS

    def __init__(self, tiles: RouteTiles | None = None) -> None:
        self._tiles = tiles

    def prepare(self, weights: RouteWeights) -> RouteOperand:
        """Makes the operand."""
        (num_experts, width), device = weights.gate_ED.shape, weights.gate_ED.device
        splits = max(triton.cdiv(width, self._tiles_of(num_tokens, width, True).width) for num_tokens in (1, MAX_ROWS))
        counters = torch.zeros(MAX_ROWS, dtype=torch.int32, device=device)
        return RouteOperand(weights, counters, torch.empty(splits * MAX_ROWS * num_experts, device=device))

    def configs(self, operand: RouteOperand) -> Sequence[Config]:
        """Returns nothing: Triton compiles at the first call."""
        return ()

    def variant(self, x_TD: torch.Tensor, operand: RouteOperand) -> str:
        """Returns the variant's name, which depends on the number of tokens and on how experts are chosen."""
        router = operand.weights.router
        name = "route_by_score" if router.tid2eid_VK is None else "route_by_token"
        return variant_name(name, k=router.num_experts_per_tok, **self._tiles_for(x_TD, operand)._asdict())

    def run(
        self,
        x_TD: torch.Tensor,
        token_ids_T: torch.Tensor | None,
        operand: RouteOperand,
        *,
        out: RouterOut | None = None,
    ) -> RouterOut:
        """Chooses experts. Shapes: x bfloat16 or float32 [T, D]; token ids and out as ``TritonRouter.run``.

        Errors: ValueError naming the operand for a wrong shape, dtype, device, stride or alignment.
        """
        ids = token_ids_T
        dtype, aligned = (None, True) if ids is None else (ids.dtype, not ids.data_ptr() % 16)
        written = torch.int64 if out is None else out[0].dtype
        key = x_TD.shape, x_TD.dtype, dtype, aligned, written, x_TD.get_device()
        call = operand.launches.get(key)
        if call is None or not is_dense(x_TD, x_TD.dtype):
            return self._first(x_TD, ids, operand, key, out)
        if ids is not None:
            check_token_ids(ids, x_TD.shape[0], x_TD.device)
        if out is None:
            out = call.ids.new(), call.weights.new()
        else:
            check_out(out, x_TD, operand.weights.router)
        with operand.lock:
            chosen = out[0].data_ptr()
            read = chosen if ids is None else ids.data_ptr()
            call.launch.start(current_stream(key[5]), x_TD.data_ptr(), read, chosen, out[1].data_ptr())
        return out

    def __call__(
        self,
        x_TD: torch.Tensor,
        gate_ED: torch.Tensor,
        weights: RouterWeights,
        token_ids_T: torch.Tensor | None = None,
        out: RouterOut | None = None,
    ) -> RouterOut:
        """Computes ``run`` with the signature of the twin."""
        return self.run(x_TD, token_ids_T, self.prepare(RouteWeights(gate_ED, weights)), out=out)

    def _tiles_for(self, x_TD: torch.Tensor, operand: RouteOperand) -> RouteTiles:
        is_narrow = x_TD.dtype == operand.weights.gate_ED.dtype == torch.bfloat16
        return self._tiles_of(len(x_TD), x_TD.shape[1], is_narrow)

    def _tiles_of(self, num_tokens: int, width: int, is_narrow: bool) -> RouteTiles:
        return choose_tiles(num_tokens, width, is_narrow) if self._tiles is None else self._tiles

    def _first(
        self,
        x_TD: torch.Tensor,
        token_ids_T: torch.Tensor | None,
        operand: RouteOperand,
        key: RouteKey,
        out: RouterOut | None,
    ) -> RouterOut:
        """Checks everything, launches, and caches the launch of this size."""
        weights = operand.weights
        _check(x_TD, token_ids_T, weights)
        num_tokens, k = len(x_TD), weights.router.num_experts_per_tok
        if out is None:
            out = x_TD.new_empty(num_tokens, k, dtype=torch.int64), x_TD.new_empty(num_tokens, k, dtype=torch.float32)
        else:
            check_out(out, x_TD, weights.router)
        if not num_tokens:
            return out
        made = _first_launch((x_TD, token_ids_T, *out), operand, self._tiles_for(x_TD, operand))
        if made is not None:
            outputs = (EmptyOutput(one.shape, one.dtype, one.get_device()) for one in out)
            operand.launches.add(key, RouteCall(made, *outputs))
        return out


def _first_launch(
    tensors: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor],
    operand: RouteOperand,
    tiles: RouteTiles,
) -> TritonCall | None:
    x_TD, token_ids_T, ids, weights_TK = tensors
    gate_ED, router = operand.weights.gate_ED, operand.weights.router
    (num_tokens, width), num_experts, pdl = x_TD.shape, len(gate_ED), not INTERPRETED
    bias_E, table, k = router.bias_E, router.tid2eid_VK, router.num_experts_per_tok
    absent = gate_ED if bias_E is None else bias_E, ids if token_ids_T is None else token_ids_T
    given = x_TD, gate_ED, *absent, ids if table is None else table, ids, weights_TK, operand.parts, operand.counters
    scalars = num_tokens, num_experts, width, 0 if table is None else len(table)
    splits = triton.cdiv(width, tiles.width)
    return launch(
        route_some if tiles.slices else route_few,
        (triton.cdiv(num_experts, tiles.experts) * splits, triton.cdiv(num_tokens, tiles.group)),
        (*given, router.routed_scaling_factor, *scalars),
        {
            "EXPERTS": tiles.experts,
            "WIDTH": tiles.width,
            "GROUP": tiles.group,
            "SPLITS": splits,
            **({"SLICES": tiles.slices} if tiles.slices else {}),
            "K": k,
            "K_PAD": triton.next_power_of_2(k),
            "E_PAD": triton.next_power_of_2(num_experts),
            "BY_TOKEN": table is not None,
            "HAS_TOKENS": token_ids_T is not None,
            "PDL": pdl,
            "num_warps": tiles.num_warps,
            "launch_pdl": pdl,
        },
        moving=(0, 3, 5, 6),
    )


def _check(x_TD: torch.Tensor, token_ids_T: torch.Tensor | None, weights: RouteWeights) -> None:
    check_rank("x_TD", x_TD, 2, INTERPRETED)
    (num_tokens, width), gate_ED = x_TD.shape, weights.gate_ED
    if num_tokens > MAX_ROWS or not 0 < width <= MAX_WIDTH:
        raise ValueError(f"x_TD must have up to {MAX_ROWS} rows of 1 to {MAX_WIDTH}, found {list(x_TD.shape)}")
    check("x_TD", x_TD, FLOATS, (num_tokens, width), x_TD.device)
    check("gate_ED", gate_ED, FLOATS, (len(gate_ED), width), x_TD.device)
    if token_ids_T is not None:
        check_token_ids(token_ids_T, num_tokens, x_TD.device)
    check_choice(weights.router, len(gate_ED), token_ids_T, x_TD.device)


ROUTE = TritonRoute()
