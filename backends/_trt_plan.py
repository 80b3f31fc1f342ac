"""What a finished TensorRT plan tells without a GPU.

TensorRT itself reads a plan on a CUDA device only. But the file begins with a header (magic,
size, version), and a plan built with detailed verbosity carries its layers' metadata as text,
``[ONNX Layer: name]``. Nothing here is an interface that NVIDIA documents: what is not found is
called unknown, and no comparison rests on it.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass

_MAGIC = {b"ptrt": "TensorRT", b"vtrt": "TensorRT for RTX"}
_SIZE, _VERSION = 16, 24  # offsets: of a 64-bit length, and of four bytes
_ORIGIN = re.compile(rb"\[ONNX Layer: ([^\]\x00-\x1f]{1,512})\]")
_TARGET = re.compile(rb"accelerators=\{(sm\d+)")


@dataclass(frozen=True, slots=True)
class Written:
    """What is written in a plan.

    Attributes:
        product: what made it; None where the file is no plan.
        version: its version; "" where the header has another form.
        origins: names of the ONNX nodes in the layers' metadata.
        target: the compute capability that it was built for; "" where not stated.
        whole: whether the file is as long as its header says, as far as that is known.
    """

    product: str | None
    version: str
    origins: frozenset[str]
    target: str
    whole: bool


def read(data: bytes) -> Written:
    """Read a plan's header and the text in it."""
    product = _MAGIC.get(data[:4])
    length, version = 0, ""
    if product is not None and len(data) >= _VERSION + 4:
        (length,) = struct.unpack_from("<Q", data, _SIZE)
        if length == len(data):
            version = ".".join(map(str, data[_VERSION : _VERSION + 4]))
    origins = frozenset(m.decode("utf-8", "replace") for m in _ORIGIN.findall(data))
    target = _TARGET.search(data)
    return Written(
        product,
        version,
        origins,
        target[1].decode() if target else "",
        product != "TensorRT for RTX" or length == len(data),  # the one layout that was seen
    )


def sentences(
    name: str, data: bytes, written: Written, nodes: Collection[str], outputs: Sequence[str]
) -> tuple[str, ...]:
    """What there is to say of a plan beside the model that it shall have been made of.

    Args:
        name: of the file.
        data: what is in it.
        written: what ``read`` made of that.
        nodes: names of the model's nodes, and of what they make.
        outputs: names of the model's outputs.
    """
    version = f" {written.version}" if written.version else ""
    target = f", for {written.target}" if written.target else ""
    said = [
        f"{name} was loaded instead of compiling the ONNX file: {len(data)} bytes written by "
        f"{written.product}{version}{target}."
    ]
    if written.origins:
        known = sum(o.rsplit(" | ", 1)[-1].rsplit(" (", 1)[0] in nodes for o in written.origins)
        said.append(
            f"It names {len(written.origins)} ONNX nodes in its layers; {known} are the model's."
        )
    else:
        said.append(
            "It does not say which ONNX nodes its layers come from: it was built without "
            "ProfilingVerbosity.DETAILED."
        )
    said += [
        f"The model's output `{output}` is not written in it."
        for output in outputs
        if output.encode() not in data
    ]
    return tuple(said)
