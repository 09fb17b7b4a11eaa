"""What the runner reads of a machine. The programs and the library are stand-ins: that real ones answer in this form
is their documentation's word."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from edgeattn.bundle import runner_state as state

NVML = """
typedef unsigned int u;
int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetHandleByIndex_v2(u index, void **device) { *device = (void *)7; return index; }
int nvmlDeviceGetTemperature(void *device, u sensor, u *out) { *out = 81; return sensor; }
int nvmlDeviceGetClockInfo(void *device, u kind, u *out) { *out = 1410; return kind != 1; }
int nvmlDeviceGetMaxClockInfo(void *device, u kind, u *out) { *out = 1980; return kind != 1; }
int nvmlDeviceGetPowerUsage(void *device, u *out) { *out = 345600; return 0; }
int nvmlDeviceGetCurrentClocksThrottleReasons(void *device, unsigned long long *out) { *out = 0x45; return 0; }
"""


def test_this_machine_says_what_it_can() -> None:
    found = state.machine_state()
    assert set(found) == {
        "temperature_c", "clock_mhz", "clock_max_mhz", "throttled", "throttle_count", "load", "power_w",
    }  # fmt: skip
    assert found["load"] >= 0
    assert state.about()["cores"] >= 1
    assert state.about()["cpu"]


@pytest.mark.parametrize(
    ("said", "throttled"),
    [
        ("throttled=0x0\n", []),
        ("throttled=0x50004\n", ["throttled", "under-voltage has occurred", "throttled has occurred"]),
    ],
)
def test_a_raspberry_pis_firmware(said: str, throttled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "said", lambda *words: said)
    assert state._raspberry_pi() == throttled
    monkeypatch.setattr(state, "said", lambda *words: "")
    assert state._raspberry_pi() is None


def test_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {
        "pmset": "2026-01-01 CPU Power notify\n\tCPU_Scheduler_Limit \t= 100\n\tCPU_Speed_Limit \t= 63\n",
        "powermetrics": "**** Thermal pressure ****\n\nCurrent pressure level: Serious\n",
    }
    monkeypatch.setattr(state, "said", lambda *words: told[words[0]])
    monkeypatch.setattr(state.os, "geteuid", lambda: 501)
    assert state._mac() == ["CPU limited to 63 %"]
    monkeypatch.setattr(state.os, "geteuid", lambda: 0)
    assert state._mac() == ["CPU limited to 63 %", "thermal pressure serious"]
    told |= {"pmset": "Note: No thermal warning level has been recorded\n", "powermetrics": "pressure level: Nominal"}
    assert state._mac() == []
    monkeypatch.setattr(state.os, "geteuid", lambda: 501)
    assert state._mac() is None


def test_an_nvidia_gpu(tmp_path: Path) -> None:
    source, library = tmp_path / "nvml.c", tmp_path / "libnvml.so"
    source.write_text(NVML)
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler, "a C compiler makes the stand-in"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    found = state._nvidia(str(library))
    assert found == {
        "temperature_c": 81,
        "clock_mhz": 1410,
        "clock_max_mhz": 1980,
        "power_w": 345.6,
        "throttled": ["software power cap", "hardware thermal slowdown"],
    }
    assert state._nvidia("libnothing-of-that-name.so") == {}


def test_words() -> None:
    found = {"temperature_c": 45.04, "clock_mhz": 1500.0, "power_w": None, "throttled": []}
    assert state.words(found) == "45.0 °C, 1500 MHz, throttling: none"
    assert state.words(dict.fromkeys(found)) == ""
