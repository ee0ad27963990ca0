"""What the environment says about kernels for accelerators. Reading it loads neither torch nor triton."""

from __future__ import annotations

import os
from importlib import util
from pathlib import Path

# What the two drivers leave where a device is: docs.nvidia.com (device node), rocm.docs.amd.com (kernel driver).
_DEVICE_NODES = (Path("/dev/nvidia0"), Path("/dev/kfd"))


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU: TRITON_INTERPRET, which triton reads when imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def installed() -> bool:
    """Whether the package triton is there."""
    return util.find_spec("triton") is not None


def device_there() -> bool:
    """Whether a driver shows a device that these kernels could run on."""
    return any(node.exists() for node in _DEVICE_NODES)
