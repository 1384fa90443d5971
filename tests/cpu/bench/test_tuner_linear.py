"""The dense products' tuner: its candidates are kernels that fit the matrices they are tried on."""

from ownpath.bench.tuners.linear import TOKENS, LinearFamily
from ownpath.kernels.nvfp4.choose import linear_choice, linear_config


def test_every_case_has_candidates_that_cover_it() -> None:
    tuner = LinearFamily("cpu")
    assert len(tuner.candidates) == 10 * len(TOKENS)
    for case, configs in tuner.candidates.items():
        tokens, rows, cols = (int(part.split("=")[1]) for part in case.split(","))
        assert len(configs) >= 3, case
        for config in configs:
            gemm = linear_config(config)
            choice = linear_choice(gemm, tokens, rows)
            assert rows % (64 * gemm.m64_per_tile) == 0
            assert (cols // 128) % (gemm.warpgroups_k * gemm.cluster_k) == 0
            assert choice.grid % gemm.cluster == 0
            assert choice.grid > 0
