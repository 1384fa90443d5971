"""``ownpath verify`` on CUDA: the embedded model passes every stage, and a wrong kernel does not."""

import json
from pathlib import Path

import pytest
import torch

from ownpath.cli import main

pytestmark = pytest.mark.gpu

small = pytest.importorskip("ownpath.kernels.triton.small")


def verified(cuda: torch.device, path: Path, *options: str) -> tuple[int, dict[str, object]]:
    """Exit code and report."""
    code = main(["verify", "--device", str(cuda), "--json", str(path), *options])
    return code, json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("options", [(), ("--batch-invariant",)], ids=["default", "batch-invariant"])
def test_the_embedded_model_passes_every_stage(cuda: torch.device, tmp_path: Path, options: tuple[str, ...]) -> None:
    code, report = verified(cuda, tmp_path / "report.json", *options)
    assert report["verdict"] == "pass"
    assert code == 0
    print(report["seconds"])


@pytest.mark.parametrize("name", ["rms_norm", "router", "swiglu"])
def test_a_kernel_that_is_a_little_wrong_is_found(
    name: str, cuda: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last result is one part in thirty too large."""
    kernel = getattr(small, name)

    def wrong(*args: object, **given: object) -> object:
        found = kernel(*args, **given)
        return (*found[:-1], found[-1] * (31 / 30)) if isinstance(found, tuple) else found * (31 / 30)

    monkeypatch.setattr(small, name, wrong)
    code, report = verified(cuda, tmp_path / "report.json", "--stages", "kernels")
    assert code == 1
    assert report["first_bad_layer"] == "layers.0"
