"""The commands of the README and of the docs are run, and their links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeattn.bundle import Bundle
from edgeattn.reparam import Proof
from tests.conftest import ROOT
from tests.profile.sshd import Sshd, needed

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
#: Commands of the README that make their own environment; a slow test runs them on a fresh clone.
FRESH = ("python3 dev.py demo", "python3 dev.py test")

NET = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, width=8):
        super().__init__(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten())

def build():
    return Net()
"""


def commands(page: Path) -> list[str]:
    """Lines of indented or fenced code that begin with edgeattn or python, without their comments."""
    lines = [
        line.strip().removeprefix("$ ")
        for line in page.read_text().splitlines()
        if re.match(r"(    |\$ |edgeattn )", line)
    ]
    return [line.partition("  #")[0].strip() for line in lines if line.startswith(("edgeattn ", "python "))]


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with the files that the examples speak of; commands of all pages run in it, in order."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "mypackage").mkdir()
    (folder / "mypackage" / "__init__.py").touch()
    (folder / "mypackage" / "net.py").write_text(NET)
    (folder / "net.py").write_text(NET)
    code = (
        "import torch, numpy\nfrom safetensors.torch import save_file\nfrom net import Net\n"
        "save_file(Net(width=16).state_dict(), 'net.safetensors')\n"
        "numpy.save('data.npy', numpy.zeros((1, 1, 32, 32), numpy.float32))\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="session")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    """What stands for the board of the examples: an OpenSSH server on this machine."""
    needed()
    server = Sshd(tmp_path_factory.mktemp("board") / "ssh")
    server.make()
    server.start()
    yield server
    server.stop()


#: The board's address in the examples.
ADDRESS = "ssh://pi@raspberrypi.local"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_run(page: Path, place: Path, digits: Bundle, request: pytest.FixtureRequest) -> None:
    environ = dict(os.environ)
    server: Sshd | None = request.getfixturevalue("board") if ADDRESS in page.read_text() else None
    if server is not None:
        environ |= {"HOME": str(server.home), "EDGEATTN_HOME": str(server.folder / "own")}
    for line in commands(page):
        words = shlex.split(line.replace("NAME", "fmvit-digits").replace("MODEL", "fmvit-digits"))
        if "BUNDLE" in line:
            words = [str(digits.path) if w == "BUNDLE" else w for w in words]
        if server is not None and ADDRESS in words:
            words[words.index(ADDRESS)] = server.url
            words += ["--python", sys.executable]  # the system's own has no NumPy
        if words[:2] == ["python", "run.py"]:
            words[1] = str(digits.path / "run.py")
        program = [sys.executable, "-m", "edgeattn"] if words[0] == "edgeattn" else [sys.executable]
        if words[0] == "python" and not Path(words[1]).is_absolute() and (ROOT / words[1]).exists():
            continue  # trainings and benchmarks of the repository: minutes long, run by hand
        done = subprocess.run([*program, *words[1:]], cwd=place, env=environ, capture_output=True, text=True)
        if done.returncode == 3 and line == "edgeattn device setup qemu" and not os.environ.get("CI"):
            pytest.skip(f"the emulator cannot be set up here: {done.stderr}")
        assert done.returncode == 0, f"{page.name}: {line}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_runs(page: Path, place: Path, digits: object) -> None:
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        start = "import numpy\nimages = numpy.zeros((1, 1, 32, 32), numpy.float32)\n"
        done = subprocess.run([sys.executable, "-c", start + code], cwd=place, capture_output=True, text=True)
        assert done.returncode == 0, f"{page.name}\n{code}\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_files_that_are_named_exist(page: Path) -> None:
    for name in re.findall(r"`((?:edgeattn|docs|benchmarks|examples|recipes|tests)/[\w./-]+\.\w+)`", page.read_text()):
        assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_the_readme_opens_with_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    for command in FRESH:
        assert command in text
    assert FRESH[1] in (ROOT / ".ci" / "run").read_text()


def test_the_output_shown_is_what_the_command_says(digits: Bundle) -> None:
    """All of it that does not depend on the machine."""
    shown = " ".join((ROOT / "README.md").read_text().split())
    fused, _, rest = Proof.from_dict(digits.manifest.reparam).summary().partition("; largest")
    assert fused in shown
    assert rest[rest.index("PTQ risk") :] in shown
    task = digits.manifest.task
    assert task is not None
    assert f"({task['artifact_correct']} of {task['samples']} held-out samples)" in shown
    assert str(digits.manifest.weights.sha256)[:16] in shown


@pytest.mark.slow
def test_first_command_on_a_fresh_clone(tmp_path: Path) -> None:
    """Environment, install and export, with nothing but this clone, Python and pip."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    words = FRESH[0].split()
    done = subprocess.run([sys.executable, *words[1:]], cwd=clone, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "held" in done.stdout
    found = re.search(r"\((\d+) of 360 held-out samples\), PyTorch [\d.]+% \((\d+)\)", " ".join(done.stdout.split()))
    assert found
    assert abs(int(found[1]) - int(found[2])) <= 1
    assert (clone / "out" / "fmvit-digits.onnx.fp32" / "manifest.json").is_file()
