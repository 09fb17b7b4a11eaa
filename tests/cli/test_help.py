"""Start-up: help imports nothing heavy and costs little."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from edgeattn.cli import cli

HEAVY = {"torch", "numpy", "onnx", "onnxruntime", "onnxscript", "onnx_ir", "pydantic", "rich", "safetensors"}
COMMANDS = cli.list_commands(click.Context(cli))

PROBE = """
import json, resource, sys
from edgeattn.cli import main
try:
    main(json.loads(sys.argv[1]))
except SystemExit as end:
    code = end.code
else:
    code = 0
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"code": code, "cpu": used.ru_utime + used.ru_stime, "modules": sorted(sys.modules)}), file=sys.stderr)
"""


def probe(arguments: list[str], cwd: Path | None = None) -> dict:
    """Exit code, CPU seconds and loaded modules of one run of the command line in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(arguments)], capture_output=True, text=True, cwd=cwd, env=os.environ
    )
    return json.loads(done.stderr.splitlines()[-1])


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_is_light(arguments: list[str]) -> None:
    # The best of three: other processes on the machine only ever add CPU time.
    runs = [probe(arguments) for _ in range(3)]
    assert runs[0]["code"] == 0
    assert not HEAVY & set(runs[0]["modules"])
    assert min(run["cpu"] for run in runs) < 0.3


def test_all_commands_of_the_design_are_there() -> None:
    wanted = {"export", "verify", "plan", "doctor", "recipes", "devices", "targets", "reparam", "inspect"}
    assert wanted <= set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_a_short_line(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    assert command.help
    assert command.short_help
    assert len(command.short_help) < 80


@pytest.mark.parametrize(
    "arguments", [["plan", "fmvit-t"], ["doctor"], ["recipes"], ["devices"], ["targets"]], ids=" ".join
)
def test_looking_imports_no_torch(arguments: list[str]) -> None:
    run = probe(arguments)
    assert run["code"] == 0
    assert not {"torch", "onnx", "onnxruntime"} & set(run["modules"])
