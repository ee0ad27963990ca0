"""Lays .typing/tokenrelay/* symlinks from the import table, so that mypy and pyright see the import paths."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Rebuild .typing/ from `[tool.scikit-build.wheel.packages]`."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["scikit-build"]["wheel"]["packages"]
    farm = ROOT / ".typing"
    shutil.rmtree(farm, ignore_errors=True)
    for target, source in table.items():
        link = farm / target
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(ROOT / source)


if __name__ == "__main__":
    main()
