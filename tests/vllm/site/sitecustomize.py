"""Lets vLLM's CPU build start where there is no Triton for CPUs: kernels are interpreted, and a backend is named.

Python imports this file at start from PYTHONPATH, in every process of a test, before vLLM asks Triton for its backends.
"""

import os
from importlib.util import find_spec
from types import SimpleNamespace

if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None:
    import triton.backends

    # vLLM asks whether the backend is there, and never for its driver: an interpreted kernel has none.
    triton.backends.backends.setdefault("cpu", SimpleNamespace(driver=None, compiler=None))
