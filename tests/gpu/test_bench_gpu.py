"""The benchmarks' harness on a device: graphs are captured, answers are right, the timer is the GPU's."""

from collections.abc import Iterator

import pytest
import torch
from support.kernel_configs import fp8_configs, linear_configs, moe_configs, plan_configs

from ownpath.bench.benches import BENCHES
from ownpath.bench.linear import FP8_BENCH, NVFP4_BENCH, run_linear
from ownpath.bench.measure import Settings
from ownpath.bench.moe import run_moe
from ownpath.bench.ours import OwnFp8Linear, OwnMoe, OwnNvfp4Linear
from ownpath.bench.peers.cublas import CublasFp8, CublasNvfp4
from ownpath.bench.request import BenchRequest, StepOptions
from ownpath.bench.shapes import LinearShape, MoeShape
from ownpath.bench.step import step_config
from ownpath.inspect.memory import KINDS
from ownpath.kernels.attend.choose_sm90 import reachable_configs
from ownpath.kernels.dsl.cache import Config
from ownpath.kernels.fp8.cases import Fp8Case
from ownpath.plan.exports import headers
from ownpath.plan.plan import make_plan
from ownpath.plan.select import Demands

pytestmark = [pytest.mark.gpu, pytest.mark.bench]

LINEAR = LinearShape("small", 512, 1024)
MOE = MoeShape("small", num_experts=16, hidden=512, inter=256, top_k=4)
COUNTS = (1, 200)
STEP = StepOptions(context=300, layers=4, expert_sets=2)


def kernel_configs() -> Iterator[Config]:
    """Those of both products and of the experts."""
    case = Fp8Case("bench", (LINEAR.out_features,), LINEAR.in_features, "e8m0")
    yield from linear_configs((LINEAR.out_features, LINEAR.in_features), COUNTS)
    yield from fp8_configs(case, COUNTS)
    yield from reachable_configs(False)
    (caps,) = (caps for caps in KINDS if caps.name == "sm_90")
    config = step_config("small", STEP)
    index = headers(config, STEP.export)
    yield from plan_configs(make_plan(config, index, caps, Demands("bfloat16")), index)
    yield from moe_configs((MOE.num_experts, MOE.hidden, MOE.inter), [count * MOE.top_k for count in COUNTS])


@pytest.fixture(scope="module")
def settings(cuda: torch.device) -> Settings:
    return Settings.of(str(cuda), budget_s=0.0)


@pytest.mark.parametrize(
    ("bench", "contenders"),
    [(NVFP4_BENCH, (OwnNvfp4Linear(), CublasNvfp4())), (FP8_BENCH, (OwnFp8Linear(), CublasFp8()))],
)
def test_dense_contenders_are_right_in_a_graph(settings, bench, contenders) -> None:
    rows = list(run_linear(bench, settings, LINEAR, list(COUNTS), contenders))
    assert [(row.contender, row.status, row.reason) for row in rows if row.status != "ok"] == []
    assert len(rows) == 4
    assert settings.timer.name == "cuda graph replay"


def test_our_moe_is_right_in_a_graph(settings) -> None:
    rows = list(run_moe(settings, MOE, list(COUNTS), [OwnMoe()]))
    assert [(row.status, row.reason) for row in rows] == [("ok", "")] * 2
    assert all(row.rel_l2 < 3e-3 for row in rows)


@pytest.mark.sm90
@pytest.mark.parametrize(
    ("bench", "shape"),
    [
        ("attend", "embedded CSA"),
        ("scores", "embedded 8k"),
        ("select", "pro 8k"),
        ("entries", "csa"),
        ("sample", "greedy"),
    ],
)
def test_kernels_of_a_decode_step_are_right_in_a_graph(settings: Settings, bench: str, shape: str) -> None:
    rows = list(BENCHES[bench].load()(BenchRequest(settings, (shape,), (1, 9), contenders="ownpath")))
    assert len(rows) >= 2
    assert [(row.case.shape, row.status, row.reason) for row in rows if row.status != "ok"] == []
    assert all(row.timing is not None and row.timing.us > 0 for row in rows)


@pytest.mark.sm90
def test_a_step_of_a_small_model_is_captured_and_measured(settings: Settings) -> None:
    """As many distinct experts as uniform routing gives, kernels counted by the device."""
    (row,) = BENCHES["step"].load()(BenchRequest(settings, ("small",), (5,), step=STEP))
    assert (row.status, row.reason) == ("ok", "")
    assert row.case.distinct_experts == pytest.approx(8, abs=0.5)
    kernels = row.facts["kernels"]
    assert isinstance(kernels, int)
    assert kernels > 4 * 10
