"""Which pipeline made this tensor? A search over the catalogue for what a device really fed.

Sizes and crops are those of a description; decoder, orientation, colour, resizer, channel order,
layout and normalisation are searched.

1. Every decoder × resizer without a colour conversion, compared with the tensor after the best
   straight line per channel. The closest one tells the normalisation, and so the tensor's pixels.
2. Colour conversions, each measured on the closest resizer and on nearest neighbour, which smooths
   nothing away. The other resizers follow, the closest conversion first. A combination is left out
   when it can be neither the best nor the second: by the triangle inequality it is at least as far
   from the tensor as without the conversion, minus what the conversion changes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from auditor.errors import UsageError
from auditor.graphs.model import shown
from auditor.pipeline.preprocessing import steps
from auditor.pipeline.preprocessing.libraries import PhotoError
from auditor.pipeline.preprocessing.stages import Channels, Colour, Decode, Layout, Pipeline, Resize
from auditor.pipeline.sysnoise import options
from auditor.ports import Array
from auditor.records.backend import Gap
from auditor.records.forensics import ForensicsCandidate, ForensicsReport

# What people normalise with, by name: scale, mean and deviation by channel (red first).
_KNOWN: dict[str, tuple[float, tuple[float, float, float], tuple[float, float, float]]] = {
    "pixels, 0 to 255": (1.0, (0.0,) * 3, (1.0,) * 3),
    "0 to 1": (1 / 255, (0.0,) * 3, (1.0,) * 3),
    "−1 to 1": (1 / 127.5, (1.0,) * 3, (1.0,) * 3),
    "(x − 127) / 128": (1.0, (127.0,) * 3, (128.0,) * 3),
    "(x − 128) / 128": (1.0, (128.0,) * 3, (128.0,) * 3),
    "(x − 127.5) / 128": (1.0, (127.5,) * 3, (128.0,) * 3),
    "mean and deviation of ImageNet": (1 / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "mean and deviation of CLIP": (
        1 / 255,
        (0.48145466, 0.4578275, 0.40821073),
        (0.26862954, 0.26130258, 0.27577711),
    ),
}
_WHOLE = 0.25  # levels from a whole number: what float16 leaves of an 8-bit pixel, and more
_NEAR = 0.3  # levels within which a normalisation is a usual one
_RATIO = 1.5  # between a slope found by regression and the true one
_SPARSE = 4  # every so many rows and columns are enough for a first look
_SAFE = 1.1  # times what a conversion changes, as it is measured on two resizers only
_ROUGHLY = 1.0  # levels beyond which a first look is enough
_LISTED = 10


@dataclass(frozen=True, slots=True)
class _Image:
    """A decoded photograph, and every decoder that gives these very pixels."""

    decoders: tuple[Decode, ...]
    pixels: Array


@dataclass(frozen=True, slots=True)
class _Candidate:
    """One combination.

    Attributes:
        pixels: what it would feed; None, to save memory, where another is closer.
        residual: how far that is from the tensor.
    """

    image: _Image
    colour: Colour | None
    resize: Resize | None
    pixels: Array | None
    residual: float


@dataclass(frozen=True, slots=True)
class _Conversion:
    """One conversion of one decoded photograph.

    Attributes:
        colour: the conversion.
        change: how much it changes, in pixel levels, where it was measured.
        measured: its candidates there.
        rest: the photograph's other candidates, without it.
    """

    colour: Colour
    change: float
    measured: list[_Candidate]
    rest: list[_Candidate]


@dataclass(frozen=True, slots=True)
class _Normalisation:
    """The straight line from pixels to the tensor, ``[3]`` each, by channel of the tensor."""

    channels: Channels
    slope: Array
    offset: Array
    name: str | None

    def undone(self, image: Array) -> Array:
        """Pixel levels of a tensor, height x width x RGB, in float64."""
        levels = (image - self.offset) / self.slope
        return levels[..., ::-1] if self.channels == "bgr" else levels


def identify(tensor: Array, photo: bytes, geometry: Pipeline) -> ForensicsReport:
    """Find what made a tensor of a photograph.

    Args:
        tensor: what was fed to the network: one photograph, three channels, first or last.
        photo: the file that it was made of.
        geometry: its sizes and crops are taken as given, and its other steps tried first.

    Raises:
        UsageError: the tensor is not one image of the size that the geometry gives.
        PhotoError: no decoder can read the photograph.
    """
    switches, missing = options.switches(geometry)
    gaps = list(missing)
    images = _decoded(
        photo, geometry, [s.step for s in switches if isinstance(s.step, Decode)], gaps
    )
    resizes = [geometry.resize, *(s.step for s in switches if isinstance(s.step, Resize))]
    colours = [s.step for s in switches if isinstance(s.step, Colour)]
    if geometry.colour is not None:
        colours.insert(0, geometry.colour)
    plain = [
        (image, resize, steps.framed(image.pixels, replace(geometry, resize=resize)))
        for image in images
        for resize in resizes
    ]
    layout, fed = _laid_out(tensor, plain[0][2].shape)
    normalisation = _normalisation(fed, [pixels for _, _, pixels in plain])
    levels, whole = _levels(fed, normalisation)
    planes = _planes(levels)
    found = [_Candidate(i, None, r, pixels, _far(pixels, planes)) for i, r, pixels in plain]
    by_image = [[c for c in found if c.image is image] for image in images]
    conversions = [one for mine in by_image for one in _converted(mine, colours, geometry, planes)]
    found += [candidate for one in conversions for candidate in one.measured]
    # The closest first: what it leaves as the two nearest rules the others out.
    conversions.sort(key=lambda one: min(c.residual for c in one.measured))
    skipped = 0
    best, second = _nearest_two(found)
    for one in conversions:
        pixels = None
        for candidate in one.rest:
            image = candidate.image
            if candidate.residual - _SAFE * one.change > second:
                skipped += len(image.decoders)
                continue
            if pixels is None:
                pixels = steps.coloured(image.pixels, one.colour)
            made = steps.framed(pixels, replace(geometry, resize=candidate.resize))
            residual = _far(made, planes, limit=second + _ROUGHLY)
            kept = made if residual <= best else None
            found.append(replace(candidate, colour=one.colour, pixels=kept, residual=residual))
            if residual < second:
                best, second = _nearest_two(found)
    return _report(found, levels, layout, normalisation, whole, skipped, gaps)


def _report(
    found: Sequence[_Candidate],
    levels: Array,
    layout: Layout,
    normalisation: _Normalisation,
    whole: bool,
    skipped: int,
    gaps: Sequence[Gap],
) -> ForensicsReport:
    ranked = sorted(found, key=lambda c: c.residual)  # stable: the geometry's own steps first
    best = ranked[0]
    exact = whole and best.residual == 0
    assert best.pixels is not None  # nothing is closer
    level = [
        c
        for c in ranked
        if c.residual == best.residual
        and c.pixels is not None
        and (exact or np.array_equal(c.pixels, best.pixels))
    ]
    alike = [name for c in level for name in _names(c)]
    others = [c for c in ranked if not any(c is one for one in level)]
    normalisation = _settled(normalisation, best.pixels, levels)
    return ForensicsReport(
        best=alike[0],
        residual=best.residual,
        exact=exact,
        indistinguishable=tuple(alike[1:]),
        runners_up=tuple(ForensicsCandidate(_names(c)[0], c.residual) for c in others[:_LISTED]),
        margin=others[0].residual - best.residual if others else None,
        channels=normalisation.channels,
        layout=layout,
        normalisation=normalisation.name,
        slope=tuple(normalisation.slope.tolist()),
        offset=tuple(normalisation.offset.tolist()),
        whole_levels=whole,
        tried=sum(len(c.image.decoders) for c in found),
        skipped=skipped,
        gaps=tuple(gaps),
    )


def _decoded(
    photo: bytes, geometry: Pipeline, others: Sequence[Decode], gaps: list[Gap]
) -> list[_Image]:
    """The photograph by every decoder, upright and as stored where that differs."""
    turned = steps.orientation(photo) != 1
    found: dict[bytes, _Image] = {}
    for decode in (geometry.decode, *others):
        flipped: tuple[Decode, ...] = (decode,)
        if turned:
            flipped = (
                replace(decode, orientation="ignore"),
                replace(decode, orientation="apply"),
            )
        try:
            for one in flipped:
                pixels = steps.decoded(photo, one)
                key = _digest(pixels)
                earlier = found[key].decoders if key in found else ()
                found[key] = _Image((*earlier, one), pixels)
        except PhotoError as error:
            gaps.append(Gap(f"decoder {decode}", "decode", error.message))
    if not found:
        raise PhotoError(f"no decoder of the catalogue can read it: {gaps[-1].reason}")
    return list(found.values())


def _converted(
    plain: Sequence[_Candidate], colours: Sequence[Colour], geometry: Pipeline, levels: Array
) -> Iterator[_Conversion]:
    """Every conversion of one decoded photograph, measured on two resizers.

    Args:
        plain: its candidates without a conversion.
        colours: the conversions.
        geometry: sizes and crops.
        levels: the tensor in pixel levels, channels first.
    """
    closest = min(plain, key=lambda c: c.residual)
    rough = next((c for c in plain if c.resize and c.resize.interpolation == "nearest"), closest)
    measured = [closest] if rough is closest else [closest, rough]
    rest = sorted(
        (c for c in plain if not any(c is one for one in measured)), key=lambda c: c.residual
    )
    for colour in colours:
        pixels = steps.coloured(closest.image.pixels, colour)
        change, found = 0.0, []
        for candidate in measured:
            made = steps.framed(pixels, replace(geometry, resize=candidate.resize))
            assert candidate.pixels is not None  # those of plain candidates are kept
            change = max(change, _far(made, _planes(candidate.pixels)))
            residual = _far(made, levels)
            kept = made if residual <= closest.residual else None
            found.append(replace(candidate, colour=colour, pixels=kept, residual=residual))
        yield _Conversion(colour, change, found, rest)


def _nearest_two(found: Sequence[_Candidate]) -> tuple[float, float]:
    """The smallest residual, and the smallest above it."""
    best = min(c.residual for c in found)
    return best, min((c.residual for c in found if c.residual > best), default=best)


# --- the tensor ------------------------------------------------------------------------------


def _laid_out(tensor: Array, shape: tuple[int, ...]) -> tuple[Layout, Array]:
    """The layout, and the tensor as height x width x channels in float64."""
    image = tensor[0] if tensor.ndim == 4 and len(tensor) == 1 else tensor
    places: tuple[tuple[Layout, tuple[int, ...]], ...] = (("nchw", (1, 2, 0)), ("nhwc", (0, 1, 2)))
    fitting = [p for p in places if image.ndim == 3 and image.transpose(p[1]).shape == shape]
    if not fitting or image.dtype.kind not in "fui":
        raise UsageError(
            f"the tensor is {tensor.dtype} {shown(tensor.shape)}, but the pipeline makes "
            f"{shape[0]}x{shape[1]} pixels with 3 channels",
            "Save one photograph's tensor, and give the pipeline of its size (resize, crop).",
        )
    finite = np.isfinite(image).all()
    if not finite or image.min() == image.max():
        raise UsageError(
            f"the tensor is {'the same everywhere' if finite else 'not finite'}, which tells "
            "nothing about what made it",
            "Save what the device fed to the network for a photograph with something on it.",
        )
    layout, axes = fitting[0]
    return layout, image.transpose(axes).astype(np.float64)


def _levels(fed: Array, normalisation: _Normalisation) -> tuple[Array, bool]:
    """The tensor in pixel levels, in float32, and whether they are whole numbers."""
    levels = normalisation.undone(fed)
    whole = bool(np.abs(levels - np.rint(levels)).max() <= _WHOLE)
    return (np.rint(levels) if whole else levels).astype(np.float32), whole


def _normalisation(fed: Array, candidates: Sequence[Array]) -> _Normalisation:
    """The straight line by channel that takes one of the candidates closest to the tensor."""
    sparse = (slice(None, None, _SPARSE),) * 2
    best: tuple[float, _Normalisation] | None = None
    for pixels in candidates:
        orders: tuple[tuple[Channels, Array], ...] = (("rgb", pixels), ("bgr", pixels[..., ::-1]))
        for channels, ordered in orders:
            slope, offset, residual = _line(ordered[sparse], fed[sparse])
            if best is None or residual < best[0]:
                best = residual, _Normalisation(channels, slope, offset, None)
    assert best is not None
    found = best[1]
    slope, offset = found.slope.copy(), found.offset.copy()
    for channel in range(3):
        values = np.unique(fed[..., channel])
        if 2 <= len(values) <= 256:
            slope[channel], offset[channel] = _grid(values, slope[channel], offset[channel])
    return _Normalisation(found.channels, slope, offset, None)


def _line(pixels: Array, fed: Array) -> tuple[Array, Array, float]:
    """Least squares by channel: slope, offset, and the residual in pixel levels."""
    x = pixels.reshape(-1, 3).astype(np.float64)
    y = fed.reshape(-1, 3)
    dx, dy = x - x.mean(axis=0), y - y.mean(axis=0)
    spread = (dx * dx).sum(axis=0)
    slope = np.divide((dx * dy).sum(axis=0), spread, out=np.ones(3), where=spread > 0)
    slope[slope == 0] = 1.0  # a constant tensor: no line tells anything
    offset = y.mean(axis=0) - slope * x.mean(axis=0)
    left = (dy - slope * dx) / slope
    return slope, offset, float(np.sqrt(np.mean(left * left)))


def _grid(values: Array, slope: float, offset: float) -> tuple[float, float]:
    """The line on which a channel's distinct values are whole levels, if there is one.

    Where it begins cannot be told from the values: it may be off by whole levels.

    Args:
        values: the values, sorted.
        slope: of a line close to it.
        offset: of that line.
    """
    gaps = np.diff(values)
    usual = {scale / s for scale, _, std in _KNOWN.values() for s in std}
    units = [u for u in (*usual, float(np.median(gaps))) if _RATIO > u / abs(slope) > 1 / _RATIO]
    for unit in sorted((*units, abs(slope)), reverse=True):  # a fraction of a level fits as well
        levels = np.concatenate([[0.0], np.cumsum(np.rint(gaps / unit))]) * np.sign(slope)
        if len(np.unique(levels)) < len(levels):
            continue
        fitted, lowest = np.polyfit(levels, values, 1)
        if np.abs((values - lowest) / fitted - levels).max() <= _WHOLE:
            first = np.rint((lowest - offset) / fitted)
            return float(fitted), float(lowest - first * fitted)
    return slope, offset


def _settled(found: _Normalisation, pixels: Array, levels: Array) -> _Normalisation:
    """The normalisation with the level at which it begins, and its name if it is a usual one."""
    shift = (pixels.astype(np.float64) - levels).mean(axis=(0, 1))
    order = slice(None, None, -1) if found.channels == "bgr" else slice(None)
    offset = found.offset - found.slope * shift[order]
    ends = np.array([[0.0], [255.0]])
    for name, (scale, mean, std) in _KNOWN.items():
        for said, turned in ((name, order), (f"{name}, red's taken for blue", slice(None))):
            slope = (scale / np.array(std))[turned]
            start = (-np.array(mean) / np.array(std))[turned]
            far = (found.slope - slope) * ends + offset - start
            if np.abs(far / slope).max() <= _NEAR:
                return _Normalisation(found.channels, slope, start, said)
    return _Normalisation(found.channels, found.slope, offset, None)


def _names(candidate: _Candidate) -> list[str]:
    """The combination in words, once for each decoder that it may be."""
    resize = str(candidate.resize or "no resize")
    rest = f"{candidate.colour or 'rgb'} → {resize}"
    return [
        f"{d}{' upright' if d.orientation == 'apply' else ''} → {rest}"
        for d in candidate.image.decoders
    ]


def _far(pixels: Array, levels: Array, limit: float = 0.0) -> float:
    """Root mean square distance in pixel levels, but for a constant by channel.

    Of what the normalisation subtracts, whole levels cannot be told before the pixels are known.
    What is more than ``limit`` away on every fourth row and column is not compared on the others.

    Args:
        pixels: height x width x 3.
        levels: the tensor's, as ``_planes``.
        limit: 0 to compare all.
    """
    planes = pixels.transpose(2, 0, 1)
    if limit > 0:
        sparse = (slice(None), slice(None, None, _SPARSE), slice(None, None, _SPARSE))
        far = _deviation(planes[sparse] - levels[sparse])
        if far > limit:
            return far
    return _deviation(planes - levels)


def _deviation(difference: Array) -> float:
    """The standard deviation within the channels of [3, ...]; exact where differences are whole."""
    flat = difference.reshape(3, -1)
    count = flat.shape[1]
    squares = np.einsum("cn,cn->c", flat, flat)  # not BLAS, which would start threads
    spread = (count * squares - flat.sum(axis=1) ** 2).sum()
    return float(np.sqrt(max(0.0, spread / (3 * count * count))))


def _planes(pixels: Array) -> Array:
    """[3, height, width] in float64 of height x width x 3."""
    return np.ascontiguousarray(pixels.transpose(2, 0, 1), np.float64)


def _digest(pixels: Array) -> bytes:
    return hashlib.blake2b(pixels.tobytes(), digest_size=16).digest()
