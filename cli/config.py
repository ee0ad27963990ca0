"""The supervisor's own table of the configuration file, `[supervisor]`."""

from __future__ import annotations

from dataclasses import dataclass

from tokenrelay.base.config import setting


@dataclass(frozen=True, kw_only=True)
class SupervisorConfig:
    """Bounds of the supervisor's waits (`TOKENRELAY_SUPERVISOR_…`)."""

    stall_s: float = setting(300.0, "seconds a start may go without news; a network disk can be slow", minimum=1)
    backoff_first_s: float = setting(0.5, "seconds before the first restart of a child that died", minimum=0)
    backoff_max_s: float = setting(30.0, "seconds at most between restarts; each failure doubles the wait", minimum=0)
    healthy_s: float = setting(60.0, "seconds a child must have served for its failures to be forgotten", minimum=0)
    restarts_max: int = setting(10, "restarts in a row before giving up: an orchestrator should know", minimum=0)
    drain_s: float = setting(120.0, "seconds a drain may take before it is cut short", minimum=0)
    stop_s: float = setting(3.0, "seconds between asking a child to stop at once and killing it", minimum=0)
