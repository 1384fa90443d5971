"""``ownpath verify`` on CUDA: the embedded model passes every stage, and a wrong kernel does not."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.kernel_configs import model_configs

from ownpath.cli import main
from ownpath.kernels.dsl.cache import Config
from ownpath.loading import default_model_dir
from ownpath.verify.layers.measure import distance

pytestmark = pytest.mark.gpu

pytest.importorskip("triton")


def kernel_configs() -> Iterator[Config]:
    """Those of the embedded model."""
    for is_batch_invariant in (False, True):
        yield from model_configs(default_model_dir(), is_batch_invariant=is_batch_invariant)


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
    room = {"rms_norm": "norms"}.get(name, name)
    launch = importlib.import_module(f"ownpath.kernels.{room}.launch")
    kernel = getattr(launch, name.upper())

    class Wrong(type(kernel)):
        def run(self, *args: object, **given: object) -> object:
            found = super().run(*args, **given)
            return (*found[:-1], found[-1] * (31 / 30)) if isinstance(found, tuple) else found * (31 / 30)

    monkeypatch.setattr(launch, name.upper(), Wrong())
    code, report = verified(cuda, tmp_path / "report.json", "--stages", "kernels")
    assert code == 1
    assert report["first_bad_layer"] == "layers.0"


def test_what_is_finite_is_counted_as_that(cuda: torch.device) -> None:
    """A GPU multiplies by 1 / n to divide by n, and n * (1 / n) is not 1 for one n in eight."""
    for num_rows in range(1, 400, 3):
        value = torch.ones(num_rows, 7, device=cuda)
        found = distance(value, value)
        assert (found.nonfinite_share, found.zero_share) == (0.0, 0.0), num_rows
        assert distance(value * 0, value).zero_share == 1.0
