"""What quantising after training needs on any backend: calibration data, and what came of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from auditor.errors import UsageError
from auditor.records.backend import Switch

if TYPE_CHECKING:
    from auditor.ports import Arrays
    from auditor.records.backend import BuildRequest

OPTION = "quantize"
# What the build is confirmed with: the same without quantisation.
SWITCH = Switch("quantisation to 8 bits", {OPTION: "none"}, ("precision.int8",))


@dataclass(frozen=True, slots=True)
class Quantised:
    """What a quantiser chose, by the float model's names.

    Attributes:
        weights: real values of the quantised constants.
        grids: of each activation, ``[3, …]``: smallest and largest value, and how many there are.
        note: how it was done, as a sentence.
    """

    weights: Arrays
    grids: Arrays
    note: str


def asked(request: BuildRequest) -> tuple[bool, BuildRequest]:
    """Whether to quantise; and the request without that option.

    Raises:
        UsageError: the option has another value, or what it needs is not there.
    """
    rest = dict(request.options)
    value = rest.pop(OPTION, "none").lower()
    plain = replace(request, options=rest)
    if value == "none":
        return False, plain
    if value != "int8":
        raise UsageError(f"{OPTION}={value} is not known here", f"Use {OPTION}=int8.")
    if request.artifact is not None:
        raise UsageError(
            f"{OPTION}=int8 quantises the ONNX model, but an artifact was given",
            "Give one of them.",
        )
    if request.calibration is None:
        raise UsageError(
            f"{OPTION}=int8 needs calibration data, which only audit MODEL gives",
            "Quantise the model first, and audit that file.",
        )
    return True, plain


def refuse(options: Mapping[str, str]) -> None:
    """Refuse to write a script that would have to quantise.

    Raises:
        UsageError: it would.
    """
    if options.get(OPTION, "none").lower() != "none":
        raise UsageError(
            f"a script does not repeat {OPTION}={options[OPTION]}",
            "Quantise the model first, and audit that file with --artifact.",
        )


def samples(request: BuildRequest) -> Iterator[Arrays]:
    """The calibration samples by input name, read one at a time."""
    assert request.calibration is not None
    for path in sorted(request.calibration.glob("*.npz")):
        with np.load(path) as stored:
            yield {name: stored[f"arr_{i}"] for i, name in enumerate(request.shapes)}


def count(request: BuildRequest) -> int:
    """How many there are."""
    assert request.calibration is not None
    return len(list(request.calibration.glob("*.npz")))
