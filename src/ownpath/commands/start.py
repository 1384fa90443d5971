"""Begins a command that runs a model: its imports, and the GPU's context beside them.

The imports take seconds, most of them torch's. They make many objects and hardly any garbage, so nothing searches for
it meanwhile, and nothing searches among these objects later. Imports leave a second core idle; the driver makes the
context there, which torch then finds.
"""

import contextlib
import ctypes
import gc
import threading
from collections.abc import Iterator

from ownpath.terminal.progress import Progress


@contextlib.contextmanager
def starting(device: str) -> Iterator[None]:
    """Shows "starting" while the caller imports what it needs. device: a torch device name, not checked yet."""
    number = device_number(device)
    if number is not None:
        threading.Thread(target=make_context, args=(number,), daemon=True).start()
    with Progress("starting"), importing():
        yield


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Keeps Python's garbage collector from what is made inside: now, and when it works again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def device_number(device: str) -> int | None:
    """Returns the number of a CUDA device; ``None`` for any other name."""
    kind, _, number = device.partition(":")
    if kind != "cuda" or (number and not number.isdecimal()):
        return None
    return int(number or 0)


def make_context(number: int) -> None:
    """Makes the device's primary context, which every library of the process shares. Silent where there is none: who
    asks torch for the device is told."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if not cuda.cuInit(0) and not cuda.cuDeviceGet(ctypes.byref(device), number):
        cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
