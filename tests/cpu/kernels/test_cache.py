"""The cache of compiled kernels: whole or absent, keyed by its sources, and a clear error where nothing can compile."""

import ast
import json
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from ownpath.kernels.dsl import cache, compiler
from ownpath.kernels.fp8.config import QuantizeConfig, W8A8Config, W8A16Config
from ownpath.kernels.nvfp4.config import AlignConfig, CombineConfig, GemmConfig, PermuteConfig

FACTS = {"entry": "f", "num_threads": 256, "cluster": 1}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OWNPATH_KERNEL_CACHE", str(tmp_path))
    return tmp_path


def test_a_kernel_counts_once_all_of_it_is_there() -> None:
    config = PermuteConfig()
    assert not cache.is_cached(config)
    cache.stem(config).with_suffix(".cubin").write_bytes(b"half")
    assert not cache.is_cached(config)
    cache.store(config, b"code", FACTS)
    assert cache.is_cached(config)
    assert cache.stem(config).with_suffix(".cubin").read_bytes() == b"code"
    assert json.loads(cache.stem(config).with_suffix(".json").read_text())["entry"] == "f"
    assert not list(cache.cache_dir().glob("*.tmp"))


def test_names_and_sources_keep_kernels_apart() -> None:
    assert cache.stem(CombineConfig(0, True)) != cache.stem(CombineConfig(0, False))
    assert cache.source_key(("dsl/ptx.py",)) != cache.source_key(("dsl/ptx.py", "nvfp4/config.py"))


def imported_modules(name: str) -> set[str]:
    """Modules of ``kernels`` that one of them imports, and those that these import, as paths in ``kernels``."""
    found: set[str] = set()
    kernels = cache.SOURCES
    waiting = [kernels / name]
    while waiting:
        for node in ast.walk(ast.parse(waiting.pop().read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ownpath.kernels."):
                folder = kernels.joinpath(*str(node.module).split(".")[2:])
                files = [folder / f"{alias.name}.py" for alias in node.names] + [folder.with_suffix(".py")]
                for file in files:
                    name = file.relative_to(kernels).as_posix()
                    if file.exists() and name not in found:
                        found.add(name)
                        waiting.append(file)
    return found


@pytest.mark.parametrize(
    "config",
    [
        GemmConfig(1, 1, 1, (8,), 2),
        AlignConfig(False, False, 0),
        PermuteConfig(),
        CombineConfig(0, True),
        W8A16Config(2, 8, 2, 1, True),
        W8A8Config(2, 1, 2),
        QuantizeConfig(True),
    ],
    ids=lambda config: config.name,
)
def test_a_kernel_is_keyed_by_every_module_that_it_is_compiled_from(config: cache.Config) -> None:
    """Otherwise a change of one of them would leave yesterday's machine code in use."""
    assert imported_modules(config.sources[0]) <= set(config.sources)


def test_nothing_missing_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cache.store(PermuteConfig(), b"code", FACTS)
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    assert cache.compile_missing([PermuteConfig()]) == 0


def test_no_compiler_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = tmp_path / "python"
    failing.write_text("#!/bin/sh\ncat > /dev/null\necho \"No module named 'cutlass'\" >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(failing))
    with pytest.raises(cache.CompileError, match=r"(?s)ownpath\[cute\].*moe_permute.*No module named 'cutlass'"):
        cache.compile_missing([PermuteConfig()])


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler of ``moe_combine`` alone, quick because it imports nothing; it cannot do that of 3 shared experts."""
    script, python = folder / "stand_in.py", folder / "python"
    key = cache.source_key(CombineConfig(0, False).sources)
    script.write_text(
        dedent(f"""
            import hashlib, json, sys

            for line in sys.stdin:
                kind, fields = json.loads(line)
                assert kind == "nvfp4.config:CombineConfig"
                assert fields["num_shared"] != 3, "too many registers"
                name = f"moe_combine_s{{fields['num_shared']}}" + "_wide" * fields["wide"]
                print("a remark of the compiler's")
                code = {{"kernel": f"{{name}}-{key}", "num_bytes": 0, "sha256": hashlib.sha256().hexdigest()}}
                facts = {FACTS} | code
                for suffix, text in (("cubin", ""), ("json", json.dumps(facts))):
                    with open(f"{folder}/{{name}}-{key}.{{suffix}}", "w") as file:
                        file.write(text)
                print(name, flush=True)
        """)
    )
    python.write_text(f"#!/bin/sh\nexec {sys.executable} -S {script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))


def test_processes_share_what_is_to_be_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes the next kernel when it has done one; progress counts all of them."""
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    stand_in(tmp_path, monkeypatch)
    configs = [CombineConfig(num_shared, wide) for num_shared in (0, 1, 2) for wide in (False, True)]
    shown: list[tuple[int, int, str]] = []
    assert cache.compile_missing(configs, lambda *told: shown.append(told)) == 6
    assert all(cache.is_cached(config) for config in configs)
    assert [(done, total) for done, total, _ in shown] == [(idx, 6) for idx in range(1, 7)]
    assert {name for _, _, name in shown} == {config.name for config in configs}


def test_what_does_not_compile_is_named_and_the_rest_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    stand_in(tmp_path, monkeypatch)
    configs = [CombineConfig(num_shared, False) for num_shared in (3, 0, 1, 2)]
    with pytest.raises(cache.CompileError, match=r"(?s)moe_combine_s3.*too many registers"):
        cache.compile_missing(configs)
    assert [cache.is_cached(config) for config in configs] == [False, True, True, True]


@pytest.mark.parametrize("version", [*compiler.COMPARED, "4.9.0", None])
def test_each_compared_compiler_has_kernels_of_its_own(version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a note never claims another's code. Without a compiler to use, the newest one's kernels are looked for."""
    newest = cache.stem(PermuteConfig())
    monkeypatch.setattr(compiler, "installed_version", lambda: version)
    assert (cache.stem(PermuteConfig()) == newest) == (version in (compiler.COMPARED[-1], "4.9.0", None))
    assert (compiler.why_not() is None) == (version in compiler.COMPARED)


@pytest.mark.parametrize(("version", "said"), [(None, "is not installed"), ("4.9.0", r"4\.9\.0 is installed.*4\.8\.1")])
def test_what_can_neither_be_loaded_nor_compiled_is_named(
    version: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any process is started; a kernel that is in the cache is not missed."""
    cache.store(CombineConfig(0, True), b"code", FACTS)
    monkeypatch.setattr(compiler, "installed_version", lambda: version)
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    assert cache.compile_missing([CombineConfig(0, True)]) == 0
    configs = [CombineConfig(count, wide) for count in (0, 1, 2) for wide in (False, True)]
    with pytest.raises(cache.CompileError, match=rf"moe_combine_s0, .* and 2 others.*{said}.*ownpath\[vllm\]") as told:
        cache.compile_missing(configs)
    assert "moe_combine_s0_wide" not in str(told.value)
