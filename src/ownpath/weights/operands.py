"""Allocates an op's operand buffers in the planned layout, with the destination of each checkpoint tensor in them.

Every buffer starts as a sentinel: NaN where the dtype has one, all bits one otherwise; a copy that was queued and never
ran leaves it. In host memory the loader leaves the sentinel out, which took half of the loading time: large buffers
read as zeros there, and counting proves that each byte was copied once (``fill``). A destination is a view of a buffer
that exactly one checkpoint tensor fills; the destinations of an op tile its buffers without gap or overlap.
"""

import mmap
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import Protocol

import torch

from ownpath.checkpoint.schema import Encoding, ModuleSpec, PartSpec
from ownpath.formats import BF16, FP8_BLOCK, FP32, MXFP4, MXFP8, NVFP4, Format
from ownpath.ops import OpKind
from ownpath.plan.ops import PlannedOp
from ownpath.plan.sharding import Region

_HUGE_PAGE_BYTES = 2 * 2**20
_HAS_HUGE_PAGES = hasattr(mmap, "MADV_HUGEPAGE")  # Linux
_MOE_SUFFIX = {"qdata": "", "scale": "_scale", "global_scale": "_scale_2", "input_scale": "_input_scale"}


@dataclass(frozen=True)
class Destination:
    """``target``: the view of a buffer that the checkpoint tensor ``key`` fills; ``part``: its role in the module.

    ``part`` is ``None`` for a parameter. region: the region of the stored tensor to copy, ``None`` for all of it.
    """

    key: str
    target: torch.Tensor
    part: PartSpec | None = None
    region: Region | None = None

    @property
    def role(self) -> str:
        return "param" if self.part is None else self.part.role


@dataclass(frozen=True)
class OperandBuffers:
    """An op's buffers by the argument names of its runner, and the destinations that tile them.

    scale_memory: memory for block scales that are converted in place when loaded. The buffer of the same name, the
        stored scales, lies in its last half.
    """

    buffers: dict[str, tuple[torch.Tensor, ...]]
    destinations: tuple[Destination, ...]
    scale_memory: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes of the operand, for as long as its runner lives."""
        whole = {name: (memory,) for name, memory in self.scale_memory.items()}
        return sum(buffer.nbytes for buffers in (self.buffers | whole).values() for buffer in buffers)


def sentinel(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Allocates a buffer filled with NaN, or with all bits one where the dtype has no NaN."""
    buffer = torch.empty(shape, dtype=dtype, device=device)
    if dtype in (torch.float32, torch.bfloat16):
        return buffer.fill_(torch.nan)
    buffer.view(torch.uint8).fill_(0xFF)
    return buffer


def reserve(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Allocates a buffer: in host memory of huge pages where the system has them, on an accelerator with a sentinel."""
    if device.type != "cpu":
        return sentinel(shape, dtype, device)
    num_bytes = prod(shape) * dtype.itemsize
    if num_bytes < _HUGE_PAGE_BYTES or not _HAS_HUGE_PAGES:
        return torch.empty(shape, dtype=dtype)
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages: small ones then
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8).view(dtype).view(shape)


class Allocate(Protocol):
    """Allocates one buffer."""

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor: ...


_New = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]


def make_operand(
    op: PlannedOp, stored: dict[str, str], device: torch.device, allocate: Allocate = sentinel
) -> OperandBuffers:
    """Allocates this rank's part of ``op``'s operand. stored: checkpoint key -> safetensors dtype name."""
    operand = _operand(op, stored, partial(allocate, device=device))
    if not op.regions:
        return operand
    regions = op.regions_by_key
    return replace(
        operand,
        destinations=tuple(
            replace(destination, region=regions[destination.key]) for destination in operand.destinations
        ),
    )


def _operand(op: PlannedOp, stored: dict[str, str], new: _New) -> OperandBuffers:
    encoding, modules = op.encoding, op.local_modules
    if op.spec.kind is OpKind.MOE:
        return _moe(op, stored, new)
    if encoding.format is NVFP4:
        return _nvfp4_linear(encoding, modules, new)
    if encoding.format in (FP8_BLOCK, MXFP8, MXFP4):
        return _scaled_shards(encoding, modules, stored, new)
    assert encoding.format in (BF16, FP32), encoding
    return _plain(encoding, modules, new)


def _nvfp4_linear(encoding: Encoding, modules: tuple[ModuleSpec, ...], new: _New) -> OperandBuffers:
    num_rows = sum(module.shape[0] for module in modules)
    width = modules[0].shape[1]
    weight = new((num_rows, width // 2), torch.uint8)
    scale = new((num_rows, width // 16), torch.float8_e4m3fn)
    global_scale = new((num_rows,), torch.float32)
    named = {"weight": weight, "weight_scale": scale, "weight_scale_2": global_scale}
    if encoding.has_input_scale:
        named["input_scale"] = new((len(modules),), torch.float32)
    destinations: list[Destination] = []
    start = 0
    for idx, module in enumerate(modules):
        rows = slice(start, start + module.shape[0])
        targets = {"qdata": weight[rows], "scale": scale[rows]}
        targets["global_scale"] = global_scale[rows]
        if encoding.has_input_scale:
            targets["input_scale"] = named["input_scale"][idx]
        destinations += _destinations(encoding, module, targets)
        start = rows.stop
    return OperandBuffers({name: (buffer,) for name, buffer in named.items()}, tuple(destinations))


def _moe(op: PlannedOp, stored: dict[str, str], new: _New) -> OperandBuffers:
    encoding, modules = op.encoding, op.local_modules
    num_experts = len(modules) // 3
    inter, dim = modules[0].shape
    if encoding.format in (FP8_BLOCK, MXFP8):
        scale_dtype = _scale_dtype(encoding, modules[0], stored)
        gate_up = _fp8_stack(encoding, (num_experts, 2), (inter, dim), scale_dtype, new)
        down = _fp8_stack(encoding, (num_experts,), (dim, inter), scale_dtype, new)
    else:
        has_own_scales = not op.choice.kernel.converts_scales
        gate_up = _expert_stack(encoding, (num_experts, 2 * inter, dim), (num_experts, 2), new, has_own_scales)
        down = _expert_stack(encoding, (num_experts, dim, inter), (num_experts,), new, has_own_scales)
    scale_memory = {}
    if op.choice.kernel.converts_scales:
        for name, stack in (("w13_scale", gate_up), ("w2_scale", down)):
            scale_memory[name] = _nvfp4_scales(stack["qdata"], new)
            stack["scale"] = _last_half(scale_memory[name])
    # One call makes the views of all experts' matrices in a buffer: 10^5 separate calls take a second.
    halves = {role: _halves(t).unbind() for role, t in gate_up.items()}
    wholes = {role: t.unbind() for role, t in down.items()}
    destinations: list[Destination] = []
    for idx, module in enumerate(modules):
        projection, expert = divmod(idx, num_experts)
        views, at = (halves, 2 * expert + projection) if projection < 2 else (wholes, expert)
        destinations += _destinations(encoding, module, {role: targets[at] for role, targets in views.items()})
    named = {f"w13{_MOE_SUFFIX[role]}": buffer for role, buffer in gate_up.items()}
    named |= {f"w2{_MOE_SUFFIX[role]}": buffer for role, buffer in down.items()}
    return OperandBuffers({name: (buffer,) for name, buffer in named.items()}, tuple(destinations), scale_memory)


def _halves(gate_up: torch.Tensor) -> torch.Tensor:
    """Splits gate and up: matrices [E, 2F, K] -> [2E, F, K], scalars [E, 2] -> [2E], grids [E, 2, R, C] -> [2E, R, C].

    w1 and w3 alternate in the result.
    """
    pairs = gate_up.unflatten(1, (2, -1)) if gate_up.ndim == 3 else gate_up
    return pairs.flatten(0, 1)


def _expert_stack(
    encoding: Encoding, shape: tuple[int, int, int], scalars: tuple[int, ...], new: _New, has_own_scales: bool
) -> dict[str, torch.Tensor]:
    """Allocates buffers by role for experts' matrices [E, N, K]. scalars: shape of the per-matrix scales.

    MXFP4's block scales lie in ``scale_memory`` instead where they are converted.
    """
    (num_experts, n, k), fmt = shape, encoding.format
    if fmt in (BF16, FP32):
        return {"qdata": new(shape, _plain_dtype(fmt))}
    assert fmt in (NVFP4, MXFP4), fmt
    stack = {"qdata": new((num_experts, n, k // 2), torch.uint8)}
    if fmt is MXFP4:
        return stack | {"scale": new((num_experts, n, k // 32), torch.float8_e8m0fnu)} if has_own_scales else stack
    stack["scale"] = new((num_experts, n, k // 16), torch.float8_e4m3fn)
    roles = ("global_scale", "input_scale") if encoding.has_input_scale else ("global_scale",)
    return stack | {role: new(scalars, torch.float32) for role in roles}


def _nvfp4_scales(codes: torch.Tensor, new: _New) -> torch.Tensor:
    """Allocates memory for experts' E8M0 scales converted to E4M3. Shapes: codes [E, N, K/2] -> [E, N, K/16]."""
    num_experts, n, packed = codes.shape
    return new((num_experts, n, packed // 8), torch.float8_e4m3fn)


def _last_half(memory: torch.Tensor) -> torch.Tensor:
    """Views the last half of the memory of E4M3 [E, N, K/16] as E8M0 [E, N, K/32]."""
    num_experts, n, width = memory.shape
    return memory.view(torch.float8_e8m0fnu).view(2, num_experts, n, width // 2)[1]


def _fp8_stack(
    encoding: Encoding, lead: tuple[int, ...], shape: tuple[int, int], scale_dtype: torch.dtype, new: _New
) -> dict[str, torch.Tensor]:
    """Allocates buffers by role for matrices [N, K]. lead: their number, (experts,) or (experts, 2) for gate above up.

    Each matrix has its own grid of scales, because its last blocks may be partial; MXFP8's are one per row, and fuse.
    """
    n, k = shape
    codes = (lead[0], prod(lead[1:]) * n, k)
    rows, columns = encoding.part("scale").shape(n, k)
    grid = (lead[0], prod(lead[1:]) * rows, columns) if encoding.format is MXFP8 else (*lead, rows, columns)
    return {"qdata": new(codes, torch.float8_e4m3fn), "scale": new(grid, scale_dtype)}


def _scale_dtype(encoding: Encoding, module: ModuleSpec, stored: dict[str, str]) -> torch.dtype:
    """Returns E8M0 where scales are stored so, else float32: scales in 16 bits are widened, exactly."""
    is_e8m0 = stored[encoding.key(module.name, "scale")] == "F8_E8M0"
    return torch.float8_e8m0fnu if is_e8m0 else torch.float32


def _scaled_shards(
    encoding: Encoding, modules: tuple[ModuleSpec, ...], stored: dict[str, str], new: _New
) -> OperandBuffers:
    """Allocates a weight and a scale per shard: a shard's last block may be partial, so shards do not concatenate."""
    weights, scales = [], []
    destinations: list[Destination] = []
    for module in modules:
        dtype = _scale_dtype(encoding, module, stored)
        is_packed = encoding.format.packed_per_byte > 1
        weights.append(
            new(encoding.part("qdata").shape(*module.shape), torch.uint8 if is_packed else torch.float8_e4m3fn)
        )
        scales.append(new(encoding.part("scale").shape(*module.shape), dtype))
        destinations += _destinations(encoding, module, {"qdata": weights[-1], "scale": scales[-1]})
    return OperandBuffers({"weight": tuple(weights), "scale": tuple(scales)}, tuple(destinations))


def _plain_dtype(fmt: Format) -> torch.dtype:
    return torch.bfloat16 if fmt is BF16 else torch.float32


def _plain(encoding: Encoding, modules: tuple[ModuleSpec, ...], new: _New) -> OperandBuffers:
    num_rows = sum(module.shape[0] for module in modules)
    weight = new((num_rows, modules[0].shape[1]), _plain_dtype(encoding.format))
    destinations: list[Destination] = []
    start = 0
    for module in modules:
        destinations += _destinations(encoding, module, {"qdata": weight[start : start + module.shape[0]]})
        start += module.shape[0]
    return OperandBuffers({"weight": (weight,)}, tuple(destinations))


def _destinations(encoding: Encoding, module: ModuleSpec, targets: dict[str, torch.Tensor]) -> list[Destination]:
    keys = encoding.keys(module.name)
    return [Destination(key, targets[part.role], part) for key, part in zip(keys, encoding.parts, strict=True)]
