"""The shipped files: the wheel's contents, and the container and cluster examples beside the program they start."""

import argparse
import re
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from ownpath.cli import main
from ownpath.commands import serve
from ownpath.server.gate import PROBES

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    hatchling = pytest.importorskip("hatchling.build")
    folder = tmp_path_factory.mktemp("wheel")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return zipfile.ZipFile(folder / hatchling.build_wheel(str(folder)))


def test_the_wheel_has_every_file_of_the_package(wheel: zipfile.ZipFile) -> None:
    package = ROOT / "src"
    files = {path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    wanted = {path.relative_to(package).as_posix() for path in files}
    shipped = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert shipped == wanted


def test_the_wheel_says_what_it_needs(wheel: zipfile.ZipFile) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (name,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
    lines = wheel.read(name).decode().splitlines()
    needed = {line.split(":", 1)[1].strip() for line in lines if line.startswith("Requires-Dist:")}
    assert {need for need in needed if "extra ==" not in need} == set(project["dependencies"])
    assert f"Version: {project['version']}" in lines


def options_of_serve() -> set[str]:
    parser = argparse.ArgumentParser().add_subparsers()
    return {name for action in serve.add_parser(parser)._actions for name in action.option_strings}


def dockerfile_words(instruction: str) -> list[str]:
    found = re.search(rf"^{instruction} \[(.*)\]$", (DEPLOY / "Dockerfile").read_text(encoding="utf-8"), re.M)
    assert found
    return [word.strip().strip('"') for word in found[1].split(",")]


def container() -> dict[str, Any]:
    deployment, _ = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8"))
    (found,) = deployment["spec"]["template"]["spec"]["containers"]
    return dict(found) | {"grace_s": deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]}


def test_the_image_and_the_cluster_start_what_the_command_line_has(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Up to the model's folder, which is not there: every option is known and its value taken."""
    monkeypatch.setenv("OWNPATH_API_KEYS", "k" * 16)
    program, *entry = dockerfile_words("ENTRYPOINT")
    assert program == "ownpath"
    entry[entry.index("--port") + 1] = "0"
    for arguments in (dockerfile_words("CMD"), container()["args"]):
        assert {word for word in (*entry, *arguments) if word.startswith("--")} <= options_of_serve()
        assert main([*entry, *["cpu" if word == "cuda" else word for word in arguments]]) == 2
        assert "/model" in capsys.readouterr().err


def test_the_cluster_sets_no_setting_by_itself() -> None:
    """A Service named ownpath would set OWNPATH_PORT to an address in every pod beside it."""
    documents = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8"))
    deployment = next(it for it in documents if it["kind"] == "Deployment")
    assert deployment["spec"]["template"]["spec"]["enableServiceLinks"] is False


def test_the_cluster_probes_and_drains_as_the_server_does() -> None:
    found = container()
    probes = {found[name]["httpGet"]["path"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert probes == PROBES
    assert found["readinessProbe"]["httpGet"]["path"] == "/ready"
    assert found["livenessProbe"]["httpGet"]["path"] == "/health"
    arguments = found["args"]
    assert found["grace_s"] > int(arguments[arguments.index("--drain-timeout") + 1])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert found["image"].endswith(f":{project['version']}")
