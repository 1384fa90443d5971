"""Triton kernels on the CPU. A process that interprets cannot compile, so this folder has a pytest run of its own."""

import os
import sys

if "triton" in sys.modules:
    raise RuntimeError("triton was imported before interpretation was asked for: run tests/interpret by itself")
os.environ["TRITON_INTERPRET"] = "1"

from support import gluon_interpreter, triton_interpreter

triton_interpreter.install()
gluon_interpreter.install()
