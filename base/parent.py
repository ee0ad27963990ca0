"""A child process that does not outlive its parent, however the parent ends (Linux; elsewhere these do nothing).

    subprocess.Popen(command, env=announce(), ...)   # the parent
    die_with_parent()                                          # the child, first thing in its main

The child asks the kernel itself. The parent could do it between fork and exec (`preexec_fn`), but a process with
threads of gRPC may not run Python there: it breaks now and then.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Mapping

VARIABLE = "TOKENRELAY_PARENT_PID"
PR_SET_PDEATHSIG = 1  # prctl(2)


def announce(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment (ours, where none is given) of a child that is to die with the thread that starts it."""
    return {**(os.environ if environment is None else environment), VARIABLE: str(os.getpid())}


def die_with_parent() -> None:
    """From now on the kernel kills this process when the parent that announced itself dies; at once if it has."""
    parent = os.environ.pop(VARIABLE, "")  # taken out: our own children have us as their parent
    if not parent.isdecimal() or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it died before prctl
        os._exit(1)
