"""Subjects planned for a GPU and loaded on the CPU: packing is arithmetic, only launching needs the device."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ownpath.config import EngineConfig
from ownpath.inspect.memory import KINDS
from ownpath.loading import planned
from ownpath.verify.subject import Selection, Subject


def subject_on(folder: Path, kind: str = "CPU", selection: Selection | None = None, **demands: object) -> Subject:
    """kind: ``CPU``, ``sm_90`` or ``sm_100``."""
    (caps,) = (caps for caps in KINDS if caps.name == kind)
    engine = replace(EngineConfig.for_device(caps.device_type), **demands)
    plan, index = planned(folder, engine, caps)
    return Subject(folder, index, plan, replace(engine, device="cpu"), selection or Selection())


def allow_packing_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is launched, so nothing need be compiled, lie on a device, or be waited for."""
    for module in ("linear", "moe"):
        monkeypatch.setattr(f"ownpath.kernels.nvfp4.{module}.require_packable", lambda *_: None)
    monkeypatch.setattr("ownpath.assembly.compile_kernels", lambda _: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
