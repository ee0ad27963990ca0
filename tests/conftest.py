"""Shared test settings: the tests' own helpers are importable, and torch runs on one thread.

The models of the tests are tiny: a second thread only waits, and on a busy machine it waits long (97 s instead of 7 s
was seen). Set before anything imports torch; child processes inherit it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

for folder in ("tidy", "support"):
    sys.path.insert(0, str(Path(__file__).parent / folder))
