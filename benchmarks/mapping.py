"""How much of an export is mapped to a module's path and a line of source.

``python -m benchmarks.mapping [MODEL…]`` exports the zoo's PyTorch modules, and a vision
transformer of the package transformers (``pip install transformers``; its weights are generated),
with both exporters, audits each file with its module at the head of the chain, and prints the share
of segments that name a module and a line. Exit code 1 where one is below 95 %.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from auditor import discovery
from auditor.audit import AuditOptions, BackendSpec
from auditor.ports import Silent
from auditor.training.export import compare
from benchmarks import zoo

WAYS = (("dynamo", 18), ("torchscript", 17))
MODELS = ("efficientnet_lite0", "minilm", "mtcnn_p", "mtcnn_r", "mtcnn_o", "vit")
LEAST = 0.95


def vit() -> Any:
    """ViT-Small/16 (Dosovitskiy et al., 2021) as transformers writes it, for ``--source``."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536
    )
    return ViTForImageClassification(config).eval()


def _example(name: str, folder: Path) -> Path:
    if name != "vit":
        return zoo.obtain([name])[0].with_suffix(".npz")
    path = folder / "photographs.npz"
    images = [zoo._imagenet(photo) for photo in zoo.PHOTOS]
    np.savez(path, pixel_values=np.stack(images))
    return path


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mapping", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="MODEL", help=", ".join(MODELS))
    least = 1.0
    print("| model | exporter | tensors paired | segments with module and line | divergence |")
    print("|---|---|--:|--:|--:|")
    for name in parser.parse_args().names or MODELS:
        where = "benchmarks.mapping" if name == "vit" else "benchmarks.zoo"
        with TemporaryDirectory() as scratch:
            options = AuditOptions(
                backends=(BackendSpec("torch"),),
                source=f"{where}:{name}",
                data=_example(name, Path(scratch)),
                samples=1,
                confirm=False,
            )
            made = compare(
                WAYS,
                options,
                {},
                Path(scratch),
                "m.onnx",
                noises=discovery.noises(),
                progress=Silent(),
            )
        for trial, report in zip(made.report.trials, made.audits, strict=True):
            if report is None:
                print(f"| {name} | {trial.label} | {trial.failure} |", flush=True)
                least = 0.0
                continue
            (side,) = (part for part in report.backends if part.id == "torch")
            proof = side.fidelity
            assert proof is not None
            placed = sum(any(".py:" in m for m in s.modules) for s in side.segments)
            share = placed / len(side.segments)
            least = min(least, share)
            print(
                f"| {name} | {trial.label} | {proof.output_proved} of {proof.candidates} "
                f"| {placed} of {len(side.segments)}, {share:.1%} "
                f"| {max(o.distance.relative_l2 for o in side.outputs):.1e} |",
                flush=True,
            )
    return 0 if least >= LEAST else 1


if __name__ == "__main__":
    sys.exit(main())
