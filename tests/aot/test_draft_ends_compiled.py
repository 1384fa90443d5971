"""The ends of a step with drafts compile for sm_90 and sm_100: nothing spills, launches overlap. Not run."""

import pytest
from support.draft_rows import draft_rows
from support.triton_aot import Compiled, compile_launch, recorded_launches

from ownpath.kernels.drafts import launch


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[Compiled]:
    with pytest.MonkeyPatch.context() as patch, recorded_launches() as launches:
        patch.setattr(launch, "check_rank", lambda name, tensor, rank, runs_on_cpu: None)  # refuses what is on CPU
        rows = draft_rows(3, 48)
        for is_judged in (False, True):
            launch.ACCEPT_DRAFTS.run(rows, 3, launch.ACCEPT_DRAFTS.prepare(), is_judged=is_judged)
        launch.GO_ON_DRAFTING.run(rows, 3, launch.GO_ON_DRAFTING.prepare())
    folder = tmp_path_factory.mktemp("cubins")
    return [compile_launch(one, sm, folder) for sm in (90, 100) for one in launches]


def test_nothing_spills_and_launches_overlap(compiled: list[Compiled]) -> None:
    assert len(compiled) == 6
    assert {one.launch.name for one in compiled} == {"accept_kernel", "go_on_kernel"}
    assert not [one.launch.constants for one in compiled if one.stack_bytes]
    for one in compiled:
        assert "griddepcontrol.wait" in one.ptx
        assert "griddepcontrol.launch_dependents" in one.ptx
