"""Planted resizes: one dense matrix per axis in numpy, PyTorch's rules, and TVM's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from torch.nn.functional import interpolate

from auditor.noises import upsample
from auditor.ports import Array
from tests.helpers import named
from tests.segments import diagnose, make_segment, run

ID = "inference.upsample"
Place = Callable[[int, float, int, int], float]  # (i, in / out, in size, out size) → where it reads

CENTRES: dict[str, Place] = {
    "half_pixel": lambda i, step, n, m: (2 * i + 1) * step / 2 - 0.5,
    "asymmetric": lambda i, step, n, m: i * step,
    "align_corners": lambda i, step, n, m: i * (n - 1) / (m - 1),
}
ROUNDINGS: dict[str, Callable[[float], float]] = {
    "floor": np.floor,
    "ceil": np.ceil,
    "round_prefer_floor": lambda v: -np.floor(-v + 0.5),
    "round_prefer_ceil": lambda v: np.floor(v + 0.5),
    "halves to even": np.rint,
}


def nearest(n: int, m: int, step: float, centre: str, rounding: str) -> Array:
    matrix = np.zeros((m, n))
    for i in range(m):
        at = ROUNDINGS[rounding](round(CENTRES[centre](i, step, n, m), 6))
        matrix[i, int(np.clip(at, 0, n - 1))] = 1
    return matrix


def linear(n: int, m: int, step: float, centre: str) -> Array:
    matrix = np.zeros((m, n))
    for i in range(m):
        at = min(max(CENTRES[centre](i, step, n, m), 0.0), n - 1.0)
        matrix[i] = np.maximum(0, 1 - abs(np.arange(n) - at))
    return matrix


def cubic(n: int, m: int, step: float, centre: str, a: float, *, inside: bool = False) -> Array:
    matrix = np.zeros((m, n))
    for i in range(m):
        at = CENTRES[centre](i, step, n, m)
        for tap in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
            d = abs(at - tap)
            near = 1 - (a + 3) * d**2 + (a + 2) * d**3
            far = a * (d**3 - 5 * d**2 + 8 * d - 4)
            if not inside or 0 <= tap < n:
                matrix[i, min(max(tap, 0), n - 1)] += near if d <= 1 else far if d < 2 else 0
        matrix[i] /= matrix[i].sum()
    return matrix


def apply(x: Array, rows: Array, columns: Array) -> Array:
    return np.einsum("nchw,ih,jw->ncij", x.astype(np.float64), rows, columns).astype(np.float32)


def resize(
    scales: tuple[float, float] | None = None,
    sizes: tuple[int, ...] | None = None,
    opset: int = 18,
    **attributes: Any,
) -> Any:
    inputs = ["x", "", "scales"] if sizes is None else ["x", "", "", "sizes"]
    constants: dict[str, Array] = (
        {"scales": np.array([1, 1, *(scales or ())], np.float32)}
        if sizes is None
        else {"sizes": np.array(sizes, np.int64)}
    )
    node = helper.make_node("Resize", inputs, ["y"], **attributes)
    return make_segment([node], constants, ["x"], ["y"], opset=opset)


def on_tvm(model: onnx.ModelProto, x: Array) -> Array:
    tvm = pytest.importorskip("tvm", reason="needs the [tvm] extra")
    from tvm import relax
    from tvm.relax.frontend.onnx import from_onnx

    module = from_onnx(model, shape_dict={"x": list(x.shape)})
    machine = relax.VirtualMachine(tvm.compile(module, target="llvm"), tvm.cpu())
    result: Array = machine["main"](tvm.runtime.tensor(x)).numpy()
    return result


@pytest.fixture
def x(generator: np.random.Generator) -> Array:
    return generator.standard_normal((1, 3, 6, 7)).astype(np.float32)


check = partial(named, ID)


@pytest.mark.parametrize("centre", ["half_pixel", "align_corners"])
def test_nearest_became_linear(x: Array, centre: str) -> None:
    segment = resize(
        (2, 2), mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"
    )
    planted = apply(x, linear(6, 12, 0.5, centre), linear(7, 14, 0.5, centre))
    check(diagnose(segment, {"x": x}, {"y": planted}), f"linear, {centre}")
    for a in (-0.75, -0.5):
        planted = apply(x, *(cubic(n, 2 * n, 0.5, "asymmetric", a) for n in (6, 7)))
        found = diagnose(segment, {"x": x}, {"y": planted})
        check(found, f"cubic, asymmetric, coefficient {a}")
    planted = apply(x, *(cubic(n, 2 * n, 0.5, centre, -0.75) for n in (6, 7)))
    found = diagnose(segment, {"x": x}, {"y": planted})
    check(found, f"cubic, {centre}, coefficient -0.75")


def test_linear_became_nearest(x: Array) -> None:
    segment = resize((3, 2), mode="linear")
    planted = x.repeat(3, 2).repeat(2, 3)
    found = diagnose(segment, {"x": x}, {"y": planted})
    check(found)
    assert found.bit_identical == 1.0


@pytest.mark.parametrize("other", ["asymmetric", "align_corners"])
@pytest.mark.parametrize("kind", ["linear", "cubic"])
def test_other_pixel_centre(x: Array, kind: str, other: str) -> None:
    segment = resize((2, 2), mode=kind, opset=13)
    matrices = [
        linear(n, 2 * n, 0.5, other) if kind == "linear" else cubic(n, 2 * n, 0.5, other, -0.75)
        for n in (6, 7)
    ]
    check(diagnose(segment, {"x": x}, {"y": apply(x, *matrices)}))


@pytest.mark.parametrize("given", ["floor", "round_prefer_ceil"])
@pytest.mark.parametrize("other", ["ceil", "round_prefer_floor"])
def test_other_rounding_of_nearest(x: Array, given: str, other: str) -> None:
    sizes = (1, 3, 9, 14)
    segment = resize(sizes=sizes, coordinate_transformation_mode="asymmetric", nearest_mode=given)
    rows = nearest(6, 9, 6 / 9, "asymmetric", other)
    planted = apply(x, rows, nearest(7, 14, 0.5, "asymmetric", other))
    found = diagnose(segment, {"x": x}, {"y": planted})
    check(found)
    assert found.bit_identical == 1.0


@pytest.mark.parametrize("kind", ["nearest", "linear", "cubic"])
def test_scale_taken_from_the_sizes(x: Array, kind: str) -> None:
    segment = resize((1.7, 0.6), mode=kind)
    matrices = []
    for n, m in ((6, 10), (7, 4)):
        if kind == "nearest":
            matrices.append(nearest(n, m, n / m, "half_pixel", "round_prefer_floor"))
        elif kind == "linear":
            matrices.append(linear(n, m, n / m, "half_pixel"))
        else:
            matrices.append(cubic(n, m, n / m, "half_pixel", -0.75))
    found = diagnose(segment, {"x": x}, {"y": apply(x, *matrices)})
    check(found, "scales are taken from the rounded output size")


@pytest.mark.parametrize(("a", "inside"), [(-0.5, False), (-0.75, True), (-0.5, True)])
def test_cubic_coefficient_and_border(x: Array, a: float, inside: bool) -> None:
    plain = cubic(6, 12, 0.5, "half_pixel", -0.75), cubic(7, 14, 0.5, "half_pixel", -0.75)
    other = [cubic(n, 2 * n, 0.5, "half_pixel", a, inside=inside) for n in (6, 7)]
    segment = resize((2, 2), mode="cubic")
    check(diagnose(segment, {"x": x}, {"y": apply(x, *other)}))
    set_so = resize((2, 2), mode="cubic", cubic_coeff_a=a, exclude_outside=int(inside))
    check(diagnose(set_so, {"x": x}, {"y": apply(x, *plain)}))


@pytest.mark.parametrize("kind", ["linear", "cubic"])
def test_antialias_is_ignored(x: Array, kind: str) -> None:
    segment = resize((0.5, 0.7), mode=kind, antialias=1)
    for steps, variant in (
        ((2, 1 / 0.7), "antialias is ignored"),
        ((2, 7 / 4), "antialias ignored, and scales are taken from the rounded output size"),
    ):
        matrices = [
            linear(n, m, s, "half_pixel")
            if kind == "linear"
            else cubic(n, m, s, "half_pixel", -0.75)
            for n, m, s in zip((6, 7), (3, 4), steps, strict=True)
        ]
        check(diagnose(segment, {"x": x}, {"y": apply(x, *matrices)}), variant)


def test_antialias_of_pytorch_was_lost(x: Array) -> None:
    """At the borders it leaves out what lies outside."""
    pixels = torch.from_numpy(x)
    planted = interpolate(pixels, (3, 4), mode="bilinear", antialias=True).numpy()
    segment = resize(sizes=(*x.shape[:2], 3, 4), mode="linear")
    check(diagnose(segment, {"x": x}, {"y": planted}))


def test_aspect_ratio_is_not_kept(x: Array) -> None:
    """The output has another shape than the reference's."""
    segment = resize(sizes=(1, 3, 6, 14), mode="linear", keep_aspect_ratio_policy="not_larger")
    planted = apply(x, np.eye(6), linear(7, 14, 0.5, "half_pixel"))
    check(diagnose(segment, {"x": x}, {"y": planted}), "keep_aspect_ratio_policy is ignored")


@pytest.mark.parametrize(("op_type", "opset"), [("Upsample", 9), ("Resize", 10)])
def test_operators_without_coordinates(x: Array, op_type: str, opset: int) -> None:
    scales = {"s": np.array([1, 1, 2, 2], np.float32)}
    segment = make_segment(f'y = {op_type} <mode = "linear"> (x, s)', scales, opset=opset)
    planted = apply(x, *(linear(n, 2 * n, 0.5, "half_pixel") for n in (6, 7)))
    check(diagnose(segment, {"x": x}, {"y": planted}))


@pytest.mark.parametrize(("opset", "scale"), [(7, 2.0), (7, 2.5), (9, 2.0), (9, 2.5)])
def test_upsample_that_rounds_halves_to_even(x: Array, opset: int, scale: float) -> None:
    """The scales are an attribute before operator set 9."""
    scales = np.array([1, 1, scale, 2], np.float32)
    given = {"scales": scales.tolist()} if opset < 9 else {}
    node = helper.make_node("Upsample", ["x"] if given else ["x", "s"], ["y"], **given)
    segment = make_segment([node], {} if given else {"s": scales}, ["x"], ["y"], opset=opset)
    rows = nearest(6, int(6 * scale), 1 / scale, "asymmetric", "halves to even")
    planted = apply(x, rows, nearest(7, 14, 0.5, "asymmetric", "halves to even"))
    found = diagnose(segment, {"x": x}, {"y": planted})
    check(found, "nearest, asymmetric, halves to even")
    assert found.bit_identical == 1.0


def test_tvm_rounds_halves_of_upsample_to_even(x: Array) -> None:
    segment = make_segment("y = Upsample <scales = [1.0, 1.0, 2.0, 2.0]> (x)", opset=8)
    check(diagnose(segment, {"x": x}, {"y": on_tvm(segment.model, x)}))


def test_two_attributes_that_are_ignored(x: Array) -> None:
    """OpenVINO's frontend ignores both."""
    n, c = x.shape[:2]
    segment = resize(sizes=(n, c, 4, 5), mode="cubic", antialias=1, exclude_outside=1)
    planted = apply(x, *(cubic(n, m, n / m, "half_pixel", -0.75) for n, m in ((6, 4), (7, 5))))
    found = diagnose(segment, {"x": x}, {"y": planted})
    check(found, "antialias and exclude_outside are ignored")


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("sized", [True, False])
def test_channels_that_are_not_resized(x: Array, mode: str, sized: bool) -> None:
    """Engines take the first two axes for images' and channels', whatever the scales say."""
    attributes = 'mode = "nearest", coordinate_transformation_mode = "asymmetric"'
    attributes = attributes if mode == "nearest" else 'mode = "linear"'
    n, c = x.shape[:2]
    given = [n, 2 * c, 12, 7] if sized else [1.0, 2.0, 2.0, 1.0]
    nodes = f"y = Resize <{attributes}> ({'x, , , s' if sized else 'x, , s'})"
    constants = {"s": np.array(given, np.int64 if sized else np.float32)}
    rows = (
        nearest(6, 12, 0.5, "asymmetric", "round_prefer_floor")
        if mode == "nearest"
        else linear(6, 12, 0.5, "half_pixel")
    )
    planted = apply(x, rows, np.eye(7))
    found = diagnose(make_segment(nodes, constants), {"x": x}, {"y": planted})
    check(found, "axes 0 and 1 keep their size")


def test_only_the_given_axes(x: Array) -> None:
    scales = {"s": np.array([2.5, 1], np.float32)}
    segment = make_segment('y = Resize <axes = [2, 3], mode = "linear"> (x, , s)', scales, opset=18)
    x = x[:, :, :5]
    planted = apply(x, linear(5, 12, 5 / 12, "half_pixel"), np.eye(7))
    check(diagnose(segment, {"x": x}, {"y": planted}))


@pytest.mark.parametrize("kind", [np.uint8, np.int32])
def test_integers_are_rounded(generator: np.random.Generator, kind: Any) -> None:
    of = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    scales = {"s": np.array([1, 1, 1, 2], np.float32)}
    segment = make_segment('y = Resize <mode = "linear"> (x, , s)', scales, kind=of)
    x = generator.integers(0, 256, (1, 1, 9, 11), kind)
    at = (np.arange(22) + 0.5) / 2 - 0.5
    planted = np.array([[[np.interp(at, np.arange(11), row) for row in x[0, 0]]]])
    found = diagnose(segment, {"x": x}, {"y": np.rint(planted).astype(kind)})
    assert (found.noise, found.bit_identical) == (ID, 1.0)


def test_tvm_takes_the_scale_from_the_sizes(x: Array) -> None:
    segment = resize((1.7, 0.6), mode="linear")
    check(diagnose(segment, {"x": x}, {"y": on_tvm(segment.model, x)}))


@pytest.mark.parametrize("defect", ["scaled", "swapped", "shifted"])
@pytest.mark.parametrize("kind", ["nearest", "linear", "cubic"])
def test_defects_are_not_named(x: Array, kind: str, defect: str) -> None:
    segment = resize((1.5, 2), mode=kind)
    right = run(segment.model, {"x": x})["y"]
    planted = {
        "scaled": right * np.float32(0.98),
        "swapped": right[:, [1, 0, 2]],
        "shifted": np.roll(right, 1, 2),
    }[defect]
    assert diagnose(segment, {"x": x}, {"y": planted}).noise is None


def test_nothing_to_replay_without_a_resize() -> None:
    segment = make_segment("y = Relu(x)")
    assert not list(upsample.NOISE.variants(segment))
