"""What is planted: one change of one node, made without anything that the auditor is made of.

Numbers are rounded by PyTorch, grids of a resize are PyTorch's own, functions are written out
from their definitions. Nothing here imports ``auditor``.
"""

from benchmarks.plants.faults import defects, nulls, operators, precision  # each plants its own
from benchmarks.plants.faults.site import (
    PLANTS,
    PRODUCTS,
    Plant,
    Site,
    UnsuitableError,
    in_bfloat16,
    rounded,
)

__all__ = [
    "PLANTS",
    "PRODUCTS",
    "Plant",
    "Site",
    "UnsuitableError",
    "defects",
    "in_bfloat16",
    "nulls",
    "operators",
    "precision",
    "rounded",
]
