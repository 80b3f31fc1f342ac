"""Real models for the tests, made once from packages by ``benchmarks.zoo``."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from benchmarks import zoo

# What a test measures is made anew; tests of the cache name a folder of their own.
os.environ["SYSNOISE_CACHE"] = "off"

# How long an example takes is the machine's affair, and no test fails for it. At a desk each run
# draws other examples; where a run decides on a release (`CI` is set), always the same ones.
settings.register_profile(
    "untimed",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize="CI" in os.environ,
)
settings.load_profile("untimed")


@pytest.fixture(scope="session", autouse=True)
def heard_interrupts() -> None:
    """A test run started in the background ignores Ctrl-C, and every audit it starts would too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def zoo_model() -> Callable[[str], Path]:
    """``zoo_model("minilm")`` is the path of ``minilm.onnx``; its inputs lie beside it (.npz).

    A model that cannot be made fails the test, because a green run that skipped the real models
    proves nothing; set ``SYSNOISE_OFFLINE`` where its packages cannot be had, and it skips.
    """

    def get(name: str) -> Path:
        try:
            return zoo.obtain([name])[0]
        except zoo.MissingPackageError as error:
            if os.environ.get("SYSNOISE_OFFLINE"):
                pytest.skip(f"SYSNOISE_OFFLINE is set and {error}")
            pytest.fail(str(error), pytrace=False)

    return get


@pytest.fixture(scope="session")
def efficientnet(zoo_model: Callable[[str], Path]) -> Path:
    """EfficientNet-Lite0: 450 nodes, six photographs."""
    return zoo_model("efficientnet_lite0")


@pytest.fixture(scope="session")
def efficientnet_int8(zoo_model: Callable[[str], Path]) -> Path:
    """The same network as int8 QDQ."""
    return zoo_model("efficientnet_lite0_int8")


@pytest.fixture(scope="session")
def minilm(zoo_model: Callable[[str], Path]) -> Path:
    """MiniLM-L6: a transformer on 64 tokens, four sentences."""
    return zoo_model("minilm")


@pytest.fixture(scope="session")
def ppocr_det(zoo_model: Callable[[str], Path]) -> Path:
    """PP-OCRv4 text detection: dynamic shapes, four photographs of writing, 256x480."""
    return zoo_model("ppocr_det")


@pytest.fixture(scope="session")
def mtcnn(zoo_model: Callable[[str], Path]) -> tuple[Path, Path, Path]:
    """MTCNN's three networks, with pooling that rounds up."""
    return zoo_model("mtcnn_p"), zoo_model("mtcnn_r"), zoo_model("mtcnn_o")
