"""``cute.nvfp4_linear``: dense NVFP4 products, computed by ``gemm_sm90``."""

from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock

import torch

from ownpath.formats import NVFP4
from ownpath.kernels.checks import readable_rows, require_input
from ownpath.kernels.contract import StoredLinear
from ownpath.kernels.dsl.driver import Boxes, Pointers, current_stream
from ownpath.kernels.empty import EmptyOutput
from ownpath.kernels.launch_cache import LaunchCache
from ownpath.kernels.nvfp4.choose import LinearChoice, choose_linear
from ownpath.kernels.nvfp4.config import GemmConfig
from ownpath.kernels.nvfp4.launch import GemmLaunch, PackedWeight, Tiling, box
from ownpath.kernels.nvfp4.layout import check_scales, pack_weight_, plain_rows, unpack_weight
from ownpath.kernels.shards import fuse_nvfp4
from ownpath.qtensor import QuantTensor

ROW_MULTIPLE, COL_MULTIPLE = 64, 128
TOKEN_COUNTS = (1, 16, 32, 64, 128, 512, 2048)
"""Numbers of tokens, one for each kernel that ``choose_linear`` may pick, without the tile widths of long prompts."""


class DenseCall:
    """The prepared launch for one number of rows. out: what a call allocates that is given none."""

    def __init__(
        self, choice: LinearChoice, weight: PackedWeight, x: Boxes, out_pitch: int, schedule_address: int
    ) -> None:
        self._schedule = schedule_address
        self._pointers = Pointers(2)
        out, schedule = self._pointers.arguments
        tiles = Tiling(choice.grid, out_pitch, choice.rows_per_tile)
        self._gemm = GemmLaunch(choice.gemm, weight, x, tiles, (out, schedule))
        self.out = EmptyOutput((x.num_rows, weight.num_rows), torch.bfloat16, weight.device_index)

    def start(self, x: int, out: int, stream: int) -> None:
        """Launches with the given addresses."""
        self._gemm.x.point_at(x)
        self._pointers.set(out, self._schedule)
        self._gemm.launch.start(stream)


@dataclass(frozen=True)
class LinearOperand:
    """A packed weight. launches: by rows and pitch of x and pitch of out. schedule: a kernel argument that dense
    products do not use."""

    weight: PackedWeight
    schedule: torch.Tensor
    launches: LaunchCache[tuple[int, int, int], DenseCall] = field(default_factory=LaunchCache, compare=False)
    lock: Lock = field(default_factory=Lock, compare=False)

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.num_rows, self.weight.num_cols


class Nvfp4LinearKernel:
    """Packs weights in place and multiplies by them. is_batch_invariant: K is never split, whatever the batch."""

    def __init__(self, is_batch_invariant: bool, choose: Callable[..., LinearChoice] = choose_linear) -> None:
        self.is_batch_invariant = is_batch_invariant
        self._choose = choose

    def prepare(self, stored: StoredLinear) -> LinearOperand:
        """Repacks in place: the tensors of a single shard afterwards hold the kernel's layout.

        Shapes: codes uint8 [N, K/2], scale E4M3 [N, K/16], global_scale float32 [] or [N]; contiguous, on one CUDA
            device. Several shards are copied together first and stay as they are.
        Errors: ValueError naming the operand for sizes that are not multiples of 64 and 128, or a bad block scale.
        """
        weight, scale, global_scale = fuse_nvfp4(stored)
        num_rows, num_cols = weight.shape[0], 2 * weight.shape[1]
        if num_rows % ROW_MULTIPLE or num_cols % COL_MULTIPLE:
            raise ValueError(f"weight is [{num_rows}, {num_cols}]: rows must be a multiple of 64, columns of 128")
        require_packable("weight", weight)
        require_packable("weight_scale", scale)
        check_scales("weight_scale", scale)
        pack_weight_(weight, scale, plain_rows(num_rows).to(weight.device))
        per_row = global_scale.contiguous()
        # Kernels read weights before they wait for their predecessor, so repacking must be complete.
        torch.cuda.synchronize(weight.device)
        packed = PackedWeight(weight, scale, per_row, num_rows, num_cols)
        return LinearOperand(packed, torch.zeros(4, dtype=torch.int32, device=weight.device))

    def restore(self, operand: LinearOperand) -> tuple[QuantTensor, ...]:
        """Reads all shards' rows back as one matrix, a global scale per row; for zero scales see ``unpack_weight``."""
        weight = operand.weight
        rows = plain_rows(weight.num_rows).to(weight.codes.device)
        codes, scale = unpack_weight(weight.codes, weight.scales, rows, weight.num_cols)
        return (QuantTensor(codes, scale, weight.global_scale, NVFP4),)

    def padding(self, operand: LinearOperand) -> None:
        """Returns ``None``: the layout has no padding."""

    def configs(self, operand: LinearOperand) -> list[GemmConfig]:
        """Returns the configurations of every kernel that a call may launch."""
        return self._configs(*operand.shape)

    def planned_configs(self, stored: StoredLinear) -> list[GemmConfig]:
        """Returns ``configs`` from the shape."""
        return self._configs(*stored.shape)

    def _configs(self, num_rows: int, num_cols: int) -> list[GemmConfig]:
        counts = (*TOKEN_COUNTS, *range(2048, 8193, 512))
        chosen = (self._choose(count, num_rows, num_cols, self.is_batch_invariant).gemm for count in counts)
        return list({config.name: config for config in chosen}.values())

    def variant(self, x: torch.Tensor, operand: LinearOperand) -> str:
        """Returns the name of the variant that a call with this x launches."""
        num_tokens = x.numel() // x.shape[-1]
        return self._choose(num_tokens, *operand.shape, self.is_batch_invariant).gemm.name

    def workspace(self, operand: LinearOperand, num_tokens: int) -> None:
        """Returns ``None``: no call needs scratch."""

    def run(
        self,
        x: torch.Tensor,
        operand: LinearOperand,
        *,
        out: torch.Tensor | None = None,
        workspace: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes y = x W^T. Shapes: x bfloat16 [..., K], rows 16-byte aligned; y or ``out`` bfloat16 [..., N].

        Errors: ValueError naming x or out for a wrong dtype, shape, device, stride or alignment.
        """
        weight = operand.weight
        readable = readable_rows(x, weight.num_cols, weight.device_index)
        if readable is None:
            require_input(x, weight.num_cols, weight.codes)
            rows = x.reshape(-1, weight.num_cols)
            require_rows("x", rows, weight.num_cols)
            flat_out = None if out is None else out.view(-1, weight.num_rows)
            return self.run(rows, operand, out=flat_out).view(*x.shape[:-1], weight.num_rows)
        num_tokens, pitch, address = readable
        out_pitch = weight.num_rows if out is None else _out_pitch(out, num_tokens, weight)
        if not num_tokens:
            return x.new_empty(0, weight.num_rows) if out is None else out
        key = num_tokens, pitch, out_pitch
        with operand.lock:
            call = operand.launches.get(key) or operand.launches.add(key, self._new_call(x, operand, out_pitch))
            if out is None:
                out = call.out.new()
            call.start(address, out.data_ptr(), current_stream(weight.device_index))
        return out

    def rounds_to_powers(self, operand: LinearOperand, num_rows: int) -> bool:
        """See ``LinearKernel``."""
        return False

    def run_wide(self, x: torch.Tensor, operand: LinearOperand) -> torch.Tensor:
        """Refuses: this kernel does not write float32. Errors: ValueError."""
        return self.run(x.to(torch.promote_types(x.dtype, torch.float32)), operand)

    def _new_call(self, x: torch.Tensor, operand: LinearOperand, out_pitch: int) -> DenseCall:
        choice = self._choose(len(x), *operand.shape, self.is_batch_invariant)
        boxes = Boxes(x.data_ptr(), (len(x), x.shape[1]), x.stride(0), box(choice.gemm))
        return DenseCall(choice, operand.weight, boxes, out_pitch, operand.schedule.data_ptr())


def require_packable(name: str, tensor: torch.Tensor) -> None:
    """Checks an operand. Errors: ValueError naming one that cannot be repacked in place or is not on a CUDA device."""
    if not tensor.is_cuda:
        raise ValueError(f"{name} is on {tensor.device}; this kernel runs on CUDA")
    if not tensor.is_contiguous() or tensor.data_ptr() % 128:
        raise ValueError(f"{name} must be contiguous and start at a multiple of 128 bytes")


def require_rows(name: str, tensor: torch.Tensor, width: int) -> None:
    """Checks a matrix. Errors: ValueError naming one that the copy engine cannot read or the epilogue cannot write."""
    if tensor.dtype is not torch.bfloat16:
        raise ValueError(f"{name} must be torch.bfloat16, found {tensor.dtype}")
    if tensor.ndim != 2 or tensor.shape[1] != width:
        raise ValueError(f"{name} must have shape [rows, {width}], found {list(tensor.shape)}")
    if tensor.stride(1) != 1 or tensor.stride(0) % 8 or tensor.data_ptr() % 16:
        raise ValueError(f"{name} must have contiguous rows that start at multiples of 16 bytes")


def _out_pitch(out: torch.Tensor, num_rows: int, weight: PackedWeight) -> int:
    """Returns the elements from row to row of ``out``. Errors: ValueError when a product cannot be written there."""
    require_rows("out", out, weight.num_rows)
    if len(out) != num_rows:
        raise ValueError(f"out has {len(out)} rows, x has {num_rows}")
    if out.get_device() != weight.device_index:
        raise ValueError(f"out is on {out.device}, the weight on {weight.codes.device}")
    return out.stride(0)


nvfp4_linear = Nvfp4LinearKernel(is_batch_invariant=False)
nvfp4_linear_invariant = Nvfp4LinearKernel(is_batch_invariant=True)
