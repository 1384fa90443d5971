"""Installs the wheel of a folder into a fresh environment, and runs it there, away from the source tree.

    python tools/try_dist.py dist

Nothing is downloaded: the environment reads the packages that ownpath needs from this one, but not ownpath itself.
"""

import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

RUNS = (
    ("--version",),
    ("inspect",),
    ("generate", "--max-tokens", "4", "The capital of France is"),
)


def install(wheel: Path, folder: Path) -> Path:
    """Makes an environment in ``folder`` that has the wheel; returns its Python."""
    venv.create(folder)
    python = folder / "bin" / "python"
    # A line of a .pth file adds a folder without the .pth files in it, and so without this tree's editable install.
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "--quiet", "--python", str(python), "install", "--no-index", "--no-deps"]
    subprocess.run([*command, str(wheel)], check=True)
    return python


def main() -> None:
    """Prints what each command answers. Errors: AssertionError for another ownpath than the wheel's."""
    (wheel,) = Path(sys.argv[1]).glob("*.whl")
    with tempfile.TemporaryDirectory() as folder:
        python = install(wheel.resolve(), Path(folder) / "env")
        where = "import ownpath; print(ownpath.__file__)"
        found = subprocess.run([python, "-c", where], check=True, capture_output=True, text=True, cwd=folder).stdout
        assert Path(found.strip()).is_relative_to(folder), f"ownpath is {found.strip()}"
        for arguments in RUNS:
            print("$ ownpath", *arguments, flush=True)
            subprocess.run([python.parent / "ownpath", *arguments], check=True, cwd=folder)
    print(f"{wheel.name}: installed and run in a fresh environment")


if __name__ == "__main__":
    main()
