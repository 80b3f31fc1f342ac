"""A trained speech recogniser as ONNX, and spoken sentences for it.

``python -m benchmarks.speech -o DIR`` writes ``speech.onnx``, ``speech.npz`` and ``tokens.txt``,
for ``audit DIR/speech.onnx --data DIR/speech.npz --samples 6 --output-kind log_probs:text
--tokens DIR/tokens.txt``. The model is that of the package hama (Apache-2.0; a convolutional and
attention encoder with CTC over phonemes, 2.3 million parameters in float16), whose releases since
1.4 ship no ONNX: ``pip install --no-deps hama==1.3.13``. The sentences are spoken by espeak-ng
(``apt-get install espeak-ng``) in several voices, each cut to 2.5 s.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import shutil
import subprocess
import wave
from pathlib import Path

import numpy as np

RATE = 16_000
LENGTH = 40_000
SPOKEN = (
    ("en-us", "the quick brown fox jumps over the lazy dog"),
    ("en-gb", "please call me back tomorrow morning"),
    ("en-us+f3", "we measured the temperature of the water"),
    ("en-us+m3", "seven eight nine ten eleven twelve"),
    ("en-gb+f2", "open the window and let the air in"),
    ("en-us+m7", "she sells sea shells by the shore"),
)


def speak(voice: str, text: str) -> np.ndarray:
    """A sentence as float32 ``[1, LENGTH]`` within [-1, 1], at 16 kHz; silence behind it."""
    # espeak-ng does not know the length when it writes to a pipe, so the header's is not used.
    command = ["espeak-ng", "-v", voice, "-s", "150", "--stdout", text]
    made = subprocess.run(command, check=True, capture_output=True).stdout
    with wave.open(io.BytesIO(made)) as file:
        rate = file.getframerate()
        heard = np.frombuffer(file.readframes(len(made)), "<i2").astype(np.float32) / 32768
    times = np.arange(LENGTH) * rate / RATE
    return np.interp(times, np.arange(len(heard)), heard, right=0).astype(np.float32)[None]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speech", description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    folder: Path = parser.parse_args().output
    spec = importlib.util.find_spec("hama")
    if spec is None or spec.origin is None:
        parser.error("run `pip install --no-deps hama==1.3.13`")
    assets = Path(spec.origin).parent / "assets"
    if not (assets / "asr_waveform_fp16.onnx").is_file():
        parser.error("this hama has no ONNX: run `pip install --no-deps hama==1.3.13`")
    if shutil.which("espeak-ng") is None:
        parser.error("run `apt-get install espeak-ng`")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(assets / "asr_waveform_fp16.onnx", folder / "speech.onnx")
    tokens = json.loads((assets / "g2p_vocab.json").read_text(encoding="utf-8"))["decoder"]
    lines = "\n".join([*tokens, "<wb>", "<blank>"]) + "\n"
    (folder / "tokens.txt").write_text(lines, encoding="utf-8")
    clips = np.stack([speak(*said) for said in SPOKEN])
    lengths = np.full((len(clips), 1), LENGTH, np.int64)
    np.savez(folder / "speech.npz", waveform=clips, waveform_lengths=lengths)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
