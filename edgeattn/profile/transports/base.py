"""What a transport is: a way to run a bundle's ``run.py`` on a device and bring its JSON back."""

from __future__ import annotations

import json
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeattn.core.errors import CheckFailed, EdgeAttnError, ToolchainMissing, UsageError

if TYPE_CHECKING:
    from edgeattn.profile.transports.live import Start

#: Shows a line of progress.
Say = Callable[[str], None]


def silent(text: str) -> None:
    """A ``Say`` that shows nothing."""


@dataclass(frozen=True)
class Found:
    """One thing that a device has or lacks.

    Attributes:
        name: "python", "numpy", a runtime's distribution, "disk", "memory".
        present: True when it is there and fit.
        detail: version or amount when present, else the reason.
        fix: the line that installs it on the device, when it is missing.
    """

    name: str
    present: bool
    detail: str
    fix: str | None = None


class Transport(ABC):
    """A way to a device.

    Attributes:
        url: ``local``, ``ssh://user@host:port`` or ``qemu://cortex-a76``.
        emulated: True where numbers can be verified but times mean nothing.
    """

    url: str
    emulated: bool = False

    @abstractmethod
    def run(self, bundle: Path, arguments: Sequence[str], say: Say = silent) -> dict[str, Any]:
        """Run ``run.py *arguments --json`` of ``bundle`` on the device, in a process of its own; returns its JSON.

        The bundle's files are compared with the manifest's hashes on the far side. Nothing stays there.

        Raises:
            DeviceUnreachable: the link cannot be made, or died. ToolchainMissing: Python, NumPy or the runtime is
                missing there; holds the install line. CheckFailed: the files or the numbers do not hold there.
                UsageError: the bundle has no runner, or cannot be stored there.
        """

    def run_all(self, bundle: Path, runs: Sequence[Sequence[str]], say: Say = silent) -> list[dict[str, Any]]:
        """``run`` for each list of arguments, in order; a transport that copies the bundle does so once for all."""
        return [self.run(bundle, arguments, say) for arguments in runs]

    @abstractmethod
    def hold(self, bundles: Sequence[Path], say: Say = silent) -> AbstractContextManager[Start]:
        """Have these bundles on the device, each once; inside, runners of them can be started side by side.

        What still runs at the end is ended, and nothing stays there.

        Raises:
            As ``run``.
        """

    @abstractmethod
    def check(self) -> list[Found]:
        """What the device has and lacks. Raises DeviceUnreachable."""


#: The runner's exit codes, as errors.
_ERRORS: dict[int, type[EdgeAttnError]] = {1: CheckFailed, 2: UsageError, 3: ToolchainMissing}


def result_of(answer: dict[str, Any], where: str) -> dict[str, Any]:
    """The runner's JSON when its numbers hold.

    Args:
        where: the device, for the error.

    Raises:
        EdgeAttnError: of the runner's own exit code.
    """
    if "error" in answer:
        kind = _ERRORS.get(int(answer.get("exit_code", 1)), CheckFailed)
        raise kind(str(answer["error"]), where=where, fix=answer.get("fix"), value=answer.get("value"))
    if not answer.get("holds", False):
        raise CheckFailed(
            "the numbers do not hold on the device",
            value=f"worst relative L2 {answer.get('worst_relative_l2')}",
            where=where,
            why=f"tolerance is {answer.get('tolerance')} under {answer.get('runtime')}",
        )
    return answer


def runner_of(bundle: Path) -> Path:
    """The bundle's ``run.py``.

    Raises:
        UsageError: it has none: its target runs in EdgeAttn only.
    """
    path = bundle / "run.py"
    if not path.is_file():
        raise UsageError("the bundle has no runner", value=bundle, why="its target needs EdgeAttn to run")
    return path


def parse_answer(text: str, code: int, errors: str, where: str, died: str = "") -> dict[str, Any]:
    """The JSON that ``run.py --json`` printed.

    Args:
        code: how its process ended; negative for a signal. errors: what it wrote to standard error.
        died: the signal's name, where it is another system's: the numbers differ.

    Raises:
        CheckFailed: it crashed, or printed something else.
    """
    tail = [line for line in errors.splitlines() if line.strip()][-5:]
    if code < 0:
        name = died or signal.Signals(-code).name
        raise CheckFailed("the runner crashed", where=where, why=f"its process was ended by {name}", details=tail)
    try:
        answer: dict[str, Any] = json.loads(text)
    except ValueError:
        why = f"it ended with code {code} and printed no result"
        raise CheckFailed("the runner failed", where=where, why=why, details=tail) from None
    return answer


def found_of(facts: Mapping[str, Any], python: str = "python3") -> list[Found]:
    """Findings from what ``PROBE`` prints on a machine."""
    version = tuple(int(part) for part in str(facts["python"]).split(".")[:2])
    rows = [
        Found(
            "python",
            version >= (3, 9),
            f"{facts['python']} on {facts['machine']}",
            None if version >= (3, 9) else "Python 3.9 or newer",
        )
    ]
    install = f"{python} -m venv --system-site-packages ~/edgeattn && ~/edgeattn/bin/pip install"
    mac = facts["system"] == "darwin"
    none = {"tflite-runtime"} if mac else set()
    if facts["machine"] in ("armv6l", "armv7l"):
        none = {"onnxruntime", "ai-edge-litert"}
    for name in ("numpy", "onnxruntime", "ai-edge-litert", "tflite-runtime", *(["coremltools"] if mac else [])):
        found = facts["versions"].get(name)
        wanted = "'numpy<2' tflite-runtime" if name == "tflite-runtime" else name
        fix = "no wheel exists for this machine" if name in none else f"{install} {wanted}"
        rows.append(Found(name, found is not None, found or "not installed", None if found else fix))
    for name, detail in facts["about"].items():
        rows.append(Found(name, True, detail))
    return rows


#: Run by a device's own Python 3.9+; prints JSON for ``found_of``.
PROBE = """
import importlib.metadata as m, json, os, platform, shutil, subprocess, sys
def version(name):
    try:
        return m.version(name)
    except Exception:
        return None
def read(path):
    try:
        return open(path, errors='replace').read()
    except OSError:
        return ''
about = {'disk': '%.1f GB free at home' % (shutil.disk_usage(os.path.expanduser('~')).free / 1e9)}
for line in read('/proc/meminfo').splitlines():
    if line.startswith(('MemTotal', 'MemAvailable')):
        about[line.split(':')[0].replace('Mem', 'memory ').lower()] = '%.2f GB' % (int(line.split()[1]) * 1024 / 1e9)
for line in read('/etc/os-release').splitlines():
    if line.startswith('PRETTY_NAME='):
        about['system'] = line.split('=', 1)[1].strip('"')
model = read('/proc/device-tree/model').strip(chr(0))
lines = read('/proc/cpuinfo').splitlines()
cpus = [line.split(':', 1)[1].strip() for line in lines if line.lower().startswith('model name')]
if sys.platform == 'darwin':
    def sysctl(name):
        return subprocess.check_output(['sysctl', '-n', name]).decode().strip()
    about['memory total'] = '%.2f GB' % (int(sysctl('hw.memsize')) / 1e9)
    about['system'] = 'macOS ' + platform.mac_ver()[0]
    model = sysctl('machdep.cpu.brand_string')
about['cpu'] = '%s, %d cores' % (model or (cpus[0] if cpus else platform.machine()), os.cpu_count() or 1)
names = ('numpy', 'onnxruntime', 'ai-edge-litert', 'tflite-runtime', 'coremltools')
machine = platform.machine()
if machine == 'aarch64' and sys.maxsize < 2**32:
    machine = 'armv7l'  # a 32-bit system under a 64-bit kernel
print(json.dumps({'python': platform.python_version(), 'machine': machine, 'system': sys.platform, 'about': about,
                  'versions': {name: version(name) for name in names}}))
"""
