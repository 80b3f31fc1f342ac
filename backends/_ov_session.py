"""Runs a compiled model, whole or cut out, and decodes what it computed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from auditor.errors import BackendError
from auditor.ports import Array, Arrays
from backends._ov_program import SHOWING, Candidate, Program
from backends._ov_source import FLOATS, Grid, Source


class Session:
    """A compiled model and its one inference request."""

    def __init__(self, compiled: Any) -> None:
        self.compiled = compiled
        self.inputs = tuple(compiled.inputs)
        self._types = tuple(o.get_element_type().get_type_name() for o in compiled.outputs)
        self._request = compiled.create_infer_request()

    def infer(self, feeds: Sequence[Array], wanted: Sequence[int]) -> list[Array]:
        """The outputs at the indices ``wanted``, copied; bfloat16 widened to float32.

        Raises:
            BackendError: the engine failed.
        """
        try:
            for index, (port, value) in enumerate(zip(self.inputs, feeds, strict=True)):
                self._request.set_input_tensor(index, _tensor(value, port))
            self._request.infer()
            return [
                _decoded(self._request.get_output_tensor(index).data, self._types[index])
                for index in wanted
            ]
        except RuntimeError as error:
            raise BackendError(
                f"OpenVINO failed to run: {reason_of(error)}", stage="run"
            ) from error


def _tensor(value: Array, port: Any) -> Any:
    import openvino as ov

    contiguous = np.ascontiguousarray(value).reshape(value.shape)  # 0-d stays 0-d
    if port.get_element_type() == ov.Type.bf16:
        # OpenVINO's numpy view of bfloat16 is float16 by name: hand over the bits.
        tensor = ov.Tensor(ov.Type.bf16, ov.Shape(value.shape))
        if value.dtype.itemsize != 2:
            raise BackendError(
                f"the bfloat16 input needs 16-bit values, not {value.dtype}", stage="run"
            )
        tensor.data[...] = contiguous.view(np.float16)
        return tensor
    return ov.Tensor(contiguous)


def _decoded(data: Array, kind: str) -> Array:
    """A copy of an output tensor's data; ``kind`` bf16 arrives as float16 with bfloat16's bits."""
    if kind == "bf16":
        widened: Array = (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        return widened
    return np.array(data)


def same_bits(a: Array, b: Array) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@dataclass(frozen=True, slots=True, eq=False)
class CutOut:
    """Kernels compiled apart from the rest.

    Attributes:
        feeds: tensor fed to each parameter, in order.
        targets: what each result shows, in order.
        grids: of tensors that are fed as integers of 8 bits, what widens them.
    """

    session: Session
    program: Program
    feeds: tuple[str, ...]
    targets: tuple[Candidate, ...]
    grids: Mapping[str, Grid]

    def run(self, known: Mapping[str, Array], wanted: Collection[Candidate]) -> Arrays:
        """Values of the targets ``wanted``, by tensor name.

        Other targets may be what they are made from. While these are not known, their readers run
        on zeros, to no effect: no kernel serves two targets.
        """
        waiting = {c.tensor for c in self.targets} - known.keys()
        feeds = [
            _zeros(port) if name in waiting else _held(known[name], port, self.grids.get(name))
            for name, port in zip(self.feeds, self.session.inputs, strict=True)
        ]
        indices = [i for i, c in enumerate(self.targets) if c in wanted]
        shown = [self.targets[i] for i in indices]
        values = self.session.infer(feeds, indices)
        return {c.tensor: as_shown(v, c) for c, v in zip(shown, values, strict=True)}


@dataclass(frozen=True, slots=True)
class Plain:
    """The program as it is deployed, and how the changed model is compiled like it.

    Attributes:
        compile: an ``openvino.Model`` → the engine's compiled model; may raise RuntimeError.
        inputs: ONNX names of the engine's inputs, in their order.
        outputs: ONNX name, index among the engine's results.
        candidates, finals: tensors that probes could observe, and the outputs.
    """

    compile: Callable[[Any], Any]
    source: Source
    session: Session
    program: Program
    inputs: tuple[str, ...]
    outputs: tuple[tuple[str, int], ...]
    candidates: tuple[Candidate, ...]
    finals: tuple[Candidate, ...]

    def compiled(self, model: Any) -> tuple[Session, Program]:
        """Another model, compiled as this one was.

        Raises:
            BackendError: the engine failed.
        """
        try:
            compiled = self.compile(model)
        except RuntimeError as error:
            raise BackendError(
                f"OpenVINO failed to compile the model with probes: {reason_of(error)}",
                stage="instrument",
            ) from error
        return Session(compiled), Program(compiled, self.source)

    def capture(
        self, session: Session, probes: Sequence[Candidate], feeds: Mapping[str, Array]
    ) -> tuple[Arrays, Arrays]:
        """Final outputs, and the values of ``probes``, the results that come before them."""
        count = len(probes)
        wanted = [*range(count), *(count + index for _, index in self.outputs)]
        values = session.infer([feeds[n] for n in self.inputs], wanted)
        return (
            {name: v for (name, _), v in zip(self.outputs, values[count:], strict=True)},
            {c.tensor: as_shown(v, c) for c, v in zip(probes, values[:count], strict=True)},
        )


Cut = tuple[CutOut, tuple[Candidate, ...]]  # and the targets to take from it


def _held(value: Array, port: Any, grid: Grid | None) -> Array:
    """A known value in the type that a parameter takes; bfloat16 stays the bits it is."""
    if grid is not None:
        value = grid.integers(value) + grid.moved
    if port.get_element_type().get_type_name() == "bf16":
        return value
    with np.errstate(invalid="ignore"):  # no integer stands for NaN
        return value.astype(port.get_element_type().to_dtype(), copy=False)


def _zeros(port: Any) -> Array:
    return np.zeros(tuple(port.get_shape()), port.get_element_type().to_dtype())


_KINDS = {"f32": "f4", "bf16": "f4", "f64": "f8", "boolean": "?", "i8": "i1", "u8": "u1"}
_OWN = {element: np.dtype(kind) for element, kind in _KINDS.items()}


def as_shown(value: Array, candidate: Candidate) -> Array:
    """A probe's value in the model's own type, or in a wider one that the program holds it in.

    Narrowed, it would no longer be what the kernels behind it read. NumPy has no bfloat16: that
    stays float32.
    """
    if candidate.lifted:
        value = value[0]
    if candidate.narrow and candidate.grid:
        value = candidate.grid.widened(value)
    elif grid := candidate.grid or candidate.snapped:
        value = grid.widened(grid.integers(value))  # rounded on the way here, by less than a half
    return value.astype(_OWN.get(candidate.element, value.dtype), copy=False)


def reason_of(error: BaseException) -> str:
    """What an OpenVINO exception says, without the source lines it passed through."""
    lines = [line.strip() for line in str(error).splitlines()]
    kept = [x for x in lines if x and not x.startswith(("Exception from", "Check '"))]
    return " ".join(kept)[:1000] or type(error).__name__


def result(ops: Mapping[int, Any], candidate: Candidate) -> Any:
    """A Result in the precision that the program holds: another would change the program.

    Before a Result in another type than bfloat16 a program in bfloat16 computes in float32. That
    type holds 8 bits exactly; behind one more axis the conversion is no part of the kernel.
    """
    from openvino import opset13 as opset

    number, index = candidate.written
    port = ops[number].output(index)
    name = ops[number].get_friendly_name()
    if candidate.lifted:
        name += SHOWING
        made = opset.unsqueeze(port, np.int64(0))
        made.set_friendly_name(name)
        port = made.output(0)
    if candidate.convolved:
        port = _by_one(port, name + SHOWING)
    element = port.get_element_type().get_type_name()
    held = "bf16" if candidate.narrow else candidate.precision
    if held in FLOATS and held != element:
        made = opset.convert(port, element_type(held))
        # In a half-precision model that the program widens nothing is left of it but its name.
        made.set_friendly_name(name)
        port = made.output(0)
    result = opset.result(port)
    result.set_friendly_name(candidate.probe)
    return result


def _by_one(port: Any, name: str) -> Any:
    """A convolution that changes nothing, with weights of unsigned 8 bits: its kernel reads floats.

    Whatever else there is reads the 8 bits that the model declares, which are rounded for it.
    """
    from openvino import opset13 as opset

    shape = port.get_partial_shape()
    ones = np.full((shape[1].get_length(), 1, 1, *(1,) * (len(shape) - 2)), 129, np.uint8)
    weights = opset.subtract(opset.convert(opset.constant(ones), "f32"), np.float32(128))
    weights = opset.multiply(weights, np.float32(1))
    axes = len(shape) - 2
    steps, none = [1] * axes, [0] * axes
    made = opset.group_convolution(port, weights, steps, none, none, steps)
    made.set_friendly_name(name)
    return made.output(0)


def element_type(name: str) -> Any:
    """The engine's type of an element by the name that it has in programs."""
    import openvino as ov

    return getattr(ov.Type, name if name != "bool" else "boolean")
