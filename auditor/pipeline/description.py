"""A pipeline description: what turns a photograph into the network's input, on both sides.

A TOML file with a ``[training]`` side and, optionally, a ``[deployment]`` side that inherits every
key it does not name. A side may start from a preset (``preset = "imagenet-torchvision"``). The
keys, their values and their order of execution are in docs/pipeline.md.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any, cast, get_args

from auditor.errors import UsageError, suggestion
from auditor.lines import Lines
from auditor.pipeline.postprocessing.masks import Enlarger, Enlarging
from auditor.pipeline.postprocessing.post import (
    BEHIND,
    Activation,
    Coding,
    Joining,
    Kind,
    Lengths,
    Masking,
    Names,
    Order,
    Post,
    Rounding,
    Shapes,
    Spelling,
    Suppression,
    Unit,
    several,
)
from auditor.pipeline.preprocessing import libraries
from auditor.pipeline.preprocessing.libraries import Arithmetic, Conversion, Matrix, Range
from auditor.pipeline.preprocessing.stages import (
    Channels,
    Colour,
    Decode,
    Layout,
    Orientation,
    Pipeline,
    Place,
    Resize,
    Size,
    Type,
)


@dataclass(frozen=True, slots=True)
class Description:
    """Both sides, and what had to be assumed to read them.

    Attributes:
        source: the file or preset.
        notes: choices made on the user's behalf, as sentences.
        training_post, deployment_post: what each side does after the network; both or none.
    """

    source: str
    training: Pipeline
    deployment: Pipeline
    notes: tuple[str, ...] = ()
    training_post: Post | None = None
    deployment_post: Post | None = None


def load(source: str) -> Description:
    """Read a description.

    Args:
        source: a TOML file, a Hugging Face ``preprocessor_config.json``, or a preset's name.

    Raises:
        UsageError: it cannot be read, or says something impossible; names file, line and key.
    """
    if source in presets():
        return parse(_preset(source), f"preset {source}")
    path = Path(source)
    if not path.is_file():
        known = ", ".join(presets())
        raise UsageError(
            f"--pipeline {source} is neither a file nor a preset",
            f"{suggestion(source, presets())}Presets: {known}.",
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {source}: {error}", "Give a TOML file in UTF-8.") from error
    if path.suffix == ".json":
        from auditor.pipeline import huggingface

        text, notes = huggingface.converted(text, source)
        found = parse(text, source, Lines("", source))  # its lines are not the file's
        return Description(source, found.training, found.deployment, notes)
    return parse(text, source)


def presets() -> tuple[str, ...]:
    """Names of the descriptions that come with the auditor."""
    folder = resources.files("auditor.pipeline") / "presets"
    return tuple(sorted(f.name.removesuffix(".toml") for f in folder.iterdir()))


def parse(text: str, source: str, lines: Lines | None = None) -> Description:
    """Read a description from its text.

    Args:
        text: as TOML.
        source: what errors call it.
        lines: where its keys stand; None for where they do in the text.

    Raises:
        UsageError: it says something impossible; names the line and the key.
    """
    try:
        tables = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(f"{source} is no TOML: {error}", "See docs/pipeline.md.") from error
    lines = lines or Lines(text, source)
    for name in tables:
        if name not in ("training", "deployment"):
            raise _wrong(lines.where(name), name, "is no side of a pipeline", ("training",))
    if "training" not in tables:
        raise UsageError(f"{source} has no [training] side", "See docs/pipeline.md.")
    training = _side(tables, "training", lines)
    deployment = _overridden(training, _side(tables, "deployment", lines))
    posts = _post(training, source), _post(deployment, source)
    if (posts[0] and posts[0].kind) != (posts[1] and posts[1].kind):
        raise UsageError(
            f"{source}: the two sides make results of different kinds", "Give both the same `post`."
        )
    pipelines = _pipeline(training, source), _pipeline(deployment, source)
    return Description(source, *pipelines, (), *posts)


# --- from text to values, each with where it stands ------------------------------------------


@dataclass(frozen=True, slots=True)
class _Value:
    value: Any
    where: str


_Side = dict[str, _Value]  # by dotted key

_TABLES = {
    "colour": ("library", "matrix", "range", "arithmetic"),
    "resize": (
        *("library", "interpolation", "antialias"),
        *("size", "short_side", "long_side", "height", "letterbox", "pad", "place", "multiple"),
    ),
    "normalise": ("scale", "mean", "std"),
    "post": tuple(field.name for field in fields(Post)),
}
_PLAIN = ("preset", "decoder", "orientation", "precrop", "crop", "channels", "layout", "dtype")
_TARGETS = (
    *("resize.size", "resize.short_side", "resize.long_side", "resize.height"),
    "resize.letterbox",
)
_ANCHORS = ("post.anchors", "post.sizes", "post.cell")
# What a new value of one key makes meaningless in the side that it overrides.
_RESETS = {
    **{target: _TARGETS for target in _TARGETS},
    **{key: _ANCHORS for key in _ANCHORS},
    "decoder": ("orientation",),  # the new decoder's own default
    "resize.library": ("resize.interpolation", "resize.antialias"),
    "resize.interpolation": ("resize.antialias",),
    "colour.library": ("colour.matrix", "colour.range", "colour.arithmetic"),
}


def _side(tables: Mapping[str, Any], name: str, lines: Lines) -> _Side:
    """The keys of one side, on top of its preset if it names one."""
    table = tables.get(name, {})
    if not isinstance(table, dict):
        raise UsageError(f"{lines.where(name)}: `{name}` is no table", f"Write [{name}].")
    side: _Side = {}
    for key, value in table.items():
        where = lines.where(f"{name}.{key}")
        if key in _TABLES and isinstance(value, dict):
            for inner, part in value.items():
                inside = lines.where(f"{name}.{key}.{inner}")
                if inner not in _TABLES[key]:
                    raise _wrong(inside, f"{key}.{inner}", "is no key", _TABLES[key])
                side[f"{key}.{inner}"] = _Value(part, inside)
        elif key in _TABLES and (key == "normalise" or value not in ("none", "rgb")):
            raise UsageError(
                f"{where}: `{key}` is {value!r}, but a table is expected",
                f"Write {key} = {{ {_TABLES[key][0]} = … }}, or see docs/pipeline.md.",
            )
        elif key in _PLAIN or key in _TABLES:
            side[key] = _Value(value, where)
        else:
            raise _wrong(where, key, "is no key of a pipeline", (*_PLAIN, *_TABLES))
    if (preset := side.pop("preset", None)) is not None:
        if preset.value not in presets():
            raise _wrong(preset.where, str(preset.value), "is no preset", presets())
        base = _preset(preset.value)
        inner_lines = Lines(base, f"preset {preset.value}")
        side = _overridden(_side(tomllib.loads(base), "training", inner_lines), side)
    return side


def _overridden(base: _Side, by: _Side) -> _Side:
    result = dict(base)
    for key in by:
        table = key.partition(".")[0]
        for stale in (*_RESETS.get(key, ()), table):
            result.pop(stale, None)
        if table == key:
            result = {k: v for k, v in result.items() if not k.startswith(f"{table}.")}
    return {**result, **by}


def _preset(name: str) -> str:
    path = resources.files("auditor.pipeline") / "presets" / f"{name}.toml"
    return path.read_text(encoding="utf-8")


# --- from values to a pipeline ---------------------------------------------------------------


class _Reader:
    """Takes typed values out of a side; every refusal names file, line and key."""

    def __init__(self, side: _Side, source: str) -> None:
        self._side = side
        self._source = source

    def has(self, key: str) -> bool:
        return key in self._side and self.value(key) != "none"

    def value(self, key: str) -> Any:
        return self._side[key].value

    def where(self, key: str) -> str:
        return self._side[key].where if key in self._side else self._source

    def choice(self, key: str, choices: Iterable[str], default: str | None = None) -> str:
        known = tuple(choices)
        if key not in self._side and default is not None:
            return default
        value = self._get(key)
        if value not in known:
            raise _wrong(self.where(key), str(value), f"is no value of `{key}`", known)
        return cast(str, value)

    def word(self, key: str, words: Any, default: str | None = None) -> Any:
        """One word of a ``Literal``, whose type it has."""
        return self.choice(key, get_args(words), default)

    def number(self, key: str, default: float, *, above: float | None = None) -> float:
        value = self._side[key].value if key in self._side else default
        if not _is_number(value) or (above is not None and value <= above):
            limit = "" if above is None else f" above {above:g}"
            raise self.expected(key, f"a number{limit}")
        return float(value)

    def whole(self, key: str, default: int | None = None, *, low: int = 1) -> int:
        value = self._get(key) if default is None or key in self._side else default
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise self.expected(key, f"a whole number of at least {low}")
        return value

    def bit(self, key: str) -> int:
        value = self._side[key].value if key in self._side else 0
        if type(value) is not int or value not in (0, 1):
            raise self.expected(key, "0 or 1")
        return value

    def size(self, key: str) -> Size:
        value = self._get(key)
        pair = value if isinstance(value, list) else [value, value]
        if len(pair) != 2 or not all(type(v) is int and v > 0 for v in pair):
            raise self.expected(key, "a length in pixels, or [height, width]")
        return pair[0], pair[1]

    def numbers(self, key: str, default: float, *, zero: bool = True) -> tuple[float, ...]:
        """Three numbers, one by channel; one stands for all."""
        value = self._side[key].value if key in self._side else default
        many = value if isinstance(value, list) else [value] * 3
        if len(many) != 3 or not all(_is_number(v) and (zero or v != 0) for v in many):
            raise self.expected(key, "one number or one for each of 3 channels, none of them 0")
        return tuple(float(v) for v in many)

    def text(self, key: str) -> str:
        value = self._side[key].value if key in self._side else ""
        if not isinstance(value, str):
            raise self.expected(key, "a name in quotes")
        return value

    def names(self, key: str) -> Names:
        """One name, or a list of them."""
        value = self._side[key].value if key in self._side else ""
        if isinstance(value, list) and value and all(isinstance(v, str) and v for v in value):
            return tuple(value)
        if not isinstance(value, str):
            raise self.expected(key, "a name in quotes, or a list of them")
        return value

    def lengths(self, key: str) -> Lengths:
        """One whole number, or a list of them; 0 where there is none."""
        value = self._side[key].value if key in self._side else 0
        many: list[Any] = value if isinstance(value, list) and value else [value]
        if not all(type(v) is int and v >= 0 for v in many):
            raise self.expected(key, "a length in pixels, or a list of them")
        return tuple(many) if isinstance(value, list) else many[0]

    def lists(self, key: str, depth: int, what: str) -> Any:
        """Lists in lists of numbers above 0, as tuples; () where there are none."""

        def read(value: Any, left: int) -> Any:
            if left == 0 and _is_number(value) and value > 0:
                return float(value)
            if left == 0 or not isinstance(value, list) or not value:
                raise self.expected(key, what)
            return tuple(read(part, left - 1) for part in value)

        return read(self._side[key].value, depth) if key in self._side else ()

    def pair(self, key: str, default: tuple[float, float]) -> tuple[float, float]:
        value = self._side[key].value if key in self._side else list(default)
        if not isinstance(value, list) or len(value) != 2 or not all(map(_is_number, value)):
            raise self.expected(key, "two numbers")
        return float(value[0]), float(value[1])

    def boolean(self, key: str, default: bool) -> bool:
        value = self._side[key].value if key in self._side else default
        if not isinstance(value, bool):
            raise self.expected(key, "true or false")
        return value

    def _get(self, key: str) -> Any:
        if key not in self._side:
            raise UsageError(f"{self._source} does not say `{key}`", "See docs/pipeline.md.")
        return self._side[key].value

    def expected(self, key: str, what: str) -> UsageError:
        value = self._side[key].value if key in self._side else None
        return UsageError(f"{self.where(key)}: `{key}` is {value!r}", f"It takes {what}.")


def _pipeline(side: _Side, source: str) -> Pipeline:
    read = _Reader(side, source)
    resize = _resize(read)
    crop = read.size("crop") if read.has("crop") else None
    if crop and resize:
        side_length = (
            resize.short_side or resize.height or min(resize.size or resize.letterbox or (10**9,))
        )
        if side_length < min(crop):
            raise UsageError(
                f"{read.where('crop')}: `crop` is larger than what is left after resizing",
                "A centre crop is at most as large as the resized photograph.",
            )
    precrop = read.number("precrop", 1.0, above=0) if read.has("precrop") else None
    if precrop is not None and precrop > 1:
        raise UsageError(f"{read.where('precrop')}: `precrop` is above 1", "It is a fraction.")
    dtype = read.word("dtype", Type, "float32")
    scale = read.number("normalise.scale", 1.0, above=0)
    mean = read.numbers("normalise.mean", 0.0)
    std = read.numbers("normalise.std", 1.0, zero=False)
    if dtype == "uint8" and (scale != 1 or any(mean) or any(s != 1 for s in std)):
        raise UsageError(
            f"{read.where('dtype')}: `dtype` is uint8, but the pixels are normalised",
            "Drop `normalise`, or let the tensor be float32.",
        )
    return Pipeline(
        decode=_decode(read),
        colour=_colour(read),
        precrop=precrop,
        resize=resize,
        crop=crop,
        channels=read.word("channels", Channels, "rgb"),
        scale=scale,
        mean=mean,
        std=std,
        layout=read.word("layout", Layout, "nchw"),
        dtype=dtype,
    )


def _decode(read: _Reader) -> Decode:
    ways = {}
    for name in libraries.names("decoders"):
        variants = libraries.load("decoders", name).variants
        ways[name] = (name, variants[0])
        ways.update({f"{name}:{variant}": (name, variant) for variant in variants})
    library, variant = ways[read.choice("decoder", ways)]
    turns = libraries.load("decoders", library).turns
    default = "apply" if turns else "ignore"
    return Decode(library, variant, read.word("orientation", Orientation, default))


def _colour(read: _Reader) -> Colour | None:
    if not any(read.has(f"colour.{key}") for key in _TABLES["colour"]):
        return None
    library = read.choice("colour.library", libraries.names("colours"))
    wanted = Conversion(
        read.word("colour.matrix", Matrix, "bt601"),
        read.word("colour.range", Range, "limited"),
        read.word("colour.arithmetic", Arithmetic, "rounded"),
    )
    offered: tuple[Conversion, ...] = libraries.load("colours", library).conversions
    if wanted not in offered:
        can = "; ".join(f"{c.matrix} {c.range} {c.arithmetic}" for c in offered)
        raise UsageError(
            f"{read.where('colour.library')}: `colour`: {library} has no "
            f"{wanted.matrix} {wanted.range} {wanted.arithmetic}",
            f"It has: {can}.",
        )
    return Colour(library, wanted)


def _resize(read: _Reader) -> Resize | None:
    if not any(read.has(f"resize.{key}") for key in _TABLES["resize"]):
        return None
    library = read.choice("resize.library", libraries.names("resizers"))
    offered: dict[str, tuple[bool, ...]] = libraries.load("resizers", library).interpolations
    interpolation = read.choice("resize.interpolation", offered)
    choices = offered[interpolation]
    antialias = read.boolean("resize.antialias", choices[0])
    if antialias not in choices:
        raise UsageError(
            f"{read.where('resize.antialias')}: `resize.antialias` is {str(antialias).lower()}, "
            f"but {library}'s {interpolation} always {'does' if choices[0] else 'does not'}",
            "Drop the key, or choose another library.",
        )
    given = [target for target in _TARGETS if read.has(target)]
    bounded = given == ["resize.short_side", "resize.long_side"]
    if len(given) != 1 and not bounded:
        raise UsageError(
            f"{read.where(given[-1] if given else 'resize.library')}: `resize` names "
            f"{len(given)} targets",
            "Give exactly one of size, short_side, long_side, height and letterbox; or short_side "
            "with long_side as its bound.",
        )
    return Resize(
        library=library,
        interpolation=interpolation,
        antialias=antialias,
        size=read.size("resize.size") if "resize.size" in given else None,
        short_side=read.whole("resize.short_side") if "resize.short_side" in given else None,
        long_side=read.whole("resize.long_side") if "resize.long_side" in given else None,
        height=read.whole("resize.height") if "resize.height" in given else None,
        letterbox=read.size("resize.letterbox") if "resize.letterbox" in given else None,
        pad=read.whole("resize.pad", 114, low=0),
        place=read.word("resize.place", Place, "centre"),
        multiple=read.whole("resize.multiple", 1),
    )


def _post(side: _Side, source: str) -> Post | None:
    """What comes after the network; None where the description does not say."""
    if not any(read_key.startswith("post.") for read_key in side):
        return None
    read = _Reader(side, source)
    default = Post("scores")
    variances = read.pair("post.variances", default.variances)
    found = Post(
        kind=read.word("post.kind", Kind),
        output=read.names("post.output"),
        scores=read.names("post.scores"),
        objectness=read.names("post.objectness"),
        join=read.word("post.join", Joining, default.join),
        channels_first=read.boolean("post.channels_first", False),
        activation=read.word("post.activation", Activation, "none"),
        background=read.whole("post.background", 0, low=0) if read.has("post.background") else None,
        threshold=read.number("post.threshold", default.threshold),
        coding=read.word("post.coding", Coding, "corners"),
        bins=read.whole("post.bins", 0, low=0),
        unit=read.word("post.unit", Unit, default.unit),
        stride=read.lengths("post.stride"),
        shift=read.number("post.shift", default.shift),
        cell=read.lengths("post.cell"),
        anchors=_anchors(read, source),
        sizes=read.lists("post.sizes", 2, "by level, a list of lengths in pixels"),
        ratios=read.lists("post.ratios", 1, "a list of heights by widths") or default.ratios,
        variances=variances,
        offset=read.bit("post.offset"),
        clip=read.size("post.clip") if read.has("post.clip") else None,
        rounding=read.word("post.rounding", Rounding, "none"),
        nms=read.word("post.nms", Suppression, "none"),
        iou=read.number("post.iou", default.iou, above=0),
        iou_offset=read.bit("post.iou_offset"),
        class_aware=read.boolean("post.class_aware", True),
        top_k=read.whole("post.top_k", default.top_k),
        mask=read.word("post.mask", Masking, default.mask),
        channels_last=read.boolean("post.channels_last", False),
        resize=read.word("post.resize", Enlarger, default.resize),
        interpolation=read.word("post.interpolation", Enlarging, default.interpolation),
        order=read.word("post.order", Order, default.order),
        text=read.word("post.text", Spelling, default.text),
        blank=read.whole("post.blank", 0, low=0),
        charset=_charset(source, read.text("post.charset")),
    )
    classes = found.mask == "argmax" and found.order == "decide" and found.resize != "none"
    if classes and found.interpolation != "nearest":
        raise UsageError(
            f"{read.where('post.order')}: `post.interpolation` {found.interpolation} cannot "
            "enlarge classes: they have no values in between",
            'Say interpolation = "nearest", or order = "resize".',
        )
    _check_levels(read, found)
    return found


def _check_levels(read: _Reader, post: Post) -> None:
    """Whether outputs, strides and anchors of a detector's levels belong together."""

    def wrong(key: str, what: str, hint: str) -> UsageError:
        return UsageError(f"{read.where(key)}: `{key}` {what}", hint)

    outputs, strides = len(several(post.output)), len(several(post.stride))
    if outputs > 1 and post.kind != "boxes":
        raise wrong("post.output", f"names {outputs} outputs", "Only boxes have several levels.")
    for key, names in (("post.scores", post.scores), ("post.objectness", post.objectness)):
        if names not in ("", BEHIND) and len(several(names)) != outputs:
            raise wrong(
                key,
                f"names {len(several(names))} outputs, `post.output` {outputs}",
                "Name one for each level in both, in the same order.",
            )
    given = [key for key in _ANCHORS if read.has(key)]
    if len(given) > 1:
        raise wrong(given[1], f"says what the anchors are, and so does `{given[0]}`", "Give one.")
    if post.coding.endswith("deltas") and not given:
        raise wrong(
            "post.coding",
            f"{post.coding} needs anchors",
            "Name a file with `anchors`, or the `stride` of a grid and its `cell`, `sizes` or "
            "`anchors`.",
        )
    by_level = {
        "post.anchors": post.anchors if isinstance(post.anchors, tuple) else (),
        "post.sizes": post.sizes,
        "post.cell": several(post.cell) if post.cell else (),
    }
    levels = {key: len(value) for key, value in by_level.items() if value}
    gridded = post.coding in ("distances", "dfl") or post.unit == "strides"
    if (gridded or levels) and not post.stride:
        key = next(iter(levels), "post.unit" if post.unit == "strides" else "post.coding")
        raise wrong(key, "needs a grid", "Say the `stride` of each level, in pixels.")
    if post.stride and outputs not in (1, strides):
        levels["post.output"] = outputs
    for key, count in levels.items():
        if count != strides:
            raise wrong(
                key, f"has {count} levels, `post.stride` {strides}", "Give all for each level."
            )


def _anchors(read: _Reader, source: str) -> str | Shapes:
    """A file beside the description, or the width and height of each anchor by level."""
    if not read.has("post.anchors") or isinstance(read.value("post.anchors"), str):
        return _beside(source, read.text("post.anchors"))
    what = "a file, or by level a list of [width, height] in pixels"
    found = read.lists("post.anchors", 3, what)
    if any(len(shape) != 2 for level in found for shape in level):
        raise read.expected("post.anchors", what)
    return cast(Shapes, found)


def _charset(source: str, name: str) -> str:
    return name if name == "model" else _beside(source, name)


def _beside(source: str, name: str) -> str:
    """A file named in a description, from that description's folder."""
    return str(Path(source).parent / name) if name else ""


def _wrong(where: str, name: str, what: str, known: Iterable[str]) -> UsageError:
    choices = tuple(known)
    meant = suggestion(name.rpartition(".")[2], choices)
    return UsageError(f"{where}: `{name}` {what}", f"{meant}Known: {', '.join(choices)}.")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30
