"""The network that most tests of the OpenVINO backend observe."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.backends.openvino_models import residual_net


@pytest.fixture
def residual(tmp_path: Path) -> Path:
    """A He-initialised CNN with two residual blocks; node names are empty, repeated, odd."""
    return residual_net(tmp_path / "residual.onnx", height=32)
