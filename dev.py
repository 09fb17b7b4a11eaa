#!/usr/bin/env python3
"""Everything a fresh machine needs, with nothing but Python 3.10+ and pip.

python3 dev.py demo          make .venv, install EdgeAttn, export the trained fmvit-digits and prove it
python3 dev.py test          make .venv, install with the development tools, then lint, types and tests
python3 dev.py test --slow   the long tests
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")


def run(*command: str | Path) -> None:
    """Show and run a command in the repository; its failure ends this script with its exit code."""
    words = [str(word) for word in command]
    print("$", " ".join(words), flush=True)
    code = subprocess.run(words, cwd=ROOT, check=False).returncode
    if code:
        sys.exit(code)


def install(extras: str) -> None:
    """Make .venv and install the package in place; skipped when pyproject.toml is the one installed last."""
    wanted = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()
    stamp = VENV / f".installed{extras}"
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    if not (BIN / "python").exists():
        print(f"making {VENV}", flush=True)
        venv.create(VENV, with_pip=True)
    pip = [BIN / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run(*pip, "--upgrade", "pip")  # Python 3.10's and 3.11's own resolves the converters' pins minutes slower
    run(*pip, "-e", f".{extras}")
    stamp.write_text(wanted)


def demo() -> None:
    """The main job: a trained model, exported and proven."""
    install("")
    run(BIN / "edgeattn", "export", "fmvit-digits", "--target", "onnx", "--output", "out")


def test(slow: bool) -> None:
    """Lint, format, types, tests."""
    install("[dev]")
    # One process a core, each with one thread: most tests wait for processes of their own with one thread.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    pytest = [BIN / "python", "-m", "pytest", "-n", "auto", "--dist", "loadfile"]
    if slow:
        run(*pytest, "-m", "slow")
        return
    run(BIN / "ruff", "check", ".")
    run(BIN / "ruff", "format", "--check", ".")
    run(BIN / "mypy")
    run(*pytest)


def main() -> None:
    """Parse the command line."""
    if sys.version_info < (3, 10):  # noqa: UP036 (this script meets old Pythons)
        sys.exit(f"EdgeAttn needs Python 3.10 or newer; this is {sys.version.split()[0]}")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("demo", "test"))
    parser.add_argument("--slow", action="store_true", help="with test: the long tests instead of the others")
    arguments = parser.parse_args()
    if arguments.what == "demo":
        demo()
    else:
        test(arguments.slow)


if __name__ == "__main__":
    main()
