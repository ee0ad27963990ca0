"""A mesh: the ranks of one SPMD group, arranged along named axes."""

from __future__ import annotations

from tokenrelay.base.errors import PlacementError

# tensor: one layer's matrices are cut over it. expert: whole experts are dealt out over it.
AXES = ("tensor", "expert")


class Mesh:
    """Sizes of the named axes; an axis that is not given has one rank. `Mesh(tensor=4)` has 4 ranks."""

    def __init__(self, **sizes: int) -> None:
        for axis, size in sizes.items():
            if axis not in AXES:
                raise PlacementError(f"the mesh has no axis {axis!r}; known: {', '.join(AXES)}")
            if size < 1:
                raise PlacementError(f"mesh axis {axis!r} has size {size}; an axis has at least one rank")
        self._sizes = {axis: sizes.get(axis, 1) for axis in AXES}

    def size(self, axis: str) -> int:
        """Ranks along `axis`."""
        return self._sizes[axis]

    @property
    def ranks(self) -> int:
        """Ranks of the whole mesh."""
        total = 1
        for size in self._sizes.values():
            total *= size
        return total

    def __repr__(self) -> str:
        return "Mesh(" + ", ".join(f"{axis}={size}" for axis, size in self._sizes.items()) + ")"
