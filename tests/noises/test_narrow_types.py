"""Exports in float16 of modules that compute in float32."""

from __future__ import annotations

import math

import numpy as np
import pytest

from auditor.noises import export_narrow_types
from tests.segments import diagnose, make_segment


@pytest.mark.parametrize(("operator", "factor"), [("Mul", 1 / math.sqrt(8)), ("Div", math.sqrt(8))])
@pytest.mark.parametrize("turned", [1.0, 1.01])
@pytest.mark.parametrize("kept", [np.float16, np.float32])
def test_a_factor_that_was_rounded_too(
    operator: str, factor: float, turned: float, kept: type[np.floating]
) -> None:
    """The scale of attention, which is no parameter of any module; another one is unexplained."""
    x = np.random.default_rng(0).standard_normal((2, 4, 16, 16), np.float32)
    wide, by = "b = Identity (a)", "scale"
    if kept is np.float32:  # as the file is run with every result rounded
        wide, by = "b = Cast <to = 1> (a) e = Cast <to = 10> (scale) f = Cast <to = 1> (e)", "f"
    segment = make_segment(
        f"a = Cast <to = 10> (x) {wide} c = {operator} (b, {by}) d = Cast <to = 10> (c) "
        "y = Cast <to = 1> (d)",
        {"scale": np.array(factor, np.float16).astype(kept)},
    )
    scale = np.float32(factor * turned)
    found = diagnose(segment, {"x": x}, {"y": x * scale if operator == "Mul" else x / scale})
    if turned == 1:
        assert found.noise == export_narrow_types.NOISE.id and (found.explained or 0) > 0.9999
    else:
        assert found.noise is None
