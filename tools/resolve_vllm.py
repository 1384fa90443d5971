"""Resolves ``ownpath[vllm]`` beside each vLLM that it is for, and prints what is chosen. Needs uv; installs nothing.

    python tools/resolve_vllm.py            # all of them
    python tools/resolve_vllm.py 0.33.0
Fails if there is no solution, or if it has another compiler than the kernels were compared with.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from ownpath.kernels.dsl.compiler import COMPARED, PACKAGE

ROOT = Path(__file__).parents[1]
VLLM = ("0.26.0", "0.33.0")
SHOWN = ("vllm", "torch", "triton", PACKAGE, "transformers", "starlette", "pydantic", "tokenizers", "numpy")


def resolve(version: str) -> dict[str, str]:
    """Returns the version of every package. Errors: ValueError with the resolver's words where there is no solution."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder, "wanted.in")
        wanted.write_text(f"vllm=={version}\nownpath[vllm] @ {ROOT.as_uri()}\n", encoding="utf-8")
        options = ["--quiet", "--no-annotate", "--no-header", "--python-platform", "x86_64-manylinux_2_28"]
        found = subprocess.run(
            ["uv", "pip", "compile", *options, "--python", sys.executable, str(wanted)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "UV_PYTHON_DOWNLOADS": "never"},
        )
    if found.returncode:
        raise ValueError(f"vLLM {version} and ownpath[vllm] do not fit:\n{found.stderr}")
    pairs = (line.split(";")[0].strip().partition("==") for line in found.stdout.splitlines())
    return {name.partition("[")[0]: version for name, _, version in pairs if version}


def main() -> None:
    """Resolves, prints one line for each vLLM, and checks the compiler."""
    for version in sys.argv[1:] or VLLM:
        chosen = resolve(version)
        print(f"vLLM {version}: {len(chosen)} packages; " + ", ".join(f"{name} {chosen[name]}" for name in SHOWN))
        if chosen[PACKAGE] not in COMPARED:
            raise SystemExit(f"{PACKAGE} {chosen[PACKAGE]} is none that the kernels were compared with")


if __name__ == "__main__":
    main()
