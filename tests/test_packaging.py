"""What the wheel holds."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from edgeattn.core.schema import tomllib
from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_folder_with_code_is_a_package_of_the_wheel() -> None:
    folders = {p.parent.relative_to(ROOT).as_posix().replace("/", ".") for p in (ROOT / "edgeattn").rglob("*.py")}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == folders | {"edgeattn.recipes", "edgeattn.devices"}


def test_every_extra_keeps_torch_below_the_next_release() -> None:
    assert "torch>=2.9,<2.14" in PROJECT["project"]["dependencies"]
    assert set(PROJECT["project"]["optional-dependencies"]) >= {"coreml", "tflite", "tensorrt", "report", "dev", "all"}


@pytest.mark.slow
def test_the_wheel_holds_code_recipes_devices_and_checkpoints(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, timeout=300)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    code = {p.relative_to(ROOT).as_posix() for end in ("py", "toml") for p in (ROOT / "edgeattn").rglob(f"*.{end}")}
    assert "edgeattn/targets/tflite/lint.toml" in code
    data = {
        f"edgeattn/{p.relative_to(ROOT).as_posix()}"
        for kind in ("recipes", "devices")
        for p in (ROOT / kind).rglob("*.*")
    }
    assert code | data <= names
