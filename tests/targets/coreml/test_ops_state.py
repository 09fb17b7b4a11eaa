"""States: what a run writes, the next one reads, and another state does not see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeattn.core.errors import UsageError
from edgeattn.core.quiet import quiet
from edgeattn.targets.coreml.mil.package import open_package
from edgeattn.targets.coreml.mil.program import Function
from tests.targets.coreml.harness import ct, mb, types
from tests.targets.coreml.judging import agree, numbers

SHAPE = (2, 3)


def package(path: Path, specs: list[Any], body: Any) -> None:
    with quiet():
        program = mb.program(input_specs=specs, opset_version=ct.target.iOS18)(body)
        model = ct.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=ct.target.iOS18,
            compute_precision=ct.precision.FLOAT32,
            pass_pipeline=ct.PassPipeline.EMPTY,
            skip_model_load=True,
        )
        model.save(str(path))


@pytest.fixture(scope="module")
def counter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adds x to what it has; gives what it had, and twice what it then has."""
    path = tmp_path_factory.mktemp("state") / "counter.mlpackage"

    def body(x: Any, total: Any) -> Any:
        old = mb.read_state(input=total)
        new = mb.coreml_update_state(state=total, value=mb.add(x=old, y=x))
        return mb.identity(x=old, name="old"), mb.mul(x=new, y=np.float16(2), name="double")

    package(path, [mb.TensorSpec(SHAPE, types.fp16), mb.StateTensorSpec(SHAPE, dtype=types.fp16)], body)
    return path


@pytest.mark.parametrize("mode", ["fp32", "fp32acc", "native"])
def test_a_state_goes_from_run_to_run(counter: Path, mode: str) -> None:
    function = Function(open_package(counter), mode=mode)
    state, other, total = function.make_state(), function.make_state(), np.zeros(SHAPE)
    for turn in range(4):
        x = numbers(turn, SHAPE, "float16")
        made = function.run({"x": x}, state)
        agree([made["old"]], [total], "float16")
        total = total + x
        agree([made["double"]], [2 * total], "float16", 2)
    agree([function.run({"x": x}, other)["old"]], [np.zeros(SHAPE)], "float16")


def test_what_a_run_gave_does_not_change_with_the_state(counter: Path) -> None:
    function = Function(open_package(counter))
    state, x = function.make_state(), numbers(1, SHAPE, "float16")
    first = function.run({"x": x}, state)
    kept = {name: value.copy() for name, value in first.items()}
    function.run({"x": x}, state)
    for name, value in first.items():
        np.testing.assert_array_equal(value, kept[name])


def test_a_model_with_states_wants_one(counter: Path) -> None:
    function = Function(open_package(counter))
    assert [(s.name, tuple(s.shape)) for s in function.states] == [("total", SHAPE)]
    with pytest.raises(UsageError, match="needs a state"):
        function.run({"x": numbers(1, SHAPE, "float16")})


def test_two_states_do_not_mix(tmp_path: Path) -> None:
    def body(x: Any, a: Any, b: Any) -> Any:
        old_a, old_b = mb.read_state(input=a), mb.read_state(input=b)
        # They change places, and x comes in.
        new_a = mb.coreml_update_state(state=a, value=mb.add(x=old_b, y=x))
        new_b = mb.coreml_update_state(state=b, value=old_a)
        return mb.identity(x=new_a, name="one"), mb.identity(x=new_b, name="two")

    path = tmp_path / "two.mlpackage"
    states = [mb.StateTensorSpec(SHAPE, dtype=types.fp16) for _ in range(2)]
    package(path, [mb.TensorSpec(SHAPE, types.fp16), *states], body)
    function = Function(open_package(path))
    state, a, b = function.make_state(), np.zeros(SHAPE), np.zeros(SHAPE)
    for turn in range(5):
        x = numbers(turn, SHAPE, "float16")
        made = function.run({"x": x}, state)
        a, b = b + x, a
        agree([made["one"], made["two"]], [a, b], "float16", 4)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_a_loop_writes_a_state_each_time(count: int, tmp_path: Path) -> None:
    def body(x: Any, limit: Any, total: Any) -> Any:
        def turn(i: Any, seen: Any) -> Any:
            new = mb.coreml_update_state(state=total, value=mb.add(x=mb.read_state(input=total), y=x))
            return mb.add(x=i, y=np.int32(1)), mb.add(x=seen, y=new)

        _, seen = mb.while_loop(
            _cond=lambda i, seen: mb.squeeze(x=mb.less(x=i, y=limit), axes=[0]),
            _body=turn,
            loop_vars=(np.array([0], np.int32), x),
        )
        return mb.identity(x=seen, name="seen"), mb.read_state(input=total, name="now")

    path = tmp_path / "loop.mlpackage"
    specs = [mb.TensorSpec(SHAPE, types.fp16), mb.TensorSpec((1,), types.int32)]
    package(path, [*specs, mb.StateTensorSpec(SHAPE, dtype=types.fp16)], body)
    function = Function(open_package(path))
    state, x, total = function.make_state(), numbers(1, SHAPE, "float16"), np.zeros(SHAPE)
    for _ in range(2):
        made, seen = function.run({"x": x, "limit": np.array([count], np.int32)}, state), x.astype(np.float64)
        for _ in range(count):
            total = total + x
            seen = seen + total
        agree([made["seen"], made["now"]], [seen, total], "float16", 8)


@pytest.mark.parametrize("mode", ["fp32acc", "native"])
def test_a_state_is_filled_and_looked_at(counter: Path, mode: str) -> None:
    function = Function(open_package(counter), mode=mode)
    state, held, x = function.make_state(), numbers(3, SHAPE, "float16"), numbers(4, SHAPE, "float16")
    state.write_state("total", held)
    seen = state.read_state("total")
    np.testing.assert_array_equal(seen, held)
    assert seen.dtype == np.float16
    agree([function.run({"x": x}, state)["old"]], [held], "float16")
    np.testing.assert_array_equal(seen, held)  # a copy
    agree([state.read_state("total")], [held.astype(np.float64) + x], "float16", 2)
    for wrong in (held[:1], held.astype(np.float32), np.full(SHAPE, np.nan, np.float16)):
        with pytest.raises(UsageError):
            state.write_state("total", wrong)
    state.reset()
    assert not state.read_state("total").any()
