"""Triton kernels compiled for GPUs that are not here. A process that interprets cannot compile: a run of its own."""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    raise RuntimeError("unset TRITON_INTERPRET: tests/aot compiles")
