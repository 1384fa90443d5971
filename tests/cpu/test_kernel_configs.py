"""The device tests name ahead every compiled kernel that their tables launch, and say so when they cannot."""

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from support.kernel_configs import HOPPER, CompiledAhead, declared, packed

from ownpath.bench.tuners.fp8 import Fp8Family
from ownpath.kernels.contract import Routing
from ownpath.kernels.dsl import cache
from ownpath.kernels.fp8.cases import CASES, NUM_ROWS
from ownpath.kernels.fp8.choose import knobs_config
from ownpath.kernels.fp8.linear import Fp8Operand, fp8_linear, fp8_linear_invariant
from ownpath.kernels.nvfp4.cases import NUM_TOKENS
from ownpath.kernels.nvfp4.config import CombineConfig, PermuteConfig
from ownpath.kernels.nvfp4.launch import PackedWeight
from ownpath.kernels.nvfp4.linear import LinearOperand
from ownpath.kernels.nvfp4.moe import MoeOperand
from ownpath.kernels.registry import KERNELS

FOLDER = Path(__file__).parents[1] / "gpu"
NONE = {
    "test_attend",
    "test_attend_chunk",
    "test_chunk_entries",
    "test_chunk_rings",
    "test_draft_ends",
    "test_entries",
    "test_exchange_gpus",
    "test_exchange_one_gpu",
    "test_indexer",
    "test_loading",
    "test_plain_few",
    "test_plain_linear",
    "test_ranks_gpu",
    "test_sample_gpu",
    "test_small_ops",
    "test_w4a4_sm100",
}
"""Tests that launch none: they load, multiply in torch, or run what Triton compiles."""
META = torch.device("meta")


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, ModuleType]]:
    """The device tests by name, without running them."""
    found, path = {}, list(sys.path)
    for file in sorted(FOLDER.glob("test_*.py")):
        spec = importlib.util.spec_from_file_location(f"gpu_{file.stem}", file)
        assert spec
        assert spec.loader
        found[file.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found[file.stem])
    yield found
    sys.path[:] = path


@pytest.fixture(scope="module")
def names(modules: dict[str, ModuleType]) -> dict[str, set[str]]:
    """Returns the kernels that each of them names, on a device with an H200's number of streaming multiprocessors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ownpath.kernels.fp8.linear.num_sms", lambda _: 132)
        return {name: set(declared([module])) for name, module in modules.items()}


def test_each_file_names_its_kernels(names: dict[str, set[str]]) -> None:
    assert {name for name, found in names.items() if not found} == NONE


def weight(num_rows: int, num_cols: int) -> PackedWeight:
    nothing = torch.empty(0, device=META)
    return PackedWeight(nothing, nothing, nothing, num_rows, num_cols)


def test_every_product_of_the_linears_table_is_named(
    modules: dict[str, ModuleType], names: dict[str, set[str]]
) -> None:
    tests = modules["test_nvfp4_linear"]
    for shape in (case.sizes for case in tests.LINEARS):
        operand = LinearOperand(weight(*shape), torch.empty(4, device=META))
        for name in tests.KERNEL_NAMES:
            for num_tokens in NUM_TOKENS:
                x = torch.empty(num_tokens, shape[1], device=META)
                assert KERNELS[name].variant(x, operand) in names["test_nvfp4_linear"], (name, shape, num_tokens)


def test_every_product_of_the_experts_table_is_named(
    modules: dict[str, ModuleType], names: dict[str, set[str]]
) -> None:
    tests = modules["test_nvfp4_moe"]
    calls = [
        (*case.sizes, NUM_TOKENS, name)
        for case in tests.EXPERTS
        for name in ("cute.nvfp4_moe", "cute.nvfp4_moe_invariant")
    ]
    calls += [(num_experts, 6, *dims, tests.FULL_COUNTS, "cute.nvfp4_moe") for num_experts, *dims in tests.FULL]
    for num_experts, top_k, hidden, inter, counts, name in calls:
        operand = MoeOperand(weight(2 * inter, hidden), weight(hidden, inter), num_experts, tests.LIMIT)
        for num_tokens in counts:
            x, ids = torch.empty(num_tokens, hidden, device=META), torch.empty(num_tokens, top_k, device=META)
            launched = KERNELS[name].variant(x, Routing(ids, ids), operand)
            assert names["test_nvfp4_moe"] >= set(launched.split()), (name, hidden, inter, num_tokens)


def test_every_product_of_the_fp8_table_is_named(
    modules: dict[str, ModuleType], names: dict[str, set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ownpath.kernels.fp8.linear.num_sms", lambda _: 132)
    for case in CASES:
        operand = Fp8Operand(packed(case), case.shard_rows)
        for kernel in (fp8_linear, fp8_linear_invariant):
            # The workspace of the tests holds no more rows of those that are quantised.
            most = modules["test_fp8_linear"].WORKSPACE_ROWS if kernel is fp8_linear else max(NUM_ROWS)
            for num_rows in (count for count in NUM_ROWS if count <= most):
                launched = kernel.variant(torch.empty(num_rows, case.width, device=META), operand)
                assert names["test_fp8_linear"] >= set(launched.split()), (case.name, num_rows)


def test_every_candidate_of_the_fp8_tuner_is_named(names: dict[str, set[str]]) -> None:
    for case, candidates in Fp8Family("cpu").candidates.items():
        num_k_blocks = int(case.rsplit("=", 1)[1]) // 128
        for knobs in candidates:
            assert knobs_config(knobs, num_k_blocks).name in names["test_fp8_linear"], case


def test_a_module_that_cannot_tell_is_named() -> None:
    module = ModuleType("test_broken")
    module.kernel_configs = lambda: [CombineConfig(0, "wide", "more")]
    with pytest.raises(pytest.UsageError, match=r"test_broken\.kernel_configs: TypeError: .*CombineConfig"):
        declared([module])


@dataclass
class Run:
    """As much of a run of pytest as the plugin uses."""

    lines: list[str]
    option: SimpleNamespace
    items: list[SimpleNamespace]

    def get_terminal_writer(self) -> SimpleNamespace:
        return SimpleNamespace(line=lambda text, flush: self.lines.append(text))


def test_what_was_not_named_is_listed_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OWNPATH_KERNEL_CACHE", str(tmp_path))
    cache.store(PermuteConfig(), b"code", {"entry": "name", "num_threads": 128, "cluster": 1})
    module = ModuleType("test_named")
    module.kernel_configs = lambda: [PermuteConfig()]
    run = Run([], SimpleNamespace(collectonly=False, compile_only=False), [SimpleNamespace(module=module)])
    ahead = CompiledAhead(run, HOPPER)
    ahead.pytest_collection_finish(run)
    ahead.pytest_terminal_summary()
    assert run.lines == ["kernels: 1 ready, 0 compiled now in 0 s"]
    cache.store(CombineConfig(0, True), b"code", {})
    ahead.pytest_terminal_summary()
    assert run.lines[1].startswith("compiled inside tests, one by one: moe_combine_s0_wide-")
    run.option.compile_only = True
    with pytest.raises(pytest.exit.Exception):
        ahead.pytest_collection_finish(run)
