"""A mesh: the ranks of one SPMD group, arranged along named axes."""

from __future__ import annotations

from tokenrelay.base.errors import PlacementError

# From the outermost to the innermost: where several axes cut one dimension, the first has the largest pieces, and
# ranks that differ in the last are neighbours. dp: sequences are dealt out. cp: the tokens of each sequence are, and
# keys are whole. ep: whole experts are dealt out, tokens are whole. tp: one layer's matrices are cut over it.
AXES = ("dp", "cp", "ep", "tp")
TOKEN_AXES = ("dp", "cp")  # a port with a dimension of tokens is Shard(0) along these where it does not say otherwise
STAGES = "pp"  # layers are dealt out over it; no tensor is placed along it, programs are cut (stages.py)
MESH_AXES = (STAGES, *AXES)


class Mesh:
    """Sizes of the named axes; an axis that is not given has one rank. `Mesh(tp=4)` has 4 ranks."""

    def __init__(self, **sizes: int) -> None:
        for axis, size in sizes.items():
            if axis not in MESH_AXES:
                raise PlacementError(f"the mesh has no axis {axis!r}; known: {', '.join(MESH_AXES)}")
            if size < 1:
                raise PlacementError(f"mesh axis {axis!r} has size {size}; an axis has at least one rank")
        self._sizes = {axis: sizes.get(axis, 1) for axis in MESH_AXES}

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
        return "Mesh(" + ", ".join(f"{axis}={size}" for axis, size in self._sizes.items() if size > 1) + ")"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mesh) and self._sizes == other._sizes

    def __hash__(self) -> int:
        return hash(tuple(self._sizes.values()))

    @property
    def sizes(self) -> dict[str, int]:
        """All axes with their sizes, outermost first."""
        return dict(self._sizes)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where `rank` stands along each axis. Raises PlacementError for a rank that the mesh has not."""
        if not 0 <= rank < self.ranks:
            raise PlacementError(f"rank {rank} is not one of the {self.ranks} ranks of {self!r}")
        found = {}
        for axis in reversed(MESH_AXES):
            rank, found[axis] = divmod(rank, self._sizes[axis])
        return {axis: found[axis] for axis in MESH_AXES}

    def rank_at(self, coordinates: dict[str, int]) -> int:
        """The rank that stands there: the inverse of `coordinates`."""
        rank = 0
        for axis in MESH_AXES:
            rank = rank * self._sizes[axis] + coordinates[axis]
        return rank

    def groups(self, axes: tuple[str, ...]) -> list[list[int]]:
        """The ranks that differ along `axes` only, one list for each place along the others, in rank order."""
        found: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.ranks):
            at = self.coordinates(rank)
            found.setdefault(tuple(at[axis] for axis in MESH_AXES if axis not in axes), []).append(rank)
        return list(found.values())
