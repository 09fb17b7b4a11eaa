"""Lists of tensors: written, read, gathered and scattered, in a row and in a loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from edgeattn.core.errors import CheckFailed
from edgeattn.targets.coreml.mil.registry import OPS
from tests.targets.coreml.harness import inferred, interpret, mb
from tests.targets.coreml.judging import agree, judgeable, numbers

FAMILY = ("make_list", "list_length", "list_write", "list_read", "list_gather", "list_scatter")
#: Operations whose results coremltools infers too, in a test here.
JUDGED = ["list_length"]

A, B = numbers(1, (2,)), numbers(2, (2,))


@pytest.mark.parametrize("opset", [15, 16, 17, 18])
@pytest.mark.parametrize(("dtype", "name"), [("float32", "fp32"), ("float16", "fp16"), ("int32", "int32")])
def test_a_list_is_a_value_that_grows(dtype: str, name: str, opset: int) -> None:
    opset = max(opset, 16) if dtype == "float16" else opset
    a, b, c = numbers(1, (2, 3), dtype), numbers(2, (2, 3), dtype), numbers(3, (2, 2, 3), dtype)

    def build(a: Any, b: Any, c: Any) -> Any:
        empty = mb.make_list(init_length=2, elem_shape=(2, 3), dtype=name)
        one = mb.list_write(ls=empty, index=0, value=a)
        longer = mb.list_write(ls=one, index=4, value=b)
        scattered = mb.list_scatter(ls=longer, indices=[2, 5], value=c)
        return (
            mb.list_read(ls=empty, index=0),
            mb.list_read(ls=one, index=0),
            mb.list_gather(ls=longer, indices=[4, 2, 0, 4]),
            mb.list_gather(ls=scattered, indices=[0, 1, 2, 3, 4, 5]),
            *(mb.list_length(ls=ls) for ls in (empty, one, longer, scattered)),
        )

    zeros = np.zeros_like(a)
    expected = [zeros, a, [b, zeros, a, b], [a, zeros, c[0], zeros, b, c[1]], 2, 2, 5, 6]
    agree(interpret(build, {"a": a, "b": b, "c": c}, opset), expected, dtype)


def test_indices_that_are_computed() -> None:
    def build(a: Any, i: Any) -> Any:
        place = mb.squeeze(x=i)
        ls = mb.list_write(ls=mb.make_list(elem_shape=(2,)), index=place, value=a)
        return mb.list_read(ls=ls, index=place), mb.list_gather(ls=ls, indices=i), mb.list_length(ls=ls)

    agree(interpret(build, {"a": A, "i": np.array([3], np.int32)}), [A, [A], 4], "float32")


@pytest.mark.parametrize("rounds", [0, 1, 4])
def test_a_loop_appends(rounds: int) -> None:
    def build(a: Any, n: Any) -> Any:
        def body(i: Any, ls: Any) -> Any:
            value = mb.mul(x=a, y=mb.cast(x=i, dtype="fp32"))
            return mb.add(x=i, y=np.int32(1)), mb.list_write(ls=ls, index=i, value=value)

        _, ls = mb.while_loop(
            _cond=lambda i, ls: mb.less(x=i, y=mb.squeeze(x=n)),
            _body=body,
            loop_vars=(np.int32(0), mb.make_list(init_length=1, elem_shape=(2,))),
        )
        length = mb.list_length(ls=ls)
        return mb.list_gather(ls=ls, indices=mb.range_1d(start=0, end=length, step=1)), length

    found = interpret(build, {"a": A, "n": np.array([rounds], np.int32)})
    agree(found, [np.outer(range(max(rounds, 1)), A), max(rounds, 1)], "float32")


def test_a_list_passes_through_identity() -> None:
    def build(a: Any) -> Any:
        ls = mb.list_write(ls=mb.make_list(elem_shape=(2,)), index=0, value=a)
        return mb.list_read(ls=mb.identity(x=ls), index=0)

    agree(interpret(build, {"a": A}), [A], "float32")


def test_a_shape_that_the_first_write_tells() -> None:
    empty = OPS["make_list"].function(call=None, elem_shape=["size"], init_length=2)
    with pytest.raises(ValueError, match="read before it is written"):
        OPS["list_read"].function(ls=empty, index=0)
    written = OPS["list_write"].function(ls=empty, index=1, value=torch.from_numpy(A))
    agree([OPS["list_read"].function(ls=written, index=i).numpy() for i in (0, 1)], [0 * A, A], "float32")
    assert empty == [None, None]


def test_elements_without_a_shape_cannot_be_gathered() -> None:
    def build(a: Any) -> Any:
        ls = mb.make_list(init_length=2, elem_shape=("size",))
        return mb.list_gather(ls=ls, indices=[0])

    with pytest.raises(CheckFailed, match="read before it is written"):
        interpret(build, {"a": A})


def test_zeros_have_the_type_of_the_list() -> None:
    """Among zeros of another type this number would not stay whole: float32 has 24 bits."""
    a = np.array([2**24 + 1], np.int32)

    def build(a: Any) -> Any:
        ls = mb.list_write(ls=mb.make_list(init_length=2, elem_shape=(1,), dtype="int32"), index=0, value=a)
        return mb.list_gather(ls=ls, indices=[0, 1])

    np.testing.assert_array_equal(interpret(build, {"a": a})[0], [[2**24 + 1], [0]])


def test_reading_beyond_the_end_is_refused() -> None:
    with pytest.raises(CheckFailed, match="cannot be computed"):
        interpret(
            lambda a: mb.list_read(ls=mb.list_write(ls=mb.make_list(elem_shape=(2,)), index=0, value=a), index=1),
            {"a": A},
        )


@pytest.mark.parametrize("length", [1, 3])
def test_the_length_is_what_coremltools_infers(length: int) -> None:
    def build(a: Any) -> Any:
        ls = mb.make_list(init_length=length, elem_shape=(2,), dynamic_length=False)
        return mb.list_length(ls=mb.list_write(ls=ls, index=0, value=a))

    judgement = inferred(build, {"a": A})
    assert judgement is not None
    agree(judgement, [length], "int32")
    agree(interpret(build, {"a": A}), judgement, "int32")


def test_all_that_coremltools_infers_is_judged() -> None:
    assert judgeable(FAMILY) == set(JUDGED)
