"""The ledger against the plan and against the device: what was named is what was launched."""

import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from support.checkpoints import random_checkpoint
from support.kernel_configs import model_configs

from ownpath.config import EngineConfig
from ownpath.finding import Finding, Verdict
from ownpath.kernels.dsl.cache import Config
from ownpath.kernels.fp8 import launch as fp8_launch
from ownpath.kernels.nvfp4 import launch, linear
from ownpath.loading import default_model_dir, load_model, plan_model
from ownpath.model.batch import ForwardBatch
from ownpath.plan.show import plan_dict
from ownpath.trace import Records
from ownpath.trace.observers import CallArguments, Observer, Watched
from ownpath.verify.ledger_check import check_ledger
from ownpath.verify.subject import Subject

pytestmark = pytest.mark.gpu

LAYOUTS = ("full-nvfp4", "deepseek-native", "fp8-experts", "bf16")


def kernel_configs() -> Iterator[Config]:
    """Those of the embedded model, and of small ones in each layout."""
    yield from model_configs(default_model_dir())
    for layout in LAYOUTS:
        with TemporaryDirectory() as folder:
            random_checkpoint(Path(folder), layout)
            yield from model_configs(Path(folder))


def findings(folder: Path, device: torch.device) -> list[Finding]:
    plan = json.loads(json.dumps(plan_dict(plan_model(folder, str(device)))))
    found = check_ledger(Subject.of(folder, EngineConfig.for_device(str(device), 512)), plan)
    return [item for item in found if isinstance(item, Finding)]


@pytest.mark.parametrize("layout", ["embedded", *LAYOUTS])
def test_what_the_device_ran_is_what_was_planned(layout: str, tmp_path: Path, cuda: torch.device) -> None:
    folder = default_model_dir()
    if layout != "embedded":
        random_checkpoint(tmp_path, layout)
        folder = tmp_path
    found = findings(folder, cuda)
    assert [finding for finding in found if finding.verdict is not Verdict.PASS] == []
    assert [finding.id for finding in found] == ["LG01", "LG02", "LG03", "LG04", "LG05", "LG06"]
    print(found[-1].message)


@pytest.mark.sm90
def test_named_forms_are_those_that_were_launched(cuda: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled configurations that records name are, slot by slot, those that were taken from the cache to run."""
    model = load_model(default_model_dir(), EngineConfig.for_device(str(cuda), 512))
    launched: dict[str, set[str]] = {}
    slots: list[str] = []
    around_products = ("align", "permute", "combine")

    for module in (launch, fp8_launch):

        def loaded(config: Any, device_index: int, load: Any = module.load) -> Any:
            if not type(config).__name__.lower().startswith(around_products):
                launched.setdefault(slots[-1], set()).add(config.name)
            return load(config, device_index)

        monkeypatch.setattr(module, "load", loaded)

    class Slots(Observer):
        def before(self, call: Watched, args: CallArguments) -> None:
            slots.append(call.slot)

    cache = model.new_cache()
    with model.ledger.observe(Records()) as records, model.ledger.observe(Slots()):
        for token_ids in ([3] * 130, [4], [5] * 20):
            model.forward(ForwardBatch.of([(token_ids, cache)], cuda))
    assert launched
    for slot, names in launched.items():
        assert {name for record in records.listed(slot) for name in record.variant.split()} == names, slot
    # Attention's names are of forms of a call: they say its splits too. Short rows are selected from by Triton.
    cute = {record.slot for record in records if record.use.kernel.startswith("cute.")}
    by_cute = {slot for slot in cute if not slot.endswith((".attend", ".select"))}
    assert by_cute == set(launched)


@pytest.mark.sm90
def test_a_library_behind_our_kernel_is_named(cuda: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call is still our kernel's; what it launches is not, which only the profiler sees."""

    def by_library(kernel: Any, x: torch.Tensor, operand: Any, **_: Any) -> torch.Tensor:
        num_rows, num_cols = operand.shape
        y = torch.mm(x.reshape(-1, num_cols), torch.zeros(num_cols, num_rows, dtype=x.dtype, device=x.device))
        return y.view(*x.shape[:-1], num_rows)

    # Of the dense products alone: experts gather rows, which a library's product does not.
    monkeypatch.setattr(linear.Nvfp4LinearKernel, "run", by_library)
    found = findings(default_model_dir(), cuda)
    failed = [finding for finding in found if finding.verdict is Verdict.FAIL]
    assert {finding.id for finding in failed} == {"LG06"}, failed
    named = {finding.where for finding in failed}
    assert "layers.{0-3}.attn.wq_b" in named
    assert any("a product that is not ours ran" in finding.message for finding in failed)
