"""Safe mends on captured programs, what they change, and the proof."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from edgeattn import targets
from edgeattn.lint.books import every
from edgeattn.lint.fix import Fix, find, fix
from tests.lint.test_rules import TOKENS, X, do, pair, program


def fixed(function: Callable[..., Any], x: Tensor, name: str, target: str = "coreml") -> Fix | None:
    feeds = [{"in0": x.numpy()}, {"in0": torch.randn_like(x).numpy()}]
    return fix(program(do(function, x)), "a-rule", name, target, {"main": feeds})


MENDS: list[tuple[str, Callable[..., Any], bool]] = [
    ("low_constant", lambda x: x.masked_fill(x > 0, -1e9).softmax(-1), False),
    ("attention_scale", lambda x: F.scaled_dot_product_attention(x, x, x, scale=0.3), False),
    ("attention_scale", lambda x: F.scaled_dot_product_attention(x, x, x, scale=8**-0.5), False),
    ("gqa", lambda x: F.scaled_dot_product_attention(x, x[:, :2], x[:, :2], enable_gqa=True), True),
    ("rms_norm", lambda x: F.rms_norm(x * 400, (8,)), True),
]


@pytest.mark.parametrize(("name", "function", "applied"), MENDS)
def test_a_mend_leaves_the_outputs_as_they_are(name: str, function: Callable[..., Any], applied: bool) -> None:
    done = fixed(function, X, name)
    assert done is not None
    assert done.holds
    assert (done.places, done.samples, done.applied) == (1, 2, applied)
    assert any(before for before, _ in done.modules.values()), "what goes is shown"
    assert json.loads(json.dumps(done.as_dict()))["holds"] is True


def test_what_a_mend_changes_is_shown_by_module() -> None:
    done = fixed(lambda x: F.scaled_dot_product_attention(x, x, x, scale=0.25 * 8**-0.5), X, "attention_scale")
    assert done is not None
    ((before, after),) = done.modules.values()
    assert [name for name in before if name.startswith("scaled_dot_product_attention(")] == list(before)
    assert sorted(name.partition("(")[0] for name in after) == ["mul", "scaled_dot_product_attention"]


def test_a_mend_that_changes_the_outputs_does_not_hold() -> None:
    """A constant that no softmax follows is no mask."""
    done = fixed(lambda x: x.masked_fill(x > 0, -1e9), TOKENS, "low_constant")
    assert done is not None
    assert done.worst > 0.5
    assert not done.holds
    assert not Fix("r", "m", 1, {}, 0.0, 0, 0, False).holds, "nothing was tried"


def test_there_is_nothing_to_mend() -> None:
    assert fixed(torch.sin, TOKENS, "low_constant") is None


def test_every_fix_that_a_rule_names_mends_the_model_that_the_rule_is_met_by() -> None:
    for _, name, held, rule in every(targets.names()):
        for target in held if rule.fix else ():
            mend, _ = find(rule.fix, target)
            made, _ = pair(name if rule.targets else f"{target}:{name}")
            graph = made.entries["main"].graph.run_decompositions({}).graph_module
            # The first case of attention-not-fused is written out; what has a scale is mended above.
            assert mend(graph, "fp16") >= (name != "attention-not-fused"), name
