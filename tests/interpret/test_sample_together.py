"""Programs of the sampler that wait for each other: each interpreted in a process of its own, over shared memory."""

import multiprocessing
from typing import Any, TypeVar

import pytest
import torch
import triton.runtime.interpreter as interpreter
from support.sampling import mixed_rows, next_step

from ownpath.kernels.sample import launch
from ownpath.kernels.sample.ref import SAMPLE as SAMPLE_TWIN
from ownpath.kernels.sample.types import Sampled

NUM_PROGRAMS, TIMEOUT_S = 2, 120
Shared = TypeVar("Shared")


def shared(value: Shared) -> Shared:
    """A tensor, or what holds tensors, in memory that other processes share."""
    if isinstance(value, torch.Tensor):
        return value.clone().share_memory_()
    return value if value is None else type(value)(*(shared(part) for part in value))  # type: ignore[attr-defined]


def run_program(split: int, arguments: tuple[Any, ...], num_calls: int, barrier: Any) -> None:
    """Interprets program ``split`` of every row, row by row, ``num_calls`` times."""
    logits, rows, out, scratch, following = arguments

    def set_grid_idx(x: int, y: int, z: int) -> None:
        interpreter.interpreter_builder.grid_idx = (split, y, z)

    def launch_one(function: Any, grid: tuple[int, int], given: Any, options: Any, moving: Any) -> None:
        function[(1, grid[1])](*given, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.interpreter_builder, "set_grid_idx", set_grid_idx)
        patch.setattr(launch, "launch", launch_one)
        for _ in range(num_calls):
            tensors = (*launch._tensors(logits, rows, out, following), *scratch)
            shape = launch.SampleShape(NUM_PROGRAMS, 256, 4)
            launch._first_launch(tensors, rows, out, shape, logits.stride(0), following)
            barrier.wait()


def test_programs_of_a_row_agree() -> None:
    """Rows that need several rounds, and a fault; the second call finds the counters as the first did, and rows that
    have gone on by one token."""
    g = torch.Generator().manual_seed(0)
    num_rows, num_vocab = 3, 1500
    logits = (torch.randn(num_rows, num_vocab, generator=g) * 8).round() / 8
    logits[1, 1499] = torch.inf
    rows = mixed_rows(num_rows, num_vocab, g)
    assert rows.filters is not None
    filters = type(rows.filters)(
        torch.tensor([20, 3, 0], dtype=torch.int32),
        torch.tensor([1.0, 0.5, 0.05]),
        torch.tensor([0.0, 0.0, 0.0]),
    )
    rows = rows._replace(temperature_T=torch.tensor([1.7, 1.0, 1.0]), filters=filters)
    wanted, twins = next_step(num_rows, 5)
    following = shared(twins)
    token, fault, logprob = following.results_NW[:3, :num_rows]
    out = Sampled(token, fault, logprob.view(torch.float32))
    scratch = shared(launch.SampleOperand().scratch_for(num_rows, torch.device("cpu")))
    arguments = shared(logits), shared(rows), out, scratch, following
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(NUM_PROGRAMS)
    programs = [
        context.Process(target=run_program, args=(split, arguments, 2, barrier)) for split in range(NUM_PROGRAMS)
    ]
    for program in programs:
        program.start()
    for program in programs:
        program.join(TIMEOUT_S)
    ended = [program.exitcode for program in programs]
    for program in programs:
        program.kill()
    assert ended == [0] * NUM_PROGRAMS
    for _ in range(2):
        SAMPLE_TWIN.run(logits, rows, None, out=wanted, following=twins)
    assert torch.equal(out.token_T, wanted.token_T)
    assert torch.equal(out.fault_T, wanted.fault_T)
    assert wanted.fault_T.tolist() == [0, 1, 0]
    assert all(torch.equal(own, other) for own, other in zip(following[:4], twins[:4], strict=True))
    assert torch.equal(following.shared_2NW[:, :2], twins.shared_2NW[:, :2])
    assert not scratch.counters.any()
