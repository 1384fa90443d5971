"""``cute.fp8_linear_sm90``: dense FP8 products, W8A16 for few rows and W8A8 for many."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock

import torch
from torch import Tensor

from ownpath.formats import FP8_BLOCK
from ownpath.kernels.checks import readable_rows, require_input
from ownpath.kernels.contract import StoredLinear
from ownpath.kernels.dsl.driver import current_stream, num_sms
from ownpath.kernels.empty import EmptyOutput
from ownpath.kernels.fp8.choose import (
    WeightKey,
    quantize_config,
    quantize_configs,
    w8a8_config,
    w8a8_configs,
    w8a16_config,
    w8a16_configs,
)
from ownpath.kernels.fp8.config import MAX_K_BLOCKS, Fp8Config
from ownpath.kernels.fp8.launch import (
    ROWS_PER_WORKSPACE_BLOCK,
    QuantizeLaunch,
    Rows,
    W8A8Launch,
    W8A16Launch,
    weight_key,
    workspace_bytes,
    workspace_rows,
)
from ownpath.kernels.fp8.layout import PackedFp8, fp8_padding, fp8_shape, pack_fp8, restore_fp8
from ownpath.kernels.fp8.spec import PREFILL_FROM
from ownpath.kernels.launch_cache import LaunchCache
from ownpath.qtensor import QuantTensor

MAX_WIDTH = 8 * MAX_K_BLOCKS * 128
PASS_BLOCKS = 2048
"""Blocks of 64 x 128 activations that W8A8 quantises in one pass (17 MB), if that is at least 2048 rows."""


def rows_at_once(num_k_blocks: int) -> int:
    """Returns the number of rows of one W8A8 pass."""
    return max(2048, PASS_BLOCKS // num_k_blocks * ROWS_PER_WORKSPACE_BLOCK)


def _new_output(weight: PackedFp8, rows: Rows) -> EmptyOutput:
    return EmptyOutput((rows.count, weight.out_features), torch.bfloat16, weight.blocks.get_device())


class _W8A16Pass:
    """A W8A16 product: one launch. out: what a call allocates that is given none."""

    def __init__(self, kernel: "Fp8LinearKernel", weight: PackedFp8, x_address: int, rows: Rows) -> None:
        config = w8a16_config(
            rows.count, weight_key(weight), num_sms(weight.blocks.get_device()), kernel.is_batch_invariant
        )
        self._product = W8A16Launch(config, weight, x_address, rows)
        self.out = _new_output(weight, rows)

    def start(self, x: int, out: int, workspace: int, stream: int) -> None:
        """Launches with the given addresses. workspace: not used."""
        self._product.start(x, out, stream)


class _W8A8Passes:
    """A W8A8 product in passes of ``step`` rows, which use the workspace one after the other."""

    def __init__(self, weight: PackedFp8, rows: Rows, step: int) -> None:
        key, device_index = weight_key(weight), weight.blocks.get_device()
        num_k_blocks, sms = weight.num_k_blocks, num_sms(device_index)
        self._passes = []
        self.out = _new_output(weight, rows)
        for start in range(0, rows.count, step):
            part = Rows(min(step, rows.count - start), rows.x_pitch, rows.out_pitch)
            config = w8a8_config(part.count, key, sms)
            first = quantize_config(config, part.count, key, sms, weight.power_of_two)
            quantize = QuantizeLaunch(first, weight.in_features, num_k_blocks, part, device_index)
            product = W8A8Launch(config, weight, part)
            self._passes.append((quantize, product, 2 * start * rows.x_pitch, 2 * start * rows.out_pitch))

    def start(self, x: int, out: int, workspace: int, stream: int) -> None:
        """Launches with the given addresses."""
        for quantize, product, x_at, out_at in self._passes:
            quantize.start(x + x_at, workspace, stream)
            product.start(workspace, out + out_at, stream)


@dataclass(frozen=True)
class Fp8Operand:
    """A packed weight. shard_rows: of each fused shard. launches: by rows, pitches of x and out, and rows per pass."""

    weight: PackedFp8
    shard_rows: tuple[int, ...]
    launches: LaunchCache[tuple[int, int, int, int], _W8A16Pass | _W8A8Passes] = field(
        default_factory=LaunchCache, compare=False
    )
    lock: Lock = field(default_factory=Lock, compare=False)


@dataclass(frozen=True)
class Fp8LinearKernel:
    """W8A16 for fewer than ``prefill_from`` rows, otherwise W8A8; ``None``: always W8A16."""

    prefill_from: int | None
    is_batch_invariant: bool = False

    def prepare(self, stored: StoredLinear) -> Fp8Operand:
        """Copies weights into the kernels' layout; the stored tensors are not needed afterwards.

        Shapes: as ``StoredLinear`` with E4M3 codes [N, K] and E8M0 or float32 scales [ceil(N/128), ceil(K/128)].
        Errors: ValueError for a K that 8 does not divide, or more than 64K.
        """
        width = stored.shape[1]
        if width % 8 or width > MAX_WIDTH:
            raise ValueError(f"weight has {width} columns; the Hopper kernels take multiples of 8 up to {MAX_WIDTH}")
        codes, scales = _codes_and_scales(stored)
        packed = pack_fp8(codes, scales)
        # Kernels read weights before they wait for their predecessor, so packing must be complete.
        torch.cuda.synchronize(codes[0].device)
        return Fp8Operand(packed, tuple(len(shard) for shard in codes))

    def restore(self, operand: Fp8Operand) -> tuple[QuantTensor, ...]:
        """Returns each shard's matrix and grid of float32 scales."""
        shards = restore_fp8(operand.weight, operand.shard_rows)
        return tuple(QuantTensor(codes, scale, None, FP8_BLOCK) for codes, scale in shards)

    def padding(self, operand: Fp8Operand) -> Tensor:
        """Returns the padding codes: uint8."""
        return fp8_padding(operand.weight)

    def configs(self, operand: Fp8Operand) -> list[Fp8Config]:
        """Returns the configurations of every kernel that a call may launch."""
        weight = operand.weight
        return self._configs(weight_key(weight), weight.power_of_two, weight.blocks.device.index)

    def planned_configs(self, stored: StoredLinear) -> list[Fp8Config]:
        """Returns ``configs``, assuming that E8M0 scales fold into the decode, as those from 2^-100 to 2^7 do."""
        codes, scales = _codes_and_scales(stored)
        is_e8m0 = all(scale.dtype == torch.float8_e8m0fnu for scale in scales)
        num_tiles, num_k_blocks, ragged = fp8_shape([len(shard) for shard in codes], stored.shape[1])
        return self._configs((num_tiles, num_k_blocks, is_e8m0, ragged), is_e8m0, codes[0].device.index)

    def _configs(self, key: WeightKey, power_of_two: bool, device_index: int | None) -> list[Fp8Config]:
        sms = num_sms(0 if device_index is None else device_index)
        found: list[Fp8Config] = [*w8a16_configs(key, sms, self.prefill_from, self.is_batch_invariant)]
        if self.prefill_from is not None:
            found += [*quantize_configs(power_of_two), *w8a8_configs(key)]
        return list({config.name: config for config in found}.values())

    def variant(self, x: Tensor, operand: Fp8Operand) -> str:
        """Returns the names of the kernels that a call with this x launches."""
        weight, num_rows = operand.weight, x.numel() // x.shape[-1]
        key, sms = weight_key(weight), num_sms(x.device.index)
        if not self._quantizes(num_rows):
            return w8a16_config(num_rows, key, sms, self.is_batch_invariant).name
        step = rows_at_once(weight.num_k_blocks)
        counts = {min(step, num_rows - start) for start in range(0, num_rows, step)}
        products = {count: w8a8_config(count, key, sms) for count in counts}
        quantizers = {quantize_config(products[n], n, key, sms, weight.power_of_two).name for n in counts}
        return " ".join([*sorted(quantizers), *sorted({product.name for product in products.values()})])

    def workspace(self, operand: Fp8Operand, num_tokens: int) -> Tensor | None:
        """Allocates scratch for the quantised activations of W8A8; more rows are processed in several passes."""
        if self.prefill_from is None:
            return None
        num_k_blocks = operand.weight.num_k_blocks
        num_bytes = workspace_bytes(min(num_tokens, rows_at_once(num_k_blocks)), num_k_blocks)
        return torch.empty(num_bytes, dtype=torch.uint8, device=operand.weight.blocks.device)

    def _quantizes(self, num_rows: int) -> bool:
        return self.prefill_from is not None and num_rows >= self.prefill_from

    def run(
        self, x: Tensor, operand: Fp8Operand, *, out: Tensor | None = None, workspace: Tensor | None = None
    ) -> Tensor:
        """Computes y = x (E4M3 x block scale)ᵀ.

        Shapes: x bfloat16 [..., K] with rows at multiples of 16 bytes; y bfloat16 [..., N], ``out`` if given.

        Errors: ValueError naming x, out or workspace for a wrong dtype, shape, device, stride or alignment.
        """
        weight = operand.weight
        device_index = weight.blocks.get_device()
        readable = readable_rows(x, weight.in_features, device_index)
        if readable is None:
            _refuse(x, weight)
            flat_out = None if out is None else out.view(-1, weight.out_features)
            flat = self.run(x.flatten(0, -2), operand, out=flat_out, workspace=workspace)
            return flat.view(*x.shape[:-1], weight.out_features)
        num_rows, pitch, x_address = readable
        out_pitch = weight.out_features if out is None else _out_pitch(out, num_rows, weight)
        if not num_rows:
            return x.new_empty(0, weight.out_features) if out is None else out
        step, address, workspace = self._scratch(num_rows, weight, workspace)
        key = num_rows, pitch, out_pitch, step
        with operand.lock:
            call = operand.launches.get(key) or operand.launches.add(key, self._new_call(x, weight, key))
            if out is None:
                out = call.out.new()
            call.start(x_address, out.data_ptr(), address, current_stream(device_index))
        return out

    def rounds_to_powers(self, operand: Fp8Operand, num_rows: int) -> bool:
        """See ``LinearKernel``."""
        return operand.weight.power_of_two and self._quantizes(num_rows)

    def run_wide(self, x: Tensor, operand: Fp8Operand) -> Tensor:
        """Refuses: this kernel does not write float32. Errors: ValueError."""
        return self.run(x.to(torch.promote_types(x.dtype, torch.float32)), operand)

    def _new_call(self, x: Tensor, weight: PackedFp8, key: tuple[int, int, int, int]) -> _W8A16Pass | _W8A8Passes:
        rows = Rows(*key[:3])
        return _W8A8Passes(weight, rows, key[3]) if key[3] else _W8A16Pass(self, weight, x.data_ptr(), rows)

    def _scratch(self, num_rows: int, weight: PackedFp8, given: Tensor | None) -> tuple[int, int, Tensor | None]:
        """Returns rows per pass (0: nothing is quantised), the scratch's address, and the tensor that owns it."""
        if not self._quantizes(num_rows):
            return 0, 0, None
        if given is None:
            step = rows_at_once(weight.num_k_blocks)
            num_bytes = workspace_bytes(min(num_rows, step), weight.num_k_blocks)
            given = torch.empty(num_bytes, dtype=torch.uint8, device=weight.blocks.device)
            return step, given.data_ptr(), given
        needed = workspace_bytes(1, weight.num_k_blocks)
        if given.dtype != torch.uint8 or not given.is_contiguous() or given.device != weight.blocks.device:
            raise ValueError(f"workspace must be contiguous uint8 on {weight.blocks.device}")
        if given.numel() < needed or given.data_ptr() % 128:
            raise ValueError(f"workspace must hold {needed} bytes at a 128-byte aligned address, found {given.numel()}")
        return workspace_rows(given.numel(), weight.num_k_blocks), given.data_ptr(), given


def _codes_and_scales(stored: StoredLinear) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    scales = [shard.scale for shard in stored.shards if shard.scale is not None]
    assert len(scales) == len(stored.shards)
    return [shard.qdata for shard in stored.shards], scales


def _refuse(x: Tensor, weight: PackedFp8) -> None:
    """Raises ValueError naming what is wrong with x; more than two dimensions are allowed."""
    require_input(x, weight.in_features, weight.blocks)
    if x.dtype != torch.bfloat16:
        raise ValueError(f"x must be torch.bfloat16 for the Hopper kernels, found {x.dtype}")
    rows = x if x.ndim == 2 else x.flatten(0, -2)
    if rows.stride(-1) != 1 or rows.stride(0) % 8 or rows.data_ptr() % 16:
        raise ValueError("x must have contiguous features and rows that start at 16-byte aligned addresses")


def _out_pitch(out: Tensor, num_rows: int, weight: PackedFp8) -> int:
    """Returns the elements from row to row of ``out``. Errors: ValueError when a product cannot be written there."""
    if out.shape != (num_rows, weight.out_features) or out.dtype is not torch.bfloat16 or out.stride(1) != 1:
        raise ValueError(f"out must be torch.bfloat16 [{num_rows}, {weight.out_features}] with contiguous rows")
    if out.device != weight.blocks.device:
        raise ValueError(f"out is on {out.device}, the weight on {weight.blocks.device}")
    return out.stride(0)


fp8_linear = Fp8LinearKernel(PREFILL_FROM)
fp8_linear_invariant = Fp8LinearKernel(None, is_batch_invariant=True)
