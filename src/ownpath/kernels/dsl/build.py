"""Compiles kernels into the cache: ``python -m ownpath.kernels.dsl.build`` reads one line of JSON for each from stdin.

It is a separate process, because the DSL reads its target from the environment when it is imported.
"""

import json
import os
import sys
import tempfile
from importlib import import_module
from typing import Any

from ownpath.kernels.contract import Config
from ownpath.kernels.dsl.cache import ARCH, store
from ownpath.kernels.dsl.compiler import compiler_name

KERNELS = "ownpath.kernels"


def find(path: str) -> Any:
    """Imports what a path "module:name" below ``ownpath.kernels`` names."""
    module, _, name = path.partition(":")
    return getattr(import_module(f"{KERNELS}.{module}"), name)


def build(config: Config) -> None:
    """Compiles one kernel into the cache."""
    function = find(config.compiler)(config)
    entry = next(line.split()[2].split("(")[0] for line in function.__ptx__.splitlines() if ".visible .entry" in line)
    facts = {
        "entry": entry,
        "num_threads": config.num_threads,
        "cluster": config.cluster,
        "compiler": compiler_name(),
        "arch": ARCH,
    }
    store(config, bytes(function.__cubin__), facts)


def main() -> None:
    """Compiles the kernel of each line of stdin and prints its name when it is done."""
    with tempfile.TemporaryDirectory() as scratch:
        settings = {"ARCH": ARCH, "KEEP_PTX": "1", "KEEP_CUBIN": "1", "DUMP_DIR": scratch}
        os.environ.update({f"CUTE_DSL_{key}": value for key, value in settings.items()})
        for line in sys.stdin:
            path, fields = json.loads(line)
            fields = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
            config: Config = find(path)(**fields)
            build(config)
            print(config.name, flush=True)


if __name__ == "__main__":
    main()
