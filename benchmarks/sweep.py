"""What ``audit sysnoise`` costs beside its network inferences alone, and in memory.

``python -m benchmarks.sweep [MODEL…] [--images DIR] [--photos N…]`` measures, for each model and
number of photographs:

- the command itself: wall and processor time of its sweep (without loading and compiling), and the
  largest proportional set size of the process;
- the same runs of the same networks (as written and under every form), with a ready tensor, on as
  many threads: wall and processor time;
- what the libraries themselves take: every decoder and colour conversion and resizer once on each
  photograph, on as many threads. With a tiny network that is more than its inferences, and no
  sweep can do without it: ``floor`` is what both take by the runs alone, the least ratio that any
  sweep could reach, and ``of need`` the sweep's processor time by that of both.

The largest photograph decides on the memory: a folder of equal ones shows whether their number
does. On a machine that does other things as well, compare processor times. Without ``--images``
parts of scikit-image's photographs are used, which are equal.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import compare, sets, tables, zoo

SMALL = """\
[training]
decoder = "pillow"
resize = { library = "pillow", interpolation = "bilinear", size = [48, 192] }
channels = "bgr"
normalise = { scale = 0.00784313725490196, mean = 1.0, std = 1.0 }
"""
PIPELINES = {
    "efficientnet_lite0": "efficientnet-lite",
    "ppocr_cls": SMALL,
    "mtcnn_p": tables.SUBJECTS["mtcnn_p"].pipeline,
}


def alone(model: Path, pipeline: str, photo: Path, runs: dict[str, int], noises: list[str]) -> None:
    """Print the seconds that these runs take with nothing around them: wall, then processor."""
    from auditor import discovery
    from auditor.graphs import model as models
    from auditor.pipeline import description
    from auditor.pipeline.preprocessing.steps import Preparation
    from auditor.pipeline.sysnoise import networks
    from auditor.ports import Silent

    training = description.load(pipeline).training
    tensor = Preparation(photo.read_bytes()).tensor(training)
    wanted = [discovery.noise(id) for id in noises]
    nets = networks.Networks(models.load(model), wanted, tensor, Silent())
    single = {networks.name((form,)): form for form in nets.forms}
    order: list[networks.Forms] = []
    for name, count in runs.items():
        forms = tuple(single[part] for part in name.split(" + ")) if name else ()
        if not nets.combine(forms):
            raise SystemExit(f"{name} cannot be run")
        order += [forms] * count
    order = [order[i] for start in range(97) for i in range(start, len(order), 97)]  # mixed
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        begun, used = time.perf_counter(), time.process_time()
        for _ in pool.map(lambda forms: nets.run(forms, tensor), order):
            pass
        print(time.perf_counter() - begun, time.process_time() - used)


def libraries(pipeline: str, photos: Sequence[Path]) -> None:
    """Print the processor seconds of every option before the network, once on each photograph."""
    from auditor.pipeline import description
    from auditor.pipeline.preprocessing import steps
    from auditor.pipeline.preprocessing.libraries import PhotoError
    from auditor.pipeline.preprocessing.stages import Colour, Decode, Resize
    from auditor.pipeline.sysnoise import options

    training = description.load(pipeline).training
    switched = [switch.step for switch in options.switches(training)[0]]
    decoders = [s for s in switched if isinstance(s, Decode)]
    colours = [s for s in switched if isinstance(s, Colour)]
    resizers = [s for s in (training.resize, *switched) if isinstance(s, Resize)]

    def every(path: Path) -> None:
        data = path.read_bytes()
        image = steps.decoded(data, training.decode)
        for decode in decoders:
            with contextlib.suppress(PhotoError):  # the sweep names it
                steps.decoded(data, decode)
        for colour in colours:
            steps.coloured(image, colour)
        for resize in resizers:
            steps.resized(image, resize)

    every(photos[0])  # imports
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        used = time.process_time()
        for _ in pool.map(every, photos):
            pass
        print(time.process_time() - used)


def measure(
    name: str, model: Path, images: Path, photos: int, noise: str | None, scratch: Path
) -> dict[str, Any]:
    """One sweep, and its inferences alone."""
    from auditor.pipeline.sysnoise.networks import PAPER

    pipeline = PIPELINES[name]
    if pipeline.startswith("["):
        path = scratch / f"{name}.toml"
        path.write_text(pipeline)
        pipeline = str(path)
    table = scratch / "table.json"
    command = [sys.executable, "-m", "auditor", "sysnoise", str(model), "--images", str(images)]
    command += ["--pipeline", pipeline, "--samples", str(photos), "-o", str(table)]
    command += ["--noise", noise] if noise else []
    _, _, peak = compare.measure(compare.Work([command], product=table), every=1.0)
    found = json.loads(table.read_text())
    seconds = found["seconds"]
    noises = [] if noise == "none" else (noise.split(",") if noise else list(PAPER))
    files = [p for p in sorted(images.rglob("*")) if p.suffix.lower() in (".jpg", ".jpeg")]
    used = [str(files[i * len(files) // photos]) for i in range(min(photos, len(files)))]
    wall, processor = _other(
        "--alone", [str(model), pipeline, used[0], found["network_runs"], noises]
    )
    (needed,) = _other("--libraries", [pipeline, used])
    return {
        "photos": found["photos"]["measured"],
        "runs": sum(found["network_runs"].values()),
        "sweep_s": seconds["alone"] + seconds["together"],
        "sweep_cpu_s": seconds["processor, all threads"],
        "alone_s": wall,
        "alone_cpu_s": processor,
        "libraries_cpu_s": needed,
        "peak_mib": peak,
    }


def _other(option: str, asked: list[Any]) -> list[float]:
    """What this module prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.sweep", option, json.dumps(asked)],
        cwd=zoo.ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return [float(word) for word in done.stdout.splitlines()[-1].split()]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(PIPELINES))
    parser.add_argument("--images", type=Path, help="a folder with photographs")
    parser.add_argument("--photos", type=int, nargs="+", default=[100, 500])
    parser.add_argument("--noise", help="as of audit sysnoise")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    parser.add_argument("--libraries", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.alone:
        model, pipeline, photo, runs, noises = json.loads(arguments.alone)
        alone(Path(model), pipeline, Path(photo), runs, noises)
        return 0
    if arguments.libraries:
        pipeline, paths = json.loads(arguments.libraries)
        libraries(pipeline, [Path(path) for path in paths])
        return 0
    facts = compare.machine()
    print(f"{facts['cpu']}, {facts['cores']} cores, load {facts['load']:.1f} when started")
    names = arguments.models or list(PIPELINES)
    with tempfile.TemporaryDirectory(prefix="sweep-") as folder:
        scratch = Path(folder)
        images = arguments.images
        if images is None:
            images = scratch / "photographs"
            sets.made(images, sets.photographs, max(arguments.photos))
        head = f"{'model':20}{'photos':>8}{'runs':>8}{'sweep s':>9}{'alone s':>9}{'ratio':>7}"
        head += f"{'cpu s':>9}{'alone':>9}{'ratio':>7}{'libraries':>11}{'floor':>7}{'of need':>9}"
        print(f"{head}{'peak MiB':>10}")
        for name, path in zip(names, zoo.obtain(names), strict=True):
            for photos in arguments.photos:
                f = measure(name, path, images, photos, arguments.noise, scratch)
                wall, processor = (f["sweep_s"], f["alone_s"]), (f["sweep_cpu_s"], f["alone_cpu_s"])
                line = f"{name:20}{f['photos']:8}{f['runs']:8}"
                line += f"{wall[0]:9.1f}{wall[1]:9.1f}{wall[0] / wall[1]:7.2f}"
                line += f"{processor[0]:9.1f}{processor[1]:9.1f}{processor[0] / processor[1]:7.2f}"
                need = f["alone_cpu_s"] + f["libraries_cpu_s"]
                line += f"{f['libraries_cpu_s']:11.1f}{need / processor[1]:7.2f}"
                line += f"{processor[0] / need:9.2f}"
                print(f"{line}{f['peak_mib']:10.0f}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
