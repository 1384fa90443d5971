"""The small operations compile for sm_90 as their launchers launch them: nothing spills. Nothing is run."""

from collections.abc import Iterable
from itertools import product

import pytest
import torch
from support.triton_aot import Compiled, Launch, compile_launch, recorded_launches

from ownpath.config import EngineConfig
from ownpath.conformance.operations import CASES, make_inputs
from ownpath.kernels.grouped import launch as grouped
from ownpath.kernels.hyper import checks as hyper
from ownpath.kernels.hyper import launch as hyper_launch
from ownpath.kernels.norms import launch as norms
from ownpath.kernels.registry import KERNELS
from ownpath.kernels.router import launch as router
from ownpath.kernels.router import route
from ownpath.kernels.swiglu import launch as swiglu
from ownpath.startup import warm_up_sizes

SHARED_BYTES = 232448  # what one program may use on sm_90
SHAPES = {
    ("hyper_boundary", "flash"): (1, 64, 300, 1024),
    ("hyper_boundary", "flash two parts"): (1, 33, 1087),
    ("hyper_boundary", "flash first"): (1055,),
    ("hyper_boundary", "flash last"): (1, 1055),
    ("hyper_boundary", "pro"): (1, 1024),
    ("router", "flash"): (1,),
    ("router", "by token"): (1,),
    ("route", "flash"): (1, 8, 33),
    ("route", "flash by token"): (1, 8),
    ("route", "least"): (4,),
    ("route", "pro"): (1, 32),
    ("rms_norm", "hidden"): (1,),
    ("rms_norm", "heads, no weight"): (33,),
    ("swiglu", "flash shared"): (1,),
    ("grouped_linear", "flash"): (1, 32, 64, 128, 300),
}


def launches_of(counts: Iterable[int], shapes: Iterable[tuple[str, str]]) -> list[Launch]:
    """Returns every distinct launch of these shapes at these numbers of tokens."""
    cases = {(case.op, case.label): case for case in CASES if not case.kernel.endswith("_invariant")}
    with pytest.MonkeyPatch.context() as patch, recorded_launches() as launches:
        for module in (grouped, hyper, router, route, norms, swiglu):
            patch.setattr(module, "check_rank", lambda name, tensor, rank, runs_on_cpu: None)  # refuses what is on CPU
        patch.setattr(hyper_launch, "num_sms", lambda device: 132)
        for key, num_tokens in product(shapes, counts):
            inputs = make_inputs(cases[key], num_tokens, torch.device("cpu"))
            KERNELS[f"triton.{key[0]}"](*inputs)
    return launches


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[Compiled]:
    """Every distinct launch of these shapes, compiled for sm_90."""
    launches = [one for key, counts in SHAPES.items() for one in launches_of(counts, (key,))]
    folder = tmp_path_factory.mktemp("cubins")
    return [compile_launch(launch, 90, folder) for launch in launches]


SMALL_SHAPES = (("hyper_boundary", "tiny"), ("rms_norm", "odd"), ("grouped_linear", "tiny"))


@pytest.mark.parametrize("largest", [100, 316, 2064])
@pytest.mark.parametrize("shape", SMALL_SHAPES)
def test_a_start_compiles_what_prompts_of_any_length_launch(shape: tuple[str, str], largest: int) -> None:
    """At the sizes that a start tries, and at no other: a length that 16 divides has no code of its own."""
    sizes = warm_up_sizes(EngineConfig(max_prefill_tokens=largest - 16, max_num_seqs=16, max_model_len=4096))
    tried = launches_of(sizes, [shape])
    lengths = (*range(2, 20), 24, 31, 33, 48, 63, 65, 100, 127, 129, 255, 256, 257, 304, 511, 513, 1000, 1024, 2000)
    asked = launches_of([length for length in lengths if length <= largest], [shape])
    assert not [(one.name, one.signature, one.divisible) for one in asked if one not in tried]


def test_every_kernel_is_there(compiled: list[Compiled]) -> None:
    assert {one.launch.name for one in compiled} == {
        "spread_few",
        "spread_many",
        "spread_columns",
        "collapse",
        "router_kernel",
        "route_few",
        "route_some",
        "rms_norm_kernel",
        "swiglu_kernel",
        "rope_grouped_kernel",
    }


def test_nothing_spills(compiled: list[Compiled]) -> None:
    found = {(one.launch.name, one.launch.constants): one.stack_bytes for one in compiled}
    assert not {key: stack for key, stack in found.items() if stack}


def test_shared_memory_fits(compiled: list[Compiled]) -> None:
    assert all(one.shared_bytes <= SHARED_BYTES for one in compiled)


def test_launches_overlap_with_their_neighbours(compiled: list[Compiled]) -> None:
    """Each waits for the grid before it, and lets the one after it start."""
    for one in compiled:
        assert dict(one.launch.options)["launch_pdl"]
        assert "griddepcontrol.wait" in one.ptx
        assert "griddepcontrol.launch_dependents" in one.ptx


def test_products_use_the_tensor_cores(compiled: list[Compiled]) -> None:
    for one in compiled:
        if one.launch.name == "rope_grouped_kernel":
            assert "wgmma.mma_async" in one.ptx
            assert "cp.async.bulk.tensor" in one.ptx
        if one.launch.name in ("spread_many", "spread_columns", "route_some"):
            assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" in one.ptx


def test_the_gates_weights_are_read_before_the_input_is_there(compiled: list[Compiled]) -> None:
    """In loads of 16 bytes, as many as a program's tile of bfloat16 weights takes, in front of the wait."""
    for one in compiled:
        if one.launch.name in ("route_few", "route_some") and dict(one.launch.constants)["WIDTH"] >= 1024:
            sizes, threads = dict(one.launch.constants), 32 * int(dict(one.launch.options)["num_warps"])
            before, _ = one.ptx.split("griddepcontrol.wait")
            assert before.count(".v4.b32") >= 2 * sizes["EXPERTS"] * sizes["WIDTH"] / (16 * threads)
