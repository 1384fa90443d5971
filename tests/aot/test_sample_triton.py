"""The sampler compiles for sm_90 as it is launched: nothing spills, nothing is fused that the twin rounds. Not run."""

import re

import pytest
import torch
from support.sampling import mixed_rows, next_step, plain_rows
from support.triton_aot import Compiled, compile_launch, recorded_launches

from ownpath.kernels.sample import launch
from ownpath.kernels.sample.types import Sampled

NUM_ROWS, NUM_VOCAB = 32, 129280


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[Compiled]:
    """Launches of plain rows, a decode step's, and rows with everything, in places too; one row compiles to the same
    code."""
    g = torch.Generator().manual_seed(0)
    everything = mixed_rows(NUM_ROWS, NUM_VOCAB, g)
    placed = everything._replace(place_T=torch.arange(NUM_ROWS, dtype=torch.int32))
    with pytest.MonkeyPatch.context() as patch, recorded_launches() as launches:
        patch.setattr(launch, "check_rank", lambda name, tensor, rank, runs_on_cpu: None)  # refuses what is on CPU
        patch.setattr(launch, "num_sms", lambda device: 132)
        logits, (token, fault) = torch.empty(NUM_ROWS, NUM_VOCAB), torch.empty(2, NUM_ROWS, dtype=torch.int64)
        out, plain = Sampled(token, fault, torch.empty(NUM_ROWS)), plain_rows(NUM_ROWS)
        launch.SAMPLE.run(logits, plain, launch.SAMPLE.prepare(), out=out._replace(logprob_T=None))
        launch.SAMPLE.run(logits, everything, launch.SAMPLE.prepare(), out=out)
        out, following = next_step(NUM_ROWS, 43 + 3)
        for rows in (plain._replace(filters=everything.filters), placed):
            launch.SAMPLE.run(logits, rows, launch.SAMPLE.prepare(), out=out, following=following)
    folder = tmp_path_factory.mktemp("cubins")
    return [compile_launch(one, 90, folder) for one in launches]


def test_nothing_spills(compiled: list[Compiled]) -> None:
    assert len(compiled) == 4
    assert {one.launch.name for one in compiled} == {"sample_kernel"}
    assert not [one.launch.constants for one in compiled if one.stack_bytes]


def test_programs_that_wait_for_each_other_fit_at_once(compiled: list[Compiled]) -> None:
    """As many on each multiprocessor as are launched: of 64 Ki registers and 227 KiB of shared memory."""
    for one in compiled:
        threads = 32 * dict(one.launch.options)["num_warps"]
        assert one.registers * threads * launch.PROGRAMS_PER_SM <= 65536
        assert one.shared_bytes * launch.PROGRAMS_PER_SM <= 232448


def test_scores_are_rounded_step_by_step(compiled: list[Compiled]) -> None:
    """The compiler fuses no product with a sum, and flushes nothing to zero where the twin does not."""
    for one in compiled:
        assert dict(one.launch.options)["enable_fp_fusion"] is False
        assert "fma.rn.f64" not in one.ptx
        assert "fma.rn.f32" not in one.ptx
        assert not re.search(r"\b(mul|add|sub)\.(f32|f64|ftz|rn\.ftz)", one.ptx)


def test_launches_overlap_with_their_neighbours(compiled: list[Compiled]) -> None:
    for one in compiled:
        assert dict(one.launch.options)["launch_pdl"]
        assert "griddepcontrol.wait" in one.ptx
        assert "griddepcontrol.launch_dependents" in one.ptx
