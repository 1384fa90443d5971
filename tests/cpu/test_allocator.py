"""Memory that is free is kept for the next result."""

import subprocess
import sys

import pytest

ROUNDS = """
import resource, sys
if sys.argv[1] == "kept":
    from ownpath.allocator import keep_freed_memory
    keep_freed_memory()
parts = [bytearray(b"x") * (1 << 24) for _ in range(4)]
del parts
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    parts = [bytearray(b"x") * (1 << 24) for _ in range(4)]
    del parts
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 80 * (1 << 24) // 4096


def page_faults(kind: str) -> int:
    run = subprocess.run([sys.executable, "-c", ROUNDS, kind], capture_output=True, text=True, check=True)
    return int(run.stdout)


def test_large_results_take_no_new_pages() -> None:
    if page_faults("as it is") < PAGES // 2:
        pytest.skip("this C library keeps freed memory by itself")
    assert page_faults("kept") <= PAGES // 20 + 100, "the pages of a round, once"
