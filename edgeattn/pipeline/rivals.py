"""Which of a bundle's artifacts goes in front: the faster one on the device, or the one that is expected to be."""

from __future__ import annotations

import statistics
import time
from typing import Any

from edgeattn import device as devices
from edgeattn.bundle import Bundle
from edgeattn.core.errors import DeviceUnreachable, ToolchainMissing
from edgeattn.pipeline.run import Progress
from edgeattn.profile.transports import open_transport
from edgeattn.profile.transports.base import Transport

#: How often each artifact is measured, in turns, each time in a process of its own.
ROUNDS = 3
_ARGUMENTS = ("--profile", "--threads", "1", "--runs", "10")


def _measure(bundle: Bundle, transport: Transport, progress: Progress) -> dict[str, list[float]]:
    """Median latency in ms of every artifact, once for each round."""
    names = [info.backend for info in bundle.manifest.artifacts]
    progress.say(f"{' and '.join(names)} on {transport.url}, {ROUNDS} rounds")
    runs = [[*_ARGUMENTS, "--backend", name] for _ in range(ROUNDS) for name in names]
    answers = transport.run_all(bundle.path, runs, progress.say)
    return {name: [float(answer["p50"]) for answer in answers[i :: len(names)]] for i, name in enumerate(names)}


def choose(bundle: Bundle, device: str | None, progress: Progress) -> dict[str, Any]:
    """Measure the bundle's artifacts in turns on the device; where it cannot be reached, on this machine.

    Returns:
        ``order`` (backends, the faster first), ``front``, ``measured_on``, ``expected`` (True where it was not the
        device itself), ``median_ms`` by backend and round, and ``why`` in words.
    """
    progress.start("rivals")
    begun = time.perf_counter()
    place = devices.resolve(device) if device else None
    unreached = ""
    medians = None
    where = "local"
    if place is not None and place.connect:
        transport = open_transport(place)
        if not transport.emulated:
            try:
                medians, where = _measure(bundle, transport, progress), transport.url
            except (DeviceUnreachable, ToolchainMissing) as error:
                unreached = f" ({place.name} could not be asked: {error.what})"
    expected = medians is None
    if medians is None:
        medians = _measure(bundle, open_transport("local"), progress)
    middle = {name: statistics.median(values) for name, values in medians.items()}
    order = sorted(middle, key=lambda name: middle[name])
    ratios = [slow / fast for slow, fast in zip(medians[order[-1]], medians[order[0]], strict=True)]
    ratio = middle[order[-1]] / middle[order[0]]
    spread = f"{order[-1]} takes {ratio:.2f} times as long [{min(ratios):.2f}-{max(ratios):.2f}]"
    how = f"one thread, medians of {ROUNDS} interleaved rounds"
    if expected:
        why = (
            f"Expected, not measured on the device: on the machine that exported it {spread}, {how}{unreached}. "
            "'edgeattn profile' on the device decides."
        )
    else:
        why = f"Measured on {where}: {spread}, {how}."
    progress.done("rivals", time.perf_counter() - begun, 0.0, False)
    return {
        "order": order,
        "front": order[0],
        "measured_on": where,
        "expected": expected,
        "median_ms": {name: [round(v, 4) for v in values] for name, values in medians.items()},
        "why": why,
    }
