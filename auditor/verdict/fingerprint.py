"""What names a finding across runs: in baselines, accepted findings and uploaded results.

The same backend, the same ONNX nodes and the same cause give the same fingerprint, whatever the
figures, the rank, the order of the segments or the path of the model. When a runtime's new version
fuses other nodes together, the segment is another one and so is its fingerprint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

_LENGTH = 32  # hexadecimal digits, 128 bits


def fingerprint(backend: str, node_keys: Iterable[str], noise: str | None) -> str:
    """The fingerprint of a finding, as 32 hexadecimal digits.

    Args:
        backend: its id with the device, as the report spells it (``ov:GPU``).
        node_keys: keys of the ONNX nodes of all its segments, in any order.
        noise: id of the cause named, None for an unexplained one.
    """
    # ASCII JSON keeps the parts apart and holds every string, lone surrogates included.
    identity = json.dumps([backend, sorted(set(node_keys)), noise])
    return hashlib.sha256(identity.encode("ascii")).hexdigest()[:_LENGTH]
