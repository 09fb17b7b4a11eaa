"""The action and the examples for CI, run as far as that is possible without GitHub's and GitLab's servers.

What stays unproven: the actions that they use (checkout, setup-python, cache, upload), and how results are shown.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from edgeattn.check.init import write
from tests.conftest import ROOT

EXAMPLES = ROOT / "examples" / "ci"


def read(path: Path) -> dict[Any, Any]:
    data = yaml.safe_load(path.read_text())
    assert isinstance(data, dict)
    return data


def filled(text: str, values: dict[str, str]) -> str:
    """GitHub's expressions as its runner would fill them in."""
    return re.sub(r"\$\{\{\s*(.*?)\s*\}\}", lambda match: values[match[1]], text)


def shell(script: str, folder: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """A step as a runner starts it. The package is here already, and its environment first on the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    words = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
    return subprocess.run(
        words, cwd=folder, env={**os.environ, "PATH": path, **environ}, capture_output=True, text=True
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with a model that holds."""
    write(tmp_path / "edgeattn.toml", "fmvit-digits", ())
    return tmp_path


def test_the_action_checks_and_leaves_its_reports(checkout: Path) -> None:
    action = read(ROOT / "action.yml")
    assert action["runs"]["using"] == "composite"
    values = {f"inputs.{name}": str(given["default"]) for name, given in action["inputs"].items()}
    values |= {"github.workspace": str(checkout)}
    ran = []
    for step in action["runs"]["steps"]:
        if "run" not in step:
            assert re.fullmatch(r"actions/[\w/-]+@v\d+", step["uses"])
            continue
        assert step["shell"] == "bash"
        assert "${{" not in step["run"], "an input in the script would be run as a script"
        if step["run"].startswith("python -m pip install"):
            continue  # no index is asked in a test
        environ = {name: filled(value, values) for name, value in step["env"].items() if name != "EDGEATTN_CACHE"}
        done = shell(step["run"], checkout, GITHUB_ACTIONS="true", **environ)
        assert done.returncode == 0, done.stdout + done.stderr
        ran.append(step["name"])
    assert ran == ["Check the exports"]
    reports = checkout / filled(action["outputs"]["reports"]["value"], values)
    names = {"junit.xml", "lint.sarif", "code-quality.json", "summary.md", "report.html", "checks.json"}
    assert {path.name for path in reports.iterdir()} == names


def test_an_input_is_a_word_and_no_script(checkout: Path) -> None:
    (step,) = [s for s in read(ROOT / "action.yml")["runs"]["steps"] if "edgeattn check" in s.get("run", "")]
    hostile = 'x.toml"; touch planted; echo "'
    done = shell(step["run"], checkout, FILE=hostile, REPORTS="reports", ARGUMENTS="")
    assert done.returncode == 2
    assert not (checkout / "planted").exists()


def test_the_example_for_github_uses_the_action_as_it_is() -> None:
    action, workflow = read(ROOT / "action.yml"), read(EXAMPLES / "github.yml")
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    own = [step for step in steps if "edgeattn@" in step.get("uses", "")]
    assert own
    for step in own:
        assert set(step.get("with", {})) <= set(action["inputs"])
    sarif = next(step for step in steps if "upload-sarif" in step.get("uses", ""))
    assert sarif["with"]["sarif_file"] == f"{action['inputs']['reports']['default']}/lint.sarif"


@pytest.mark.slow
def test_the_example_compares_with_the_base(checkout: Path) -> None:
    """The job that measures latency: the base's checkout holds the same model, so the bytes are the same."""
    file = checkout / "edgeattn.toml"
    file.write_text(file.read_text().replace("# [budgets.latency]", "[budgets.latency]"))
    (checkout / "base").mkdir()
    (checkout / "base" / "edgeattn.toml").write_text(file.read_text())
    steps = read(EXAMPLES / "github.yml")["jobs"]["latency"]["steps"]
    for step in steps:
        if "edgeattn check" in step.get("run", ""):
            done = shell(step["run"], checkout, GITHUB_ACTIONS="true")
            assert done.returncode == 0, done.stdout + done.stderr
    assert "same bytes" in (checkout / "reports" / "checks.json").read_text()


def test_the_example_for_gitlab_names_reports_that_there_are(checkout: Path) -> None:
    job = read(EXAMPLES / "gitlab-ci.yml")["exports"]
    script = [line for line in job["script"] if not line.startswith("python -m pip install")]
    done = shell("\n".join(script), checkout, GITLAB_CI="true", CI_PROJECT_DIR=str(checkout))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "::error" not in done.stdout
    for name in job["artifacts"]["reports"].values():
        assert (checkout / name).is_file()
    assert all((checkout / path).exists() for path in [*job["cache"]["paths"], *job["artifacts"]["paths"]])
