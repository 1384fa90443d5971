"""The guard against drift in vLLM, on packages written from signatures that were recorded from the real wheels."""

import ast
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from packaging.requirements import Requirement

from ownpath.integrations.vllm import versions
from ownpath.integrations.vllm.versions import (
    ANY_VERSION,
    SM100,
    TABLES,
    Package,
    VllmRefusal,
    check_device,
    check_version,
    minor_of,
    signature_text,
)
from ownpath.kernels.dsl.compiler import COMPARED, PACKAGE

RECORDED: Mapping[str, Mapping[str, Mapping[str, str | None]]] = json.loads(
    Path(__file__).with_name("vllm_signatures.json").read_text()
)
"""Minor version -> module -> name -> signature, ``null`` for a class or an imported name; from the wheels' sources."""


def write_package(root: Path, modules: Mapping[str, Mapping[str, str | None]]) -> Package:
    """Writes a package of these names: a class for each owner, a function for each signature."""
    for module, names in modules.items():
        file = root.joinpath(*module.split(".")).with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        lines, classes = list[str](), dict[str, list[str]]()
        for name, signature in names.items():
            owner, _, method = name.rpartition(".")
            if signature is None and not owner:
                lines.append(f"from elsewhere import {name}")
            else:
                indent = "    " if owner else ""
                part = f"{indent}def {method}({(signature or '').replace('=', '=0')}): ..."
                classes.setdefault(owner, []).append(part) if owner else lines.append(part)
        for owner, methods in classes.items():
            lines += [f"class {owner}:", *methods]
        file.write_text("\n".join(lines))
    return Package(root, {})


@pytest.mark.parametrize("minor", list(TABLES))
def test_a_known_vllm_passes_and_each_change_is_named(minor: str, tmp_path: Path) -> None:
    modules = {module: dict(names) for module, names in RECORDED[minor].items()}
    package = write_package(tmp_path / "right", modules)
    assert check_version(f"{minor}.0", package, {}) == []
    for relied in TABLES[minor]:
        del modules[relied.module][relied.name]
    removed = write_package(tmp_path / "removed", modules)
    with pytest.raises(VllmRefusal) as told:
        check_version(f"{minor}.0", removed, {})
    assert all(f"{relied.path} is not there" in str(told.value) for relied in TABLES[minor])


def test_a_changed_signature_is_named_with_both(tmp_path: Path) -> None:
    modules = {module: dict(names) for module, names in RECORDED["0.33"].items()}
    modules["vllm.model_executor.layers.linear"]["LinearMethodBase.apply"] = "self, layer, x, scale, bias="
    package = write_package(tmp_path, modules)
    said = r"linear:LinearMethodBase\.apply takes \(self, layer, x, scale, bias=\), not \(self, layer, x, bias=\)"
    with pytest.raises(VllmRefusal, match=said):
        check_version("0.33.0", package, {})
    (warning,) = check_version("0.33.0", package, {ANY_VERSION: "1"})
    assert "LinearMethodBase.apply" in warning


@pytest.mark.parametrize("version", ["0.25.1", "0.27.0", "0.34.0", "1.0.0", "0.3.3"])
def test_an_unknown_minor_version_is_refused_with_a_sentence(version: str, tmp_path: Path) -> None:
    package = write_package(tmp_path, RECORDED["0.33"])
    with pytest.raises(VllmRefusal, match=rf"knows vLLM 0\.26, 0\.32, 0\.33, and this is {version}.*{ANY_VERSION}=1"):
        check_version(version, package, {})
    assert check_version(version, package, {ANY_VERSION: "1"}) == [
        f"ownpath knows vLLM 0.26, 0.32, 0.33, and this is {version}"
    ]


def test_patch_releases_and_local_builds_belong_to_their_minor_version() -> None:
    assert [minor_of(one) for one in ("0.26.1", "0.32.0+cpu", "0.33.0rc2+g1234", "0.33")] == [
        "0.26", "0.32", "0.33", "0.33",
    ]  # fmt: skip


def test_an_imported_module_is_asked_itself(tmp_path: Path) -> None:
    """So another plugin's patch is seen, which its source does not have."""
    package = write_package(tmp_path, RECORDED["0.33"])
    name = "vllm.model_executor.layers.linear"
    module = ModuleType(name)

    class LinearMethodBase:
        def create_weights(
            self, layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype,
            **extra_weight_attrs,
        ): ...  # fmt: skip

        def apply(self, layer, x): ...

    vars(module).update(LinearMethodBase=LinearMethodBase, LinearBase=object, UnquantizedLinearMethod=object)
    with pytest.raises(VllmRefusal, match=r"apply takes \(self, layer, x\), not \(self, layer, x, bias=\)"):
        check_version("0.33.0", Package(package.root, {name: module}), {})


def test_signatures_are_the_same_from_source_and_from_objects(tmp_path: Path) -> None:
    source = "class A:\n    @classmethod\n    def f(cls, a, /, b, c=1, *rest, d, e=2, **more): ...\n"
    source += "    @staticmethod\n    def g(): ...\n    def h(self, *, d, e=2): ...\nif x:\n    def k(a): ...\n"
    (tmp_path / "m.py").write_text(source)
    package = Package(tmp_path, {})

    class A:
        @classmethod
        def f(cls, a, /, b, c=1, *rest, d, e=2, **more): ...

        @staticmethod
        def g(): ...

        def h(self, *, d, e=2): ...

    for name, expected in {
        "f": "cls, a, b, c=, *rest, d, e=, **more",
        "g": "",
        "h": "self, *, d, e=",
    }.items():
        assert signature_text(vars(A)[name]) == expected
        assert package.mismatch(versions.Relied("m", f"A.{name}", expected)) is None
        assert "takes" in str(package.mismatch(versions.Relied("m", f"A.{name}", "other")))
    assert package.mismatch(versions.Relied("m", "k", "a")) is None
    assert "no nothing" in str(package.mismatch(versions.Relied("m", "nothing")))
    assert "no such module" in str(package.mismatch(versions.Relied("absent", "k")))


def test_blackwell_is_refused_with_the_reason_and_the_variable() -> None:
    with pytest.raises(VllmRefusal, match=rf"W4A4 kernels for sm_100 have never run.*{SM100}=1.*docs/vllm\.md"):
        check_device((10, 0), {})
    (warning,) = check_device((10, 3), {SM100: "1"})
    assert "sm_103" in warning
    assert check_device((9, 0), {}) == check_device(None, {}) == []
    for capability in ((8, 0), (8, 9), (12, 0), (9, 1)):
        with pytest.raises(VllmRefusal, match=f"no kernels for sm_{capability[0]}{capability[1]}"):
            check_device(capability, {SM100: "1"})


def test_without_vllm_the_refusal_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "_DISTRIBUTIONS", ("no-such-distribution",))
    with pytest.raises(VllmRefusal, match=r"pip install vllm==0\.26\.0"):
        versions.installed_version()
    monkeypatch.setattr(versions, "find_spec", lambda _: SimpleNamespace(submodule_search_locations=None))
    with pytest.raises(VllmRefusal, match="not installed"):
        versions.installed_package()


RELEASED = (
    *("4.4.2", "4.5.2", "4.5.3", "4.6.0", "4.6.1", "4.6.2", "4.6.3", "4.7.0", "4.7.1", "4.8.0", "4.8.1"),
    *("4.8.2", "4.9.0", "5.0.0"),
)


def test_the_extra_accepts_the_compared_compilers_and_no_other() -> None:
    """vLLM 0.26 and 0.33 pin 4.6.0 and 4.8.0; whatever a resolver may choose must be able to compile."""
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    (compiler,) = map(Requirement, project["optional-dependencies"]["vllm"])
    assert (compiler.name, compiler.extras) == (PACKAGE, {"cu13"})
    assert {"4.6.0", "4.8.0"} < set(COMPARED)
    assert tuple(version for version in RELEASED if compiler.specifier.contains(version)) == COMPARED
    assert [Requirement(one).specifier for one in project["optional-dependencies"]["cute"]] == [f"=={COMPARED[-1]}"]


def test_whatever_the_plugin_imports_of_vllm_is_in_every_table() -> None:
    """By name: vLLM shows some at other places than where they are defined. ``envs`` is a module."""
    room = Path(versions.__file__).parent
    nodes = [node for file in room.glob("*.py") for node in ast.walk(ast.parse(file.read_text()))]
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm")]
    imported = {alias.name for node in froms for alias in node.names} - {"envs"}
    assert len(imported) > 10
    for minor, table in TABLES.items():
        assert imported <= {relied.name.partition(".")[0] for relied in table}, minor
