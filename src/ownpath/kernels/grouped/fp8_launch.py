"""``cute.grouped_linear_fp8_sm90``: the operand, the checks and the launches of ``wo_a`` with FP8 weights."""

from collections.abc import Sequence
from ctypes import c_int
from dataclasses import dataclass, field
from threading import Lock

import torch
from torch import Tensor

from ownpath.formats import FP8_BLOCK
from ownpath.kernels.checks import check, check_rank
from ownpath.kernels.contract import StoredGroups
from ownpath.kernels.dsl.cache import load
from ownpath.kernels.dsl.driver import Argument, Boxes, Launch, Pointers, current_stream, pointer
from ownpath.kernels.empty import EmptyOutput
from ownpath.kernels.fp8.config import CHUNK_K, MAX_K_BLOCKS
from ownpath.kernels.fp8.layout import PackedFp8, pack_fp8, restore_fp8
from ownpath.kernels.grouped.choose import WeightSizes, choices, choose
from ownpath.kernels.grouped.config import MAX_ANGLES, GroupedFp8Config
from ownpath.kernels.launch_cache import LaunchCache
from ownpath.qtensor import QuantTensor

BLOCK = 128
"""Rows and columns that share a scale; heads and groups begin at multiples of it."""
ROW_BLOCK = 64
MAX_WIDTH = 8 * MAX_K_BLOCKS * BLOCK
GroupedSizes = tuple[torch.Size, torch.Size, bool]
"""Shapes of o and of the angles, and whether the kernel is batch-invariant."""


@dataclass(frozen=True)
class GroupedFp8Operand:
    """A packed weight [G * R, I]. launches: for inputs that have passed every check."""

    weight: PackedFp8
    num_groups: int
    launches: LaunchCache[GroupedSizes, "GroupedFp8Launch"] = field(default_factory=LaunchCache, compare=False)
    lock: Lock = field(default_factory=Lock, compare=False)

    @property
    def rows(self) -> int:
        """Outputs of a group."""
        return self.weight.out_features // self.num_groups

    @property
    def sizes(self) -> WeightSizes:
        """The properties that decide the kernels."""
        return self.weight.num_row_blocks, self.weight.num_k_blocks, self.weight.folded


class GroupedFp8Launch:
    """Prepared launch for inputs of the shapes of ``o_TNH`` and ``cos_TA``."""

    def __init__(self, config: GroupedFp8Config, operand: GroupedFp8Operand, o_TNH: Tensor, num_angles: int) -> None:
        weight, (num_tokens, num_heads, head_dim) = operand.weight, o_TNH.shape
        self.empty = EmptyOutput((num_tokens, operand.num_groups, operand.rows), torch.bfloat16, o_TNH.get_device())
        width = num_heads * head_dim
        self._o = Boxes(o_TNH.data_ptr(), (num_tokens, width), width, (config.num_n, CHUNK_K))
        self._pointers = Pointers(3)
        sizes = (num_tokens, operand.num_groups, weight.num_row_blocks, weight.num_k_blocks)
        operands = map(pointer, (weight.blocks, weight.scales, weight.rows))
        counts = map(c_int, (*sizes, head_dim // BLOCK, num_angles))
        args: tuple[Argument, ...] = (self._o.argument, *operands, *self._pointers.arguments, *counts)
        grid = config.grid(num_tokens, weight.num_row_blocks)
        self._launch = Launch(load(config, o_TNH.get_device()), (grid, 1, 1), args)

    def start(self, addresses: tuple[int, int, int, int], stream: int) -> None:
        """Launches. addresses: of o, cos, sin and out."""
        self._o.point_at(addresses[0])
        self._pointers.set(*addresses[1:])
        self._launch.start(stream)


@dataclass(frozen=True)
class GroupedFp8Kernel:
    """y[t, g] = W[g] u[t, g] with E4M3 weights, decoded exactly; u is o with the rotation of its channels undone.

    is_batch_invariant: a token's bits do not depend on the other tokens, nor on their number.
    """

    is_batch_invariant: bool = False

    def prepare(self, stored: StoredGroups) -> GroupedFp8Operand:
        """Copies the weights into the kernels' layout; the stored tensors are not needed afterwards.

        Errors: ValueError for rows of a group or a width that 128 does not divide, NaN codes or scales.
        """
        matrix = stored.matrix
        num_groups, num_rows, width = stored.shape
        assert matrix.scale is not None
        if num_rows % BLOCK or width % BLOCK or width > MAX_WIDTH:
            raise ValueError(
                f"weight has {num_groups} groups of {num_rows} x {width}; the Hopper kernel takes multiples of "
                f"{BLOCK}, up to {MAX_WIDTH} columns"
            )
        packed = pack_fp8([matrix.qdata], [matrix.scale])
        # Kernels read weights before they wait for their predecessor, so packing must be complete.
        torch.cuda.synchronize(matrix.qdata.device)
        return GroupedFp8Operand(packed, num_groups)

    def restore(self, operand: GroupedFp8Operand) -> tuple[QuantTensor, ...]:
        """Returns the rows of all groups and the grid of float32 scales."""
        ((codes, scale),) = restore_fp8(operand.weight, [operand.weight.out_features])
        return (QuantTensor(codes, scale, None, FP8_BLOCK),)

    def padding(self, operand: GroupedFp8Operand) -> None:
        """Returns ``None``: the layout has no padding."""

    def configs(self, operand: GroupedFp8Operand) -> Sequence[GroupedFp8Config]:
        """Returns the configurations of every kernel that a call may launch."""
        return choices(operand.sizes, self.is_batch_invariant)

    def planned_configs(self, stored: StoredGroups) -> Sequence[GroupedFp8Config]:
        """Returns ``configs``, assuming that E8M0 scales fold into the decode, as those from 2^-100 to 2^7 do."""
        num_groups, num_rows, width = stored.shape
        assert stored.matrix.scale is not None
        folded = stored.matrix.scale.dtype == torch.float8_e8m0fnu
        num_row_blocks = num_groups * num_rows // ROW_BLOCK
        return choices((num_row_blocks, width // BLOCK, folded), self.is_batch_invariant)

    def variant(self, o_TNH: Tensor, operand: GroupedFp8Operand) -> str:
        """Returns the name of the kernel that a call with this input launches."""
        return choose(len(o_TNH), operand.sizes, self.is_batch_invariant).name

    def run(
        self, o_TNH: Tensor, cos_TA: Tensor, sin_TA: Tensor, operand: GroupedFp8Operand, *, out: Tensor | None = None
    ) -> Tensor:
        """Computes y. Shapes: o bfloat16 [T, N, H]; cos and sin float32 [T, A]; y bfloat16 [T, G, R].

        Errors: ValueError naming the operand for a wrong shape, dtype, device, stride or alignment.
        """
        prepared = operand.launches.get((o_TNH.shape, cos_TA.shape, self.is_batch_invariant))
        device_index = operand.weight.blocks.get_device()
        o, cos, sin = o_TNH.data_ptr(), cos_TA.data_ptr(), sin_TA.data_ptr()
        fits = (
            prepared is not None
            and o_TNH.dtype is torch.bfloat16
            and cos_TA.dtype is sin_TA.dtype is torch.float32
            and sin_TA.shape == cos_TA.shape
            and o_TNH.is_contiguous()
            and cos_TA.is_contiguous()
            and sin_TA.is_contiguous()
            and o_TNH.get_device() == cos_TA.get_device() == sin_TA.get_device() == device_index
            and not (o | cos | sin) & 15
        )
        if not fits:
            _check_inputs(o_TNH, cos_TA, sin_TA, operand)
        if out is not None:
            shape = (len(o_TNH), operand.num_groups, operand.rows)
            check("out", out, (torch.bfloat16,), shape, operand.weight.blocks.device)
        if not len(o_TNH):
            return o_TNH.new_empty(0, operand.num_groups, operand.rows) if out is None else out
        with operand.lock:
            if prepared is None:
                prepared = self._prepare(o_TNH, cos_TA, operand)
            if out is None:
                out = prepared.empty.new()
            prepared.start((o, cos, sin, out.data_ptr()), current_stream(device_index))
        return out

    def _prepare(self, o_TNH: Tensor, cos_TA: Tensor, operand: GroupedFp8Operand) -> GroupedFp8Launch:
        config = choose(len(o_TNH), operand.sizes, self.is_batch_invariant)
        launch = GroupedFp8Launch(config, operand, o_TNH, cos_TA.shape[1])
        return operand.launches.add((o_TNH.shape, cos_TA.shape, self.is_batch_invariant), launch)


def _check_inputs(o_TNH: Tensor, cos_TA: Tensor, sin_TA: Tensor, operand: GroupedFp8Operand) -> None:
    device = operand.weight.blocks.device
    check_rank("o_TNH", o_TNH, 3, runs_on_cpu=False)
    num_tokens, num_heads, head_dim = o_TNH.shape
    width = operand.weight.in_features
    if num_heads * head_dim != operand.num_groups * width or head_dim % BLOCK or width % head_dim:
        raise ValueError(
            f"o_TNH {list(o_TNH.shape)} does not fit {operand.num_groups} groups of {width} channels, "
            f"in heads of a multiple of {BLOCK}"
        )
    if cos_TA.ndim != 2 or cos_TA.shape[1] > MAX_ANGLES or cos_TA.shape[1] % 4:
        raise ValueError(f"cos_TA must be [T, 0..{MAX_ANGLES}], a multiple of 4, found {list(cos_TA.shape)}")
    angles = (num_tokens, cos_TA.shape[1])
    check("o_TNH", o_TNH, (torch.bfloat16,), tuple(o_TNH.shape), device)
    check("cos_TA", cos_TA, (torch.float32,), angles, device)
    check("sin_TA", sin_TA, (torch.float32,), angles, device)


GROUPED_FP8 = GroupedFp8Kernel()
GROUPED_FP8_INVARIANT = GroupedFp8Kernel(is_batch_invariant=True)
