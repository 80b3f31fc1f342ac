"""The domain: capture, decomposition, attribution and ranking of export divergence.

Imports neither ``backends`` nor ``reports``; only ``discovery`` and ``cli`` look outward.
"""

__version__ = "0.1.0"
