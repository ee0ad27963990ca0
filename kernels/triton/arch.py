"""What a device can do, as features that the registry compares, and its sizes."""

from __future__ import annotations

import functools

import torch

from tokenrelay.kernels.triton.config import installed, interpreting

SHARED_BYTES = 227 << 10
INTERPRETED_PARTS = 3  # programs that attention is dealt to in the interpreter: few, and not a power of two


@functools.cache
def features() -> frozenset[str]:
    """Of the first device: its architecture's name (`sm_90`, `gfx942`), what its matrix units take (`dot_bf16`,
    `dot_fp8`), `shared_227k` where a program may have so much shared memory, which the tiles here were chosen for, and
    `triton` where that package is there. Without a device only the last."""
    found = {"triton"} if installed() else set()
    if interpreting():
        return frozenset(found | {"dot_bf16", "dot_fp8", "shared_227k"})
    if not torch.cuda.is_available():
        return frozenset(found)
    properties = torch.cuda.get_device_properties(0)
    if getattr(properties, "shared_memory_per_block_optin", 0) >= SHARED_BYTES:
        found.add("shared_227k")
    amd = str(getattr(properties, "gcnArchName", "")).split(":")[0] if torch.version.hip else ""
    if amd:
        found |= {amd}
        if amd.startswith(("gfx90a", "gfx94", "gfx95", "gfx12")):
            found.add("dot_bf16")
        if amd.startswith(("gfx94", "gfx95", "gfx12")):
            found.add("dot_fp8")
        return frozenset(found)
    level = properties.major * 10 + properties.minor
    found.add(f"sm_{level}")
    if level >= 80:
        found.add("dot_bf16")
    if level >= 89:
        found.add("dot_fp8")
    return frozenset(found)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the device; some for the interpreter."""
    if device.type == "cpu":
        return INTERPRETED_PARTS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
