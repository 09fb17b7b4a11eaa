"""Where in the model's files a finding lies."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from edgeattn.capture import Program, capture
from edgeattn.lint import Finding
from edgeattn.lint.source import Sources, located

NET = """\
import torch
from torch import nn
from parts import Inner


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.inner = Inner()

    def forward(self, x):
        y = self.first(x)
        return torch.median(self.inner(y), -1).values


def build():
    return nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1)))
"""
PARTS = """\
from torch import nn


class Inner(nn.Module):
    def forward(self, x):
        z = x.cumsum(-1)
        return z + 1
"""


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model's file as ``models.build`` imports it."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "net.py").write_text(NET)
    (tmp_path / "models" / "parts.py").write_text(PARTS)
    monkeypatch.syspath_prepend(tmp_path / "models")
    spec = importlib.util.spec_from_file_location("edgeattn_guest_net", tmp_path / "models" / "net.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.delitem(sys.modules, "parts", raising=False)
    return module


def places(made: Program, factory: str, folder: Path, *findings: tuple[str, str]) -> list[tuple[str, int]]:
    asked = [Finding("r", "note", module, "w", detail, "m") for module, detail in findings]
    return [(f.file, f.line) for f in located(asked, made, Sources(factory, folder))]


def test_the_line_that_calls_a_module_or_an_operation(net: Any, tmp_path: Path) -> None:
    made = capture(net.Net().eval(), {"x": torch.randn(1, 3, 4, 4)}, ())
    for factory in ("models/net.py:Net", f"{tmp_path / 'models' / 'net.py'}:Net"):
        found = places(
            made, factory, tmp_path, ("first", "conv2d"), ("inner", "cumsum (1,)"), ("", "2 x median"), ("inner", "?")
        )
        assert found == [
            ("models/net.py", 13),
            ("models/parts.py", 6),
            ("models/net.py", 14),
            ("models/parts.py", 5),
        ]


def test_of_a_model_of_torchs_own_classes_the_factory(net: Any, tmp_path: Path) -> None:
    made = capture(net.build().eval(), {"x": torch.randn(1, 3, 4, 4)}, ())
    assert places(made, "models/net.py:build", tmp_path, ("0.0", "conv2d")) == [("models/net.py", 17)]
    assert places(made, "models/net.py:build", tmp_path, ("", "input x")) == [("", 0)]
    assert places(made, "elsewhere.py:build", tmp_path, ("0.0", "conv2d")) == [("", 0)]
    assert places(made, "edgeattn.models.fmvit:fmvit_s", tmp_path, ("0.0", "conv2d")) == [("", 0)]


def test_a_finding_of_an_older_manifest_is_read() -> None:
    old = {"rule": "r", "severity": "note", "module": "", "what": "w", "detail": "d", "mend": "m"}
    finding = Finding(**old)  # type: ignore[arg-type]
    assert (finding.evidence, finding.file, finding.line) == ("", "", 0)
    assert Finding(**finding.as_dict()) == finding
