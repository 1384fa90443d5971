"""The start of commands, before a model is loaded."""

import ctypes
import gc
from types import SimpleNamespace

import pytest

from ownpath.commands.start import device_number, importing, make_context, starting


@pytest.fixture
def collector():
    was_enabled = gc.isenabled()
    yield
    gc.unfreeze()
    (gc.enable if was_enabled else gc.disable)()


def test_the_collector_rests_during_imports_and_passes_over_them_afterwards(collector):
    gc.enable()
    with importing():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0


def test_a_collector_that_was_off_stays_off(collector):
    gc.disable()
    with importing():
        pass
    assert not gc.isenabled()


@pytest.mark.parametrize(
    ("device", "number"),
    [("cuda", 0), ("cuda:3", 3), ("cpu", None), ("cuda:x", None), ("cuda:-1", None), ("sm_90", None), ("", None)],
)
def test_only_a_cuda_device_has_a_number(device, number):
    assert device_number(device) == number


@pytest.mark.parametrize("failing", [None, "cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"])
def test_a_driver_that_fails_is_silent_and_asked_no_further(monkeypatch, failing):
    order, called = ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"], []

    def call(name):
        return lambda *_: called.append(name) or (100 if name == failing else 0)

    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(**{name: call(name) for name in order}))
    make_context(0)
    assert called == order[: order.index(failing) + 1 if failing else None]


def test_a_machine_without_a_driver_starts(monkeypatch, collector):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    make_context(0)
    with starting("cuda"):
        pass
