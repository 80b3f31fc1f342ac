"""Photographs from a package, and a small network that looks at them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from tests.helpers import jpeg, nodes_of

PICTURES = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg")
PIPELINE = """\
[training]
decoder = "pillow"
orientation = "ignore"
resize = { library = "pillow", interpolation = "bilinear", short_side = 40 }
crop = 32
normalise = { scale = 0.00392156862745098, mean = 0.5, std = 0.25 }
"""


@pytest.fixture(scope="session")
def tiles() -> list[Image.Image]:
    """Twelve parts of real photographs, 150x121 pixels."""
    folder = Path(importlib.util.find_spec("skimage").origin).parent / "data"
    found = []
    for name in PICTURES:
        whole = Image.open(folder / name).convert("RGB")
        for x, y in ((0, 0), (120, 40), (200, 150)):
            found.append(whole.crop((x, y, x + 150, y + 121)))
    return found


@pytest.fixture
def photos(tiles: list[Image.Image], tmp_path: Path) -> Path:
    """The tiles as JPEG files, named by a number."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, tile in enumerate(tiles):
        (folder / f"{number:02d}_tile.jpg").write_bytes(jpeg(tile))
    return folder


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """What the network below was made for."""
    path = tmp_path / "pipeline.toml"
    path.write_text(PIPELINE)
    return path


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Convolution, strided pooling and ten classes, with seeded random weights."""
    rng = np.random.default_rng(3)

    def tensor(name: str, *shape: int) -> TensorProto:
        return numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)

    nodes = nodes_of(
        "a = Conv <kernel_shape = [3, 3]> (image, w) b = Relu(a) "
        "c = MaxPool <kernel_shape = [3, 3], strides = [2, 2]> (b) d = GlobalAveragePool(c) "
        "e = Flatten(d) logits = Gemm(e, v)"
    )
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 32, 32])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 10])],
        [tensor("w", 8, 3, 3, 3), tensor("v", 8, 10)],
    )
    path = tmp_path_factory.mktemp("network") / "network.onnx"
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path
    )
    return path
