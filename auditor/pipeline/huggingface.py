"""Reads the ``preprocessor_config.json`` that Hugging Face models carry, as a description.

Source: ``BaseImageProcessor`` and its subclasses in the documentation of Transformers. Images are
decoded and resized with Pillow there.
"""

from __future__ import annotations

import json
from typing import Any

from auditor.errors import UsageError

# PIL.Image.Resampling, by number.
_RESAMPLE = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
_READ = frozenset(
    (
        *("do_resize", "size", "resample", "do_center_crop", "crop_size", "crop_pct"),
        *("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
        *("do_convert_rgb", "do_flip_channel_order", "do_flip_channels", "max_size"),
    )
)
# Keys that say nothing about pixels.
_SILENT = (
    *("processor_class", "image_processor_type", "feature_extractor_type", "auto_map"),
    *("do_convert_annotations", "do_reduce_labels", "reduce_labels", "format", "data_format"),
    *("input_data_format", "return_tensors", "device", "disable_grouping", "default_to_square"),
)
# Keys without `do_` that change pixels, or the size, where they are set.
_CHANGING = (
    *("rescale_offset", "include_top", "keep_aspect_ratio", "ensure_multiple_of"),
    *("size_divisor", "pad_size"),
)
_HINT = "Write a pipeline.toml for it (docs/pipeline.md)."


def converted(text: str, source: str) -> tuple[str, tuple[str, ...]]:
    """A description as TOML text, and what had to be assumed.

    Args:
        text: the JSON.
        source: what errors call it.

    Raises:
        UsageError: it is no such file, or asks for a step that a description does not have.
    """
    try:
        config = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{source} is no JSON: {error}", _HINT) from error
    if not isinstance(config, dict) or not _READ.intersection(config):
        raise UsageError(f"{source} is no preprocessor_config.json", _HINT)
    notes: list[str] = []
    table: dict[str, Any] = {"decoder": "pillow", "orientation": "ignore"}
    crops = config.get("do_center_crop", False)
    if config.get("do_resize", True) and "size" in config:
        table["resize"], crop = _resize(config, crops, source, notes)
        if crop is not None:
            table["crop"] = crop
    if crops and "crop_size" in config:
        table["crop"] = _pair(config["crop_size"], "crop_size", source)
    scale = config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0
    table["normalise"] = {"scale": scale}
    if config.get("do_normalize", True) and "image_mean" in config and "image_std" in config:
        table["normalise"] |= {"mean": config["image_mean"], "std": config["image_std"]}
    flipped = config.get("do_flip_channel_order", config.get("do_flip_channels"))
    table["channels"] = "bgr" if flipped else "rgb"
    known = {*_READ, *_SILENT}
    if "long_side" in table.get("resize", {}):
        known.add("do_pad")  # to the largest of a batch: here it is one photograph
    ignored = [
        k for k, v in config.items() if k not in known and k[0] != "_" and v not in (None, False)
    ]
    changing = [k for k in ignored if k.startswith("do_") or k in _CHANGING]
    if changing:
        raise UsageError(
            f"{source}: `{changing[0]}` asks for a step that a description does not have", _HINT
        )
    if ignored:
        notes.append(f"Not read from {source}: {', '.join(sorted(ignored))}.")
    lines = [f"{key} = {_toml(value, source)}" for key, value in table.items()]
    return "\n".join(("[training]", *lines)), tuple(notes)


def _resize(
    config: dict[str, Any], crops: bool, source: str, notes: list[str]
) -> tuple[dict[str, Any], Any]:
    """The resize step, and the crop that comes with ``crop_pct`` (ConvNeXt), if any."""
    number = config.get("resample", 2)
    if not isinstance(number, int) or not 0 <= number < len(_RESAMPLE):
        raise UsageError(f"{source}: `resample` is {number!r}", "It takes 0 to 5, as in Pillow.")
    resize: dict[str, Any] = {"library": "pillow", "interpolation": _RESAMPLE[number]}
    kind = str(config.get("image_processor_type", ""))
    if kind.endswith("Fast"):
        notes.append(f"{kind} resizes with torchvision; Pillow, which it follows, stands for it.")
    size = config["size"]
    longest = config.get("max_size")  # of earlier versions, beside a number as `size`
    if isinstance(size, int):
        shorter = crops or longest is not None or config.get("crop_pct") is not None
        size = {"shortest_edge": size} if shorter else {"height": size, "width": size}
        notes.append(
            f"`size` in {source} is a number: taken as the "
            f"{'shorter side' if shorter else 'height and width'}."
        )
    edge = size.get("shortest_edge") if isinstance(size, dict) else None
    if isinstance(edge, int):
        longest = size.get("longest_edge", longest)
    if isinstance(edge, int) and isinstance(longest, int):
        return resize | {"short_side": edge, "long_side": longest}, None
    if isinstance(edge, int) and longest is None:
        fraction = config.get("crop_pct")
        if isinstance(fraction, int | float) and 0 < fraction <= 1 and edge < 384:
            return resize | {"short_side": int(edge / fraction)}, [edge, edge]
        if fraction is not None:  # from 384 on ConvNeXt resizes to the square (its processor)
            return resize | {"size": [edge, edge]}, None
        return resize | {"short_side": edge}, None
    return resize | {"size": _pair(size, "size", source)}, None


def _pair(size: Any, key: str, source: str) -> list[int]:
    if isinstance(size, int):
        return [size, size]
    if isinstance(size, dict) and {"height", "width"} <= size.keys():
        return [size["height"], size["width"]]
    raise UsageError(f"{source}: `{key}` is {size!r}, which is not understood", _HINT)


def _toml(value: Any, source: str) -> str:
    """Strings, numbers, lists and tables are written alike in JSON and TOML but for the `=`."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {_toml(v, source)}" for k, v in value.items()) + " }"
    if value is None:
        raise UsageError(f"{source} has a null where a value is needed", _HINT)
    return json.dumps(value)
