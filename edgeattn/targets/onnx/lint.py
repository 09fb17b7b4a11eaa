"""ONNX's lint: operations without a form. Its other rules are among the shared ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeattn.lint import Finding
from edgeattn.lint.operators import unsupported
from edgeattn.targets.onnx_graph.lint import unknown

if TYPE_CHECKING:
    from edgeattn.capture import Program


def lint(program: Program) -> list[Finding]:
    """Findings in the captured program, before any conversion."""
    return unsupported(program, "onnx", unknown)
