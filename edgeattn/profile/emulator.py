"""Sets up what ``qemu://`` needs: an aarch64 Python with the devices' own wheels, and qemu's user-mode emulation.

Debian's packages are fetched and checked by apt with a state of its own, wheels by pip; nothing of the system's
packages is touched. Everything stands in one folder that appears when it is whole.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from edgeattn.core import tools
from edgeattn.core.errors import ToolchainMissing
from edgeattn.core.files import inside, whole_folder

#: Debian 12, whose Python is that of Raspberry Pi OS Bookworm.
PYTHON_SUITE, PYTHON = "bookworm", "3.11"
#: Debian 13: its qemu 10 runs the runtimes; the 7.2 of Debian 12 was measured to crash in both.
QEMU_SUITE = "trixie"

PYTHON_PACKAGES = (
    "libc6 libgcc-s1 libstdc++6 zlib1g libexpat1 libffi8 libbz2-1.0 liblzma5 libssl3 libuuid1 libgomp1 libsqlite3-0 "
    f"libpython{PYTHON}-minimal libpython{PYTHON}-stdlib python{PYTHON}-minimal"
).split()

#: Wheels, and the versions that were measured to work together; those installed here go first.
WHEELS = {"numpy": "2.3.5", "onnxruntime": "1.32.0", "ai-edge-litert": "2.3.0", "tokenizers": "0.23.3"}
#: What the runtimes import beside NumPy, and what fills chat templates in; any version does.
COMPANIONS = (
    *("flatbuffers", "protobuf", "packaging", "backports.strenum", "tqdm", "typing-extensions"),
    *("jinja2", "markupsafe"),
)
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")

_DEB_MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}
Say = Callable[[str], None]


@dataclass(frozen=True)
class Emulator:
    """A set-up emulator.

    Attributes:
        folder: holds all of it. versions: of qemu's package and the wheels.
    """

    folder: Path
    versions: dict[str, str]

    @property
    def root(self) -> Path:
        """The aarch64 system's files."""
        return self.folder / "root"

    @property
    def python(self) -> Path:
        """The aarch64 Python."""
        return self.root / "usr" / "bin" / f"python{PYTHON}"

    @property
    def packages(self) -> Path:
        """Its packages."""
        return self.folder / "packages"

    @property
    def qemu(self) -> Path:
        """qemu for aarch64 programs, itself a program of this machine."""
        return self.folder / "qemu-aarch64"


def _folder() -> Path:
    named, cache, base = (os.environ.get(n) for n in ("EDGEATTN_QEMU", "EDGEATTN_CACHE", "XDG_CACHE_HOME"))
    if named:
        return Path(named)
    return (Path(cache) if cache else (Path(base) if base else Path.home() / ".cache") / "edgeattn") / "qemu"


def _wanted() -> dict[str, str]:
    """Versions to emulate: those that bundles are proven with here."""
    return {name: tools.version(name) or version for name, version in WHEELS.items()}


def _stamp() -> dict[str, object]:
    return {"layout": 1, "python": PYTHON, "suites": [PYTHON_SUITE, QEMU_SUITE], "wheels": _wanted()}


def find() -> Emulator | None:
    """The emulator if it is set up, with the wheels that this installation wants. Uses no network."""
    folder = _folder()
    try:
        stamp = json.loads((folder / "stamp.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if stamp.get("made_from") != _stamp():
        return None
    return Emulator(folder, stamp["versions"])


def debian_source(etc: Path = Path("/etc/apt")) -> tuple[str, str]:
    """(address, keyring) of the Debian archive that this machine's apt uses; keyring "" where apt has its own.

    Raises:
        ToolchainMissing: it uses none.
    """
    for path in sorted((etc / "sources.list.d").glob("*.sources")):
        for stanza in re.split(r"\n\s*\n", path.read_text(encoding="utf-8")):
            fields = dict(re.findall(r"^([A-Za-z-]+):[ \t]*(\S+)", stanza, re.MULTILINE))
            address = fields.get("URIs", "")
            if address.rstrip("/").endswith("/debian") and fields.get("Enabled", "yes") != "no":
                return address, fields.get("Signed-By", "")
    lists = [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*.list"))]
    for path in (p for p in lists if p.is_file()):
        for options, address in re.findall(
            r"^deb\s+(\[[^]]*\]\s+)?(\S+)\s", path.read_text(encoding="utf-8"), re.MULTILINE
        ):
            if address.rstrip("/").endswith("/debian"):
                key = re.search(r"signed-by=([^\s\]]+)", options)
                return address, key[1] if key else ""
    raise ToolchainMissing(
        "no Debian archive is known to this machine",
        where=str(etc),
        why="the emulator is made from Debian's packages",
        fix="set it up on Debian 12 or 13, or copy such a machine's folder and name it in EDGEATTN_QEMU",
    )


def _run(words: Sequence[str], cwd: Path, what: str) -> None:
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise ToolchainMissing(
            f"{what} failed",
            value=" ".join(words[:1]),
            why=f"it ended with code {done.returncode}",
            fix="look at its last lines; without a network the emulator cannot be set up",
            details=lines[-8:],
        )


def _debs(packages: Sequence[str], suite: str, machine: str, work: Path) -> list[Path]:
    """Download packages with an apt state of their own; apt checks the archive's signature."""
    state = work / f"apt-{suite}-{machine}"
    for name in ("lists/partial", "cache/archives/partial", "debs"):
        (state / name).mkdir(parents=True)
    address, key = debian_source()
    (state / "status").touch()
    (state / "sources.list").write_text(f"deb {f'[signed-by={key}] ' if key else ''}{address} {suite} main\n")
    options = {
        "Dir::State": state,
        "Dir::State::lists": state / "lists",
        "Dir::State::status": state / "status",
        "Dir::Cache": state / "cache",
        "Dir::Etc::sourcelist": state / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "APT::Architecture": machine,
        "APT::Architectures": machine,
        "APT::Sandbox::User": "",
        "Acquire::Languages": "none",
    }
    apt = ["apt-get", "-q", *(f"-o{name}={value}" for name, value in options.items())]
    _run([*apt, "update"], state, f"apt-get update of {suite}")
    _run([*apt, "download", *packages], state / "debs", f"apt-get download from {suite}")
    return sorted((state / "debs").glob("*.deb"))


def unpack_wheel(wheel: Path, into: Path) -> None:
    """Unpack a wheel.

    Raises:
        UsageError: a name in it leaves the folder.
    """
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            inside(into, name)
        archive.extractall(into)


def _wheels(into: Path, work: Path) -> None:
    downloads = work / "wheels"
    downloads.mkdir()
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    pip += ["--only-binary=:all:", "--implementation=cp", f"--python-version={PYTHON}", f"--dest={downloads}"]
    pip += [f"--platform={name}" for name in (*PLATFORMS, "any")]
    _run([*pip, *(f"{name}=={version}" for name, version in _wanted().items()), *COMPANIONS], work, "pip download")
    for wheel in sorted(downloads.glob("*.whl")):
        unpack_wheel(wheel, into)


def setup(say: Say) -> Emulator:
    """Make the emulator, if it is not there; some 450 MB, a minute or two.

    Raises:
        ToolchainMissing: this machine is no Debian, or something cannot be fetched.
    """
    found = find()
    if found is not None:
        return found
    machine = _DEB_MACHINES.get(platform.machine())
    lacking = [tool for tool in ("apt-get", "dpkg") if shutil.which(tool) is None]
    if machine is None or lacking or sys.platform != "linux":
        raise ToolchainMissing(
            "the emulator cannot be set up here",
            value=f"{sys.platform} {platform.machine()}",
            why=f"missing: {', '.join(lacking)}" if lacking else "it is made from Debian's packages",
            fix="set it up on Debian 12 or 13, or copy such a machine's folder and name it in EDGEATTN_QEMU",
        )
    with whole_folder(_folder(), replace=True) as folder:
        work = folder / "work"
        work.mkdir()
        emulator = Emulator(folder, {})
        say(f"fetching Python {PYTHON} for aarch64")
        for package in _debs(PYTHON_PACKAGES, PYTHON_SUITE, "arm64", work):
            _run(["dpkg", "-x", str(package), str(emulator.root)], work, "dpkg")
        say("fetching qemu")
        (deb,) = _debs(["qemu-user"], QEMU_SUITE, machine, work)
        _run(["dpkg", "-x", str(deb), str(work / "qemu")], work, "dpkg")
        shutil.copy2(work / "qemu" / "usr" / "bin" / "qemu-aarch64", emulator.qemu)
        say("fetching wheels for aarch64")
        _wheels(emulator.packages, work)
        versions = {"qemu-user": unquote(deb.name.split("_")[1]), **_wanted()}
        shutil.rmtree(work)
        stamp = {"made_from": _stamp(), "versions": versions}
        (folder / "stamp.json").write_text(json.dumps(stamp, indent=1), encoding="utf-8")
    return Emulator(_folder(), versions)
