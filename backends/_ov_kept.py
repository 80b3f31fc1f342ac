"""Single layers in float32 inside a program that OpenVINO otherwise computes in fewer bits.

OpenVINO has no public switch for it. Its CPU device leaves an operation in the precision of the
model where the operation's run-time information disables the conversion to float16, whatever the
narrow type is. That mark is read from a model file only, and is lost where the device replaces an
operation, as it does a product with constant weights; such a product is therefore written as the
operation that the device would put there. Source: OpenVINO's code, ``DisablePrecisionConversion``,
``Graph::EnforceInferencePrecision`` and ``ConvertMatMulToFC``; not documented, so whoever writes
such a file has to look at what the device then executes.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np

_MARK = {"name": "DisablePrecisionConversion", "version": "0", "value": "dynamic:f16"}
_RANK = 7  # of tensors that elementwise operations are not gathered on
_UNMARKED = ("Parameter", "Const", "Result")


def write(
    model: Any,
    path: Path,
    kept: Callable[[str], bool | None],
    called: Callable[[str], str],
    *,
    products: bool,
) -> None:
    """Write ``model`` as OpenVINO's own file (``path`` and ``.bin``), with layers kept in float32.

    Args:
        model: an ``openvino.Model``, left as it is.
        path: where to write, ending in ``.xml``.
        kept: whether the layer of this friendly name is to be kept; None where it is no layer of
            the model's, which then is kept where everything that reads it is.
        called: how to call the layer of a friendly name in the file.
        products: whether products with constant weights are written as the CPU device's own.

    Raises:
        RuntimeError: OpenVINO cannot write it.
    """
    import openvino as ov
    from openvino._offline_transformations import apply_moc_transformations

    changed = model.clone()
    for op in changed.get_ordered_ops():
        if kept(op.get_friendly_name()):
            _scaled_in_place(op)
            _out_of_reach(op)
            _older_resize(op)
    # Done now, not when it is compiled: these passes replace operations, and lose their marks.
    apply_moc_transformations(changed, False)
    ov.save_model(changed, path, compress_to_fp16=False)
    file = _File(path)
    for id in reversed(file.layers):  # in topological order, so that readers come first
        layer = file.layers[id]
        readers = file.readers(id)
        keep = kept(layer.get("name", ""))
        if keep is None:
            keep = bool(readers) and all(file.marked(reader) for reader, _ in readers)
        if keep and layer.get("type") not in _UNMARKED:
            file.mark(id)
    if products:
        for id in [i for i, x in file.layers.items() if x.get("type") == "MatMul"]:
            if file.marked(id):
                file.fully_connect(id)
    for layer in file.layers.values():
        layer.set("name", called(layer.get("name", "")))
    file.save()


def _scaled_in_place(op: Any) -> None:
    """A product that is divided by a constant, written so that it stays where it is.

    When the model is compiled a factor moves to one of the operands, as a new operation without a
    mark: attention's scale would round the keys. ``x - x·(1 - s)`` does not move.
    """
    from openvino import opset13 as opset

    if op.get_type_name() not in ("Divide", "Multiply"):
        return
    product, constant = (op.input_value(i).get_node() for i in (0, 1))
    if product.get_type_name() != "MatMul" or constant.get_type_name() != "Constant":
        return
    if product.input_value(1).get_node().get_type_name() == "Constant":
        return
    values = constant.data
    if values.dtype != np.float32 or values.size != 1 or not values.all():
        return
    scale = values if op.get_type_name() == "Multiply" else 1 / values
    source, name = op.input_value(0), op.get_friendly_name()
    part = opset.multiply(source, opset.constant(1 - scale))
    rest = opset.subtract(source, part)
    part.set_friendly_name(name)
    rest.set_friendly_name(name)
    _put_in_place_of(op, rest)


def _out_of_reach(op: Any) -> None:
    """A PReLU that is no part of a convolution, on tensors of rank 7.

    When the model is compiled, elementwise operations of lower ranks are gathered in new ones
    without a mark, but for those that become one kernel with a convolution or a product before
    them; and a product is written as the device's own operation here, which that pass ignores.
    """
    from openvino import opset13 as opset

    if op.get_type_name() != "PRelu":
        return
    before = op.input_value(0).get_node()
    sources = [before, *(before.input_value(i).get_node() for i in range(before.get_input_size()))]
    if any("Convolution" in node.get_type_name() for node in sources):
        return
    dimensions, slope = op.get_output_partial_shape(0).rank, op.input_value(1).get_node()
    if slope.get_type_name() != "Constant" or not dimensions.is_static:
        return
    rank = dimensions.get_length()
    if not 2 <= rank < _RANK or slope.data.ndim > 1:
        return
    along = np.reshape(slope.data, [1, -1] + [1] * (_RANK - 2))  # the channels
    same = [0] * rank  # as the dimensions are, where some are open
    wide = opset.reshape(op.input_value(0), same + [1] * (_RANK - rank), True)
    done = opset.prelu(wide, opset.constant(along))
    back = opset.reshape(done, same, True)
    for made in (wide, done, back):
        made.set_friendly_name(op.get_friendly_name())
    _put_in_place_of(op, back)


def _older_resize(op: Any) -> None:
    """A resize as the operation that the device would replace it with, without its mark."""
    from openvino import opset10, opset13

    if op.get_type_name() != "Interpolate" or op.get_type_info().version_id != "opset11":
        return
    said = op.get_attributes()
    given = op.input_value(1)
    count = given.get_partial_shape()
    if said["mode"] not in ("nearest", "linear", "linear_onnx", "cubic") or not count.is_static:
        return
    # The older one has an input for sizes and one for scales, and does not look at the other.
    unread = np.ones(count.to_shape())
    if said["shape_calculation_mode"] == "scales":
        both = opset13.constant(unread.astype(np.int64)).output(0), given
    else:
        both = given, opset13.constant(unread.astype(np.float32)).output(0)
    axes = [op.input_value(2)] if op.get_input_size() > 2 else []
    made = opset10.interpolate(op.input_value(0), *both, axes=axes[0] if axes else None, **said)
    made.set_friendly_name(op.get_friendly_name())
    _put_in_place_of(op, made)


def _put_in_place_of(op: Any, made: Any) -> None:
    """Have what reads ``op``, which ``made`` itself must not do any more, read ``made``."""
    made.output(0).set_names(op.output(0).get_names())
    for reader in op.output(0).get_target_inputs():
        reader.replace_source_output(made.output(0))


class _File:
    """An ``.xml`` as OpenVINO writes it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tree = ET.parse(path)
        root = self._tree.getroot()
        self._layers, self._edges = (_child(root, tag) for tag in ("layers", "edges"))
        self.layers = {layer.get("id", ""): layer for layer in self._layers}
        self._marked = set[str]()

    def save(self) -> None:
        self._tree.write(self._path)

    def readers(self, id: str) -> list[tuple[str, ET.Element]]:
        """Who reads a layer, and by which edge."""
        return [(e.get("to-layer", ""), e) for e in self._edges if e.get("from-layer") == id]

    def marked(self, id: str) -> bool:
        return id in self._marked

    def mark(self, id: str) -> None:
        layer = self.layers[id]
        info = layer.find("rt_info")
        if info is None:
            info = ET.Element("rt_info")
            layer.insert(0 if layer.find("data") is None else 1, info)
        ET.SubElement(info, "attribute", _MARK)
        self._marked.add(id)
        self._first_version(layer)

    def _first_version(self, layer: ET.Element) -> None:
        """What the device's own passes replace an operation with, without its mark."""
        data, outputs = layer.find("data"), layer.find("output")
        if data is None or outputs is None or layer.get("version") != "opset8":
            return
        if layer.get("type") == "SoftMax":
            rank = sum(1 for _ in outputs[0].iter("dim"))
            data.set("axis", str(int(data.get("axis", "1")) % rank))
        elif layer.get("type") == "MaxPool":
            indices = {e.get("from-port") for _, e in self.readers(layer.get("id", ""))}
            if outputs[-1].get("id") in indices or set(data.get("dilations", "")) - set("1, "):
                return
            outputs.remove(outputs[-1])
            for name in ("dilations", "axis", "index_element_type"):
                data.attrib.pop(name, None)
        else:
            return
        layer.set("version", "opset1")

    def fully_connect(self, id: str) -> None:
        """Write a product with constant weights, and the constant added to it, as one layer."""
        layer = self.layers[id]
        data = layer.find("data")
        if data is None or data.get("transpose_a") == "true":
            return
        weights = self._source(id, 1)
        if weights.get("type") != "Const" or data.get("transpose_b") != "true":
            return
        shape = _shape(weights)
        if len(shape) != 2 or (element := _child(weights, "data").get("element_type")) != "f32":
            return
        bias = self._bias(id, shape[0])
        if bias is None:
            bias = self._empty()
        layer.set("type", "FullyConnected")
        layer.set("version", "ie_internal_opset")
        data.clear()
        data.set("output_type", element)
        port = _child(bias, "output")[0]
        used = [int(p.get("id", "0")) for kind in ("input", "output") for p in _child(layer, kind)]
        free = str(1 + max(used))
        into = {"id": free, "precision": port.get("precision", "")}
        ET.SubElement(ET.SubElement(_child(layer, "input"), "port", into), "dim").text = str(
            _shape(bias)[0]
        )
        self._edge(bias.get("id", ""), port.get("id", ""), id, free)

    def _bias(self, id: str, size: int) -> ET.Element | None:
        """The constant of the addition that alone reads a layer, which then takes its place."""
        readers = self.readers(id)
        if len(readers) != 1 or not self.marked(readers[0][0]):
            return None
        reader, edge = readers[0]
        add = self.layers[reader]
        if add.get("type") != "Add":
            return None
        others = [e for e in self._edges if e.get("to-layer") == reader and e is not edge]
        bias = self.layers[others[0].get("from-layer", "")] if others else add
        if bias.get("type") != "Const" or prod(_shape(bias)) != size or _shape(bias)[-1] != size:
            return None
        if len(self.readers(bias.get("id", ""))) != 1:
            return None
        made, out = (_child(self.layers[i], "output")[0] for i in (id, reader))
        if [d.text for d in made.iter("dim")] != [d.text for d in out.iter("dim")]:
            return None
        made.set("names", out.get("names", ""))
        self.layers[id].set("name", add.get("name", ""))
        for _, onward in self.readers(reader):
            onward.set("from-layer", id)
            onward.set("from-port", made.get("id", ""))
        for gone in (edge, others[0]):
            self._edges.remove(gone)
        self._layers.remove(self.layers.pop(reader))
        self._marked.discard(reader)
        _child(bias, "data").set("shape", str(size))
        port = _child(bias, "output")[0]
        for dim in list(port.iter("dim"))[:-1]:
            port.remove(dim)
        return bias

    def _empty(self) -> ET.Element:
        """The constant that stands for no bias."""
        id = str(1 + max(map(int, self.layers)))
        layer = ET.Element("layer", id=id, name=f"none{id}", type="Const", version="opset1")
        data = {"element_type": "dynamic", "shape": "0", "offset": "0", "size": "0"}
        ET.SubElement(layer, "data", data)
        port = ET.SubElement(ET.SubElement(layer, "output"), "port", id="0", precision="dynamic")
        ET.SubElement(port, "dim").text = "0"
        self._layers.insert(0, layer)
        self.layers[id] = layer
        return layer

    def _source(self, id: str, place: int) -> ET.Element:
        port = _child(self.layers[id], "input")[place].get("id")
        edges = (e for e in self._edges if e.get("to-layer") == id and e.get("to-port") == port)
        return self.layers[next(edges).get("from-layer", "")]

    def _edge(self, source: str, out: str, target: str, into: str) -> None:
        ends = {"from-layer": source, "from-port": out, "to-layer": target, "to-port": into}
        ET.SubElement(self._edges, "edge", ends)


def _child(element: ET.Element, tag: str) -> ET.Element:
    found = element.find(tag)
    if found is None:
        raise RuntimeError(f"OpenVINO wrote a model without {tag}")
    return found


def _shape(constant: ET.Element) -> list[int]:
    text = _child(constant, "data").get("shape", "")
    return [int(size) for size in text.split(",") if size.strip()] or [1]
