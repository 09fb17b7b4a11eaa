"""The runner's part that tells how the machine is: temperature, clocks, throttling, load.

Standard library; Python 3.9 and newer. Beside run.py in a bundle as run_state.py. None stands for what is not told.
"""

from __future__ import annotations

import ctypes
import glob
import os
import platform
import re
import subprocess
import sys
from typing import Any

Data = dict[str, Any]

#: Bits of the Raspberry Pi firmware's get_throttled; 16 higher for what has happened since the start.
THROTTLED = {0: "under-voltage", 1: "ARM frequency capped", 2: "throttled", 3: "soft temperature limit"}
#: Bits of NVML's reasons for lower clocks (nvml.h) that a measurement suffers from; idle and set limits are none.
NVML_REASONS = {
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}


def read(path: str) -> str:
    """A small file's text; "" where there is none."""
    try:
        with open(path, encoding="utf-8", errors="replace") as handle:
            return handle.read().strip()
    except OSError:
        return ""


def numbers(pattern: str) -> list[int]:
    """The whole numbers that the files of a pattern hold."""
    return [int(text) for text in map(read, sorted(glob.glob(pattern))) if text.lstrip("-").isdigit()]


def said(*words: str) -> str:
    """What a program prints; "" where it is not there, or fails."""
    try:
        done = subprocess.run(
            words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, timeout=5, check=False
        )
        return done.stdout.decode(errors="replace") if done.returncode == 0 else ""
    except (OSError, subprocess.SubprocessError):
        return ""


def machine_state(gpu: bool = False) -> Data:
    """The machine at this moment; with ``gpu`` NVIDIA's first one, where its driver tells.

    ``temperature_c`` is of the hottest zone, ``clock_mhz`` of the fastest core, ``throttled`` a list of reasons,
    ``throttle_count`` how often a core of Intel's was slowed down since the start.
    """
    cores = "/sys/devices/system/cpu/cpu[0-9]*"
    degrees = [value / 1000 for value in numbers("/sys/class/thermal/thermal_zone*/temp") if value > 0]
    clocks, limits = numbers(f"{cores}/cpufreq/scaling_cur_freq"), numbers(f"{cores}/cpufreq/cpuinfo_max_freq")
    counts = numbers(f"{cores}/thermal_throttle/core_throttle_count")
    throttled = _raspberry_pi() if sys.platform != "darwin" else _mac()
    state: Data = {
        "temperature_c": max(degrees) if degrees else None,
        "clock_mhz": max(clocks) / 1000 if clocks else None,
        "clock_max_mhz": max(limits) / 1000 if limits else None,
        "throttled": throttled,
        "throttle_count": sum(counts) if counts else None,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "power_w": None,
    }
    return {**state, **_nvidia()} if gpu else state


def _raspberry_pi() -> list[str] | None:
    """What the firmware says."""
    try:
        bits = int(said("vcgencmd", "get_throttled").partition("=")[2], 16)
    except ValueError:
        return None
    now = [text for bit, text in THROTTLED.items() if bits >> bit & 1]
    return now + [f"{text} has occurred" for bit, text in THROTTLED.items() if bits >> (bit + 16) & 1]


def _mac() -> list[str] | None:
    """What macOS says: ``pmset`` to everyone, ``powermetrics`` to root."""
    found: list[str] | None = None
    limit = re.search(r"CPU_Speed_Limit\s*=\s*(\d+)", said("pmset", "-g", "therm"))
    if limit:
        found = [f"CPU limited to {limit[1]} %"] if int(limit[1]) < 100 else []
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        told = said("powermetrics", "-n", "1", "-i", "200", "--samplers", "thermal")
        level = re.search(r"pressure level:\s*(\w+)", told)
        if level:
            found = (found or []) + ([] if level[1] == "Nominal" else [f"thermal pressure {level[1].lower()}"])
    return found


def _nvidia(name: str = "libnvidia-ml.so.1") -> Data:
    """Of the first GPU, by NVML; nothing where it is not there, as on a Jetson."""
    try:
        nvml = ctypes.CDLL(name)
        handle = ctypes.c_void_p()
        if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(handle)):
            return {}
    except (OSError, AttributeError):
        return {}

    def ask(function: str, *before: int, kind: Any = ctypes.c_uint) -> int | None:
        value = kind()
        call = getattr(nvml, function, None)
        return None if call is None or call(handle, *before, ctypes.byref(value)) else int(value.value)

    power, reasons = (
        ask("nvmlDeviceGetPowerUsage"),
        ask("nvmlDeviceGetCurrentClocksThrottleReasons", kind=ctypes.c_ulonglong),
    )
    found: Data = {
        "temperature_c": ask("nvmlDeviceGetTemperature", 0),
        "clock_mhz": ask("nvmlDeviceGetClockInfo", 1),  # of the multiprocessors
        "clock_max_mhz": ask("nvmlDeviceGetMaxClockInfo", 1),
        "power_w": None if power is None else power / 1000,
        "throttled": None if reasons is None else [text for bit, text in NVML_REASONS.items() if reasons & bit],
    }
    nvml.nvmlShutdown()
    return {key: value for key, value in found.items() if value is not None}


def words(state: Data) -> str:
    """A state for a person."""
    parts = [
        "" if state["temperature_c"] is None else f"{state['temperature_c']:.1f} °C",
        "" if state["clock_mhz"] is None else f"{state['clock_mhz']:.0f} MHz",
        "" if state["power_w"] is None else f"{state['power_w']:.0f} W",
        "" if state["throttled"] is None else f"throttling: {', '.join(state['throttled']) or 'none'}",
    ]
    return ", ".join(part for part in parts if part)


def cpu_model() -> str:
    """As the system names it."""
    if sys.platform == "darwin":
        return subprocess.check_output(["sysctl", "-n", "machdep.cpu.brand_string"]).decode().strip()
    model = read("/proc/device-tree/model").strip("\0")
    for line in read("/proc/cpuinfo").splitlines():
        if line.lower().startswith("model name"):
            return line.partition(":")[2].strip() + (f" ({model})" if model else "")
    return model or platform.processor() or platform.machine()


def about() -> Data:
    """What the machine is."""
    mac = platform.mac_ver()[0]
    system = f"macOS {mac}" if mac else f"{platform.system()} {platform.release()}"
    return {"cpu": cpu_model(), "cores": os.cpu_count(), "system": system}
