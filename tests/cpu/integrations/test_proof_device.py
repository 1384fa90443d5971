"""The device's record of a step against the plan, with names as the compilers and vLLM's sources give them."""

from collections.abc import Mapping
from typing import Any

import pytest

from ownpath.finding import Verdict
from ownpath.integrations.vllm.proof.device import PlannedStep
from ownpath.integrations.vllm.proof.findings import judge_device
from ownpath.integrations.vllm.proof.seen import EngineRun, StepRun
from ownpath.integrations.vllm.proof.steps import Planned

NUM_LAYERS = 2
DENSE = ("attn.wqa_wkv", "attn.wq_b", "attn.wo_b", "ffn.shared_experts.w13", "ffn.shared_experts.w2")
CUTE = "kernel_cutlass_kernel_ownpathkernels{}_object_at__CopyAtom_ThrID10_TVLayoutSrc151201"
W8A16, W8A8, QUANTIZE = (CUTE.format(f"fp8{name}") for name in ("w8a16_sm90W8A16", "w8a8_sm90W8A8", "quantize_sm90Q"))
WO_A = CUTE.format("groupedfp8_sm90GroupedW8A16")
GEMM, COMBINE, ALIGN = (CUTE.format(f"nvfp4{name}") for name in ("gemm_sm90Gemm", "moe_sm90Combine", "moe_sm90Align"))
SLICED, SLICED_SUM = (CUTE.format(f"nvfp4moe_sliced_{name}") for name in ("sm90SlicedExperts", "sum_sm90SlicedSum"))
MARLIN = (
    "void marlin_moe_wna16::Marlin<1125899906909960l, 1125899906910466l, 256, 1, 8, 8, true, 4, 1, false>(int4 const*)"
)
DEEP_GEMM = (
    "void deep_gemm::sm90_fp8_gemm_1d2d_impl<(cute::UMMA::Major)0, 0u, 4096u, 8192u, 1u, 128u, 64u, 128u>(float*)"
)
MHC = "mhc_fused_tilelang_kernel"
OTHERS = {"nvjet_sm90_tst_64x8_64x16_2x1_v_bz_TNT": 3, "void sm90::decode::sparse_fp8::flash_fwd_splitkv_mla<64>()": 2}


def rank(
    parts: tuple[str, ...] = (*DENSE, "attn.wo_a", "ffn.experts"), hyper: str | None = "triton.hyper_boundary"
) -> Any:
    """A worker's walk: what runs in each slot of two layers."""
    kernels = {"attn.wo_a": "cute.grouped_linear_fp8_sm90", "ffn.experts": "cute.nvfp4_moe"}
    modules: dict[str, Any] = {f"model.layers.{layer}.ffn.gate": {"method": "X"} for layer in range(NUM_LAYERS)}
    for layer in range(NUM_LAYERS):
        for part in parts:
            kernel = kernels.get(part, "cute.fp8_linear_sm90")
            modules[f"model.layers.{layer}.{part}"] = {
                "slot": f"layers.{layer}.{part}", "kernel": kernel, "planned": ["Runner", kernel], "method": "Ours"
            }  # fmt: skip
    return {"rank": 0, "modules": modules, "absent": [], "hyper": hyper}


def few() -> dict[str, int]:
    """A decode step of few rows."""
    return OTHERS | {W8A16: 10, WO_A: 2, SLICED: 2, SLICED_SUM: 2, "spread_few": 4, "collapse": 4}


def many() -> dict[str, int]:
    """A step of many rows: products in two launches, experts in five."""
    own = {W8A8: 10, QUANTIZE: 10, WO_A: 2, ALIGN: 2, GEMM: 4, COMBINE: 2, "spread_many": 4, "collapse": 4}
    return OTHERS | own


def test_calls_are_one_a_slot_and_two_boundaries_a_layer() -> None:
    assert PlannedStep.of(rank()).kernels == {
        "cute.fp8_linear_sm90": NUM_LAYERS * len(DENSE),
        "cute.grouped_linear_fp8_sm90": NUM_LAYERS,
        "cute.nvfp4_moe": NUM_LAYERS,
        "triton.hyper_boundary": 2 * NUM_LAYERS,
    }


@pytest.mark.parametrize("launched", [few(), many()])
def test_the_planned_kernels_are_no_fault(launched: Mapping[str, int]) -> None:
    assert not list(PlannedStep.of(rank()).faults(launched))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({W8A16: 9}, "cute.fp8_linear_sm90 has 10 calls a step, and the device ran 9 kernels named w8a(16|8)_sm90"),
        ({SLICED: 0}, "cute.nvfp4_moe has 2 calls a step, and the device ran 0 kernels named gemm_sm90|sliced_sm90"),
        ({"collapse": 3}, "triton.hyper_boundary has 4 calls a step, and the device ran 3 kernels named collapse"),
        ({MARLIN: 1}, f"the device ran {MARLIN[:80]}, of a part that is ours"),
        ({DEEP_GEMM: 1}, f"the device ran {DEEP_GEMM[:80]}, of a part that is ours"),
        ({MHC: 1}, f"the device ran {MHC}, of a part that is ours"),
        ({"rope_grouped_kernel": 1}, "the device ran rope_grouped_kernel, a kernel of ours that is not planned"),
    ],
)
def test_each_difference_is_named(changed: Mapping[str, int], told: str) -> None:
    assert list(PlannedStep.of(rank()).faults(few() | dict(changed))) == [told]


def test_what_is_left_to_vllm_may_run_there() -> None:
    """Experts alone are ours: DeepGEMM's products and TileLang's hyper-connections are as they should be."""
    planned = PlannedStep.of(rank(("ffn.experts",), hyper=None))
    launched = OTHERS | {SLICED: 2, SLICED_SUM: 2, DEEP_GEMM: 12, MHC: 4}
    assert not list(planned.faults(launched))
    assert list(planned.faults(launched | {"collapse": 4})) == [
        "the device ran collapse, a kernel of ours that is not planned"
    ]


def run_of(*steps: tuple[Mapping[str, int] | None, bool]) -> EngineRun:
    """steps: what the device ran, and whether Python ran."""
    planned = [Planned("decode", count + 1, {}, True) for count in range(len(steps))]
    seen = [
        StepRun(plan, "graphs", {}, {}, (), from_python, 0, kernels)
        for plan, (kernels, from_python) in zip(planned, steps, strict=True)
    ]
    return EngineRun((tuple(seen),), (), (rank(),), {}, None, "")


def test_a_run_says_which_steps_graphs_replayed() -> None:
    (finding,) = judge_device(run_of((few(), False), (many(), True)))
    assert finding.verdict is Verdict.PASS
    assert "2 steps recorded, of which graphs replayed decode of 1 row (graphs)" in finding.message


def test_without_a_replay_nothing_is_claimed_of_one() -> None:
    (finding,) = judge_device(run_of((few(), True)))
    assert finding.verdict is Verdict.SKIPPED


def test_a_wrong_step_is_named_with_its_rows() -> None:
    failed, *rest = judge_device(run_of((few(), False), (few() | {MARLIN: 2}, False)))
    assert failed.verdict is Verdict.FAIL
    assert failed.message == f"the device ran {MARLIN[:80]}, of a part that is ours: decode of 2 rows (graphs)"
    assert not rest


def test_no_record_is_no_finding_and_an_empty_one_is_skipped() -> None:
    assert not list(judge_device(run_of((None, True))))
    (finding,) = judge_device(run_of(({}, False)))
    assert finding.verdict is Verdict.SKIPPED
