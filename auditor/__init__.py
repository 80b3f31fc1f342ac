"""The domain: capture, decomposition, attribution and ranking of export divergence.

Imports neither ``backends`` nor ``reports``; only ``discovery`` and ``cli`` look outward.
"""

import os

__version__ = "0.1.0"

# ONNX Runtime's wheels report to their vendor from 1.32 on, the moment they are imported. Models
# under audit are nobody else's business; set it to 0 to decide otherwise.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
