"""The helpers of other test folders, and the mesh of one process."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in ("worker", "kvstore", "handover"):
    sys.path.insert(0, str(Path(__file__).parent.parent / folder))
sys.path.insert(0, str(Path(__file__).parent))
