"""What several tests share: a cache of their own, and the trained digits model exported once."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edgeattn.bundle import Bundle

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test reads or writes the user's own cache and recipes, or leaves temporary files to the machine."""
    folder = tmp_path_factory.mktemp("home")
    kept = {name: os.environ.get(name) for name in ("EDGEATTN_CACHE", "EDGEATTN_HOME", "XDG_CACHE_HOME", "TMPDIR")}
    os.environ["EDGEATTN_CACHE"] = str(folder / "cache")
    os.environ["EDGEATTN_HOME"] = str(folder / "config")
    os.environ["XDG_CACHE_HOME"] = str(folder / "user-cache")  # the runner's notes of what held
    (folder / "tmp").mkdir()
    os.environ["TMPDIR"] = str(folder / "tmp")
    tempfile.tempdir = None  # read TMPDIR anew
    yield folder
    for name, value in kept.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})
    tempfile.tempdir = None


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for this test alone."""
    monkeypatch.setenv("EDGEATTN_CACHE", str(tmp_path / "own-cache"))
    return tmp_path / "own-cache"


@pytest.fixture(scope="session")
def digits(home: Path) -> Bundle:
    """The trained digits model as an fp32 ONNX bundle, made by the real pipeline."""
    import edgeattn

    return edgeattn.export("fmvit-digits", output=home / "bundles")


@pytest.fixture(scope="session")
def digits_tflite(home: Path) -> Bundle:
    """The trained digits model as an fp32 TFLite bundle, made by the real pipeline."""
    import edgeattn

    return edgeattn.export("fmvit-digits", target="tflite", output=home / "bundles")


@pytest.fixture
def edgeattn_cli() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the command line as a process of its own."""

    def run(*arguments: str | Path, cwd: Path | None = None, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "edgeattn", *map(str, arguments)],
            cwd=cwd,
            env={**os.environ, **environ},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run
