"""The writes of a step with chunks compile for sm_90 as their launcher launches them. Nothing is run."""

import pytest
import torch
from support.triton_aot import Compiled, compile_launch, recorded_launches

from ownpath.conformance.chunk_entries import draw_chunks, with_key_pages
from ownpath.kernels.chunk_entries import checks
from ownpath.kernels.chunk_entries.cases import CASES
from ownpath.kernels.chunk_entries.launch import CHUNK_ENTRIES
from ownpath.kernels.chunk_entries.rings import CHUNK_RINGS

CPU = torch.device("cpu")
WIDE = [case for case in CASES if case.layer.sizes[0] == 512 and (case.tiny or "mixed" in case.label)]
KINDS, FORMS = 3, 2


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[Compiled]:
    """Every distinct launch: of each kind of layer, in values and pages, of few rows and of many."""
    with pytest.MonkeyPatch.context() as patch, recorded_launches() as launches:
        patch.setattr(checks, "check_rank", lambda name, tensor, rank, runs_on_cpu: None)  # refuses what is on CPU
        for case in WIDE:
            step = draw_chunks(case, CPU)
            for given in (step, with_key_pages(step)):
                CHUNK_ENTRIES(*given.arguments)
                CHUNK_RINGS(given.of_decode.raw, given.places, given.of_decode.pools, given.of_decode.weights)
    folder = tmp_path_factory.mktemp("cubins")
    return [compile_launch(launch, 90, folder) for launch in launches]


def test_one_compilation_serves_every_step(compiled: list[Compiled]) -> None:
    """Of a kind of layer and a form of its caches, whatever rows there are: entries, and rings."""
    assert len(compiled) == 2 * KINDS * FORMS


def test_nothing_is_spilt(compiled: list[Compiled]) -> None:
    assert not [one.launch for one in compiled if one.stack_bytes]
