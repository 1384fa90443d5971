"""The experts' tuner: its candidates are kernels that exist, and cover the table that the kernels read."""

import json

import pytest

from ownpath.bench.tuners.moe import TOKENS, MoeFamily, family
from ownpath.kernels.cute.choose import TUNED, moe_choice, moe_table


def test_every_candidate_is_a_kernel() -> None:
    tuner = MoeFamily("cpu")
    assert list(tuner.candidates) == [f"pairs_per_expert<={limit}" for limit in TOKENS]
    for configs in tuner.candidates.values():
        for config in configs:
            choice = moe_choice(config, 4096, 2048, wide=True)
            assert choice.gate_up.num_stages >= 3
            assert choice.gate_up.num_m64 == config["num_m64"]
            assert choice.gate_up.cluster_m == config.get("cluster_m", 1)


def test_the_table_is_ascending_and_ends_open() -> None:
    limits = [limit for limit, _ in moe_table()]
    assert limits == sorted(limits)
    assert limits[-1] >= 1e9
    assert json.loads((TUNED / "moe.json").read_text())["family"] == "moe"


def test_it_does_not_tune_on_a_cpu() -> None:
    with pytest.raises(ValueError, match="not on cpu"):
        family("cpu")
