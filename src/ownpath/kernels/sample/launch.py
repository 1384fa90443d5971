"""The sampler on Hopper: chooses every row's token in one launch.

Roofline. 4 * T * V bytes once for greedy rows and rows without filters, twice and a little for rows with filters.
At few rows a row is shared by up to 128 programs; then the time is launch latency and two trips to the second-level
cache. At many rows noise decides: about 40 instructions a token to bound it, 110 where it is computed.

Limits. float32 logits, up to 2^24 tokens, rows any number of elements apart; one token per row. Programs that share a
row with filters wait for each other, so there are never more of them than the device holds at once. Calls with one
operand must follow each other on one stream: they share counters. A row's token never depends on the other rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import NamedTuple

import torch
import triton

from ownpath.kernels.checks import check, check_rank
from ownpath.kernels.contract import Config
from ownpath.kernels.dsl.driver import current_stream, num_sms
from ownpath.kernels.dsl.triton import TritonCall, launch
from ownpath.kernels.launch_cache import LaunchCache
from ownpath.kernels.sample.kernel import MAX_SPLITS, NUM_REALS, NUM_WHOLES, sample_kernel
from ownpath.kernels.sample.types import NextStep, Sampled, SampleRows
from ownpath.kernels.variants import variant_name

INTERPRETED = triton.knobs.runtime.interpret
MAX_VOCAB = 1 << 24
BLOCK, PROGRAMS_PER_SM, MAX_REGISTERS = 256, 4, 128
"""Programs of four warps: with so many registers a thread, a multiprocessor holds four at once."""
NUM_POINTERS = 29
NUM_FOLLOWING = len(NextStep._fields)


class SampleShape(NamedTuple):
    """splits: programs that share a row, at most 128. block: counters of a program's step, each for four tokens."""

    splits: int
    block: int
    num_warps: int


class SampleScratch(NamedTuple):
    """Numbers that a row's programs exchange: counters int32 [2, T], 0 between calls; reals float64; wholes int64."""

    counters: torch.Tensor
    reals: torch.Tensor
    wholes: torch.Tensor


def choose_shape(num_rows: int, num_vocab: int, num_programs: int) -> SampleShape:
    """Chooses how rows are shared, for a device that runs ``num_programs`` at once."""
    share = max(num_programs // max(num_rows, 1), 1)
    num_blocks = -(-num_vocab // (4 * BLOCK))
    return SampleShape(min(share, num_blocks, MAX_SPLITS), BLOCK, 4)


@dataclass(frozen=True)
class SampleOperand:
    """Prepared launches, by everything that a compiled call fixes, and scratch, which captured graphs refer to."""

    launches: LaunchCache[tuple[object, ...], TritonCall] = field(default_factory=LaunchCache, compare=False)
    scratch: dict[tuple[int, torch.device], SampleScratch] = field(default_factory=dict, compare=False)
    lock: Lock = field(default_factory=Lock, compare=False)

    def scratch_for(self, num_rows: int, device: torch.device) -> SampleScratch:
        """Returns the scratch of calls of this size; made once and kept."""
        key = num_rows, device
        if key not in self.scratch:
            self.scratch[key] = SampleScratch(
                torch.zeros(2, num_rows, dtype=torch.int32, device=device),
                torch.empty(num_rows, NUM_REALS, MAX_SPLITS, dtype=torch.float64, device=device),
                torch.empty(num_rows, NUM_WHOLES, MAX_SPLITS, dtype=torch.int64, device=device),
            )
        return self.scratch[key]


def _options(rows: SampleRows, out: Sampled) -> dict[str, bool]:
    return {
        "FILTERS": rows.filters is not None,
        "PENALTIES": rows.penalties is not None,
        "BIAS": rows.bias is not None,
        "MASK": rows.mask_TW is not None,
        "PLACED": rows.place_T is not None,
        "LOGPROB": out.logprob_T is not None,
    }


class TritonSample:
    """The next token of each row. ``shape``: how rows are shared; chosen by their number if it is not given."""

    def __init__(self, shape: SampleShape | None = None) -> None:
        self._shape = shape

    def prepare(self) -> SampleOperand:
        """Makes the operand: launches and scratch of one stream of calls."""
        return SampleOperand()

    def configs(self, operand: SampleOperand) -> Sequence[Config]:
        """Returns nothing: Triton compiles at the first call."""
        return ()

    def variant(self, logits_TV: torch.Tensor, rows: SampleRows, operand: SampleOperand) -> str:
        """Returns the variant's name: how rows are shared. Neither logits nor rows are read."""
        shape = self._shape_for(_num_rows(logits_TV, rows), logits_TV)
        return variant_name("sample", splits=shape.splits, block=shape.block)

    def run(
        self,
        logits_TV: torch.Tensor,
        rows: SampleRows,
        operand: SampleOperand,
        *,
        out: Sampled | None = None,
        following: NextStep | None = None,
    ) -> Sampled:
        """Computes ``ref.sample``. See ``SampleKernel``."""
        check_rank("logits_TV", logits_TV, 2, INTERPRETED)
        num_rows, num_vocab = _num_rows(logits_TV, rows), logits_TV.shape[1]
        if out is None:
            assert rows.place_T is None, "results that have places need somewhere to be"
            pair = logits_TV.new_empty(2, num_rows, dtype=torch.int64)
            out = Sampled(pair[0], pair[1], None)
        tensors = _tensors(logits_TV, rows, out, following)
        _check(logits_TV, rows, out, num_rows)
        if not num_rows:
            return out
        shape = self._shape_for(num_rows, logits_TV)
        places = 0 if rows.bias is None else rows.bias.ids_TK.shape[1]
        key = (
            *(num_rows, num_vocab, logits_TV.stride(0), logits_TV.data_ptr() % 16, logits_TV.get_device()),
            *(shape, places, out.token_T.dtype, *_options(rows, out).values()),
            None if following is None else (following.results_NW.shape, *(part.data_ptr() for part in following)),
        )
        with operand.lock:
            call = operand.launches.get(key)
            if call is not None:
                call.start(current_stream(logits_TV.get_device()), *(tensor.data_ptr() for tensor in tensors))
                return out
            if following is not None:
                _check_following(following, out)
            scratch = operand.scratch_for(num_rows, logits_TV.device)
            made = _first_launch((*tensors, *scratch), rows, out, shape, logits_TV.stride(0), following)
            if made is not None:
                operand.launches.add(key, made)
        return out

    def _shape_for(self, num_rows: int, logits_TV: torch.Tensor) -> SampleShape:
        if self._shape is not None:
            return self._shape
        num_programs = 1 if INTERPRETED else PROGRAMS_PER_SM * num_sms(logits_TV.get_device())
        return choose_shape(num_rows, logits_TV.shape[1], num_programs)


def _num_rows(logits_TV: torch.Tensor, rows: SampleRows) -> int:
    return len(logits_TV if rows.place_T is None else rows.place_T)


def _tensors(
    logits_TV: torch.Tensor, rows: SampleRows, out: Sampled, following: NextStep | None
) -> tuple[torch.Tensor, ...]:
    """Returns the kernel's tensors in order; an absent one is replaced by one that is not read."""
    unread = rows.temperature_T
    return (
        *(logits_TV, rows.temperature_T, rows.seed_T, rows.index_T),
        *((unread,) * 3 if rows.filters is None else rows.filters),
        *((unread,) * 5 if rows.penalties is None else rows.penalties),
        *((unread,) * 3 if rows.bias is None else rows.bias),
        unread if rows.mask_TW is None else rows.mask_TW,
        unread if rows.place_T is None else rows.place_T,
        *(out.token_T, out.fault_T, unread if out.logprob_T is None else out.logprob_T),
        *((unread,) * NUM_FOLLOWING if following is None else following),
    )


def _first_launch(
    tensors: tuple[torch.Tensor, ...],
    rows: SampleRows,
    out: Sampled,
    shape: SampleShape,
    pitch: int,
    following: NextStep | None,
) -> TritonCall | None:
    num_rows, num_vocab = _num_rows(tensors[0], rows), tensors[0].shape[1]
    places, pdl = 0 if rows.bias is None else rows.bias.ids_TK.shape[1], not INTERPRETED
    num_fields, width = (0, 0) if following is None else following.results_NW.shape
    assert len(tensors) == NUM_POINTERS
    return launch(
        sample_kernel,
        (shape.splits, num_rows),
        (*tensors, pitch, num_vocab, num_rows, places, shape.splits, num_fields, width),
        {
            "PLACES": triton.next_power_of_2(max(places, 1)),
            "BLOCK": shape.block,
            **_options(rows, out),
            "FIELDS": 0 if following is None else triton.next_power_of_2(num_fields),
            "PDL": pdl,
            "num_warps": shape.num_warps,
            "maxnreg": MAX_REGISTERS,
            "enable_fp_fusion": False,
            "launch_pdl": pdl,
        },
        moving=range(NUM_POINTERS - 3),
    )


def _vectors(rows: SampleRows) -> Iterator[tuple[str, torch.Tensor, tuple[torch.dtype, ...]]]:
    """Yields what has one element per row, with the dtypes that it may have."""
    floats, ints = (torch.float32,), (torch.int32,)
    yield from (("temperature_T", rows.temperature_T, floats), ("seed_T", rows.seed_T, (torch.int64,)))
    yield "index_T", rows.index_T, ints
    if rows.filters is not None:
        yield from zip(rows.filters._fields, rows.filters, (ints, floats, floats), strict=True)
    if rows.penalties is not None:
        yield from zip(rows.penalties._fields[1:], rows.penalties[1:], (ints, floats, floats, floats), strict=True)
    if rows.bias is not None:
        yield "counts_T", rows.bias.counts_T, ints
    if rows.place_T is not None:
        yield "place_T", rows.place_T, ints


def _results(out: Sampled) -> Iterator[tuple[str, torch.Tensor, tuple[torch.dtype, ...]]]:
    """Yields what has one element per row of logits, with the dtypes that it may have."""
    yield "out.token_T", out.token_T, (torch.int64, torch.int32)
    yield "out.fault_T", out.fault_T, (out.token_T.dtype,)
    if out.logprob_T is not None:
        yield "out.logprob_T", out.logprob_T, (torch.float32,)


def _check_following(following: NextStep, out: Sampled) -> None:
    """Checks what is written beside the results. The shared copies may be in the host's memory."""
    num_fields, width = following.results_NW.shape
    device, count = out.token_T.device, len(out.token_T)
    if out.token_T.dtype is not torch.int32 or out.logprob_T is None:
        raise ValueError("out must have tokens of int32 and log-probs where a step follows")
    if num_fields < len(Sampled._fields) or width < count:
        raise ValueError(f"results_NW must have {len(Sampled._fields)} rows or more of at least {count} columns")
    shapes = (width,), (width,), (2, width), (width,), (num_fields, width)
    for name, tensor, size in zip(following._fields, following, shapes, strict=False):
        check(name, tensor, (torch.int32,), size, device)
    shared = following.shared_2NW
    check("shared_2NW", shared, (torch.int32,), (2, num_fields, width), shared.device)
    if device.type == "cuda" and not (shared.device == device or shared.is_pinned()):
        raise ValueError(f"shared_2NW must be on {device} or in pinned memory")


def _check(logits_TV: torch.Tensor, rows: SampleRows, out: Sampled, num_rows: int) -> None:
    num_vocab, device = logits_TV.shape[1], logits_TV.device
    if logits_TV.dtype is not torch.float32 or (num_vocab > 1 and logits_TV.stride(1) != 1):
        raise ValueError("logits_TV must be float32 with contiguous rows")
    if not 0 < num_vocab <= MAX_VOCAB:
        raise ValueError(f"logits_TV must have 1 to {MAX_VOCAB} tokens, found {num_vocab}")
    for count, vectors in ((num_rows, _vectors(rows)), (len(logits_TV), _results(out))):
        for name, tensor, dtypes in vectors:
            is_sound = tensor.dtype in dtypes and tensor.shape == (count,) and tensor.device == device
            if not is_sound or not tensor.is_contiguous():
                kind = " or ".join(map(str, dtypes))
                raise ValueError(f"{name} must be {kind} [{count}], contiguous on {device}")
    if rows.penalties is not None:
        tables = rows.penalties.tables_RV
        check("tables_RV", tables, (torch.int32,), (tables.shape[0], num_vocab), device)
    if rows.bias is not None:
        places = rows.bias.ids_TK.shape[1]
        check("ids_TK", rows.bias.ids_TK, (torch.int32,), (num_rows, places), device)
        check("values_TK", rows.bias.values_TK, (torch.float32,), (num_rows, places), device)
    if rows.mask_TW is not None:
        check("mask_TW", rows.mask_TW, (torch.int32,), (num_rows, -(-num_vocab // 32)), device)


SAMPLE = TritonSample()
