"""cond and while_loop: which block runs, what it sees of the blocks around it, and what comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeattn.core.numerics import Array
from edgeattn.targets.coreml.mil.package import open_package
from edgeattn.targets.coreml.mil.program import Function
from tests.targets.coreml.harness import inferred, interpret, mb, save
from tests.targets.coreml.judging import agree, judgeable, numbers

FAMILY = ("cond", "while_loop")
#: Operations whose results coremltools infers too, in a test here.
JUDGED = ["cond"]

X = numbers(1, (2, 3))


def over(x: Any, bound: float) -> Any:
    """Whether the sum of x lies over the bound, as a scalar bool."""
    return mb.greater(x=mb.reduce_sum(x=x, axes=[0, 1], keep_dims=False), y=np.float32(bound))


@pytest.mark.parametrize("opset", [15, 16, 17, 18])
@pytest.mark.parametrize(("x", "taken"), [(np.abs(X), True), (-np.abs(X), False)])
def test_cond_runs_one_branch(x: Array, taken: bool, opset: int) -> None:
    def build(x: Any) -> Any:
        twice = mb.mul(x=x, y=np.float32(2))
        return mb.cond(
            pred=over(x, 0),
            _true_fn=lambda: (mb.add(x=twice, y=x), mb.sub(x=twice, y=x)),
            _false_fn=lambda: (mb.mul(x=twice, y=x), twice),
        )

    found = interpret(build, {"x": x}, opset)
    agree(found, [3 * x, x] if taken else [2 * x * x, 2 * x], "float32")


@pytest.mark.parametrize("taken", [False, True])
def test_cond_is_what_coremltools_infers(taken: bool) -> None:
    def build(x: Any) -> Any:
        return mb.cond(
            pred=np.bool_(taken), _true_fn=lambda: mb.add(x=x, y=x), _false_fn=lambda: mb.mul(x=x, y=np.float32(3))
        )

    found, judged = interpret(build, {"x": X}), inferred(build, {"x": X})
    assert judged is not None
    agree(found, judged, "float32")
    agree(found, [X * (2 if taken else 3)], "float32")


@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, 1), (-1, -1)])
def test_conds_nest_and_see_all_that_is_around(signs: tuple[int, int]) -> None:
    x, y = (np.abs(numbers(i, (2, 3))) * sign for i, sign in enumerate(signs))

    def build(x: Any, y: Any) -> Any:
        outer = mb.mul(x=x, y=np.float32(2))

        def inside() -> Any:
            middle = mb.add(x=outer, y=y)
            return mb.cond(
                pred=over(y, 0),
                _true_fn=lambda: mb.add(x=mb.mul(x=middle, y=outer), y=x),
                _false_fn=lambda: mb.sub(x=middle, y=x),
            )

        chosen = mb.cond(pred=over(x, 0), _true_fn=inside, _false_fn=lambda: mb.mul(x=outer, y=y))
        return mb.add(x=chosen, y=outer)

    outer, middle = 2 * x, 2 * x + y
    chosen = (middle * outer + x if signs[1] > 0 else middle - x) if signs[0] > 0 else outer * y
    agree(interpret(build, {"x": x, "y": y}), [chosen + outer], "float32")


@pytest.mark.parametrize("opset", [15, 18])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_while_loop_runs_as_often_as_its_condition_holds(count: int, opset: int) -> None:
    limit = np.array([count], np.int32)

    def build(x: Any, limit: Any) -> Any:
        shift = mb.mul(x=x, y=np.float32(0.5))
        return mb.while_loop(
            _cond=lambda i, a, b: mb.squeeze(x=mb.less(x=i, y=limit), axes=[0]),
            # What one variable was, the other becomes: none of them changes before all are computed.
            _body=lambda i, a, b: (mb.add(x=i, y=np.int32(1)), mb.add(x=b, y=shift), a),
            loop_vars=(np.array([0], np.int32), x, mb.mul(x=x, y=np.float32(3))),
        )

    a, b = X, 3 * X
    for _ in range(count):
        a, b = b + X * np.float32(0.5), a
    agree(interpret(build, {"x": X, "limit": limit}, opset), [limit, a, b], "float32", 2)


@pytest.mark.parametrize("rows", [1, 3])
def test_loops_nest_with_a_cond_in_them(rows: int) -> None:
    limit = np.array([rows], np.int32)

    def build(x: Any, limit: Any) -> Any:
        scale = mb.mul(x=x, y=np.float32(0.25))

        def inner(i: Any, total: Any) -> Any:
            def body(j: Any, part: Any) -> Any:
                more = mb.cond(
                    pred=mb.squeeze(x=mb.equal(x=j, y=i), axes=[0]),
                    _true_fn=lambda: mb.add(x=part, y=scale),
                    _false_fn=lambda: mb.sub(x=part, y=total),
                )
                return mb.add(x=j, y=np.int32(1)), more

            _, part = mb.while_loop(
                _cond=lambda j, part: mb.squeeze(x=mb.less_equal(x=j, y=i), axes=[0]),
                _body=body,
                loop_vars=(np.array([0], np.int32), total),
            )
            return mb.add(x=i, y=np.int32(1)), part

        return mb.while_loop(
            _cond=lambda i, total: mb.squeeze(x=mb.less(x=i, y=limit), axes=[0]),
            _body=inner,
            loop_vars=(np.array([0], np.int32), x),
        )

    total = X
    for i in range(rows):
        part = total
        for j in range(i + 1):
            part = part + X * np.float32(0.25) if i == j else part - total
        total = part
    agree(interpret(build, {"x": X, "limit": limit}), [limit, total], "float32", 4)


def test_a_value_that_only_a_loop_reads_lives_as_long_as_the_loop(tmp_path: Path) -> None:
    def build(x: Any, limit: Any) -> Any:
        kept = mb.mul(x=x, y=np.float32(2))
        _, total = mb.while_loop(
            _cond=lambda i, total: mb.squeeze(x=mb.less(x=i, y=limit), axes=[0]),
            _body=lambda i, total: (mb.add(x=i, y=np.int32(1)), mb.add(x=mb.mul(x=kept, y=kept), y=total)),
            loop_vars=(np.array([0], np.int32), x),
        )
        return total

    path = tmp_path / "loop.mlpackage"
    (name,) = save(build, {"x": X, "limit": np.array([2], np.int32)}, path)
    function, seen = Function(open_package(path)), []
    for count in (3, 0, 2):
        feeds = {"x": X, "limit": np.array([count], np.int32)}
        made = function.run(feeds, watch=lambda name, kind, value: seen.append(kind))
        agree([made[name]], [X + count * 4 * X * X], "float32", 2)
    # The watch sees what a loop computes, every time, and the loop's own results.
    assert seen.count("while_loop") == 3
    assert seen.count("mul") == 3 + 3 + 2


@pytest.mark.parametrize("mode", ["fp32", "fp32acc", "native"])
def test_a_block_may_give_a_constant(mode: str) -> None:
    fixed = numbers(5, (2, 3), "float16")

    def build(x: Any) -> Any:
        bound = mb.greater(x=mb.reduce_sum(x=x, axes=[0, 1], keep_dims=False), y=np.float16(0))
        return mb.cond(pred=bound, _true_fn=lambda: mb.identity(x=fixed), _false_fn=lambda: mb.identity(x=x))

    for x in (np.abs(X), -np.abs(X)):
        given = x.astype(np.float16)
        agree(interpret(build, {"x": given}, 16, mode), [fixed if x.sum() > 0 else given], "float16", 0)


def test_all_that_coremltools_infers_is_judged() -> None:
    assert judgeable(FAMILY) == set(JUDGED)
