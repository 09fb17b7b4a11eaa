"""``edgeattn check`` on a repository of its own, with real exports: what holds, what does not, and where it is said."""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree as xml

import pytest

from tests.report.test_checks import check_shape

Cli = Callable[..., subprocess.CompletedProcess[str]]

NET = '''
import torch
from torch import nn


class Broken(nn.Module):
    """Exports as another program than it is."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        y = self.inner(x)
        return y * 1.1 if torch.compiler.is_exporting() else y


class Fine(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8))


class Ranked(nn.Module):
    def forward(self, x):
        return torch.relu(x.reshape(1, 2, 1, 2, 1, 2).permute(0, 3, 5, 1, 2, 4)) + 1
'''
#: Of the pattern.
LINE = len(NET.splitlines())

FILE = """\
# What this repository exports.
[models.broken]
model = "net.py:Broken"
inputs = ["x=1x8"]

[models.large]
model = "net.py:Fine"
inputs = ["x=1x8"]
[models.large.budgets]
size_mb = 0.001

[models.ranked]
model = "net.py:Ranked"
inputs = ["x=1x8"]
targets = ["coreml"]
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Three models: numbers that are off, a file that is too large, a pattern that a target breaks."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "net.py").write_text(NET)
    (tmp_path / "sub" / "edgeattn.toml").write_text(FILE)
    return tmp_path


@pytest.mark.slow
def test_three_models_that_do_not_hold(repository: Path, edgeattn_cli: Cli) -> None:
    summary = repository / "summary.md"
    summary.write_text("before\n")
    on_github = {"GITHUB_ACTIONS": "true", "GITHUB_WORKSPACE": str(repository), "GITHUB_STEP_SUMMARY": str(summary)}
    done = edgeattn_cli("check", "-o", "../reports", cwd=repository / "sub", **on_github)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "3 of 3 exports did not hold" in done.stderr

    root = xml.parse(repository / "reports" / "junit.xml").getroot()
    check_shape(root)
    failures = [
        (s.get("name"), c.get("name")) for s in root for c in s.findall("testcase") if c.find("failure") is not None
    ]
    assert failures == [("broken", "numerics"), ("large", "size"), ("ranked", "lint")]

    errors = [line for line in done.stdout.splitlines() if line.startswith("::error ")]
    places = [re.match(r"::error file=([^,]+),line=(\d+),", line) for line in errors]
    assert [m and (m[1], int(m[2])) for m in places] == [
        ("sub/edgeattn.toml", 2),
        ("sub/edgeattn.toml", 10),
        ("sub/net.py", LINE),
    ]
    page = summary.read_text()
    assert page.startswith("before\n## EdgeAttn: 3 of 3 exports did not hold")
    assert "rank-6" in page
    sarif = json.loads((repository / "reports" / "lint.sarif").read_text())
    (result,) = [r for r in sarif["runs"][0]["results"] if r["level"] == "error"]
    where = result["locations"][0]["physicalLocation"]
    assert (where["artifactLocation"]["uri"], where["region"]["startLine"]) == ("sub/net.py", LINE)
    assert (repository / "reports" / "report.html").is_file()

    # Nothing changed: the failures too are known, and nothing is exported.
    again = edgeattn_cli("check", "--json", cwd=repository / "sub")
    assert again.returncode == 1
    data = json.loads(again.stdout)
    assert [cell["cached"] for cell in data["cells"]] == [True, True, True]
    assert [cell["status"] for cell in data["cells"]] == ["failed"] * 3

    # What was mended is looked at again, and nothing else.
    net = repository / "sub" / "net.py"
    net.write_text(NET.replace("y * 1.1", "y * 1.0"))
    file = repository / "sub" / "edgeattn.toml"
    file.write_text(FILE[: FILE.index("[models.ranked]")].replace("size_mb = 0.001", "size_mb = 1.0"))
    mended = edgeattn_cli("check", cwd=repository / "sub")
    assert mended.returncode == 0, mended.stdout + mended.stderr


@pytest.mark.slow
def test_the_file_that_init_writes_holds_and_a_second_run_costs_little(tmp_path: Path, edgeattn_cli: Cli) -> None:
    assert edgeattn_cli("check", "--init", cwd=tmp_path).returncode == 0
    first = edgeattn_cli("check", cwd=tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        again = edgeattn_cli("check", cwd=tmp_path)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert again.returncode == 0
        assert "unchanged" in again.stdout
    assert min(spent) < 3.0  # CPU seconds: other processes cannot take them from it
    accepted = edgeattn_cli("check", "--update", cwd=tmp_path)
    assert "wrote edgeattn.lock" in accepted.stdout
    assert edgeattn_cli("check", "--locked", cwd=tmp_path).returncode == 0
    # The same bytes come out of an empty cache: the lock holds on another machine of the same kind.
    shutil.rmtree(tmp_path / ".edgeattn")
    fresh = edgeattn_cli("check", "--locked", cwd=tmp_path, EDGEATTN_CACHE=str(tmp_path / "cache"))
    assert fresh.returncode == 0, fresh.stdout + fresh.stderr


def test_a_mistake_in_a_recipe_is_told_at_its_line(tmp_path: Path, edgeattn_cli: Cli) -> None:
    (tmp_path / "own.toml").write_text('name = "own"\ndescription = "x"\n\n[model]\nfactry = "net.py:Net"\n')
    (tmp_path / "edgeattn.toml").write_text('[models.own]\nmodel = "own.toml"\n')
    done = edgeattn_cli("check", "--format", "github", cwd=tmp_path)
    assert done.returncode == 1
    assert "::error file=own.toml,line=5,title=own onnx fp32%3A export::" in done.stdout


@pytest.mark.slow
def test_a_failure_that_was_mended_elsewhere_is_looked_at_again(tmp_path: Path, edgeattn_cli: Cli) -> None:
    """The file that fails is not among those that the model was built from when it was built last."""
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "edgeattn.toml").write_text('[models.fine]\nmodel = "net.py:Fine"\ninputs = ["x=1x8"]\n')
    assert edgeattn_cli("check", cwd=tmp_path).returncode == 0
    (tmp_path / "net.py").write_text("import helper\n" + NET)
    (tmp_path / "helper.py").write_text("raise RuntimeError\n")
    assert edgeattn_cli("check", cwd=tmp_path).returncode == 1
    (tmp_path / "helper.py").write_text("")
    mended = edgeattn_cli("check", cwd=tmp_path)
    assert mended.returncode == 0, mended.stdout + mended.stderr


@pytest.mark.parametrize(
    ("text", "words", "where"),
    [
        (None, "there is no file of checks", "edgeattn.toml"),
        ("[models.a]\nmodel = \n", "not TOML", "edgeattn.toml:2"),
        ('[models.a]\nmodel = "x"\ntarget = "onnx"\n', "targets", "edgeattn.toml:3"),
    ],
)
def test_a_file_that_cannot_be_used(
    text: str | None, words: str, where: str, tmp_path: Path, edgeattn_cli: Cli
) -> None:
    if text is not None:
        (tmp_path / "edgeattn.toml").write_text(text)
    done = edgeattn_cli("check", "--format", "github", cwd=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr
    assert where in done.stderr
    assert done.stdout.startswith("::error file=edgeattn.toml")
    assert not (tmp_path / ".edgeattn").exists()
