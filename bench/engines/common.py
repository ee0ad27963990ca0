"""What the subjects of bench/cpu_engine.py share: how they are asked, and the prompts.

A subject reads a case a line (JSON) and answers with a line that begins with MARK. Plain Python: it runs in the peers'
environments too.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

MARK = "@@ "


def prompt(seed: int, tokens: int, vocab: int = 32000) -> list[int]:
    """Token ids that no other seed begins with."""
    return [100 + (seed * 7919 + i * (seed * 2 + 31)) % (vocab - 200) for i in range(tokens)]


def answer(message: dict[str, Any]) -> None:
    """To bench/cpu_engine.py."""
    print(MARK + json.dumps(message), flush=True)


def serve(cases: dict[str, Callable[..., dict[str, float]]], version: str, began_s: float) -> None:
    """Say that the engine is ready, then run cases until the input ends."""
    answer({"ready_s": time.time() - began_s, "version": version})
    for line in sys.stdin:
        case = json.loads(line)
        name = case.pop("case")
        try:
            answer(cases[name](**case))
        except Exception as error:
            answer({"error": f"{type(error).__name__}: {error}"[:300]})
