"""An uncalibrated estimate of what every operation of an artifact takes: the roofline of the device.

An operation takes as long as its arithmetic at the device's peak, or as its bytes at the memory's bandwidth, whichever
is longer, and what calling it costs. No number here is the result of a fit. The rules are what runtimes of every kind
do with a graph; which of them are worth having was seen with ONNX Runtime on one x86-64 machine:

- Activations, sums and constant factors that follow a convolution or a matrix product are part of it, as its result is
  still in registers: they take no call, and of a sum the other summand alone is read.
- A factor that is a curve of the other one (x * sigmoid(x)) is computed along with it.
- Convolutions of few output channels a group, and transposed ones, write and read more than their data (``unfolded``).
- Storage in integers between two operations costs nothing, a view no more than a call on a CPU and nothing elsewhere.
- ``DEPTHWISE``, ``FEW`` and ``CURVED`` are choices of ours, numbers that follow from what the kernels have to do.

It ranks models and operations; a single figure can be off by a factor of two or more.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from edgeattn.core import tools
from edgeattn.core.errors import UsageError
from edgeattn.device import Device
from edgeattn.targets.base import OpCost

#: Share of the peak that a depthwise convolution can reach: a number of the data goes into one output channel alone, so
#: each multiply-add has its data and its weights to load, and cores load two vectors in the time of two multiply-adds.
DEPTHWISE = 0.5
#: Output channels of a group below which they do not fill a vector of 16 numbers.
FEW = 16
#: Arithmetic operations for an element of a function without an instruction of its own: an exponential or an error
#: function is a polynomial of about ten terms, of two operations each, and its range has to be reduced before.
CURVED = 32
#: What calling one operation costs a runtime, in ms: on a CPU to find its buffers, elsewhere to have it started.
CALL_MS = {"cpu": 0.002, "gpu": 0.004, "npu": 0.004}

#: Operations by their names in all targets, in small letters without underscores.
_ACTIVATIONS = ("relu", "relu6", "relun1to1", "relu0to1", "clip", "hardswish", "hardsigmoid", "leakyrelu")
_SUMS, _FACTORS = ("add", "sub"), ("mul", "div", "prelu")
_CURVES = (
    *("gelu", "quickgelu", "erf", "exp", "log", "sin", "cos", "pow", "sigmoid", "logistic", "silu", "swish", "mish"),
    *("tanh", "elu", "selu", "celu", "softplus", "softmax", "logsoftmax"),
)
_STORAGE = ("quantizelinear", "dequantizelinear", "quantize", "dequantize")
_WIDTH = {"fp32": 4, "fp16": 2, "bf16": 2, "w8a8": 1, "fp8": 1}
#: What computes a type that the roof has no peak for, the nearest first.
_INSTEAD = {"w8a8": ("fp16", "fp32"), "fp8": ("fp16", "fp32"), "fp16": ("fp32",), "bf16": ("fp16", "fp32")}

#: fp32 operations a clock of one core, by an extension's name; the first that a CPU has counts. A fused
#: multiply-add is two, and there are two units for them (a core with AVX-512 may have one, and does half as much).
#: Advanced SIMD as a Cortex-A76 has it.
_A_CLOCK = {"avx512f": 64, "avx2": 32, "avx": 16, "sse2": 8, "asimd": 16, "neon": 8}
#: How many times as many 8-bit operations a CPU does with an extension, the first that it has.
_EIGHT_BITS = {"avx512_vnni": 4, "avx_vnni": 4, "asimddp": 4}


@dataclass(frozen=True)
class Roof:
    """What a device can do at most.

    Attributes:
        tflops: arithmetic per second in 1e12 operations (two for a multiply-accumulate), by ``OpCost.dtype``.
        gb_s: bandwidth of its memory. call_ms, view_ms: what calling an operation costs, and a view.
        source: where the peaks and the bandwidth are from, such as "documented" or "computed, measured".
    """

    tflops: Mapping[str, float]
    gb_s: float
    call_ms: float = CALL_MS["cpu"]
    view_ms: float = 0.0
    source: str = "documented"

    def peak(self, dtype: str) -> float:
        """TFLOPS for a dtype: its own, that of a wider one that stands in, or the slowest."""
        for name in (dtype, *_INSTEAD.get(dtype, ())):
            if name in self.tflops:
                return self.tflops[name]
        return min(self.tflops.values())


@dataclass(frozen=True)
class Estimate:
    """The uncalibrated estimate of an operation in ms, and what bounds it; "" where it is part of another."""

    ms: float
    bound: Literal["compute", "memory", "call", ""]


def estimate(operations: Sequence[OpCost], roof: Roof) -> list[Estimate]:
    """An uncalibrated estimate of every operation, in order; their sum is the whole's.

    Args:
        operations: of one graph, as ``Target.operations`` gives them.
    """
    joined = _joined(operations)
    return [_one(operation, roof, joined.get(index)) for index, operation in enumerate(operations)]


def _one(operation: OpCost, roof: Roof, joined: int | None) -> Estimate:
    """Of one operation; ``joined`` are the bytes that it moves as a part of another."""
    moved = operation.bytes + unfolded(operation) if joined is None else joined
    if not moved and not operation.macs:  # what has no inputs is known before anything runs
        view = joined is None and operation.inputs and _kind(operation) not in _STORAGE and roof.view_ms
        return Estimate(roof.view_ms, "call") if view else Estimate(0.0, "")
    compute = flops(operation) / (roof.peak(operation.dtype) * 1e9 * efficiency(operation)) if joined is None else 0.0
    memory = moved / (roof.gb_s * 1e6)
    call, longest = roof.call_ms if joined is None else 0.0, max(compute, memory)
    return Estimate(longest + call, "call" if call > longest else "compute" if compute > memory else "memory")


def flops(operation: OpCost) -> float:
    """Arithmetic operations: two for a multiply-accumulate, ``CURVED`` for an element of a curve, one for another."""
    if operation.macs or operation.dtype == "int":
        return 2.0 * operation.macs
    return operation.bytes_out / _WIDTH.get(operation.dtype, 4) * (CURVED if _kind(operation) in _CURVES else 1)


def efficiency(operation: OpCost) -> float:
    """Share of the peak that an operation's kind can reach: ``DEPTHWISE`` of such convolutions, else 1."""
    depthwise = "conv" in _kind(operation) and operation.channels == 1 and 0 < operation.fan < FEW
    return DEPTHWISE if depthwise and operation.macs else 1.0


def unfolded(operation: OpCost) -> int:
    """Bytes of what convolutions write and read again beside their data, as matrix products are all they have.

    One of few output channels a group unfolds its data: a number for each multiply-accumulate of one output channel.
    A transposed one gets a number for each multiply-accumulate of one input channel, and adds them up.
    """
    kind = _kind(operation)
    if operation.channels <= 1 or operation.taps == 1 or "conv" not in kind:
        return 0
    shared = operation.channels if "transpose" in kind else operation.fan if operation.fan < FEW else 0
    return 2 * _WIDTH.get(operation.dtype, 4) * operation.macs // shared if shared else 0


def _kind(operation: OpCost) -> str:
    return operation.op.lower().replace("_", "")


def _joined(operations: Sequence[OpCost]) -> dict[int, int]:
    """By the places of operations that become part of a product before them: the bytes that they still move."""
    same: dict[str, str] = {}  # what a view gives is what it was given
    readers: dict[str, int] = {}
    for operation in operations:
        read = {same.get(name, name) for name in operation.inputs}
        if not operation.bytes and not operation.macs and len(read) == 1 and len(operation.outputs) == 1:
            (same[operation.outputs[0]],) = read
            continue
        for name in read:
            readers[name] = readers.get(name, 0) + 1
    found: dict[int, int] = {}
    curves: dict[str, str] = {}  # what a curve's result is a curve of
    open_ends: dict[str, int] = {}  # bytes of results of products, and of what became part of one
    for index, operation in enumerate(operations):
        kind, given = _kind(operation), [same.get(name, name) for name in operation.inputs]
        ends = [name for name in dict.fromkeys(given) if name in open_ends and readers.get(name) == 1]
        fits = kind in _ACTIVATIONS or (kind in _FACTORS and len(given) == 1) or kind in _SUMS
        curved = [name for name in given if name in curves and readers.get(name) == 1 and curves[name] in given]
        if operation.bytes and curved and kind in _FACTORS:
            found[index] = 0
        elif operation.bytes and ends and fits and not operation.macs:
            end = ends[-1]  # of a sum of two products the later one is still in registers
            other = [name for name in dict.fromkeys(given) if name != end]
            found[index] = max(operation.bytes_in - open_ends[end], 0) if other else 0
        if len(operation.outputs) == 1 and (operation.macs or (index in found and not curved)):
            open_ends[operation.outputs[0]] = operation.bytes_out
        if kind in _CURVES and len(given) == len(operation.outputs) == 1:
            curves[operation.outputs[0]] = given[0]
    return found


def roof_of(device: Device, precision: str, threads: int = 0) -> Roof:
    """The roof of a device, for an artifact of a precision.

    Args:
        device: of kind "host" it is this machine: peaks are computed from what the CPU says of itself, the bandwidth
            is measured, which takes a fraction of a second.
        precision: small weights (w8, w4) are computed with in the floats around them.
        threads: of the CPU; 0 for all cores. Others' peaks are all cores', and fall with the threads; the bandwidth
            stays, as one core may well use all of it.

    Raises:
        UsageError: the file has no peak for the precision, or no bandwidth; this machine does not say what it is.
    """
    if device.kind == "host":
        return _here(threads or os.cpu_count() or 1)
    wanted = ("fp32", "fp16") if precision in ("w8", "w4") else (precision,)
    if not set(wanted) & set(device.peak):
        why = f"its file has peaks of {', '.join(device.peak)}" if device.peak else "its file has no table [peak]"
        raise _missing(f"peak of {' or '.join(wanted)}, in TFLOPS", f"device {device.name}", why)
    if device.bandwidth_gb_s is None:
        raise _missing("bandwidth_gb_s", f"device {device.name}", "its file has none")
    unit = device.peak_unit or "gpu"  # the default of target tensorrt, see Device
    share = min(threads / device.cores, 1.0) if unit == "cpu" and threads and device.cores else 1.0
    kinds = dict.fromkeys((device.peak_kind or "documented", device.bandwidth_kind or "documented"))
    peaks = {name: peak * share for name, peak in device.peak.items()}
    view_ms = CALL_MS[unit] if unit == "cpu" else 0.0
    return Roof(peaks, device.bandwidth_gb_s, CALL_MS[unit], view_ms, ", ".join(kinds))


def _missing(value: str, where: str, why: str) -> UsageError:
    fix = "add what is documented of it to a device file of yours, with this one as its base"
    return UsageError("there is no roofline for an estimate", value=value, where=where, why=why, fix=fix)


def _here(threads: int) -> Roof:
    """Of this machine's CPU: threads x clock x operations a clock, and a measured bandwidth."""
    has = tools.cpu_extensions()
    a_clock = next((number for name, number in _A_CLOCK.items() if name in has), None)
    clock = clock_ghz()
    if a_clock is None or clock is None:
        error = _missing("instruction set" if clock else "clock", "this machine", "its system does not say it")
        error.fix = "describe it in a device file with cores, peak and bandwidth_gb_s, and name that device"
        raise error
    fp32 = threads * clock * a_clock / 1e3
    times = next((number for name, number in _EIGHT_BITS.items() if name in has), 1)
    peaks = {"fp32": fp32, "fp16": fp32 * (2 if "asimdhp" in has else 1), "w8a8": fp32 * times}
    return Roof(peaks, copied_gb_s(), view_ms=CALL_MS["cpu"], source="computed, measured")


def clock_ghz(root: Path = Path("/")) -> float | None:
    """The highest clock of this machine's cores as Linux says it, else the one it runs at now; None elsewhere."""
    try:
        files = root.glob("sys/devices/system/cpu/cpu[0-9]*/cpufreq/cpuinfo_max_freq")
        highest = [float(path.read_text()) / 1e6 for path in files]
        lines = (root / "proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        now = [float(line.partition(":")[2]) / 1e3 for line in lines if line.startswith("cpu MHz")]
    except (OSError, ValueError):
        return None
    return max(highest or now, default=None)


def copied_gb_s(megabytes: int = 128, rounds: int = 5) -> float:
    """Bandwidth of this machine's memory in GB/s, read and written together, by copying that much; the best round."""
    source = np.ones(megabytes * 125_000, np.float64)
    copy, best = np.empty_like(source), float("inf")
    for _ in range(rounds + 1):  # the first one has the system find the pages
        begun = time.perf_counter()
        np.copyto(copy, source)
        best = min(best, time.perf_counter() - begun)
    return 2 * source.nbytes / best / 1e9
