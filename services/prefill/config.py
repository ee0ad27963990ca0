"""Settings of the prefill role, the table `[prefill]`."""

from __future__ import annotations

from dataclasses import dataclass

from tokenrelay.base.config import setting


@dataclass(frozen=True, kw_only=True)
class PrefillConfig:
    """Bounds of the role (`TOKENRELAY_PREFILL_…`)."""

    handle_deadline_s: float = setting(
        600.0,
        "seconds from admission to the first token, at most; a long queue of long prompts is legitimate",
        minimum=1,
    )
