"""Where tensors lie on a mesh: named axes, placements in torch's vocabulary, and the check of a model's boundaries.

boundary = Boundary(inputs={"x": Port((None, 4096))}, outputs={"y": Port((None, 14336), {"tp": Shard(-1)})})
report = check(model, Mesh(tp=8))       # PlacementError names both modules of an edge that cannot fit
print(report)                               # the collectives that the declarations ask for
"""

from tokenrelay.runtime.placement.boundary import Boundary, Edge, Port, edges
from tokenrelay.runtime.placement.check import Collective, PlacementReport, check
from tokenrelay.runtime.placement.mesh import AXES, STAGES, TOKEN_AXES, Mesh
from tokenrelay.runtime.placement.placements import Layout, Partial, Placement, Replicate, Shard

__all__ = [
    "AXES",
    "STAGES",
    "TOKEN_AXES",
    "Boundary",
    "Collective",
    "Edge",
    "Layout",
    "Mesh",
    "Partial",
    "Placement",
    "PlacementReport",
    "Port",
    "Replicate",
    "Shard",
    "check",
    "edges",
]
