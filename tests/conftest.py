"""Shared test settings: the tests' own helpers are importable, and torch runs on one thread.

The models of the tests are tiny: a second thread only waits, and on a busy machine it waits long (97 s instead of 7 s
was seen). Set before anything imports torch; child processes inherit it. Without a GPU, Triton's kernels run in its
interpreter, which is decided when triton is imported (tests/triton).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from tokenrelay.kernels.triton.config import device_there

if not device_there():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Every folder here, whichever are run: they use each other's helpers; behind them bench/. Helpers' names differ
# from one another and from those of bench/ (tests/tidy/test_helpers.py).
HERE = Path(__file__).resolve().parent
sys.path[:0] = [*(str(folder) for folder in sorted(HERE.iterdir()) if folder.is_dir()), str(HERE.parent / "bench")]
