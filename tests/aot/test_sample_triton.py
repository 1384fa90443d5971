"""The sampler compiles for sm_90 as it is launched: nothing spills, nothing is fused that the twin rounds. Not run."""

import re

import pytest
import torch
from support.sampling import mixed_rows, plain_rows
from support.triton_aot import Compiled, compile_launch, recorded_launches

from ownpath.kernels.sample import launch
from ownpath.kernels.sample.types import Sampled

SHAPES = ((1, 129280), (32, 129280), (128, 129280), (4, 2560))


def results(num_rows: int, has_logprob: bool) -> Sampled:
    pair = torch.empty(2, max(num_rows, 2), dtype=torch.int64)[:, :num_rows]
    return Sampled(pair[0], pair[1], torch.empty(num_rows) if has_logprob else None)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[Compiled]:
    """Launches of plain rows, rows with filters, and rows with everything."""
    g = torch.Generator().manual_seed(0)
    with pytest.MonkeyPatch.context() as patch, recorded_launches() as launches:
        patch.setattr(launch, "check_rank", lambda name, tensor, rank, runs_on_cpu: None)  # refuses what is on CPU
        patch.setattr(launch, "num_sms", lambda device: 132)
        for num_rows, num_vocab in SHAPES:
            kernel, logits = launch.TritonSample(), torch.empty(num_rows, num_vocab)
            with_filters = mixed_rows(num_rows, num_vocab, g, with_all=False)
            for rows, has_logprob in ((plain_rows(num_rows), False), (with_filters, False)):
                kernel.run(logits, rows, kernel.prepare(), out=results(num_rows, has_logprob))
        num_rows, num_vocab = SHAPES[1]
        everything = mixed_rows(num_rows, num_vocab, g)
        launch.SAMPLE.run(
            torch.empty(num_rows, num_vocab), everything, launch.SAMPLE.prepare(), out=results(num_rows, True)
        )
    folder = tmp_path_factory.mktemp("cubins")
    return [compile_launch(one, 90, folder) for one in launches]


def test_nothing_spills(compiled: list[Compiled]) -> None:
    assert len(compiled) == 2 * len(SHAPES) + 1
    assert {one.launch.name for one in compiled} == {"sample_kernel"}
    assert not [one.launch.constants for one in compiled if one.stack_bytes]


def test_programs_that_wait_for_each_other_fit_at_once(compiled: list[Compiled]) -> None:
    """One on each multiprocessor at least: 64 Ki registers, 227 KiB of shared memory."""
    for one in compiled:
        threads = 32 * dict(one.launch.options)["num_warps"]
        assert one.registers * threads <= 65536
        assert one.shared_bytes <= 232448


def test_scores_are_rounded_step_by_step(compiled: list[Compiled]) -> None:
    """No fused multiply-add on float64, where scores are; none on float32 but inside logarithms and divisions."""
    for one in compiled:
        assert "fma.rn.f64" not in one.ptx
        assert not re.findall(r"\bDFMA\b", one.sass()) or "div.rn.f64" in one.ptx
        assert "fma.rn.f32" not in one.ptx
        assert ".ftz" not in re.sub(r"(lg2|ex2)\.approx\.ftz", "", one.ptx)


def test_launches_overlap_with_their_neighbours(compiled: list[Compiled]) -> None:
    for one in compiled:
        assert dict(one.launch.options)["launch_pdl"]
        assert "griddepcontrol.wait" in one.ptx
        assert "griddepcontrol.launch_dependents" in one.ptx
