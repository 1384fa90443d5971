"""Hyper-connection boundary: post of one sublayer, pre of the next and its RMS norm, as two launches.

How it works. Two sums run over all S * D channels of a token: the 24 mixing logits, and the root mean square that
divides them. Everything before them is local to a channel, everything after needs only their values.
  1. ``spread`` gives each program a slice of channels (and 1, 16 or many tokens): it forms new streams, writes them,
     and writes its part of the 24 dot products and of the sum of squares to the workspace.
  2. ``collapse`` gives each token a program: it adds the parts in a fixed order, collapses the streams with the
     ``pre`` weights and normalises; other programs beside it run Sinkhorn, a token's 16 entries in one thread, and
     write the mix for the next boundary.
Both are launched with programmatic dependent launch: the second grid is resident and has its constants loaded when the
first one ends, and the first one reads ``fn`` (which no earlier kernel writes) before it waits for its predecessor.

Why it is fast. At T = 1 the boundary moves 1.6 MB (0.4 us), so latency dominates: ``fn`` is split over 128
programs, one reduction per program, no atomics, no host work: 5.0 us on an H200, of which a graph's two empty kernels
would be 2.2. From ``MIN_DOT_TOKENS`` tokens on, the dot products run on tensor cores. The streams are bfloat16 already;
``fn`` is split into three bfloat16 terms (24 bits of mantissa), so that every product is exact and the sum is float32,
as in the reference. Of many tokens ``columns`` has ``fn`` cut once per program and streams that stay in registers.

Roofline. fn once, and per token S*D streams read, written and read again: (24 * 4 * S*D + T * (6 * S*D + 4 * D)) bytes.

Limits. S = 4, bfloat16 streams, D a multiple of 8 up to 16384. Bits are the same on every repetition. The ways of
summing differ in the last float32 bits, so a token's result may depend on how many tokens run with it;
``HYPER_BOUNDARY_INVARIANT`` always takes ``spread_many`` with the same slices, whose sums do not depend on T.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import NamedTuple

import torch
import triton

from ownpath.kernels.checks import is_dense
from ownpath.kernels.contract import Config
from ownpath.kernels.dsl.driver import current_stream, num_sms
from ownpath.kernels.dsl.triton import TritonCall, launch
from ownpath.kernels.empty import EmptyOutput
from ownpath.kernels.hyper.boundary import collapse, spread_few, spread_many
from ownpath.kernels.hyper.checks import (
    INTERPRETED,
    NUM_MIX,
    NUM_STREAMS,
    check_inputs,
    check_out,
    check_weights,
    check_workspace,
    overlaps,
)
from ownpath.kernels.hyper.columns import spread_columns
from ownpath.kernels.hyper.ref import HyperOut, HyperWeights, Mix
from ownpath.kernels.hyper.tiles import INVARIANT_TILES, BoundaryTiles, choose_tiles
from ownpath.kernels.launch_cache import LaunchCache
from ownpath.kernels.variants import variant_name

PART_ROWS = 32


def num_workspace_floats(num_tokens: int, hidden_size: int, tiles: BoundaryTiles | None = None) -> int:
    """Returns the float32 elements that a boundary needs; without tiles, enough for every variant."""
    if tiles is None:
        default = num_workspace_floats(num_tokens, hidden_size, choose_tiles(num_tokens, hidden_size, invariant=False))
        return max(default, num_workspace_floats(num_tokens, hidden_size, INVARIANT_TILES))
    return PART_ROWS * int(triton.cdiv(hidden_size, tiles.channels)) * num_tokens


def new_out(x_TSD: torch.Tensor, with_mix: bool) -> HyperOut:
    """Allocates outputs for streams like ``x_TSD``; there is no mix after the last sublayer."""
    num_tokens, s, dim = x_TSD.shape
    mix = None
    if with_mix:
        post_TS = x_TSD.new_empty((num_tokens, s), dtype=torch.float32)
        mix = Mix(post_TS, x_TSD.new_empty((num_tokens, s, s), dtype=torch.float32))
    return HyperOut(torch.empty_like(x_TSD), x_TSD.new_empty(num_tokens, dim), mix)


Shapes = tuple[torch.Size, torch.Size, torch.Size]
Addresses = tuple[int, int, int, int, int]
"""Of x, y, the second part of the output, post and comb."""
BoundaryKey = tuple[torch.Size, bool, bool, int]
"""Shape of x, whether a sublayer came before, whether its output has two parts, device."""


class BoundaryInputs(NamedTuple):
    """The inputs of a call. y and mix: ``None`` before the first sublayer; other: the second part of its output."""

    x_TSD: torch.Tensor
    y_TD: torch.Tensor | None
    mix: Mix | None
    other_TD: torch.Tensor | None

    @property
    def key(self) -> BoundaryKey:
        """Names the launches that fit."""
        return self.x_TSD.shape, self.mix is not None, self.other_TD is not None, self.x_TSD.get_device()


@dataclass(frozen=True)
class BoundaryCall:
    """The two prepared launches of one size. num_floats: elements of the workspace that they use.

    makes_mix: another sublayer follows. shapes: of y, post and comb. streams, hidden, post, comb, scratch: outputs and
    workspace of a call that is given none.
    """

    spread: TritonCall
    collapse: TritonCall
    num_floats: int
    makes_mix: bool
    shapes: Shapes
    streams: EmptyOutput
    hidden: EmptyOutput
    post: EmptyOutput
    comb: EmptyOutput
    scratch: EmptyOutput

    def new_out(self) -> HyperOut:
        """Allocates the outputs."""
        mix = Mix(self.post.new(), self.comb.new()) if self.makes_mix else None
        return HyperOut(self.streams.new(), self.hidden.new(), mix)

    def start(self, given: Addresses, out: HyperOut, workspace: int, stream: int) -> None:
        """Launches both. given: an absent one may be any address."""
        streams, hidden, mix = out
        x = streams.data_ptr()
        self.spread.start(stream, *given, x, workspace)
        post, comb = (x, x) if mix is None else (mix[0].data_ptr(), mix[1].data_ptr())
        self.collapse.start(stream, x, workspace, hidden.data_ptr(), post, comb)


@dataclass(frozen=True)
class HyperOperand:
    """launches: for inputs that have passed every check."""

    weights: HyperWeights
    launches: LaunchCache[BoundaryKey, BoundaryCall] = field(default_factory=LaunchCache, compare=False)
    lock: Lock = field(default_factory=Lock, compare=False)


@dataclass(frozen=True)
class Tensors:
    """The tensors that a boundary reads and writes."""

    given: BoundaryInputs
    weights: HyperWeights
    out: HyperOut
    workspace: torch.Tensor

    def spread(self) -> tuple[torch.Tensor, ...]:
        """Returns the first launch's tensors; an absent input is replaced by a tensor that is not read."""
        (x, y, mix, other), unused = self.given, self.weights.base
        post, comb = (unused, unused) if mix is None else (mix.post_TS, mix.comb_TSS)
        outputs = x if y is None else y, x if other is None else other
        return x, *outputs, post, comb, self.weights.fn, self.out.x_TSD, self.workspace

    def collapse(self) -> tuple[torch.Tensor, ...]:
        """Returns the second launch's tensors."""
        weights, mix = self.weights, self.out.mix
        post, comb = (weights.base, weights.base) if mix is None else (mix.post_TS, mix.comb_TSS)
        norms = weights.base, weights.scale, weights.norm_weight
        return self.out.x_TSD, self.workspace, *norms, self.out.h_TD, post, comb


def _first_launches(tensors: Tensors, tiles: BoundaryTiles, num_floats: int) -> BoundaryCall | None:
    spread, collapse = _launch_spread(tensors, tiles), _launch_collapse(tensors, tiles)
    if spread is None or collapse is None:
        return None
    num_tokens, s, dim = tensors.out.x_TSD.shape
    shapes = torch.Size((num_tokens, dim)), torch.Size((num_tokens, s)), torch.Size((num_tokens, s, s))
    makes_mix, device_index = len(tensors.weights.fn) == NUM_MIX, tensors.out.x_TSD.get_device()
    streams, hidden = (EmptyOutput(one, torch.bfloat16, device_index) for one in (tensors.out.x_TSD.shape, shapes[0]))
    floats = (EmptyOutput(one, torch.float32, device_index) for one in (*shapes[1:], (num_floats,)))
    return BoundaryCall(spread, collapse, num_floats, makes_mix, shapes, streams, hidden, *floats)


def _launch_spread(tensors: Tensors, tiles: BoundaryTiles) -> TritonCall | None:
    num_tokens, _, dim = tensors.out.x_TSD.shape
    num_slices, num_blocks = triton.cdiv(dim, tiles.channels), triton.cdiv(num_tokens, tiles.tokens)
    function, sizes, pdl = spread_many if tiles.use_dot else spread_few, (dim, num_slices), not INTERPRETED
    if tiles.per_sm:
        resident = 1 if INTERPRETED else tiles.per_sm * num_sms(tensors.out.x_TSD.get_device()) // num_slices
        num_blocks = min(num_blocks, max(1, resident))
        function, sizes = spread_columns, (dim, tiles.num_warps)
    return launch(
        function,
        (num_slices, num_blocks),
        (*tensors.spread(), num_tokens, *sizes),
        {
            "HAS_POST": tensors.given.mix is not None,
            "HAS_OTHER": tensors.given.other_TD is not None,
            "NUM_MIX": len(tensors.weights.fn),
            "TOKENS": tiles.tokens,
            "CHANNELS": tiles.channels,
            "PDL": pdl,
            "num_warps": tiles.num_warps,
            "num_stages": tiles.num_stages,
            "launch_pdl": pdl,
        },
        moving=(0, 1, 2, 3, 4, 6, 7),
    )


def _launch_collapse(tensors: Tensors, tiles: BoundaryTiles) -> TritonCall | None:
    num_tokens, _, dim = tensors.out.x_TSD.shape
    weights, block_d = tensors.weights, triton.next_power_of_2(dim)
    num_slices, sinkhorn_tokens = triton.cdiv(dim, tiles.channels), tiles.sinkhorn_tokens
    num_sinkhorn = 0 if tensors.out.mix is None else triton.cdiv(num_tokens, sinkhorn_tokens)
    slices = triton.next_power_of_2(num_slices)
    epsilons = weights.mix_norm_eps, weights.eps, weights.norm_eps
    return launch(
        collapse,
        (num_sinkhorn + num_tokens,),
        (*tensors.collapse(), num_tokens, dim, num_slices, *epsilons),
        {
            "NUM_MIX": len(weights.fn),
            "NUM_ITERS": weights.num_iters,
            "SINKHORN_TOKENS": sinkhorn_tokens,
            "SLICES": slices,
            "AT_ONCE": tiles.slices_at_once or slices,
            "BLOCK_D": block_d,
            "PDL": not INTERPRETED,
            "num_warps": 4 if block_d <= 4096 else 8,
            "launch_pdl": not INTERPRETED,
        },
        moving=(0, 1, 5, 6, 7),
    )


def _given(inputs: BoundaryInputs, shapes: Shapes) -> Addresses | None:
    """Returns the inputs' addresses; ``None`` where one does not fit. shapes: of y, post, comb."""
    x_TSD, y_TD, mix, other_TD = inputs
    x = x_TSD.data_ptr()
    if x_TSD.dtype is not torch.bfloat16 or not x_TSD.is_contiguous() or x & 15:
        return None
    if y_TD is None or mix is None:
        return (x, x, x, x, x) if y_TD is None and mix is None and other_TD is None else None
    post_TS, comb_TSS, device_index = mix.post_TS, mix.comb_TSS, x_TSD.get_device()
    y, post, comb = y_TD.data_ptr(), post_TS.data_ptr(), comb_TSS.data_ptr()
    fits = (
        y_TD.dtype is torch.bfloat16
        and post_TS.dtype is comb_TSS.dtype is torch.float32
        and (y_TD.shape, post_TS.shape, comb_TSS.shape) == shapes
        and y_TD.is_contiguous()
        and post_TS.is_contiguous()
        and comb_TSS.is_contiguous()
        and device_index == y_TD.get_device() == post_TS.get_device() == comb_TSS.get_device()
        and not (y | post | comb) & 15
    )
    if other_TD is None:
        return (x, y, y, post, comb) if fits else None
    other = other_TD.data_ptr()
    fits &= is_dense(other_TD, torch.bfloat16) and other_TD.shape == y_TD.shape
    return (x, y, other, post, comb) if fits and other_TD.get_device() == device_index else None


def _out_fits(out: HyperOut, shape: torch.Size, call: BoundaryCall, device_index: int) -> bool:
    """Returns True for outputs that a middle boundary can write. ``check_out`` says why others are refused."""
    streams, hidden, mix = out
    if mix is None or not call.makes_mix:
        return False
    post, comb = mix
    return (
        streams.dtype is hidden.dtype is torch.bfloat16
        and post.dtype is comb.dtype is torch.float32
        and streams.shape == shape
        and (hidden.shape, post.shape, comb.shape) == call.shapes
        and streams.is_contiguous()
        and hidden.is_contiguous()
        and post.is_contiguous()
        and comb.is_contiguous()
        and streams.get_device() == hidden.get_device() == post.get_device() == comb.get_device() == device_index
        and not (streams.data_ptr() | hidden.data_ptr() | post.data_ptr() | comb.data_ptr()) & 15
    )


def _is_scratch(workspace: torch.Tensor, device_index: int) -> bool:
    return is_dense(workspace, torch.float32) and workspace.get_device() == device_index


class HyperBoundaryKernel:
    """Post of the sublayer that made y (none before the first), pre of the coming one, and its norm.

    With fn of 4 rows (after the last sublayer) only the collapse and the norm follow, and there is no new mix.
    is_batch_invariant: the order of sums does not depend on how many tokens run together.
    """

    def __init__(self, is_batch_invariant: bool) -> None:
        self.is_batch_invariant = is_batch_invariant

    def prepare(self, weights: HyperWeights) -> HyperOperand:
        """Makes the operand. The first call raises for weights that do not fit."""
        return HyperOperand(weights)

    def configs(self, operand: HyperOperand) -> Sequence[Config]:
        """Returns nothing: Triton compiles at the first call."""
        return ()

    def variant(self, x_TSD: torch.Tensor, operand: HyperOperand) -> str:
        """Returns the variant's name. It depends on the number of tokens, unless the kernel is batch-invariant."""
        return variant_name("hyper", **vars(self._tiles(x_TSD)))

    def workspace(self, operand: HyperOperand, num_tokens: int) -> torch.Tensor:
        """Allocates float32 scratch for calls of up to ``num_tokens`` tokens."""
        fn = operand.weights.fn
        return fn.new_empty(num_workspace_floats(num_tokens, fn.shape[1] // NUM_STREAMS))

    def run(
        self,
        x_TSD: torch.Tensor,
        y_TD: torch.Tensor | None,
        mix: Mix | None,
        operand: HyperOperand,
        other_TD: torch.Tensor | None = None,
        *,
        out: HyperOut | None = None,
        workspace: torch.Tensor | None = None,
    ) -> HyperOut:
        """Computes the boundary. Shapes: x bfloat16 [T, 4, D]; y and other bfloat16 [T, D]; workspace float32
            [num_floats]. Outputs must not overlap inputs: a program's warps write streams that others of them read.

        Errors: ValueError naming the operand for a wrong shape, dtype, device, stride or alignment, before any launch.
        """
        device_index, inputs = x_TSD.get_device(), BoundaryInputs(x_TSD, y_TD, mix, other_TD)
        call = operand.launches.get(inputs.key)
        given = None if call is None else _given(inputs, call.shapes)
        if call is None or given is None:
            return self._first(inputs, operand, out, workspace)
        if out is None:
            out = call.new_out()
        elif not _out_fits(out, x_TSD.shape, call, device_index) or overlaps(out.x_TSD, x_TSD):
            check_out(out, x_TSD, call.makes_mix)
        if workspace is None:
            workspace = call.scratch.new()
        elif workspace.numel() < call.num_floats or not _is_scratch(workspace, device_index):
            check_workspace(workspace, call.num_floats, x_TSD.device)
        with operand.lock:
            call.start(given, out, workspace.data_ptr(), current_stream(device_index))
        return out

    def _tiles(self, x_TSD: torch.Tensor) -> BoundaryTiles:
        return choose_tiles(len(x_TSD), x_TSD.shape[2], self.is_batch_invariant)

    def _first(
        self, inputs: BoundaryInputs, operand: HyperOperand, out: HyperOut | None, workspace: torch.Tensor | None
    ) -> HyperOut:
        """Checks everything, launches, and caches the launches of this size."""
        x_TSD, weights = inputs.x_TSD, operand.weights
        check_inputs(*inputs)
        num_tokens, _, dim = x_TSD.shape
        check_weights(weights, dim, x_TSD.device)
        with_mix, tiles = len(weights.fn) == NUM_MIX, self._tiles(x_TSD)
        if out is None:
            out = new_out(x_TSD, with_mix)
        else:
            check_out(out, x_TSD, with_mix)
        num_floats = num_workspace_floats(num_tokens, dim, tiles)
        if workspace is None:
            workspace = x_TSD.new_empty(num_floats, dtype=torch.float32)
        else:
            check_workspace(workspace, num_floats, x_TSD.device)
        if num_tokens:
            call = _first_launches(Tensors(inputs, weights, out, workspace), tiles, num_floats)
            if call is not None:
                operand.launches.add(inputs.key, call)
        return out

    def __call__(
        self,
        x_TSD: torch.Tensor,
        y_TD: torch.Tensor | None,
        mix: Mix | None,
        weights: HyperWeights,
        other_TD: torch.Tensor | None = None,
        out: HyperOut | None = None,
        workspace: torch.Tensor | None = None,
    ) -> HyperOut:
        """Computes ``run`` with the signature of the twin."""
        return self.run(x_TSD, y_TD, mix, self.prepare(weights), other_TD, out=out, workspace=workspace)


HYPER_BOUNDARY = HyperBoundaryKernel(is_batch_invariant=False)
HYPER_BOUNDARY_INVARIANT = HyperBoundaryKernel(is_batch_invariant=True)
