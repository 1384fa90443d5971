"""The angles of a decode step, computed once for all its layers, in one launch.

Angles are float32 products, their cosine and sine the toolkit's float32 functions with full range reduction, as torch
computes them. Rows beside each other never meet.

Legend: T rows, F rotary pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock

import torch
import triton
import triton.language as tl
from torch import Tensor

from ownpath.kernels.angles.types import KINDS, Frequencies
from ownpath.kernels.checks import check, check_rank
from ownpath.kernels.contract import Config
from ownpath.kernels.dsl.driver import current_stream
from ownpath.kernels.dsl.triton import TritonCall, launch
from ownpath.kernels.entries.types import LONG_RATIO, OVERLAPPING_RATIO
from ownpath.kernels.launch_cache import LaunchCache

INTERPRETED = triton.knobs.runtime.interpret


@triton.jit(do_not_specialize=["num_rows"])
def step_angles_kernel(
    positions_ptr,
    sliding_ptr,
    compress_ptr,
    out_ptr,
    num_rows,
    F: tl.constexpr,
    F_PAD: tl.constexpr,
    SHORT: tl.constexpr,
    LONG: tl.constexpr,
    PDL: tl.constexpr,
):
    """Computes cos and sin of one row at one of four positions."""
    t, pair = tl.program_id(0).to(tl.int64), tl.program_id(1)
    f = tl.arange(0, F_PAD)
    freqs_ptr = compress_ptr
    if pair == 0:
        freqs_ptr = sliding_ptr
    freqs = tl.load(freqs_ptr + f, mask=f < F, other=0.0)
    shift = tl.where(pair == 2, 1 - SHORT, tl.where(pair == 3, 1 - LONG, 0))
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    angles = (tl.load(positions_ptr + t) + shift).to(tl.float32) * freqs
    out = out_ptr + (2 * pair * num_rows + t) * F + f
    tl.store(out, tl.cos(angles), mask=f < F)
    tl.store(out + num_rows * F, tl.sin(angles), mask=f < F)


@dataclass(frozen=True)
class AnglesOperand:
    """launches: by number of rows and device, for calls that have passed every check."""

    frequencies: Frequencies
    launches: LaunchCache[tuple[int, int], TritonCall] = field(default_factory=LaunchCache, compare=False)
    lock: Lock = field(default_factory=Lock, compare=False)


class TritonStepAngles:
    """cos and sin of a step's rows: at their positions, and where the windows that end there begin."""

    def prepare(self, frequencies: Frequencies) -> AnglesOperand:
        """Makes the operand. The first call raises for frequencies that do not fit."""
        return AnglesOperand(frequencies)

    def configs(self, operand: AnglesOperand) -> Sequence[Config]:
        """Returns nothing: Triton compiles at the first call."""
        return ()

    def variant(self, positions_T: Tensor, operand: AnglesOperand) -> None:
        """Returns ``None``: the kernel has no variants."""

    def run(self, positions_T: Tensor, operand: AnglesOperand, *, out: Tensor | None = None) -> Tensor:
        """Computes all tables. Shapes: positions int32 [T]; out, the result, float32 [KINDS, T, F].

        Errors: ValueError naming the operand for a wrong shape, dtype, device, stride or alignment.
        """
        check_rank("positions_T", positions_T, 1, INTERPRETED)
        num_rows, device = len(positions_T), positions_T.device
        check("positions_T", positions_T, (torch.int32,), (num_rows,), device)
        shape = KINDS, num_rows, len(operand.frequencies.sliding_F)
        if out is None:
            out = torch.empty(shape, dtype=torch.float32, device=device)
        check("out", out, (torch.float32,), shape, device)
        if num_rows:
            _start(positions_T, operand, out)
        return out


def _start(positions_T: Tensor, operand: AnglesOperand, out: Tensor) -> None:
    key = len(positions_T), positions_T.get_device()
    call = operand.launches.get(key)
    if call is not None:
        with operand.lock:
            call.start(current_stream(key[1]), positions_T.data_ptr(), out.data_ptr())
        return
    num_pairs, pdl = out.shape[2], not INTERPRETED
    for name, one in zip(Frequencies._fields, operand.frequencies, strict=True):
        check(name, one, (torch.float32,), (num_pairs,), out.device)
    first = launch(
        step_angles_kernel,
        (key[0], KINDS // 2),
        (positions_T, *operand.frequencies, out, key[0]),
        {
            "F": num_pairs,
            "F_PAD": triton.next_power_of_2(num_pairs),
            "SHORT": OVERLAPPING_RATIO,
            "LONG": LONG_RATIO,
            "PDL": pdl,
            "num_warps": 1,
            "enable_fp_fusion": False,
            "launch_pdl": pdl,
        },
        moving=(0, 3),
    )
    if first is not None:
        operand.launches.add(key, first)


STEP_ANGLES = TritonStepAngles()
