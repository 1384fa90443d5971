"""Prints the project's size: lines of each room, the embedded model, and packages of the base install."""

import importlib.metadata
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "ownpath"


def main() -> int:
    """Prints three short tables."""
    for room in sorted(path for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()):
        files = [room] if room.suffix else sorted(room.rglob("*.py"))
        lines = [len(file.read_text(encoding="utf-8").splitlines()) for file in files]
        print(f"{room.stem:12} {len(files):3} files {sum(lines):6} lines, longest {max(lines)}")
    assets = [path for path in (PACKAGE / "assets").rglob("*") if path.is_file()]
    total, largest = sum(f.stat().st_size for f in assets), max(f.stat().st_size for f in assets)
    print(f"\nassets: {total / 1e6:.2f} MB, largest file {largest / 1e6:.2f} MB")
    needed = sorted(_closure("ownpath"))
    print(f"base install: {len(needed)} packages: {', '.join(needed)}")
    return 0


def _closure(root: str) -> set[str]:
    """Returns the installed packages that ``root`` requires, without extras and itself."""
    found: set[str] = set()
    waiting = [root]
    while waiting:
        for requirement in importlib.metadata.requires(waiting.pop()) or []:
            name = re.split(r"[^\w.-]", requirement)[0].lower().replace("_", "-")
            if "extra ==" not in requirement and name not in found and _is_installed(name):
                found.add(name)
                waiting.append(name)
    return found


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
