"""Starts vLLM on faults, one after the other, and writes how each ended: ``refuse.py CASES OUT``.

CASES: JSON of [folder, arguments of ``vllm.LLM``, environment]. OUT gets JSON of the messages, "started" for none.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path


def chain(error: BaseException | None) -> Iterator[str]:
    """Yields an error's message and those of its causes."""
    while error is not None:
        yield f"{type(error).__name__}: {error}"
        error = error.__cause__ or error.__context__


def try_start(folder: str, engine: dict[str, object], environment: dict[str, str]) -> str:
    """Returns how a start ended. vLLM opens a port, if it serves, only after this."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    small = {"max_model_len": 512, "max_num_seqs": 2, "max_num_batched_tokens": 512, "enforce_eager": True}
    os.environ.update(environment)
    try:
        LLM(model=folder, kv_cache_dtype="fp8", **small | engine)
    except Exception as error:
        return "\n".join(chain(error))
    finally:
        cleanup_dist_env_and_memory()
        for name in environment:
            del os.environ[name]
    return "started"


if __name__ == "__main__":
    cases, out = json.loads(sys.argv[1]), Path(sys.argv[2])
    out.write_text(json.dumps([try_start(*case) for case in cases]))
