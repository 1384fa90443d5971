"""The ring of shared-memory stages between the threads that load and the threads that multiply.

How it works. Every stage has two barriers: ``full`` counts the producers that have announced their bytes and the bytes
that have landed, ``empty`` the warps that have read the stage. A producer acquires a stage, commits the bytes that it
will send there, and starts its copies; a consumer waits for a stage, reads it, and releases it. Both walk around the
ring, each with a position of its own. The parity that a barrier shows at a stage flips with every turn: the position
holds it.
"""

from dataclasses import dataclass
from typing import Self

import cutlass
from cutlass import Int32, Int64, cute
from cutlass._mlir import ir

from ownpath.kernels.dsl import ptx


@cute.jit
def _next(slot: Int32, phase: Int32, num_stages: int) -> tuple[Int32, Int32]:
    slot += 1
    if slot == num_stages:
        slot = Int32(0)
        phase = phase ^ 1
    return slot, phase


@dataclass(frozen=True)
class Pipeline:
    """The barriers of a ring of stages. num_ctas: CTAs of a cluster that write into each other's stages."""

    full: cute.Pointer
    empty: cute.Pointer
    num_stages: int
    num_ctas: int = 1

    @classmethod
    def allocate(cls, num_stages: int, num_ctas: int = 1) -> "Pipeline":
        """Allocates the barriers in shared memory."""
        full = cute.arch.alloc_smem(Int64, num_stages, 8)
        empty = cute.arch.alloc_smem(Int64, num_stages, 8)
        return cls(full, empty, num_stages, num_ctas)

    def init(self, num_producers: int, num_warps: int) -> None:
        """Initialises the barriers, in one thread before any other uses them.

        num_producers: commits per stage; num_warps: releases per stage in a CTA.
        """
        for stage in range(self.num_stages):
            cute.arch.mbarrier_init(self.full + stage, num_producers)
            cute.arch.mbarrier_init(self.empty + stage, num_warps * self.num_ctas)
        cute.arch.mbarrier_init_fence()

    def producer(self) -> "Producer":
        """Returns a producer at the first stage, which is empty."""
        return Producer(self, Int32(0), Int32(1))

    def consumer(self) -> "Consumer":
        """Returns a consumer at the first stage."""
        return Consumer(self, Int32(0), Int32(0))

    def consumer_at(self, step: Int32) -> "Consumer":
        """Returns a consumer at the stage that the ring reaches after ``step`` stages."""
        return Consumer(self, step % self.num_stages, (step // self.num_stages) % 2)


class Position:
    """A place in the ring. The DSL carries ``slot`` and ``phase`` through loops."""

    def __init__(self, pipeline: Pipeline, slot: Int32, phase: Int32) -> None:
        self.pipeline, self.slot, self.phase = pipeline, slot, phase

    def __extract_mlir_values__(self) -> list[ir.Value]:
        return [self.slot.ir_value(), self.phase.ir_value()]

    def __new_from_mlir_values__(self, values: list[ir.Value]) -> Self:
        return type(self)(self.pipeline, Int32(values[0]), Int32(values[1]))

    def advance(self) -> None:
        """Moves to the next stage."""
        self.slot, self.phase = _next(self.slot, self.phase, self.pipeline.num_stages)


class Producer(Position):
    """A thread that fills stages."""

    @property
    def full(self) -> cute.Pointer:
        """The barrier that counts the bytes of the stage's copies."""
        return self.pipeline.full + self.slot

    def acquire(self) -> None:
        """Waits until every consumer has released the stage."""
        cute.arch.mbarrier_wait(self.pipeline.empty + self.slot, self.phase)

    def commit(self, num_bytes: Int32 | int) -> None:
        """Announces the bytes that this producer sends to the stage."""
        cute.arch.mbarrier_arrive_and_expect_tx(self.full, num_bytes)


class Consumer(Position):
    """A thread that reads stages."""

    def wait(self) -> None:
        """Waits until the bytes of every producer have landed in the stage."""
        cute.arch.mbarrier_wait(self.pipeline.full + self.slot, self.phase)

    def release(self, slot: Int32, lane: Int32) -> None:
        """Releases stage ``slot``, on every CTA that writes there. Called by every lane of a warp that has read it."""
        _release(self.pipeline.empty + slot, lane, self.pipeline.num_ctas)


@cute.jit
def _release(barrier: cute.Pointer, lane: Int32, num_ctas: int) -> None:
    if cutlass.const_expr(num_ctas > 1):
        if lane % 32 < num_ctas:
            ptx.arrive_remote(barrier, lane % 32)
    else:
        if lane % 32 == 0:
            cute.arch.mbarrier_arrive(barrier)


@dataclass(frozen=True)
class Stages:
    """The shared memory of a ring: the stages' contents and their barriers."""

    tokens: cute.Pointer
    weights: cute.Pointer
    scales: cute.Pointer
    pipeline: Pipeline
