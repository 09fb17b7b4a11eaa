"""``edgeattn lint``: findings of a model on a target, and the gate that an export ends at."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgeattn.core.errors import CheckFailed
from edgeattn.lint import Finding
from edgeattn.pipeline.context import Context, Result
from edgeattn.pipeline.export import make_job
from edgeattn.pipeline.stages import lower

Cli = Callable[..., subprocess.CompletedProcess[str]]

NET = """
from torch import nn

class Volume(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.MaxPool2d(2, dilation=2)
        self.second = nn.MaxPool2d(2, dilation=2)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(self.second(self.first(x)))
"""
WORDS = ("net.py:Volume", "-i", "x=1x3x16x16", "--target", "tflite")
OLD = ("--device", "raspberry-pi-3b-32bit")


@pytest.fixture
def net(tmp_path: Path) -> Path:
    """A folder with a model that TFLite warns of, and that tflite-runtime does not run."""
    (tmp_path / "net.py").write_text(NET)
    return tmp_path


def test_findings_are_shown_by_rule_with_modules_and_mend(edgeattn_cli: Cli, net: Path) -> None:
    done = edgeattn_cli("lint", *WORDS, cwd=net)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    heads = [line[:2] for line in lines if line[:1] in (["warning"], ["error"], ["note"])]
    assert heads == [["warning", "reduce-window"], ["warning", "batch-norm-left"]]
    for module in ("first", "second", "norm"):
        assert [line for line in lines if line[:1] == [module]], module
    assert [line[0] for line in lines if line].count("mend") == 2
    assert done.stdout.splitlines()[-1] == "tflite: 3 warnings"


def test_an_error_ends_it_after_the_table(edgeattn_cli: Cli, net: Path) -> None:
    done = edgeattn_cli("lint", *WORDS, *OLD, cwd=net)
    assert done.returncode == 1
    assert done.stdout.index("error reduce-window") < done.stdout.index("warning batch-norm-left")
    assert done.stdout.splitlines()[-1] == "tflite: 2 errors, 1 warning"
    assert "module first, rule reduce-window" in done.stderr
    assert "reduce-window in module second" in done.stderr


def test_json_has_every_finding_and_the_same_exit_code(edgeattn_cli: Cli, net: Path) -> None:
    for words, code in (((), 0), (OLD, 1)):
        done = edgeattn_cli("lint", *WORDS, *words, "--json", cwd=net)
        assert done.returncode == code
        shown = json.loads(done.stdout)
        found = {(f["rule"], f["module"]): f["severity"] for f in shown["findings"]}
        severity = "error" if code else "warning"
        assert found == {
            ("reduce-window", "first"): severity,
            ("reduce-window", "second"): severity,
            ("batch-norm-left", "norm"): "warning",
        }
        assert all(f["target"] == "tflite" and f["what"] and f["detail"] and f["mend"] for f in shown["findings"])
        assert shown["device"] == (words[1] if words else None)


def test_the_same_error_ends_an_export_before_anything_is_converted(edgeattn_cli: Cli, net: Path) -> None:
    cache = {"EDGEATTN_CACHE": str(net / "cache")}
    done = edgeattn_cli("export", *WORDS, *OLD, "--precision", "w8", cwd=net, **cache)
    assert done.returncode == 1
    assert "module first, rule reduce-window" in done.stderr
    finished = [line.split()[0] for line in done.stderr.splitlines() if line.endswith("MB peak")]
    assert finished == ["build", "reference", "reparameterize", "capture", "lint"]
    assert not list(net.glob("*.tflite.w8"))
    # What lint found is a result: it is there for the command, and not found anew.
    again = edgeattn_cli("lint", *WORDS, *OLD, cwd=net, **cache)
    assert again.returncode == 1
    assert again.stderr.count("cached") == 5


@pytest.mark.parametrize("severity", ["error", "warning"])
def test_the_gate_stands_at_the_head_of_the_conversion(severity: Any, tmp_path: Path) -> None:
    finding = Finding("a-rule", severity, "a.module", "a pattern", "a detail", "a mend")
    lint = Result(tmp_path, {"findings": [finding.as_dict()]})
    context = Context(make_job("fmvit-digits", target="null"), tmp_path, {"lint": lint})
    # There is nothing to convert: whatever else the stage begins with, it is a KeyError.
    with pytest.raises(CheckFailed if severity == "error" else KeyError) as caught:
        lower.run(context)
    assert severity == "warning" or "module a.module, rule a-rule" in str(caught.value)


@pytest.mark.parametrize("target", ["null", "onnx"])
def test_a_target_without_rules_finds_nothing(edgeattn_cli: Cli, net: Path, target: str) -> None:
    done = edgeattn_cli("lint", *WORDS[:-1], target, cwd=net)
    assert (done.returncode, done.stdout) == (0, f"{target}: nothing found\n")


def test_a_target_that_stands_for_two_is_looked_at_for_both(edgeattn_cli: Cli, net: Path) -> None:
    done = edgeattn_cli("lint", *WORDS[:-1], "rpi", cwd=net)
    assert done.returncode == 0, done.stderr
    assert "onnx: nothing found" in done.stdout
    assert "tflite: 3 warnings" in done.stdout


MASKED = """
import torch
from torch import nn

class Scores(nn.Module):
    def forward(self, x):
        scores = x @ x.transpose(-2, -1)
        return scores.masked_fill(scores > 0, -1e9).softmax(-1)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Scores()])

    def forward(self, x):
        return torch.median(self.blocks[0](x), -1).values
"""
MINE = """
[rules.mine]
severity = "note"
what = "a softmax"
evidence = "measured: by us"
mend = "none"
pattern = { op = "softmax" }
"""


def test_mends_rules_of_ones_own_and_sarif(edgeattn_cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "net.py").write_text(MASKED)
    (tmp_path / "mine.toml").write_text(MINE)
    words = ("sub/net.py:Net", "-i", "x=1x4x8", "--fix", "--rules", "mine.toml", "--sarif", "lint.sarif", "--json")
    done = edgeattn_cli("lint", *words, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "median: x.topk" in done.stderr
    shown = json.loads(done.stdout)
    found = {f["rule"]: (f["severity"], f["module"], f["file"], f["line"]) for f in shown["findings"]}
    assert found == {
        "unsupported-operator": ("error", "", "sub/net.py", 16),
        "mask-kept-wide": ("note", "blocks.0", "sub/net.py", 8),
        "mine": ("note", "blocks.0", "sub/net.py", 8),
    }
    (fix,) = shown["fixes"]
    assert (fix["rule"], fix["places"], fix["holds"], fix["applied"]) == ("mask-kept-wide", 1, True, False)
    (module,) = fix["modules"]
    assert module["module"] == "blocks.0"
    assert (list(module["before"]), list(module["after"])) == (
        ["masked_fill(value=-1000000000.0)"],
        ["masked_fill(value=-30000.0)"],
    )
    log = json.loads((tmp_path / "lint.sarif").read_text())
    places = [result["locations"][0]["physicalLocation"] for result in log["runs"][0]["results"]]
    assert {(p["artifactLocation"]["uri"], p["region"]["startLine"]) for p in places} == {
        ("sub/net.py", 16),
        ("sub/net.py", 8),
    }


def run(*words: str) -> Any:
    """The command in this process."""
    from click.testing import CliRunner

    from edgeattn.cli.lint import command

    return CliRunner().invoke(command, list(words))


def test_all_rules_are_listed(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(MINE)
    every = json.loads(run("--list", "--json", "--rules", str(tmp_path / "mine.toml")).output)["rules"]
    assert len(every) >= 45
    assert all(row["severity"] in ("error", "warning", "note") and row["evidence"] and row["mend"] for row in every)
    assert [row["from"] for row in every if row["rule"] == "mine"] == [str(tmp_path / "mine.toml")]
    some = json.loads(run("--list", "--json", "--target", "rpi").output)["rules"]
    assert {target for row in some for target in row["targets"]} >= {"onnx", "tflite"}
    assert all({"onnx", "tflite"} & set(row["targets"]) for row in some)
    shown = run("--list", "--target", "optical").output
    assert "strided-light" in shown
    assert shown.splitlines()[-1] == f"{sum('optical' in row['targets'] for row in every)} rules"


def test_a_list_takes_no_model_and_all_else_needs_one(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text(MINE.replace("op =", "opp ="))
    for words, what in (
        (("--list", "net.py:Net"), "a list of rules takes no model"),
        ((), "no model was given"),
        (("--list", "--target", "onx"), "unknown target"),
        (("fmvit-digits", "--rules", str(tmp_path / "bad.toml")), "rules is not valid"),
    ):
        assert run(*words).exception.what == what


def test_a_mend_that_changes_the_outputs_is_refused() -> None:
    from edgeattn.cli.lint import _gate_fixes
    from edgeattn.lint.fix import Fix

    held = Fix("a-rule", "a_mend", 1, {"m": ({"a": 1}, {"b": 1})}, 1e-7, 0, 2, False)
    _gate_fixes([held])
    for broken in (replace(held, worst=0.5), replace(held, nonfinite=1), replace(held, samples=0)):
        with pytest.raises(CheckFailed, match="mend a_mend changes the outputs"):
            _gate_fixes([held, broken])


def test_many_modules_are_counted_and_json_lists_them(edgeattn_cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def deep():\n    return nn.Sequential(*(nn.MaxPool2d(2, stride=1, dilation=2) for _ in range(15)))\n"
    )
    words = ("net.py:deep", "-i", "x=1x3x40x40", "--target", "tflite")
    shown = edgeattn_cli("lint", *words, cwd=tmp_path).stdout
    assert "and 3 more" in shown
    assert shown.endswith("tflite: 15 warnings\n")
    assert len(json.loads(edgeattn_cli("lint", *words, "--json", cwd=tmp_path).stdout)["findings"]) == 15
