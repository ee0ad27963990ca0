"""Shared test settings: the tests' own helpers are importable, and torch keeps to the cores this process may use."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in ("tidy", "support"):
    sys.path.insert(0, str(Path(__file__).parent / folder))
