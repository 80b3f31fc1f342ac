"""How often ``audit forensics --deployed-input`` names what made a tensor.

``python -m benchmarks.forensics [--images DIR] [--photos N] [--each N] [--seed N]`` feeds tensors
that the libraries make of photographs, each by one decoder, one colour conversion and one resizer
of the catalogue. All their products are too many: the options of every type take turns in a random
order, beside others on each photograph, and over the photographs are met about equally often.

A tensor counts as identified where the answer claims every pixel and names the combination that
made it, alone or among those that it says cannot be told apart; as alone where no other is named.
Without ``--images`` parts of scikit-image's photographs are used.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

from auditor.pipeline import description
from auditor.pipeline.forensics import inputs as forensics
from auditor.pipeline.preprocessing.stages import Colour, Decode, Pipeline, Resize
from auditor.pipeline.preprocessing.steps import Preparation
from auditor.pipeline.sysnoise import options
from benchmarks import compare, sets

Found = tuple[tuple[str, str, str], bool, bool]  # what made it; whether named; whether alone


def catalogue(
    geometry: Pipeline,
) -> tuple[list[Decode], list[Colour | None], list[Resize]]:
    """Every option of each type, those of the description first."""
    every = [switch.step for switch in options.switches(geometry)[0]]
    assert geometry.resize is not None
    return (
        [geometry.decode, *(s for s in every if isinstance(s, Decode))],
        [None, *(s for s in every if isinstance(s, Colour))],
        [geometry.resize, *(s for s in every if isinstance(s, Resize))],
    )


def combinations(
    geometry: Pipeline, each: int, rng: random.Random
) -> Iterator[tuple[Decode, Colour | None, Resize]]:
    """So many combinations in which the options of every type take turns."""
    turns = []
    for steps in catalogue(geometry):
        taken: list[Decode | Colour | Resize | None] = []
        while len(taken) < each:
            taken += rng.sample(steps, len(steps))  # type: ignore[arg-type]
        turns.append(taken[:each])
    yield from zip(*turns, strict=True)  # type: ignore[misc]


def photograph(path: Path, geometry: Pipeline, each: int, seed: int) -> list[Found]:
    """What the search says of tensors made of one photograph."""
    data = path.read_bytes()
    preparation = Preparation(data)
    found = []
    for decode, colour, resize in combinations(geometry, each, random.Random(f"{seed}{path.name}")):
        made = replace(geometry, decode=decode, colour=colour, resize=resize)
        answer = forensics.identify(preparation.tensor(made), data, geometry)
        names = str(decode), str(colour or "rgb"), str(resize)
        named = answer.exact and " → ".join(names) in (answer.best, *answer.indistinguishable)
        found.append((names, named, named and not answer.indistinguishable))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.forensics",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--images", type=Path, help="a folder with JPEG photographs")
    parser.add_argument("--photos", type=int, default=50)
    parser.add_argument("--each", type=int, default=8, help="combinations for each photograph")
    parser.add_argument("--pipeline", default="imagenet-torchvision", help="sizes and crops")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    geometry = description.load(arguments.pipeline).training
    sizes = list(map(len, catalogue(geometry)))
    print(compare.machine()["cpu"], "· decoders, colours, resizers:", *sizes, flush=True)
    with tempfile.TemporaryDirectory(prefix="forensics-") as scratch:
        images = arguments.images
        if images is None:
            images = Path(scratch, "photographs")
            sets.made(images, sets.photographs, arguments.photos)
        paths = sorted(p for p in images.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
        paths = paths[:: max(1, len(paths) // arguments.photos)][: arguments.photos]
        spawn = multiprocessing.get_context("spawn")
        begun = time.monotonic()
        every: list[Found] = []
        with ProcessPoolExecutor(os.cpu_count(), mp_context=spawn) as pool:
            one = partial(photograph, geometry=geometry, each=arguments.each, seed=arguments.seed)
            for number, found in enumerate(pool.map(one, paths), 1):
                every += found
                if number % 10 == 0 or number == len(paths):
                    _say(number, every, time.monotonic() - begun)
    for names, named, _ in every:
        if not named:
            print("not identified:", " → ".join(names))
    return 0


def _say(photos: int, every: Sequence[Found], seconds: float) -> None:
    named, alone = sum(one[1] for one in every), sum(one[2] for one in every)
    print(
        f"{photos} photographs, {len(every)} tensors: {named} identified "
        f"({100 * named / len(every):.2f} %), {alone} of them alone; "
        f"{seconds / len(every):.1f} s each",
        flush=True,
    )


if __name__ == "__main__":
    raise SystemExit(main())
