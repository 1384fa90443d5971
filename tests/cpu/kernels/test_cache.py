"""The cache of compiled kernels: whole or absent, keyed by its sources, and a clear error where nothing can compile."""

import json
import sys
from pathlib import Path

import pytest

from ownpath.kernels.dsl import cache
from ownpath.kernels.nvfp4.config import CombineConfig, PermuteConfig


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OWNPATH_KERNEL_CACHE", str(tmp_path))
    return tmp_path


def test_a_kernel_counts_once_all_of_it_is_there() -> None:
    config = PermuteConfig()
    assert not cache.is_cached(config)
    cache.stem(config).with_suffix(".cubin").write_bytes(b"half")
    assert not cache.is_cached(config)
    cache.store(config, b"code", {"entry": "f", "num_threads": 256, "cluster": 1})
    assert cache.is_cached(config)
    assert cache.stem(config).with_suffix(".cubin").read_bytes() == b"code"
    assert json.loads(cache.stem(config).with_suffix(".json").read_text())["entry"] == "f"
    assert not list(cache.cache_dir().glob("*.tmp"))


def test_names_and_sources_keep_kernels_apart() -> None:
    assert cache.stem(CombineConfig(0, True)) != cache.stem(CombineConfig(0, False))
    assert cache.source_key(("dsl/ptx.py",)) != cache.source_key(("dsl/ptx.py", "nvfp4/config.py"))


def test_nothing_missing_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cache.store(PermuteConfig(), b"code", {})
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    assert cache.compile_missing([PermuteConfig()]) == 0


def test_no_compiler_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = tmp_path / "python"
    failing.write_text("#!/bin/sh\ncat > /dev/null\necho \"No module named 'cutlass'\" >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(failing))
    with pytest.raises(cache.CompileError, match=r"(?s)ownpath\[cute\].*moe_permute.*No module named 'cutlass'"):
        cache.compile_missing([PermuteConfig()])
