"""The experts' tuner: its candidates are kernels that exist, and cover the table that the kernels read."""

import json

import pytest

from ownpath.bench.shapes import moe_shape
from ownpath.bench.tuners.moe import SHAPES, TOKENS, MoeFamily, cases, family
from ownpath.kernels.nvfp4.choose import TUNED, choose_moe, moe_case, moe_choice, moe_table


def test_every_candidate_is_a_kernel() -> None:
    tuner = MoeFamily("cpu")
    assert len(tuner.candidates) == len(SHAPES) * len(TOKENS)
    for case, configs in tuner.candidates.items():
        hidden, inter = moe_case(case)[0]
        assert len(configs) >= 6
        for config in configs:
            choice = moe_choice(config, hidden, inter, wide=True)
            assert choice.gate_up.num_stages >= 3
            assert choice.gate_up.num_m64 == config["num_m64"]
            assert choice.gate_up.cluster_m == config.get("cluster_m", 1)


@pytest.mark.parametrize("name", SHAPES)
def test_an_entry_serves_the_tokens_it_was_measured_with(name: str) -> None:
    shape = moe_shape(name)
    limits = [(moe_case(case)[1], num_tokens) for case, num_tokens in cases(shape).items()]
    for num_tokens in TOKENS:
        density = num_tokens * shape.top_k / shape.num_experts
        assert next(measured for limit, measured in limits if density <= limit) == num_tokens


@pytest.mark.parametrize("shape", [(4096, 2048), (7168, 3072), (512, 256)], ids=str)
def test_the_table_is_ascending_and_ends_open(shape: tuple[int, int]) -> None:
    limits = [limit for limit, _ in moe_table(*shape)]
    assert limits == sorted(limits)
    assert limits[-1] >= 1e9
    assert json.loads((TUNED / "moe.json").read_text())["family"] == "moe"


def test_shapes_that_nobody_measured_take_the_first_ones_entries() -> None:
    assert moe_table(512, 256) == moe_table(4096, 2048)
    assert choose_moe(6, 16, 512, 256, False).gate_up.swiglu


def test_it_does_not_tune_on_a_cpu() -> None:
    with pytest.raises(ValueError, match="not on cpu"):
        family("cpu")
