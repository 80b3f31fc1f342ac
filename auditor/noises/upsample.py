"""Up-sampling: the interpolation, where a pixel's centre is, and which of two scales is used."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from auditor.graphs import surgery
from auditor.noises._cause import Cause
from auditor.noises._rewritten import rewritten
from auditor.ports import Array, SegmentGraph, Variant

# Resize says where a pixel's centre is from opset 11 on. Before, and in Upsample, it is at the
# pixel's corner; such nodes become a Resize of opset 13.
_RESIZE, _MODERN = 11, 13
_ANTIALIAS = 18
_DEFAULTS = {
    "mode": "nearest",
    "coordinate_transformation_mode": "half_pixel",
    "nearest_mode": "round_prefer_floor",
    "cubic_coeff_a": -0.75,
    "exclude_outside": 0,
    "antialias": 0,
    "keep_aspect_ratio_policy": "stretch",
}
_CENTRE, _ROUNDING = "coordinate_transformation_mode", "nearest_mode"
_OLD = {_CENTRE: "asymmetric", _ROUNDING: "floor"}
_CENTRES = ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")
_ROUNDINGS = ("floor", "round_prefer_floor", "round_prefer_ceil", "ceil")
# What frameworks call nearest: PyTorch and OpenCV, PyTorch's nearest-exact and ONNX, TensorFlow.
_NEAREST = (("asymmetric", "floor"), ("half_pixel", "round_prefer_floor"), ("half_pixel", "floor"))
_PLAIN = {"antialias": 0, "exclude_outside": 0}  # all that mode nearest may be
_COEFFICIENTS = (-0.75, -0.5)  # PyTorch and OpenCV; Pillow and TensorFlow
_INTEGERS = (TensorProto.UINT8, TensorProto.INT8, TensorProto.INT32)
_ROUNDED = "integers are rounded to the nearest, not cut off"
_EVEN = "nearest, {}, halves to even"  # TVM's Upsample; no Resize does that
_IGNORABLE = ("keep_aspect_ratio_policy", "antialias", "exclude_outside")
_WHOLE = "scales are taken from the rounded output size"
_SPATIAL = "axes 0 and 1 keep their size"  # as images with the channels first are resized
_CUBIC_RANK = 4  # the reference interpolates by cubics over two axes only


@dataclass(frozen=True, slots=True)
class _Change:
    """A Resize done another way.

    Attributes:
        settings: attributes that differ.
        whole: its scales are the rounded output size over the input size.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    whole: bool = False


def _changes(given: Mapping[str, Any], version: int, *, fractional: bool) -> Iterator[_Change]:
    """What an engine may do instead of the given settings, most likely first.

    Args:
        given: every attribute, defaults included.
        version: the operator set.
        fractional: whether the output size may be a rounded one.
    """
    seen = [dict(given)]
    if fractional:
        yield _Change(_WHOLE, whole=True)
    ignorable = [n for n in _IGNORABLE if given[n] != _DEFAULTS[n]]
    for count in range(1, len(ignorable) + 1):
        for names in itertools.combinations(ignorable, count):
            ignored, listed = {n: _DEFAULTS[n] for n in names}, " and ".join(names)
            seen.append({**given, **ignored})
            yield _Change(f"{listed} {'is' if count == 1 else 'are'} ignored", ignored)
            if fractional:
                yield _Change(f"{listed} ignored, and {_WHOLE}", ignored, whole=True)
    for settings in _interpolations(given, version):
        changed = {**given, **settings}
        if changed not in seen:
            seen.append(changed)
            yield _Change(_described(changed, settings), settings)


def _interpolations(given: Mapping[str, Any], version: int) -> Iterator[dict[str, Any]]:
    mode, centre = given["mode"], given[_CENTRE]
    if mode == "nearest":
        for other in dict.fromkeys(("half_pixel", centre, "align_corners")):
            yield {"mode": "linear", _CENTRE: other}
        for other, rounding in _NEAREST:
            yield {_CENTRE: other, _ROUNDING: rounding}
        for other in dict.fromkeys((centre, "asymmetric")):
            yield from ({_CENTRE: other, _ROUNDING: rounding} for rounding in _ROUNDINGS)
        yield {_CENTRE: "align_corners", _ROUNDING: "round_prefer_ceil"}
        for other in dict.fromkeys(("half_pixel", centre, "align_corners")):
            yield from (cubic | {_CENTRE: other} for cubic in _cubics(given))
        return
    if mode == "cubic":
        yield from _cubics(given)
    for other, rounding in _NEAREST[:2]:
        yield {"mode": "nearest", _CENTRE: other, _ROUNDING: rounding, **_PLAIN}
    if mode == "cubic":
        yield {"mode": "linear", "exclude_outside": 0}
    else:
        yield from _cubics(given)
    yield from ({_CENTRE: other} for other in _CENTRES)
    if version >= _ANTIALIAS:
        for excluded in (1, 0):  # PyTorch and Pillow do not count what lies outside
            yield {"antialias": 1, "exclude_outside": excluded}


def _cubics(given: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for excluded in (given["exclude_outside"], 1 - given["exclude_outside"]):
        for a in dict.fromkeys((given["cubic_coeff_a"], *_COEFFICIENTS)):
            yield {"mode": "cubic", "cubic_coeff_a": a, "exclude_outside": excluded}


def _described(settings: Mapping[str, Any], changed: Mapping[str, Any]) -> str:
    words = [settings["mode"], settings[_CENTRE]]
    if settings["mode"] == "nearest":
        words.append(settings[_ROUNDING])
    if settings["mode"] == "cubic":
        words.append(f"coefficient {settings['cubic_coeff_a']:g}")
    words += [n for n in ("exclude_outside", "antialias") if settings[n] and n in changed]
    return ", ".join(words)


@dataclass(frozen=True, slots=True)
class _Site:
    """A Resize or Upsample of the segment, with what may be done there instead.

    Attributes:
        rank: of what it takes the nearest pixels of; 0 if it interpolates, or unknown.
    """

    index: int
    changes: dict[str, _Change]
    rank: int


def _sites(model: onnx.ModelProto) -> Iterator[_Site]:
    found = list(surgery.find(model, ("Resize", "Upsample")))
    version, known = surgery.opset(model), surgery.constants(model) if found else {}
    shapes = surgery.shapes(model) if found else {}
    for index, node in found:
        old = version < _RESIZE
        given = {**_DEFAULTS, **(_OLD if old else {}), **surgery.attributes(node)}
        if given[_CENTRE] == "tf_crop_and_resize":
            continue
        scales = given.get("scales", known.get(_scales(node)))
        sized = scales is None and not _scales(node)
        fractional = not sized and (scales is None or bool(np.mod(scales, 1).any()))
        changes = {
            change.name: change
            for change in _changes(given, version, fractional=fractional)
            if change.settings.get("mode") != "cubic"
            or scales is None
            or len(scales) <= _CUBIC_RANK
        }
        scaled = () if scales is None or given.get("axes") else scales
        chosen = given["mode"] == "nearest"
        rank = len(shapes.get(node.input[0], scaled)) if chosen else 0
        yield _Site(index, changes, rank)


def _scales(node: onnx.NodeProto) -> str:
    """Name of the scales, or nothing where the output size is given."""
    position = 1 if len(node.input) == 2 else 2
    sized = len(node.input) == 4 and node.input[3]
    return "" if sized or len(node.input) <= position else node.input[position]


def _changed(model: onnx.ModelProto, changes: Mapping[int, _Change]) -> onnx.ModelProto:
    """A copy in which the nodes at these positions resize in another way.

    All are a Resize of an operator set that says where a pixel's centre is.
    """
    result = surgery.copied(model)
    if surgery.opset(model) < _RESIZE:
        for entry in result.opset_import:
            if entry.domain in ("", "ai.onnx"):
                entry.version = _MODERN
    nodes = list(result.graph.node)
    del result.graph.node[:]
    for index, node in enumerate(nodes):
        if surgery.opset(model) < _RESIZE and node.op_type in ("Resize", "Upsample"):
            node.op_type = "Resize"
            node.input.insert(1, "")
            if (scales := surgery.attributes(node).get("scales")) is not None:
                name = f"{node.output[0]}/scales"
                result.graph.initializer.append(
                    numpy_helper.from_array(np.array(scales, np.float32), name)
                )
                node.input.append(name)
            surgery.set_attributes(node, scales=None, **_OLD)
        if (change := changes.get(index)) is not None:
            if change.whole:
                result.graph.node.extend(_measured(node))
            surgery.set_attributes(
                node, **{k: None if v == _DEFAULTS[k] else v for k, v in change.settings.items()}
            )
        result.graph.node.append(node)
    return result


def _measured(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    """What finds out a node's output size, which the node is then given instead of scales."""
    plain = surgery.copied(node)
    target = node.output[0]
    plain.output[0], size = f"{target}/plain", f"{target}/size"
    plain.name = ""  # ONNX Runtime takes no two nodes of one name
    yield plain
    axes = surgery.attributes(node).get("axes")
    if axes is None:
        yield helper.make_node("Shape", [plain.output[0]], [size])
    else:
        yield helper.make_node("Shape", [plain.output[0]], [f"{size}/all"])
        yield helper.make_node("Constant", [], [f"{size}/axes"], value_ints=axes)
        yield helper.make_node("Gather", [f"{size}/all", f"{size}/axes"], [size])
    node.input[2] = ""
    node.input[3:] = [size]


def _variants(segment: SegmentGraph) -> Iterable[Variant]:
    """The segment with every Resize done in each of the other ways."""
    model = segment.model
    sites = list(_sites(model))
    if not sites:
        return
    for name in dict.fromkeys(name for site in sites for name in site.changes):
        changes = {s.index: s.changes[name] for s in sites if name in s.changes}
        yield Variant(name, _changed(model, changes))
    nodes = [(s.index, model.graph.node[s.index]) for s in sites]
    spatial = partial(_spatial, known=surgery.constants(model))
    yield from rewritten(model, _SPATIAL, nodes, spatial)
    yield from _halves_to_even(model, {s.index: s.rank for s in sites if s.rank})
    types = surgery.types(model)
    stored = [(i, n) for i, n in nodes if types.get(n.input[0]) in _INTEGERS]
    yield from rewritten(model, _ROUNDED, stored, _in_float)


def _spatial(node: onnx.NodeProto, known: Mapping[str, Array]) -> str | None:
    """A Resize of the axes behind the first two only; None where no others are asked for."""
    if len(node.input) < 3 or surgery.attributes(node).get("axes"):
        return None
    names = ["x", "roi", "scales", "sizes"][: len(node.input)]
    sized = len(names) == 4 and node.input[3] != ""
    scales = known.get(node.input[2])
    if not sized and scales is not None and np.all(scales[:2] == 1):
        return None
    given, ones = names[-1], "Constant <value = float[2] {1.0, 1.0}> ()"
    asked = [*names[:-1], "changed"]
    return f"""({", ".join(names)}) => (y) {{
        zero = Constant <value = int64[1] {{0}}> () two = Constant <value = int64[1] {{2}}> ()
        far = Constant <value = int64[1] {{9223372036854775807}}> () shape = Shape(x)
        head = {"Slice(shape, zero, two)" if sized else ones} tail = Slice({given}, two, far)
        changed = Concat <axis = 0> (head, tail)
        y = Resize {surgery.options(node)} ({", ".join(asked)}) }}"""


def _halves_to_even(model: onnx.ModelProto, ranks: Mapping[int, int]) -> Iterator[Variant]:
    if not ranks:
        return
    modern = _changed(model, {})
    for centre in ("asymmetric", "half_pixel"):
        bodies = {i: _to_even(modern.graph.node[i], rank, centre) for i, rank in ranks.items()}
        yield Variant(_EVEN.format(centre), surgery.substituted(modern, bodies))


def _to_even(node: onnx.NodeProto, rank: int, centre: str) -> str:
    """What takes the nearest pixel along every axis, as a function body."""
    names = ("x", "roi", "scales", "sizes")[: len(node.input)]
    shift = 0.5 if centre == "half_pixel" else 0.0
    steps = [
        f"plain = Resize {surgery.options(node)} ({', '.join(names)}) to = Shape(plain)",
        f"of = Shape(x) half = Constant <value_float = {shift}> () x0 = Identity(x)",
        "none = Constant <value_int = 0> () one = Constant <value_int = 1> ()",
    ]
    for axis in range(rank):
        steps.append(
            f"a{axis} = Constant <value_int = {axis}> () n{axis} = Gather(to, a{axis}) "
            f"m{axis} = Gather(of, a{axis}) i{axis} = Range(none, n{axis}, one) "
            f"f{axis} = Cast <to = 1> (i{axis}) g{axis} = Cast <to = 1> (n{axis}) "
            f"h{axis} = Cast <to = 1> (m{axis}) step{axis} = Div(h{axis}, g{axis}) "
            f"c{axis} = Add(f{axis}, half) p{axis} = Mul(c{axis}, step{axis}) "
            f"s{axis} = Sub(p{axis}, half) r{axis} = Round(s{axis}) "
            f"k{axis} = Cast <to = 7> (r{axis}) last{axis} = Sub(m{axis}, one) "
            f"q{axis} = Clip(k{axis}, none, last{axis}) "
            f"x{axis + 1} = Gather <axis = {axis}> (x{axis}, q{axis})"
        )
    return f"({', '.join(names)}) => (y) {{ {' '.join(steps)} y = Identity(x{rank}) }}"


def _in_float(node: onnx.NodeProto) -> str | None:
    """A Resize of integers, rounded to the nearest of these."""
    if surgery.attributes(node).get("mode", "nearest") == "nearest":
        return None
    names = ("x", "roi", "scales", "sizes")[: len(node.input)]
    return (
        f"({', '.join(names)}) => (y) {{ wide = Cast <to = {TensorProto.FLOAT}> (x) "
        f"between = {node.op_type} {surgery.options(node)} ({', '.join(('wide', *names[1:]))}) "
        "whole = Round (between) y = Cast <to = $T> (whole) }"
    )


_COMMON = (
    "resize by whole factors, mode nearest with asymmetric coordinates and floor or mode "
    "linear with half_pixel, without antialias, exclude_outside and "
    "keep_aspect_ratio_policy"
)
NOISE = Cause(
    id="inference.upsample",
    type="upsample",
    title="A Resize interpolates, places its pixels or takes its scale another way",
    cause=(
        "Nearest, linear and cubic each exist with several pixel centres, roundings and "
        "coefficients; engines support some of them, ignore others, and where scale × size is no "
        "whole number some take the ratio of the sizes for the scale."
    ),
    applies="Resize and Upsample; not with tf_crop_and_resize",
    source=(
        "SysNoise (Wang et al., MLSys 2023), Table 1, upsample; ONNX operator Resize-19; TVM "
        "issues 19500 and 19570 (scales taken from sizes); OpenVINO operation Interpolate-11"
    ),
    advice=_COMMON,
    remedies={
        "tvm": (
            f"give Resize sizes instead of scales, and {_COMMON}: TVM derives its scale from the "
            "sizes and ignores those three; export an Upsample, whose halves TVM rounds to even, "
            "at operator set 11 or later, as Resize"
        ),
        "ov": f"{_COMMON}: OpenVINO's ONNX frontend ignores those three",
    },
    convention=True,
    forms=(
        "ATTRIBUTE is ignored",
        "ATTRIBUTES are ignored",
        _WHOLE,
        f"ATTRIBUTES ignored, and {_WHOLE}",
        "nearest, CENTRE, ROUNDING",
        _EVEN.format("CENTRE"),
        "linear, CENTRE",
        "cubic, CENTRE, coefficient NUMBER",
        "cubic, CENTRE, coefficient NUMBER, exclude_outside",
        "MODE, CENTRE, antialias",
        _SPATIAL,
        _ROUNDED,
    ),
    variants=_variants,
)
