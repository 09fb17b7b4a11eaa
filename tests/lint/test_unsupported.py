"""Operations without a form: all at once, and none that a converter takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgeattn.core.errors import CheckFailed
from edgeattn.lint import gate
from edgeattn.lint.operators import NotAsked, Operators, doubtful, unsupported
from edgeattn.targets.coreml.lint import _unknown as coreml
from edgeattn.targets.onnx_graph.lint import unknown as onnx
from edgeattn.targets.tflite.lint import _unknown as tflite
from tests.lint.test_rules import SIN, X, do, program


class Usual(nn.Module):
    """Operations that every converter takes, in many forms, and one that none does."""

    def __init__(self, odd: bool) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Hardswish(), nn.MaxPool2d(2))
        self.norm = nn.LayerNorm(8)
        self.heads = nn.Linear(8, 24)
        self.odd = odd

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.norm(self.first(x).flatten(2).transpose(1, 2))
        q, k, v = self.heads(tokens).chunk(3, -1)
        y = F.gelu(F.scaled_dot_product_attention(q, k, v)).mean(1)
        return torch.median(y, -1).values if self.odd else y.softmax(-1)


@pytest.mark.parametrize("ask", [onnx, coreml, tflite], ids=["onnx", "coreml", "tflite"])
def test_no_operation_is_reported_that_the_converter_takes(ask: Callable[..., Any]) -> None:
    """Also of batch norms and reshapes, which are decomposed first, beside an operation that it does not know."""
    assert ask(program((Usual(False), (X,))).entries["main"]) == []
    assert [node.name for _, node in ask(program((Usual(True), (X,))).entries["main"])] == ["median"]


def test_all_operations_at_once_with_modules_and_what_to_write() -> None:
    made = program(do(lambda x: torch.median(x, -1).values + torch.erfinv(x).sum(-1) + torch.erfinv(x).sum(-1)))
    entry = made.entries["main"]
    (found,) = unsupported(
        made, "onnx", lambda e: [("", n) for n in e.graph.graph.nodes if "sum" not in n.name and n.args]
    )
    assert "median" in found.detail
    assert "2 x erfinv" in found.detail
    assert found.severity == "error"
    assert "x.topk" in found.mend
    with pytest.raises(CheckFailed, match="no form for"):
        gate([found])
    assert {node.name for _, node in doubtful(entry, ())} >= {"median", "erfinv"}


class Branch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.median(x, -1, keepdim=True).values


class Branched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = Branch()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda y: self.branch(y), lambda y: y * 2, (x,))


@pytest.mark.parametrize(("target", "ask"), [("onnx", onnx), ("coreml", coreml), ("tflite", tflite)])
def test_operations_inside_of_a_branch_are_found(target: str, ask: Any) -> None:
    found = unsupported(program((Branched(), (torch.ones(1, 8),))), target, ask)
    assert [one for one in found if "median" in one.detail]
    assert {one.severity for one in found} == {"error"}


def test_where_a_converter_cannot_be_asked_what_failed_is_a_warning() -> None:
    def ask(entry: Any) -> Any:
        raise NotAsked("its decompositions raise ValueError: 7")

    assert "median" in Operators.load().fails["onnx"]
    made = program(do(lambda x: torch.median(x, -1).values.sin()))
    (found,) = unsupported(made, "onnx", ask)
    assert (found.severity, found.detail.partition(" ")[0]) == ("warning", "median")
    assert "ValueError: 7; measured with" in found.detail
    assert "onnxscript" in found.detail
    assert unsupported(program(SIN), "onnx", ask) == []


def test_an_entry_without_a_question_leaves_the_others_findings_errors() -> None:
    """A decoder's second entry may be the same graph."""
    made = program(do(lambda x: torch.median(x, -1).values))
    made.entries["again"] = made.entries["main"]
    (found,) = unsupported(made, "onnx", onnx)
    assert (found.severity, found.detail) == ("error", "median")


@pytest.mark.parametrize(
    ("ask", "broken"),
    [
        (onnx, "torch.onnx._internal.exporter._fx_passes.decompose_with_registry"),
        (coreml, "edgeattn.targets.coreml.lower.prepare"),
        (tflite, "litert_torch.fx_infra.safe_run_decompositions"),
    ],
)
def test_a_decomposition_that_raises_is_named(ask: Any, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise LookupError("no rule\nfor it")

    entry = program(SIN).entries["main"]
    ask(entry)
    monkeypatch.setattr(broken, fail)
    with pytest.raises(NotAsked, match=r"^its decompositions raise LookupError: no rule$"):
        ask(entry)


def test_a_graph_of_known_operations_is_not_asked_about() -> None:
    def ask(entry: Any) -> Any:
        raise AssertionError("asked")

    names = Operators.load().known["onnx"]
    assert "aten.gelu.default" in names
    assert unsupported(program(do(torch.nn.functional.gelu)), "onnx", ask) == []
    with pytest.raises(AssertionError, match="asked"):
        unsupported(program(do(lambda x: torch.median(x, -1).values)), "onnx", ask)
