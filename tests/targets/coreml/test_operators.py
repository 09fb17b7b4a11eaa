"""What the interpreter covers, and the page that says so."""

from __future__ import annotations

import importlib

from edgeattn.targets.coreml.mil.registry import OPS
from tests.conftest import ROOT

operators = importlib.import_module("examples.mil_operators")


def test_all_that_a_torch_model_can_become_is_covered() -> None:
    assert operators.from_pytorch() <= set(OPS)
    assert {"cond", "while_loop", "read_state", "write_state"} <= set(OPS)


def test_nothing_is_covered_that_no_package_holds() -> None:
    assert set(OPS) <= set(operators.known())


def test_the_page_is_what_the_script_writes() -> None:
    assert (ROOT / "docs" / "coreml-operators.md").read_text() == operators.table()
