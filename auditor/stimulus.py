"""What the model is fed: samples recorded by the user, or seeded random ones."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from auditor import datafiles
from auditor.comparison.metrics import is_float
from auditor.datafiles import Stored
from auditor.errors import UsageError, suggestion
from auditor.graphs.model import Model, Shape, TensorSpec, shown
from auditor.graphs.shapes import resolve_shapes
from auditor.processes.limits import physical_memory
from auditor.records.model import StimulusInfo

if TYPE_CHECKING:
    import onnx

    from auditor.ports import Array, Arrays

_DEFAULT_RECORDED = 4
_DEFAULT_SYNTHETIC = 1
_DRAWN = 8  # bytes of a number as it is drawn
_MASK = re.compile(r"attention|attn|pad", re.IGNORECASE)
# Lengths tried where a model does not take the default: frames of sound as usual at 16 kHz,
# powers of two, then seconds.
_LENGTHS = (
    *(64, 160, 256, 320, 400, 480, 512, 576, 640, 768, 1024, 1280, 1536, 2048, 4096, 8000),
    *(16000, 24000, 32000, 48000, 80000, 160000),
)
# Operators whose output is their first input's numbers, in another shape or type.
_TRANSPARENT = frozenset(
    {"Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Transpose", "Expand"}
)


_Range = tuple[int, int]  # both included


class Stimulus:
    """A fixed number of samples, each made or read when asked for.

    Attributes:
        info: where they come from and every choice made on the user's behalf.
        available: how many there are where they come from; no fewer than are used.
    """

    def __init__(
        self, info: StimulusInfo, sample: Callable[[int], Arrays], available: int | None = None
    ) -> None:
        """``sample(i)`` gives the arrays of sample ``i``, by graph input."""
        self.info = info
        self.available = available or info.samples
        self._sample = sample

    def __len__(self) -> int:
        """Number of samples."""
        return self.info.samples

    def sample(self, index: int) -> Arrays:
        """Sample ``index``: one array per graph input, of its type and of ``info.shapes``."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._sample(index)


def load(
    model: Model,
    data: Path | None,
    seed: int,
    samples: int | None,
    shapes: Mapping[str, Shape],
    *,
    nonfinite: bool = False,
) -> Stimulus:
    """Recorded samples from ``data``, or synthetic ones where it is None.

    Args:
        model: the model to feed.
        data: ``.npz`` or ``.safetensors`` with one array per graph input, or ``.npy`` for a
            model with one input. An array with the input's rank is one sample, or several
            where the input's first dimension is fixed at 1; with one dimension more it is
            samples stacked on axis 0.
        seed: of the synthetic samples.
        samples: how many to use; None for every recorded sample up to 4, or one synthetic.
        shapes: shapes chosen by the user, by input; may name only some inputs.
        nonfinite: accept recorded NaN and infinities.

    Raises:
        UsageError: the data or the shapes don't fit the model.
    """
    if data is None:
        return _synthetic(model, seed, samples or _DEFAULT_SYNTHETIC, shapes)
    return _recorded(model, data, samples, shapes, nonfinite)


# --- recorded --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Column:
    """The samples of one graph input.

    Attributes:
        count: number of samples; ``shape`` is that of each.
        stacked: whether axis 0 of the stored array counts samples.
    """

    spec: TensorSpec
    stored: Stored
    count: int
    shape: Shape
    stacked: bool

    def sample(self, index: int) -> Array:
        """Sample ``index`` in the type of the graph input, contiguous and in memory."""
        array = self.stored.read(index if self.stacked else None).reshape(self.shape)
        if array.dtype == self.spec.dtype or self.spec.dtype.kind == "U":
            return np.asarray(array, order="C")
        with np.errstate(over="ignore"):  # an overflow becomes inf, which is refused by name
            cast = array.astype(self.spec.dtype)
        if array.dtype.kind in "iu" and not np.array_equal(cast, array):
            raise UsageError(
                f"input `{self.spec.name}` has values that do not fit {self.spec.dtype}",
                f"Save it as {self.spec.dtype}, or export the model with {array.dtype} inputs.",
            )
        return cast


def _recorded(
    model: Model,
    data: Path,
    samples: int | None,
    shapes: Mapping[str, Shape],
    nonfinite: bool,
) -> Stimulus:
    stored = _named(model, data)
    return of_arrays(model, data, stored, samples, shapes, nonfinite=nonfinite)


def of_arrays(
    model: Model,
    data: Path,
    stored: Mapping[str, Stored],
    samples: int | None,
    shapes: Mapping[str, Shape],
    *,
    nonfinite: bool = False,
) -> Stimulus:
    """Recorded samples from arrays that were found in a file; see ``load``.

    Raises:
        UsageError: the arrays or the shapes don't fit the model.
    """
    _check_keys(model, data, stored)
    notes: list[str] = []
    columns = [
        _column(spec, _typed(spec, stored[spec.name]), shapes.get(spec.name))
        for spec in model.inputs
    ]
    for column in columns:
        notes += _check_type(column)
    available = _common_count(columns)
    resolved, oddities = resolve_shapes(model, shapes, {c.spec.name: c.shape for c in columns})
    notes += oddities
    if samples is None:
        used = min(available, _DEFAULT_RECORDED)
        if used < available:
            notes.append(
                f"the first {used} of {available} recorded samples are used; "
                f"--samples {available} uses them all"
            )
    elif samples <= available:
        used = samples
    else:
        raise UsageError(
            f"--samples asks for {samples} samples, but {data} holds {available}",
            f"Use --samples {available} or fewer, or record more.",
        )

    def sample(index: int) -> Arrays:
        return {column.spec.name: column.sample(index) for column in columns}

    for index in range(0 if nonfinite else used):
        _check_finite(index, sample(index), columns)
    info = StimulusInfo("recorded", used, None, str(data), resolved, tuple(notes))
    return Stimulus(info, sample, available)


def _check_keys(model: Model, data: Path, stored: Mapping[str, Stored]) -> None:
    wanted = [spec.name for spec in model.inputs]
    unknown = [name for name in stored if name not in wanted]
    missing = [name for name in wanted if name not in stored]
    inputs = "The inputs are " + ", ".join(str(spec) for spec in model.inputs) + "."
    if unknown:
        raise UsageError(
            f"{data} has `{unknown[0]}`, which is not an input of the model",
            suggestion(unknown[0], missing) + inputs,
        )
    if missing:
        names = ", ".join(f"`{name}`" for name in missing)
        raise UsageError(f"{data} has no array for input {names}", inputs)


def _typed(spec: TensorSpec, stored: Stored) -> Stored:
    """Raw bytes as the input's type: all that NumPy's files keep of types that it does not know."""
    raw = stored.dtype.type is np.void and stored.dtype.names is None
    if not raw or not is_float(spec.dtype) or stored.dtype.itemsize != spec.dtype.itemsize:
        return stored
    return Stored(stored.shape, spec.dtype, lambda index: stored.read(index).view(spec.dtype))


def _column(spec: TensorSpec, stored: Stored, given: Shape | None) -> _Column:
    declared = given if given is not None else spec.shape
    shape = stored.shape
    # A further axis may be empty: a reduction over nothing is a real case. So may a list of axes.
    listed = len(declared) == 1 and spec.dtype.kind in "iu"
    empty = declared[:1] == (0,) or (listed and shape == (0,))
    if shape[:1] == (0,) and not empty:
        raise UsageError(
            f"the data for input `{spec.name}` are empty ({shown(shape)})",
            "Record at least one sample.",
        )
    if len(shape) == len(declared):
        if declared and declared[0] == 1 and shape[0] > 1:
            return _Column(spec, stored, shape[0], (1, *shape[1:]), stacked=True)
        return _Column(spec, stored, 1, shape, stacked=False)
    if len(shape) == len(declared) + 1:
        return _Column(spec, stored, shape[0], shape[1:], stacked=True)
    raise UsageError(
        f"the data for input {spec} have shape {shown(shape)}",
        f"Give one sample with {len(declared)} dimensions, or several stacked on a new axis 0.",
    )


def _check_type(column: _Column) -> tuple[str, ...]:
    """A note where the stored type is cast to the input's.

    Raises:
        UsageError: the two hold different kinds of number, or the cast would lose precision
            (but for float64, numpy's default, which is what people save by accident).
    """
    have, want = column.stored.dtype, column.spec.dtype
    if have == want or have.kind == want.kind == "U":
        return ()
    name = column.spec.name
    integers = have.kind in "iu" and want.kind in "iu"  # sample() checks that the values fit
    floats = have.kind == want.kind == "f" and (
        np.can_cast(have, want, "safe") or (have == np.float64 and want == np.float32)
    )
    if not (integers or floats):
        raise UsageError(
            f"the data for input `{name}` are {have}, but the model takes {want}",
            f"Convert them as your application does, then save them as {want}.",
        )
    return (f"input `{name}`: recorded as {have}, fed as {want}",)


def _common_count(columns: list[_Column]) -> int:
    first = columns[0]
    for column in columns:
        if column.count != first.count:
            raise UsageError(
                f"input `{first.spec.name}` has {first.count} samples, but "
                f"`{column.spec.name}` has {column.count}",
                "Record the same number of samples of every input.",
            )
    return first.count


def _check_finite(index: int, arrays: Arrays, columns: list[_Column]) -> None:
    for column in columns:
        array = arrays[column.spec.name]
        if not is_float(array.dtype):
            continue
        bad = int(np.count_nonzero(~np.isfinite(array)))
        if bad:
            raise UsageError(
                f"input `{column.spec.name}` of sample {index} is NaN or infinite at {bad} of "
                f"{array.size} elements",
                "Fix the recording, or use --allow-nonfinite to audit how such values are handled.",
            )


def _named(model: Model, data: Path) -> dict[str, Stored]:
    """The arrays of a data file by graph input."""
    stored = datafiles.read(data, "--data")
    if data.suffix.lower() != ".npy":
        return stored
    if len(model.inputs) != 1:
        names = ", ".join(f"`{spec.name}`" for spec in model.inputs)
        raise UsageError(
            f"{data} is one array, but the model has {len(model.inputs)} inputs",
            f"Save a .npz with one array for each of {names}.",
        )
    return {model.inputs[0].name: stored[""]}


# --- synthetic -----------------------------------------------------------------------------------


def _synthetic(model: Model, seed: int, samples: int, shapes: Mapping[str, Shape]) -> Stimulus:
    resolved, notes = _shaped(model, seed, shapes)
    ranges = _integer_ranges(model)

    def sample(index: int) -> Arrays:
        return _drawn(model, seed, index, resolved, ranges)

    drawn = tuple(_drawn_from(spec, ranges[spec.name]) for spec in model.inputs)
    info = StimulusInfo(
        "synthetic", samples, seed, "seeded random numbers", resolved, notes + drawn
    )
    return Stimulus(info, sample)


def _shaped(
    model: Model, seed: int, given: Mapping[str, Shape]
) -> tuple[dict[str, Shape], tuple[str, ...]]:
    """Every input's shape; of sounds and the like, the first length that the reference takes.

    Raises:
        UsageError: as ``resolve_shapes``, or there is not so much memory.
    """
    resolved, notes = resolve_shapes(model, given, {})
    _check_memory(model, resolved)
    long = [
        spec.name
        for spec in model.inputs
        if spec.name not in given
        and is_float(spec.dtype)
        and 2 <= len(spec.shape) <= 3
        and not isinstance(spec.shape[-1], int)
    ]
    if not long or (refusal := _refusal(model, seed, resolved)) is None:
        return resolved, notes
    # States of a recurrent layer have their batch inside.
    narrow = {
        spec.name: tuple(size if isinstance(size, int) else 1 for size in spec.shape)
        for spec in model.inputs
        if spec.name not in given and None in spec.shape[1:-1]
    }
    for more, length in itertools.product(({}, narrow) if narrow else ({},), _LENGTHS):
        tried = {name: (*resolved[name][:-1], length) for name in long}
        shapes, said = resolve_shapes(model, {**given, **more, **tried}, {})
        if _refusal(model, seed, shapes) is None:
            names = ", ".join(f"`{name}`" for name in long)
            note = (
                f"input {names}: last dimension set to {length}, the first length tried that the "
                f"model takes; with {resolved[long[0]][-1]}: {refusal}"
            )
            return shapes, (*said, note)
    return resolved, notes


def _check_memory(model: Model, shapes: Mapping[str, Shape]) -> None:
    for spec in model.inputs:
        size = math.prod(shapes[spec.name]) * max(spec.dtype.itemsize, _DRAWN)
        if 0 < physical_memory() < size:
            raise UsageError(
                f"input {spec} would need {size / 2**30:,.0f} GiB, more memory than there is",
                "Give it smaller sizes with --shape where the model leaves them open, or export "
                "the model with the sizes that you deploy.",
            )


def _refusal(model: Model, seed: int, shapes: Mapping[str, Shape]) -> str | None:
    """Why the model as written cannot be run at these shapes; None where it can."""
    from auditor.replays import sessions

    feeds = _drawn(model, seed, 0, shapes, _integer_ranges(model))
    try:
        sessions.session(model.proto, 1, model.folder).run(None, feeds)
    except Exception as error:  # ORT raises a family of classes that share no base
        return (str(error).splitlines() or [type(error).__name__])[0].rpartition("Message: ")[2]
    return None


def _integer_ranges(model: Model) -> dict[str, _Range]:
    """Smallest and largest value of each input, where it is drawn from integers.

    A number that the model compares it with, such as a sampling rate; indices where it is used as
    such; pixels for 8 bits; else 0 or 1.
    """
    pixels = {"uint8": (0, 255), "int8": (-128, 127)}
    found = {}
    for spec in model.inputs:
        limit, compared = _index_limit(model.proto.graph, spec.name), None
        if spec.dtype.kind in "iu" and set(spec.shape) <= {1}:
            compared = _compared(model.proto.graph, spec.name)
        if compared is not None:
            found[spec.name] = (compared, compared)
        elif limit is not None:
            found[spec.name] = (0, limit - 1)
        else:
            found[spec.name] = pixels.get(spec.dtype.name, (0, 1))
    return found


def _drawn(
    model: Model,
    seed: int,
    index: int,
    shapes: Mapping[str, Shape],
    ranges: Mapping[str, _Range],
) -> Arrays:
    return {
        spec.name: _draw(
            np.random.default_rng([seed, index, position]),
            spec,
            shapes[spec.name],
            ranges[spec.name],
            _texts(model),
        )
        for position, spec in enumerate(model.inputs)
    }


def _texts(model: Model) -> list[str]:
    """Texts that the model knows, those of its tables; a letter where it has none."""
    attributes = (a for node in model.proto.graph.node for a in node.attribute)
    found = {text for a in attributes for text in a.strings}
    return sorted(text.decode(errors="replace") for text in found) or ["a"]


def _draw(
    rng: np.random.Generator, spec: TensorSpec, shape: Shape, integers: _Range, texts: list[str]
) -> Array:
    if spec.dtype.kind == "U":
        return rng.choice(np.asarray(texts), shape)
    if _is_mask(spec):
        return np.ones(shape, spec.dtype)
    if is_float(spec.dtype) or spec.dtype.kind == "c":
        return rng.standard_normal(shape).astype(spec.dtype)
    return rng.integers(*integers, shape, endpoint=True).astype(spec.dtype)


def _drawn_from(spec: TensorSpec, integers: _Range) -> str:
    if spec.dtype.kind == "U":
        return f"input `{spec.name}`: texts from the model's own tables; give yours with --data"
    if _is_mask(spec):
        return f"input `{spec.name}`: all ones, as a mask that hides nothing"
    if is_float(spec.dtype) or spec.dtype.kind == "c":
        return f"input `{spec.name}`: standard normal"
    low, high = integers
    if low == high:
        return f"input `{spec.name}`: {low}, which the model compares it with"
    return f"input `{spec.name}`: uniform integers {low} to {high}"


def _is_mask(spec: TensorSpec) -> bool:
    named = "mask" in spec.name.lower()
    return named and (not is_float(spec.dtype) or bool(_MASK.search(spec.name)))


def _index_limit(graph: onnx.GraphProto, name: str) -> int | None:
    """How many rows the tables have that the input's numbers index through Gather.

    The smallest such number; None where nothing looks the input up in a stored table.
    """
    tables = {t.name: tuple(t.dims) for t in graph.initializer}
    followed = {name}
    limits: list[int] = []
    for node in graph.node:  # sorted topologically (ONNX IR specification)
        if node.op_type in _TRANSPARENT and node.input[0] in followed:
            followed.add(node.output[0])
        elif node.op_type in ("Cast", "Identity", "DequantizeLinear") and node.input[0] in tables:
            tables[node.output[0]] = tables[node.input[0]]
        elif node.op_type == "Gather" and node.input[1] in followed and node.input[0] in tables:
            axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
            limits.append(tables[node.input[0]][axis])
        elif node.op_type == "Constant":
            value = next((a.t for a in node.attribute if a.name == "value"), None)
            if value is not None:
                tables[node.output[0]] = tuple(value.dims)
    return min(limits, default=None)


def _compared(graph: onnx.GraphProto, name: str) -> int | None:
    """The first stored number that the model tests an input of one number against."""
    from onnx import numpy_helper

    numbers = {t.name: t for t in graph.initializer if math.prod(t.dims) == 1}
    followed = {name}
    for node in graph.node:
        if node.op_type in _TRANSPARENT and node.input[0] in followed:
            followed.add(node.output[0])
        elif node.op_type == "Constant" and node.attribute[0].HasField("t"):
            numbers[node.output[0]] = node.attribute[0].t
        elif node.op_type == "Equal" and followed.intersection(node.input):
            against = next((numbers[i] for i in node.input if i in numbers), None)
            if against is not None and math.prod(against.dims) == 1:
                return int(numpy_helper.to_array(against).item())
    return None
