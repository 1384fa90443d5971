"""The benchmarks' harness on a device: graphs are captured, answers are right, the timer is the GPU's."""

from collections.abc import Iterator

import pytest
import torch
from support.kernel_configs import fp8_configs, linear_configs, moe_configs

from ownpath.bench.linear import FP8_BENCH, NVFP4_BENCH, run_linear
from ownpath.bench.measure import Settings
from ownpath.bench.moe import run_moe
from ownpath.bench.ours import OwnFp8Linear, OwnMoe, OwnNvfp4Linear
from ownpath.bench.peers.cublas import CublasFp8, CublasNvfp4
from ownpath.bench.shapes import LinearShape, MoeShape
from ownpath.kernels.dsl.cache import Config
from ownpath.kernels.fp8.cases import Fp8Case

pytestmark = [pytest.mark.gpu, pytest.mark.bench]

LINEAR = LinearShape("small", 512, 1024)
MOE = MoeShape("small", num_experts=16, hidden=512, inter=256, top_k=4)
COUNTS = (1, 200)


def kernel_configs() -> Iterator[Config]:
    """Those of both products and of the experts."""
    case = Fp8Case("bench", (LINEAR.out_features,), LINEAR.in_features, "e8m0")
    yield from linear_configs((LINEAR.out_features, LINEAR.in_features), COUNTS)
    yield from fp8_configs(case, COUNTS)
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
