"""Recorded and synthetic inputs."""

from __future__ import annotations

import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from auditor import stimulus as stimuli
from auditor.errors import UsageError
from auditor.graphs import model as models

Saver = Callable[[Path, dict[str, NDArray[np.generic]]], Path]
FLOAT, INT64, INT32 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., models.Model]:
    """Makes a model that copies its inputs, each given as name=(type, *shape)."""

    def make(**inputs: tuple[int | str | None, ...]) -> models.Model:
        values = [helper.make_tensor_value_info(n, t, list(s)) for n, (t, *s) in inputs.items()]
        outputs = [
            helper.make_tensor_value_info(f"{n}_out", t, list(s)) for n, (t, *s) in inputs.items()
        ]
        nodes = [helper.make_node("Identity", [n], [f"{n}_out"]) for n in inputs]
        return save(tmp_path, helper.make_graph(nodes, "g", values, outputs))

    return make


def save(folder: Path, graph: onnx.GraphProto) -> models.Model:
    opset = [helper.make_opsetid("", 21)]
    path = folder / "m.onnx"
    path.write_bytes(
        helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()
    )
    return models.load(path)


def npz(folder: Path, arrays: dict[str, NDArray[np.generic]]) -> Path:
    np.savez(folder / "d.npz", **arrays)
    return folder / "d.npz"


def compressed(folder: Path, arrays: dict[str, NDArray[np.generic]]) -> Path:
    np.savez_compressed(folder / "c.npz", **arrays)
    return folder / "c.npz"


def safetensors(folder: Path, arrays: dict[str, NDArray[np.generic]]) -> Path:
    save_file(arrays, folder / "d.safetensors")
    return folder / "d.safetensors"


def npy(folder: Path, arrays: dict[str, NDArray[np.generic]]) -> Path:
    (array,) = arrays.values()
    np.save(folder / "d.npy", array)
    return folder / "d.npy"


@pytest.mark.parametrize("store", [npz, compressed, safetensors, npy])
class TestFormats:
    """The same reading of every file format."""

    def test_one_sample(self, load: Callable[..., models.Model], tmp_path: Path, store: Saver):
        x = np.random.default_rng(0).random((2, 3), np.float32)
        got = stimuli.load(load(x=(FLOAT, "n", 3)), store(tmp_path, {"x": x}), 0, None, {})
        assert len(got) == 1
        assert got.info.shapes == {"x": (2, 3)}
        assert np.array_equal(got.sample(0)["x"], x)

    def test_stacked_samples(self, load: Callable[..., models.Model], tmp_path: Path, store: Saver):
        x = np.random.default_rng(0).random((6, 2, 3), np.float32)
        model = load(x=(FLOAT, "n", 3))
        path = store(tmp_path, {"x": x})
        got = stimuli.load(model, path, 0, None, {})
        assert (got.info.kind, len(got)) == ("recorded", 4)
        assert got.info.notes == (
            "the first 4 of 6 recorded samples are used; --samples 6 uses them all",
        )
        everything = stimuli.load(model, path, 0, 6, {})
        assert np.array_equal(np.stack([everything.sample(i)["x"] for i in range(6)]), x)
        for index in (-1, 6):
            with pytest.raises(IndexError):
                everything.sample(index)

    def test_batch_fixed_at_one(
        self, load: Callable[..., models.Model], tmp_path: Path, store: Saver
    ):
        x = np.random.default_rng(0).random((3, 5), np.float32)
        path = store(tmp_path, {"x": x})
        for model, shapes in (
            (load(x=(FLOAT, 1, 5)), {}),
            (load(x=(FLOAT, "n", 5)), {"x": (1, 5)}),
        ):
            got = stimuli.load(model, path, 0, None, shapes)
            assert len(got) == 3
            assert np.array_equal(got.sample(2)["x"], x[2:])

    def test_samples_are_writable_copies_in_row_order(
        self, load: Callable[..., models.Model], tmp_path: Path, store: Saver
    ):
        x = np.ascontiguousarray(np.random.default_rng(0).random((2, 3, 4), np.float32))
        if store is not safetensors:
            x = np.asfortranarray(x)
        got = stimuli.load(load(x=(FLOAT, 3, 4)), store(tmp_path, {"x": x}), 0, None, {})
        sample = got.sample(1)["x"]
        assert sample.flags.c_contiguous
        assert np.array_equal(sample, x[1])

    def test_float64_is_fed_as_float32_with_a_note(
        self, load: Callable[..., models.Model], tmp_path: Path, store: Saver
    ):
        x = np.random.default_rng(0).random((2, 3))
        got = stimuli.load(load(x=(FLOAT, 2, 3)), store(tmp_path, {"x": x}), 0, None, {})
        assert got.sample(0)["x"].dtype == np.float32
        assert got.info.notes == ("input `x`: recorded as float64, fed as float32",)


@pytest.mark.parametrize("store", [npz, compressed, safetensors])
def test_memory_does_not_grow_with_the_file(
    load: Callable[..., models.Model], tmp_path: Path, store: Saver
) -> None:
    model = load(x=(FLOAT, 64, 1024))
    path = store(tmp_path, {"x": np.ones((40, 64, 1024), np.float32)})  # 10 MiB
    tracemalloc.start()
    try:
        got = stimuli.load(model, path, 0, 40, {})
        got.sample(39)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3 << 20


@pytest.mark.parametrize("store", [npz, safetensors])  # in an .npz it is bytes without a type
def test_bfloat16(load: Callable[..., models.Model], tmp_path: Path, store: Saver) -> None:
    x = np.array([1.5, -2.0], ml_dtypes.bfloat16)
    path = store(tmp_path, {"x": x})
    got = stimuli.load(load(x=(TensorProto.BFLOAT16, 2)), path, 0, None, {})
    assert np.array_equal(got.sample(0)["x"], x)


def test_integers_are_cast_when_they_fit(load: Callable[..., models.Model], tmp_path: Path) -> None:
    model = load(ids=(INT32, "n", "t"))
    got = stimuli.load(model, npz(tmp_path, {"ids": np.array([[5, -1]])}), 0, None, {})
    assert got.sample(0)["ids"].dtype == np.int32
    assert got.info.notes == ("input `ids`: recorded as int64, fed as int32",)
    with pytest.raises(UsageError, match="do not fit int32"):
        stimuli.load(model, npz(tmp_path, {"ids": np.array([[1 << 40]])}), 0, None, {})


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 3), np.int64), "int64, but the model takes float32"),
        (np.zeros((2, 3), np.uint8), "uint8, but the model takes float32"),
        (np.zeros((2, 3), np.complex64), "complex64"),
        (np.zeros((2, 4), np.float32), "dimension 1 is fixed at 3"),
        (np.zeros(3, np.float32), "have shape 3"),
        (np.zeros((1, 1, 2, 3), np.float32), "have shape 1x1x2x3"),
        (np.zeros((0, 2, 3), np.float32), "are empty"),
        (np.array([[1, np.nan, 3]], np.float32), "NaN or infinite"),
        (np.array([[1, 2, -np.inf]], np.float32), "NaN or infinite"),
        (np.array([[1, 2, 1e300]]), "NaN or infinite"),
    ],
)
def test_arrays_that_do_not_fit(
    load: Callable[..., models.Model], tmp_path: Path, array: NDArray[np.generic], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        stimuli.load(load(x=(FLOAT, "n", 3)), npz(tmp_path, {"x": array}), 0, None, {})
    assert caught.value.hint


@pytest.mark.parametrize(
    ("declared", "given", "order"),
    [
        (("n", 3, "h", "w"), (2, 8, 9, 3), "(0, 3, 1, 2)"),
        ((1, 8, 9, 3), (1, 3, 8, 9), "(0, 2, 3, 1)"),
        ((1, 3, 8, 9), (1, 4, 8, 9), "leaves open"),
        ((1, 3), (1, 4), "leaves open"),
    ],
)
def test_channels_at_the_other_end_are_told(
    load: Callable[..., models.Model],
    tmp_path: Path,
    declared: tuple[int | str, ...],
    given: tuple[int, ...],
    order: str,
) -> None:
    path = npz(tmp_path, {"x": np.zeros(given, np.float32)})
    with pytest.raises(UsageError, match="is fixed at") as caught:
        stimuli.load(load(x=(FLOAT, *declared)), path, 0, None, {})
    assert caught.value.hint and order in caught.value.hint


def test_half_precision_inputs_are_not_rounded_silently(
    load: Callable[..., models.Model], tmp_path: Path
) -> None:
    path = npz(tmp_path, {"x": np.zeros((1, 3), np.float32)})
    with pytest.raises(UsageError, match="float32, but the model takes float16"):
        stimuli.load(load(x=(TensorProto.FLOAT16, 1, 3)), path, 0, None, {})


def test_bad_sample_is_named(load: Callable[..., models.Model], tmp_path: Path) -> None:
    x = np.zeros((3, 2), np.float32)
    x[2, 1] = np.nan
    with pytest.raises(UsageError, match="`x` of sample 2 is NaN or infinite at 1 of 2 el"):
        stimuli.load(load(x=(FLOAT, 2)), npz(tmp_path, {"x": x}), 0, None, {})


def test_names(load: Callable[..., models.Model], tmp_path: Path) -> None:
    model = load(input_ids=(INT64, 1, 2), mask=(INT64, 1, 2))
    ids = np.zeros((1, 2), np.int64)
    with pytest.raises(UsageError, match="no array for input `mask`"):
        stimuli.load(model, npz(tmp_path, {"input_ids": ids}), 0, None, {})
    with pytest.raises(UsageError, match="`input_id`, which is not an input") as caught:
        stimuli.load(model, npz(tmp_path, {"input_id": ids, "mask": ids}), 0, None, {})
    assert "Did you mean `input_ids`?" in caught.value.hint
    assert "`mask` (int64, 1x2)" in caught.value.hint


def test_sample_counts(load: Callable[..., models.Model], tmp_path: Path) -> None:
    model = load(a=(FLOAT, 1, 2), b=(FLOAT, 2))
    pair = {"a": np.zeros((3, 1, 2), np.float32), "b": np.zeros((4, 2), np.float32)}
    with pytest.raises(UsageError, match="`a` has 3 samples, but `b` has 4"):
        stimuli.load(model, npz(tmp_path, pair), 0, None, {})
    pair["b"] = pair["b"][:3]
    assert len(stimuli.load(model, npz(tmp_path, pair), 0, 2, {})) == 2
    with pytest.raises(UsageError, match="holds 3"):
        stimuli.load(model, npz(tmp_path, pair), 0, 5, {})


def test_npy_needs_a_single_input(load: Callable[..., models.Model], tmp_path: Path) -> None:
    path = npy(tmp_path, {"x": np.zeros((1, 2), np.float32)})
    with pytest.raises(UsageError, match="has 2 inputs"):
        stimuli.load(load(a=(FLOAT, 1, 2), b=(FLOAT, 1, 2)), path, 0, None, {})


class Bomb:
    """Writes a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_pickles_are_refused_unread(
    load: Callable[..., models.Model], tmp_path: Path, suffix: str
) -> None:
    path, trace = tmp_path / f"d.{suffix}", tmp_path / "exploded"
    bomb = np.array([Bomb(trace)], dtype=object)
    if suffix == "npy":
        np.save(path, bomb, allow_pickle=True)
    else:
        np.savez(path, x=bomb)
    with pytest.raises(UsageError, match="pickled"):
        stimuli.load(load(x=(FLOAT, 1, 2)), path, 0, None, {})
    assert not trace.exists()


@pytest.mark.parametrize("suffix", ["npy", "npz", "safetensors"])
@pytest.mark.parametrize("damage", ["junk", "cut"])
def test_damaged_files(
    load: Callable[..., models.Model], tmp_path: Path, suffix: str, damage: str
) -> None:
    path = tmp_path / f"d.{suffix}"
    store: Saver = {"npy": npy, "npz": npz, "safetensors": safetensors}[suffix]
    data = store(tmp_path, {"x": np.zeros((1, 200), np.float32)}).read_bytes()
    path.write_bytes(b"not an archive at all" if damage == "junk" else data[: len(data) // 2])
    with pytest.raises(UsageError, match="not a valid") as caught:
        stimuli.load(load(x=(FLOAT, 1, 200)), path, 0, None, {})
    assert "record it again" in caught.value.hint


def test_damaged_compressed_member(load: Callable[..., models.Model], tmp_path: Path) -> None:
    path = compressed(tmp_path, {"x": np.random.default_rng(0).random((1, 2000), np.float32)})
    data = bytearray(path.read_bytes())
    data[3000:3100] = bytes(100)
    path.write_bytes(data)
    with pytest.raises(UsageError, match="not a valid"):
        stimuli.load(load(x=(FLOAT, 1, 2000)), path, 0, None, {})


def test_member_shorter_than_its_header_says(
    load: Callable[..., models.Model], tmp_path: Path
) -> None:
    whole = npy(tmp_path, {"x": np.zeros((1, 200), np.float32)}).read_bytes()
    path = tmp_path / "d.npz"
    for how in (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED):
        with zipfile.ZipFile(path, "w", how) as archive:
            archive.writestr("x.npy", whole[:-10])
        with pytest.raises(UsageError, match="not a valid"):
            stimuli.load(load(x=(FLOAT, 1, 200)), path, 0, None, {})


def test_files_that_are_not_there_or_not_known(
    load: Callable[..., models.Model], tmp_path: Path
) -> None:
    model = load(x=(FLOAT, 1, 2))
    (tmp_path / "empty.npz").touch()
    (tmp_path / "d.csv").write_text("1,2")
    with zipfile.ZipFile(tmp_path / "none.npz", "w"):
        pass
    for name, message in (
        ("missing.npz", "does not exist"),
        ("empty.npz", "is empty"),
        (".", "is not a file"),
        ("d.csv", r"not a \.npz"),
        ("none.npz", "holds no array"),
    ):
        with pytest.raises(UsageError, match=message):
            stimuli.load(model, tmp_path / name, 0, None, {})


# --- synthetic -----------------------------------------------------------------------------------


def test_synthetic_samples_depend_on_seed_and_index_only(
    load: Callable[..., models.Model],
) -> None:
    model = load(x=(FLOAT, "n", 3, 8, 8))
    one, again = (stimuli.load(model, None, 7, 3, {}) for _ in range(2))
    other = stimuli.load(model, None, 8, None, {})
    assert (one.info.kind, one.info.seed, len(one), len(other)) == ("synthetic", 7, 3, 1)
    assert np.array_equal(one.sample(2)["x"], again.sample(2)["x"])
    assert not np.array_equal(one.sample(0)["x"], one.sample(1)["x"])
    assert not np.array_equal(one.sample(0)["x"], other.sample(0)["x"])
    assert one.sample(0)["x"].shape == one.info.shapes["x"] == (1, 3, 8, 8)
    assert "input `x`: dimension `n` set to 1" in one.info.notes
    assert "input `x`: standard normal" in one.info.notes


def test_inputs_of_the_same_shape_differ(load: Callable[..., models.Model]) -> None:
    sample = stimuli.load(load(a=(FLOAT, 5), b=(FLOAT, 5)), None, 0, None, {}).sample(0)
    assert not np.array_equal(sample["a"], sample["b"])


@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [
        (TensorProto.UINT8, 0, 255),
        (TensorProto.INT8, -128, 127),
        (TensorProto.INT64, 0, 1),
        (TensorProto.BOOL, 0, 1),
    ],
)
def test_ranges_by_type(load: Callable[..., models.Model], kind: int, low: int, high: int) -> None:
    values = stimuli.load(load(x=(kind, 5000)), None, 0, None, {}).sample(0)["x"]
    assert values.dtype == helper.tensor_dtype_to_np_dtype(kind)
    assert (int(values.min()), int(values.max())) == (low, high)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE])
def test_other_floats(load: Callable[..., models.Model], kind: int) -> None:
    values = stimuli.load(load(x=(kind, 5000)), None, 0, None, {}).sample(0)["x"]
    assert values.dtype == helper.tensor_dtype_to_np_dtype(kind)
    assert abs(float(values.astype(np.float64).std()) - 1) < 0.05


def test_masks_hide_nothing(load: Callable[..., models.Model]) -> None:
    model = load(attention_mask=(INT64, 1, 8), mask_input=(FLOAT, 1, 8))
    sample = stimuli.load(model, None, 0, None, {}).sample(0)
    assert sample["attention_mask"].tolist() == [[1] * 8]
    assert sample["mask_input"].std() > 0, "a float mask is a picture, not an attention mask"


@pytest.mark.parametrize("quantised", [False, True])
def test_tokens_stay_inside_the_vocabulary(tmp_path: Path, quantised: bool) -> None:
    """Through a Cast to the smallest of two tables, one of them behind DequantizeLinear."""
    nodes = [
        helper.make_node("Cast", ["ids"], ["wide"], to=INT64),
        helper.make_node("Gather", ["big", "wide"], ["a"]),
        helper.make_node("Gather", ["table", "wide"], ["b"], axis=1),
    ]
    stored = [numpy_helper.from_array(np.zeros((50, 2), np.float32), "big")]
    small = np.zeros((2, 30), np.int8 if quantised else np.float32)
    if quantised:
        stored += [
            numpy_helper.from_array(small, "packed"),
            numpy_helper.from_array(np.float32(1), "scale"),
        ]
        nodes.insert(0, helper.make_node("DequantizeLinear", ["packed", "scale"], ["table"]))
    else:
        stored.append(numpy_helper.from_array(small, "table"))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("ids", INT32, [1, 4000])],
        [helper.make_tensor_value_info("a", FLOAT, [1, 4000, 2])],
        stored,
    )
    values = stimuli.load(save(tmp_path, graph), None, 0, None, {}).sample(0)["ids"]
    assert (values.min(), values.max()) == (0, 29)


def test_an_inner_dimension_may_be_empty_where_the_model_leaves_it_open(
    load: Callable[..., models.Model], tmp_path: Path
) -> None:
    model = load(x=(FLOAT, 2, "boxes", 3))
    one = stimuli.load(model, npz(tmp_path, {"x": np.zeros((2, 0, 3), np.float32)}), 0, None, {})
    assert one.sample(0)["x"].shape == (2, 0, 3)
    stack = npz(tmp_path, {"x": np.zeros((4, 2, 0, 3), np.float32)})
    assert len(stimuli.load(model, stack, 0, None, {})) == 4
    with pytest.raises(UsageError, match="are empty"):
        stimuli.load(model, npz(tmp_path, {"x": np.zeros((0, 2, 0, 3), np.float32)}), 0, None, {})
    with pytest.raises(UsageError, match="fixed at 3"):
        stimuli.load(model, npz(tmp_path, {"x": np.zeros((2, 5, 0), np.float32)}), 0, None, {})
    axes = npz(tmp_path, {"axes": np.zeros(0, np.int32)})
    assert stimuli.load(load(axes=(INT32, "n")), axes, 0, None, {}).sample(0)["axes"].shape == (0,)


def test_sounds_get_a_length_that_the_model_takes(tmp_path: Path) -> None:
    sound = helper.make_tensor_value_info("sound", FLOAT, ["batch", "samples"])
    out = helper.make_tensor_value_info("y", FLOAT, [None, None])
    pads = numpy_helper.from_array(np.array([0, 100, 0, 100]), "pads")
    node = helper.make_node("Pad", ["sound", "pads"], ["y"], mode="reflect")
    model = save(tmp_path, helper.make_graph([node], "g", [sound], [out], [pads]))
    made = stimuli.load(model, None, 0, None, {})
    assert made.sample(0)["sound"].shape == (1, 160)
    assert any("set to 160" in note and "reflect" in note for note in made.info.notes)
    assert stimuli.load(model, None, 0, None, {"sound": (1, 101)}).info.shapes["sound"] == (1, 101)


def test_a_number_is_what_the_model_compares_it_with_and_a_state_has_a_batch_of_one(
    tmp_path: Path,
) -> None:
    inputs = [
        helper.make_tensor_value_info("sound", FLOAT, [None, None]),
        helper.make_tensor_value_info("state", FLOAT, [2, None, 3]),
        helper.make_tensor_value_info("rate", TensorProto.INT64, []),
    ]
    nodes = [
        helper.make_node("Equal", ["rate", "kilohertz"], ["yes"]),
        helper.make_node("Pad", ["sound", "pads"], ["padded"], mode="reflect"),
        helper.make_node("Reshape", ["state", "six"], ["kept"]),
    ]
    constants = {"kilohertz": np.array(16000), "pads": np.array([0, 99, 0, 0]), "six": [6]}
    graph = helper.make_graph(
        nodes,
        "g",
        inputs,
        [
            helper.make_tensor_value_info("yes", TensorProto.BOOL, []),
            helper.make_tensor_value_info("padded", FLOAT, [None, None]),
            helper.make_tensor_value_info("kept", FLOAT, [6]),
        ],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()],
    )
    made = stimuli.load(save(tmp_path, graph), None, 0, None, {})
    assert made.sample(0)["rate"] == 16000
    assert made.info.shapes == {"sound": (1, 160), "state": (2, 1, 3), "rate": ()}
    assert any("16000, which the model compares it with" in note for note in made.info.notes)
