"""Deep models of any size, He-initialised: how time and memory grow with the number of nodes.

``python -m benchmarks.deep 5000 -o deep.onnx`` writes a residual network of about so many nodes
with the weights that training starts from (He et al., "Delving Deep into Rectifiers", 2015). Each
residual branch is scaled by one over the root of their number, so that activations keep
their size at any depth (Zhang et al., "Fixup Initialization", 2019), and every node matters.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 17
BLOCK = 5  # nodes of one residual block


def network(nodes: int, channels: int = 16, side: int = 16, seed: int = 0) -> onnx.ModelProto:
    """A residual network of ``nodes`` nodes, rounded down to whole blocks, at least one.

    Args:
        nodes: how many nodes.
        channels: of every tensor, ``(1, channels, side, side)`` in float32.
        side: height and width.
        seed: of the weights.
    """
    generator = np.random.default_rng(seed)
    blocks = max(1, (nodes - 4) // BLOCK)
    made: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []

    def convolution(source: str, name: str, into: int, gain: float) -> str:
        fan = into * 9
        values = generator.standard_normal((channels, into, 3, 3)) * gain * math.sqrt(2 / fan)
        weights.append(numpy_helper.from_array(values.astype(np.float32), f"{name}.weight"))
        bias = np.zeros(channels, np.float32)
        weights.append(numpy_helper.from_array(bias, f"{name}.bias"))
        inputs = [source, f"{name}.weight", f"{name}.bias"]
        made.append(helper.make_node("Conv", inputs, [name], name, pads=[1, 1, 1, 1]))
        return name

    def node(kind: str, inputs: list[str], name: str) -> str:
        made.append(helper.make_node(kind, inputs, [name], name))
        return name

    last = node("Relu", [convolution("x", "stem", 3, 1.0)], "stem.relu")
    for index in range(blocks):
        name = f"block{index}"
        inner = node("Relu", [convolution(last, f"{name}.a", channels, 1.0)], f"{name}.relu")
        branch = convolution(inner, f"{name}.b", channels, 1 / math.sqrt(blocks))
        last = node("Relu", [node("Add", [last, branch], f"{name}.sum")], f"{name}.out")
    pooled = node("GlobalAveragePool", [last], "pooled")
    node("Flatten", [pooled], "features")
    graph = helper.make_graph(
        made,
        "deep",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, side, side])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, [1, channels])],
        weights,
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9, producer_name="deep"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.deep", description=__doc__)
    parser.add_argument("nodes", type=int)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--side", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model = network(arguments.nodes, arguments.channels, arguments.side, arguments.seed)
    onnx.save(model, arguments.output)
    print(f"{arguments.output}: {len(model.graph.node)} nodes")


if __name__ == "__main__":
    main()
