"""``wo_a``: one matrix per group of heads. The rotation of attention's output is undone while it is loaded.

How it works. y[t, g] = W[g] u[t, g]; u is the attention output of the group's heads, with the last 2A channels of each
head rotated back by the token's angles. A program owns some rows of one W[g] and some tokens, and loops over the heads;
the weights are the left operand (their rows fill the tensor core's 64-row tile even for a single token). The tile at
the end of each head loads channels in pairs and rotates them in registers; the others are used as loaded.

Why it is fast. At decode the time is that of reading W (67 MB for V4-Flash) once: 128 programs each stream their rows
through a deep pipeline of asynchronous copies. The outputs with undone rotation are never written to memory.

Roofline. 2 * G * R * I bytes at decode; 2 * T * G * R * I operations at prefill.

Limits. bfloat16; head dim a multiple of 64, rotary channels at most 64, R a multiple of 64. Bits are the same on every
repetition; a token's bits depend on T only through the choice of tile. ``rope_grouped_linear_invariant`` has one tile,
and so one order of sums, for every T; it reads W once for each 16 tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ownpath.formats import BF16
from ownpath.kernels.checks import check, check_rank
from ownpath.kernels.contract import Config, StoredGroups
from ownpath.kernels.dsl.driver import current_stream
from ownpath.kernels.dsl.triton import TritonCall, launch
from ownpath.kernels.empty import EmptyOutput
from ownpath.kernels.launch_cache import LaunchCache
from ownpath.kernels.variants import variant_name
from ownpath.qtensor import QuantTensor

INTERPRETED = triton.knobs.runtime.interpret


@dataclass(frozen=True)
class GroupedTiles:
    """Tile sizes of a program: rows of W, tokens and channels per step; pipeline stages and warps."""

    rows: int
    tokens: int
    channels: int
    num_stages: int
    num_warps: int


def choose_tiles(num_tokens: int, num_rows: int, head_dim: int) -> GroupedTiles:
    """Chooses tiles by token count, as measured on an H200 at V4-Flash's shape."""
    if num_tokens <= 64:
        channels = 64 if head_dim % 128 else 128
        if num_tokens <= 16:
            return GroupedTiles(64, 16, channels, 5, 4)
        return GroupedTiles(64, 32 if num_tokens <= 32 else 64, channels, 4, 4)
    if num_tokens <= 256 or num_rows % 128:
        return GroupedTiles(64, 128, 64, 6, 4)
    return GroupedTiles(128, 256, 64, 3, 8)


def invariant_tiles(head_dim: int) -> GroupedTiles:
    """Returns the tiles of the batch-invariant kernel, for every token count."""
    return GroupedTiles(64, 16, 64 if head_dim % 128 else 128, 5, 4)


@triton.jit
def _turn_back(u, cos, sin, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    """Rotates pairs of channels [TOKENS, CHANNELS] by the negative angle, rounded once."""
    even, odd = tl.split(tl.reshape(u.to(tl.float32), (TOKENS, CHANNELS // 2, 2)))
    turned = tl.join(even * cos + odd * sin, odd * cos - even * sin)
    return tl.reshape(turned, (TOKENS, CHANNELS)).to(tl.bfloat16)


@triton.jit(do_not_specialize=["num_tokens"])
def rope_grouped_kernel(
    o_desc,
    w_desc,
    cos_ptr,
    sin_ptr,
    y_ptr,
    num_tokens,
    num_groups,
    num_rows,
    num_heads,
    H: tl.constexpr,
    A: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Computes ROWS outputs of a group for TOKENS tokens. num_heads: heads per group; o is [T, G*I], w [G*R, I]."""
    g = tl.program_id(2)
    first_row, first_token = tl.program_id(0) * ROWS, tl.program_id(1) * TOKENS
    t, pair = first_token + tl.arange(0, TOKENS), tl.arange(0, CHANNELS // 2)
    in_t = t < num_tokens
    w_row, o_column = g * num_rows + first_row, g * num_heads * H
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    # Pairs before the rotary ones are rotated by 0: cos 1, sin 0.
    angle = pair - (CHANNELS // 2 - A)
    angle_at, turns = t.to(tl.int64)[:, None] * A + angle[None, :], (angle >= 0)[None, :] & in_t[:, None]
    cos = tl.load(cos_ptr + angle_at, mask=turns, other=1.0)
    sin = tl.load(sin_ptr + angle_at, mask=turns, other=0.0)
    acc = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    # Rotary ends of the heads first, then the rest, so that each loop pipelines one kind of step.
    for head in range(num_heads):
        k = head * H + H - CHANNELS
        u = _turn_back(o_desc.load([first_token, o_column + k]), cos, sin, TOKENS, CHANNELS)
        acc = tl.dot(w_desc.load([w_row, k]), u.T, acc)
    plain: tl.constexpr = H // CHANNELS - 1
    for step in range(num_heads * plain):
        k = (step // plain) * H + (step % plain) * CHANNELS
        acc = tl.dot(w_desc.load([w_row, k]), o_desc.load([first_token, o_column + k]).T, acc)
    r = first_row + tl.arange(0, ROWS)
    y_row = y_ptr + (t.to(tl.int64) * num_groups + g) * num_rows
    tl.store(y_row[None, :] + r[:, None], acc.to(tl.bfloat16), mask=in_t[None, :])


GroupedCallKey = tuple[torch.Size, torch.Size, int]
"""Shapes of o and of the angles, and the device."""


@dataclass(frozen=True)
class GroupedOperand:
    """weight bfloat16 [G, R, I]. launches: by ``GroupedCallKey``, for inputs that have passed every check."""

    weight_GRI: torch.Tensor
    launches: LaunchCache[GroupedCallKey, tuple[TritonCall, EmptyOutput]] = field(
        default_factory=LaunchCache, compare=False
    )
    lock: Lock = field(default_factory=Lock, compare=False)


def _check_shapes(o_TNH: torch.Tensor, cos_TA: torch.Tensor, weight_GRI: torch.Tensor) -> None:
    _, num_heads, head_dim = o_TNH.shape
    num_groups, num_rows, width = weight_GRI.shape
    if num_heads * head_dim != num_groups * width or head_dim % 64 or width % head_dim:
        raise ValueError(f"weight_GRI {list(weight_GRI.shape)} does not fit o_TNH {list(o_TNH.shape)}")
    if num_rows % 64:
        raise ValueError(f"weight_GRI must have a multiple of 64 rows per group, found {num_rows}")
    check("weight_GRI", weight_GRI, (torch.bfloat16,), (num_groups, num_rows, width), o_TNH.device)
    if cos_TA.ndim != 2 or cos_TA.shape[1] > 32:
        raise ValueError(f"cos_TA must be [T, 0..32], found {list(cos_TA.shape)}")


def _check_out(out: torch.Tensor, o_TNH: torch.Tensor, operand: GroupedOperand) -> None:
    check("out", out, (torch.bfloat16,), (o_TNH.shape[0], *operand.weight_GRI.shape[:2]), o_TNH.device)


def _check_inputs(o_TNH: torch.Tensor, cos_TA: torch.Tensor, sin_TA: torch.Tensor) -> None:
    device, angles = o_TNH.device, (len(o_TNH), cos_TA.shape[1])
    check("o_TNH", o_TNH, (torch.bfloat16,), tuple(o_TNH.shape), device)
    check("cos_TA", cos_TA, (torch.float32,), angles, device)
    check("sin_TA", sin_TA, (torch.float32,), angles, device)


class GroupedLinearKernel:
    """y[t, g] = W[g] u[t, g], where u is the attention output with the rotation of its channels undone.

    is_batch_invariant: a token's bits do not depend on the other tokens, nor on their number.
    """

    def __init__(self, is_batch_invariant: bool) -> None:
        self.is_batch_invariant = is_batch_invariant

    def prepare(self, stored: StoredGroups) -> GroupedOperand:
        """Makes the operand of bfloat16 matrices. The first call raises for a weight that does not fit."""
        return GroupedOperand(stored.matrix.qdata.unflatten(0, (stored.num_groups, -1)))

    def restore(self, operand: GroupedOperand) -> tuple[QuantTensor, ...]:
        """Returns the rows of all groups."""
        return (QuantTensor(operand.weight_GRI.flatten(0, 1), None, None, BF16),)

    def configs(self, operand: GroupedOperand) -> Sequence[Config]:
        """Returns nothing: Triton compiles at the first call."""
        return ()

    def planned_configs(self, stored: StoredGroups) -> Sequence[Config]:
        """Returns nothing, as ``configs``."""
        return ()

    def variant(self, o_TNH: torch.Tensor, operand: GroupedOperand) -> str:
        """Returns the variant's name. It depends on the number of tokens, unless the kernel is batch-invariant."""
        return variant_name("rope_grouped", **vars(self._tiles(o_TNH, operand)))

    def _tiles(self, o_TNH: torch.Tensor, operand: GroupedOperand) -> GroupedTiles:
        if self.is_batch_invariant:
            return invariant_tiles(o_TNH.shape[2])
        return choose_tiles(len(o_TNH), operand.weight_GRI.shape[1], o_TNH.shape[2])

    def run(
        self,
        o_TNH: torch.Tensor,
        cos_TA: torch.Tensor,
        sin_TA: torch.Tensor,
        operand: GroupedOperand,
        *,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes y. Shapes: o bfloat16 [T, N, H]; cos and sin float32 [T, A]; y bfloat16 [T, G, R].

        Errors: ValueError naming the operand for a wrong shape, dtype, device, stride or alignment.
        """
        device_index = o_TNH.get_device()
        key = o_TNH.shape, cos_TA.shape, device_index
        prepared = operand.launches.get(key)
        if prepared is None:
            return self._first((o_TNH, cos_TA, sin_TA), operand, key, out)
        call, empty = prepared
        o, cos, sin = o_TNH.data_ptr(), cos_TA.data_ptr(), sin_TA.data_ptr()
        fits = (
            o_TNH.dtype is torch.bfloat16
            and cos_TA.dtype is sin_TA.dtype is torch.float32
            and sin_TA.shape == cos_TA.shape
            and o_TNH.is_contiguous()
            and cos_TA.is_contiguous()
            and sin_TA.is_contiguous()
            and cos_TA.get_device() == sin_TA.get_device() == device_index
            and not (o | cos | sin) & 15
        )
        if not fits:
            _check_inputs(o_TNH, cos_TA, sin_TA)
        if out is None:
            out = empty.new()
        else:
            _check_out(out, o_TNH, operand)
        with operand.lock:
            call.start_described(current_stream(device_index), o, cos, sin, out.data_ptr())
        return out

    def _first(
        self,
        inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        operand: GroupedOperand,
        key: GroupedCallKey,
        out: torch.Tensor | None,
    ) -> torch.Tensor:
        """Checks everything, launches, and caches the launch of this size. inputs: o, cos and sin."""
        (o_TNH, cos_TA, sin_TA), weight_GRI = inputs, operand.weight_GRI
        check_rank("o_TNH", o_TNH, 3, INTERPRETED)
        check_rank("weight_GRI", weight_GRI, 3, INTERPRETED)
        _check_shapes(o_TNH, cos_TA, weight_GRI)
        _check_inputs(o_TNH, cos_TA, sin_TA)
        if out is None:
            out = o_TNH.new_empty(len(o_TNH), *weight_GRI.shape[:2])
        else:
            _check_out(out, o_TNH, operand)
        if len(o_TNH):
            first = _first_launch((o_TNH, weight_GRI, cos_TA, sin_TA, out), self._tiles(o_TNH, operand))
            if first is not None:
                operand.launches.add(key, (first, EmptyOutput(out.shape, out.dtype, out.get_device())))
        return out

    def __call__(
        self,
        o_TNH: torch.Tensor,
        cos_TA: torch.Tensor,
        sin_TA: torch.Tensor,
        weight_GRI: torch.Tensor,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes ``run`` with the signature of the twin."""
        return self.run(o_TNH, cos_TA, sin_TA, GroupedOperand(weight_GRI), out=out)


def _first_launch(tensors: tuple[torch.Tensor, ...], tiles: GroupedTiles) -> TritonCall | None:
    o_TNH, weight_GRI, cos_TA, sin_TA, out = tensors
    (num_tokens, _, head_dim), (num_groups, num_rows, width) = o_TNH.shape, weight_GRI.shape
    pdl, row = not INTERPRETED, num_groups * width
    o_desc = TensorDescriptor(o_TNH, [num_tokens, row], [row, 1], [tiles.tokens, tiles.channels])
    w_desc = TensorDescriptor(weight_GRI, [num_groups * num_rows, width], [width, 1], [tiles.rows, tiles.channels])
    return launch(
        rope_grouped_kernel,
        (num_rows // tiles.rows, triton.cdiv(num_tokens, tiles.tokens), num_groups),
        (o_desc, w_desc, cos_TA, sin_TA, out, num_tokens, num_groups, num_rows, width // head_dim),
        {
            "H": head_dim,
            "A": cos_TA.shape[1],
            "ROWS": tiles.rows,
            "TOKENS": tiles.tokens,
            "CHANNELS": tiles.channels,
            "PDL": pdl,
            "num_warps": tiles.num_warps,
            "num_stages": tiles.num_stages,
            "launch_pdl": pdl,
        },
        moving=(0, 2, 3, 4),
    )


GROUPED_LINEAR = GroupedLinearKernel(is_batch_invariant=False)
GROUPED_LINEAR_INVARIANT = GroupedLinearKernel(is_batch_invariant=True)
