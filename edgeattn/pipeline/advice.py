"""What a quantized artifact is good for: its speed against float32, measured here or read from the device's file."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

import numpy as np

from edgeattn import device as devices
from edgeattn import targets
from edgeattn.core import tools
from edgeattn.core.numerics import Array
from edgeattn.pipeline.cache import Cache
from edgeattn.pipeline.context import Result
from edgeattn.pipeline.job import Job
from edgeattn.pipeline.run import Finished, Progress, run_plan
from edgeattn.pipeline.stages.lower import artifact_of
from edgeattn.targets.base import Runtime
from edgeattn.targets.feeds import own_feeds

#: Targets whose runtime on this machine is the one of the devices.
_RUN_HERE = ("onnx", "tflite")
#: Turns, in each of which both artifacts are timed once; fewer, but some, where they would take longer than so many
#: seconds; and how long the faster artifacts are timed in a turn.
_TURNS, _LEAST, _SECONDS, _TURN = 15, 3, 20.0, 0.02
#: Kernels for int8: extensions of CPUs, as Linux names them.
_INT8 = {
    "avx512_vnni": "VNNI",
    "avx_vnni": "VNNI",
    "amx_int8": "AMX",
    "asimddp": "dot products",
    "i8mm": "int8 matrix products",
}


def int8_words(extensions: tuple[str, ...]) -> str:
    """What a CPU has for int8, by its extensions."""
    found = dict.fromkeys(_INT8[name] for name in extensions if name in _INT8)
    return f"with {', '.join(found)}" if found else "no VNNI or dot products for int8"


def advise(job: Job, run: Finished, cache: Cache, progress: Progress) -> list[str]:
    """Sentences for the user of one artifact; none where nothing is quantized.

    Args:
        job: of the artifact's own target. run: of ``job``.
    """
    if not job.quant.quantizes or job.steps:
        return []
    words = []
    place = devices.resolve(job.device) if job.device else None
    # Made for another kind of CPU, it is not run here as it is there.
    if job.target in _RUN_HERE and (place is None or place.machine in ("any", tools.host()["machine"])):
        words.append(_measured(job, run, cache, progress))
    if place is not None and place.kind != "host":
        words += _documented(job.precision, place)
    return words


def _documented(precision: str, place: devices.Device) -> list[str]:
    """What the device's file says of int8."""
    if precision != "w8a8":
        return []
    if place.int8_activations is not None:
        does = "computes faster" if place.int8_activations else "saves memory, and computes no faster,"
        return [f"{place.name} {does} where weights and data are int8 (its file)"]
    if place.machine in ("aarch64", "armv7l") and place.extensions:
        return [f"{place.name} is a CPU {int8_words(place.extensions)} (its file); profile on it to know"]
    return []


def _measured(job: Job, run: Finished, cache: Cache, progress: Progress) -> str:
    """The time that the artifact takes on this machine, against the one in float32."""
    floats = replace(job, precision="fp32", options={}, device=None)
    plain = run_plan(floats, cache, progress, upto="lower")
    progress.say(f"timing {job.precision} against fp32 on this machine")
    target = targets.get(job.target)
    lowered = [(plain.records["lower"], "fp32"), (run.records["lower"], job.precision)]
    artifacts = [artifact_of(Result(record.folder, record.facts), name) for record, name in lowered]
    sample = min((run.records["reference"].folder / "golden").glob("*.npz"))
    with np.load(sample, allow_pickle=False) as data:
        given = {key[3:]: data[key] for key in data.files if key.startswith("in.")}
    runners = [(target.open(one), own_feeds(one.entries["main"].inputs, given)) for one in artifacts]
    for runtime, feeds in runners:
        _seconds(runtime, feeds, 1)  # makes it ready
    runs = max(1, int(_TURN / _seconds(*runners[0], 1)))
    ratios: list[float] = []
    begun = time.monotonic()
    while len(ratios) < _TURNS and (len(ratios) < _LEAST or time.monotonic() - begun < _SECONDS):
        theirs, ours = (_seconds(runtime, feeds, runs) for runtime, feeds in runners)
        ratios.append(ours / theirs)
    ratios.sort()
    spread = f"[{ratios[len(ratios) // 4]:.2f}-{ratios[-1 - len(ratios) // 4]:.2f}]"
    host = tools.host()
    return (
        f"{job.precision} takes {statistics.median(ratios):.2f} {spread} times as long as fp32 on this machine "
        f"({host['machine']}, {int8_words(tools.cpu_extensions())}; {len(ratios)} turns)"
    )


def _seconds(runtime: Runtime, feeds: dict[str, Array], runs: int) -> float:
    begun = time.perf_counter()
    for _ in range(runs):
        runtime.run("main", feeds)
    return time.perf_counter() - begun
