"""The guard against drift on the vLLM that is installed: from its sources, and from what it has imported."""

import sys
from importlib import import_module

import pytest

pytest.importorskip("vllm")

from ownpath.integrations.vllm.versions import (
    TABLES,
    Package,
    VllmRefusal,
    check_version,
    installed_package,
    installed_version,
    minor_of,
)


def test_the_sources_are_what_we_rely_on() -> None:
    package = installed_package()
    assert check_version(installed_version(), Package(package.root, {}), {}) == []


def test_what_is_imported_is_what_we_rely_on() -> None:
    modules = {relied.module for relied in TABLES[minor_of(installed_version())] if ".nvidia." not in relied.module}
    for name in modules - {"vllm.model_executor.kernels.mhc.tilelang"}:
        import_module(name)
    package = installed_package()
    assert package.loaded is sys.modules
    assert check_version(installed_version(), package, {}) == []


def test_a_patch_of_somebody_else_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = import_module("vllm.model_executor.layers.linear")
    monkeypatch.setattr(linear.LinearMethodBase, "apply", lambda self, layer, x, out, bias=None: None)
    with pytest.raises(VllmRefusal, match=r"LinearMethodBase\.apply takes \(self, layer, x, out, bias=\)"):
        check_version(installed_version(), installed_package(), {})
