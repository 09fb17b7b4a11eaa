"""A toolchain of one small package, which pip finds in a folder: real environments without a network."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import pytest

from edgeattn.toolchains import KNOWN, Toolchain


def wheel(folder: Path, version: str = "1.0", code: str = "") -> Path:
    """A wheel of distribution edgeattn-tiny with module tiny_tool."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"edgeattn_tiny-{version}.dist-info"
    files = {
        "tiny_tool.py": f"VERSION = {version!r}\n{code}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: edgeattn-tiny\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: a test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    path = folder / f"edgeattn_tiny-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
        archive.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"]))
    return path


def toolchain(**changes: Any) -> Toolchain:
    fields: dict[str, Any] = {
        "name": "tiny",
        "purpose": "tests",
        "requirements": ("edgeattn-tiny==1.0",),
        "probe": "tiny_tool",
        "size_mb": 1,
        "seconds": 3,
        "python": ((3, 10), (3, 99)),
    }
    return Toolchain(**{**fields, **changes})


def prepare(folder: Path, patch: pytest.MonkeyPatch, **changes: Any) -> Path:
    """A user's folder where ``tiny`` is known and nothing is added; returns where pip looks for wheels."""
    wheels = folder / "wheels"
    wheel(wheels)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        patch.delenv(name)
    patch.setenv("EDGEATTN_HOME", str(folder / "own"))
    patch.setenv("PIP_CONFIG_FILE", os.devnull)
    patch.setenv("PIP_NO_INDEX", "1")
    patch.setenv("PIP_FIND_LINKS", str(wheels))
    patch.setitem(KNOWN, "tiny", toolchain(**changes))
    return wheels
