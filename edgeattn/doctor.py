"""What is installed, and what could be: every toolchain that EdgeAttn knows. Imports none of them and never raises."""

from __future__ import annotations

import platform
import shutil
import sys
from dataclasses import dataclass

from edgeattn import targets, toolchains
from edgeattn.core import tools
from edgeattn.pipeline.cache import Cache
from edgeattn.profile import emulator


@dataclass(frozen=True)
class Finding:
    """One toolchain: what it is for, whether it was found, its version or the reason, and the install line."""

    name: str
    purpose: str
    found: bool
    detail: str
    fix: str | None = None


#: (distribution, purpose, pip requirement)
_PACKAGES = (
    ("torch", "models, reparameterization, capture", "'torch>=2.9,<2.14'"),
    ("numpy", "numbers", "'numpy<2.4'"),
    ("onnx", "target onnx", "onnx"),
    ("onnxscript", "target onnx, export", "onnxscript"),
    ("onnxruntime", "target onnx, verification", "onnxruntime"),
    ("timm", "models timm:NAME", "'edgeattn[timm]'"),
    ("coremltools", "Core ML toolchain", "'edgeattn[coreml]'"),
    ("litert-torch", "TFLite toolchain, conversion", "'edgeattn[tflite]'"),
    ("ai-edge-quantizer", "TFLite toolchain, int8 weights", "'edgeattn[tflite]'"),
    ("ai-edge-litert", "TFLite toolchain, runtime", "'edgeattn[tflite]'"),
    ("tensorrt-rtx", "TensorRT toolchain", "'edgeattn[tensorrt]'"),
    ("tokenizers", "text of language models", "'edgeattn[text]'"),
    ("jinja2", "HTML reports, chats", "'edgeattn[report,text]'"),
    ("plotly", "HTML reports", "'edgeattn[report]'"),
)


def _package(name: str, purpose: str, requirement: str) -> Finding:
    try:
        version = tools.version(name)
    except Exception as error:  # broken metadata of somebody else's package
        return Finding(name, purpose, False, f"its metadata cannot be read: {error}", f"pip install {requirement}")
    if version is None:
        return Finding(name, purpose, False, "not installed", f"pip install {requirement}")
    if name == "torch":
        numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
        if not (2, 9) <= numbers < (2, 14):
            return Finding(name, purpose, False, f"{version} is outside of 2.9 to 2.13", f"pip install {requirement}")
    return Finding(name, purpose, True, version)


def _target(name: str) -> Finding:
    purpose = "target"
    try:
        availability = targets.get(name).availability()
    except Exception as error:  # a third party's target that cannot even be loaded
        return Finding(f"target {name}", purpose, False, f"{type(error).__name__}: {error}")
    return Finding(f"target {name}", purpose, availability.found, availability.detail, availability.fix)


def _emulator() -> Finding:
    purpose = "a Raspberry Pi's numbers without one"
    try:
        found = emulator.find()
    except Exception as error:
        return Finding("emulator", purpose, False, f"{type(error).__name__}: {error}", "edgeattn device setup qemu")
    if found is None:
        return Finding("emulator", purpose, False, "not set up", "edgeattn device setup qemu")
    return Finding("emulator", purpose, True, f"qemu {found.versions.get('qemu-user', '')} in {found.folder}")


def _toolchain(name: str) -> Finding:
    """One that has an environment of its own; its packages are read there, not here."""
    toolchain = toolchains.get(name)
    shown, purpose, line = f"toolchain {name}", toolchain.purpose, toolchain.line
    try:
        found = toolchains.installed(name)
    except Exception as error:  # a folder that cannot be read
        return Finding(shown, purpose, False, f"{type(error).__name__}: {error}", line)
    if not found.usable:
        return Finding(shown, purpose, False, found.why, line)
    return Finding(shown, purpose, True, ", ".join(f"{name} {text}" for name, text in list(found.versions.items())[:2]))


def _cache() -> Finding:
    root = Cache.default().root
    try:
        place = next(folder for folder in (root, *root.parents) if folder.exists())
        free = shutil.disk_usage(place).free / 1e9
        detail = f"{root}, {free:.0f} GB free"
    except (OSError, StopIteration) as error:
        return Finding("cache", "results of stages", False, f"{root}: {error}", "set EDGEATTN_CACHE to another folder")
    return Finding("cache", "results of stages", True, detail)


def examine() -> list[Finding]:
    """Look at Python, every package, target and toolchain, the emulator and the cache."""
    fine = sys.version_info >= (3, 10)
    python = Finding(
        "python",
        "everything",
        fine,
        f"{platform.python_version()} on {sys.platform} {platform.machine()}",
        None if fine else "Python 3.10 or newer",
    )
    try:
        names = targets.names()
    except Exception:  # broken metadata of somebody else's package
        names = []
    return [
        python,
        *(_package(*row) for row in _PACKAGES),
        *(_target(name) for name in names),
        *(_toolchain(name) for name in toolchains.known()),
        _emulator(),
        _cache(),
    ]
