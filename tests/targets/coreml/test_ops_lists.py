"""Lists of tensors: what is written is read, nothing changes in place, and they grow."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgeattn.core.errors import CheckFailed
from edgeattn.core.numerics import Array
from edgeattn.targets.coreml.mil.registry import OPS
from tests.targets.coreml.harness import inferred, interpret, mb
from tests.targets.coreml.judging import judgeable, numbers

FAMILY = ("make_list", "list_length", "list_write", "list_read", "list_gather", "list_scatter")
JUDGED = ["list_length"]
DTYPES = {"float32": "fp32", "float16": "fp16", "int32": "int32"}
SHAPES: list[tuple[int, ...]] = [(1,), (3,), (2, 3), (1, 2, 3)]


def test_the_family_is_whole() -> None:
    assert set(FAMILY) == {name for name in OPS if "list" in name}
    assert set(JUDGED) == judgeable(FAMILY)


@pytest.mark.parametrize("opset", [15, 18])
@pytest.mark.parametrize("length", [1, 3, 7])
def test_length_of_a_fixed_list(length: int, opset: int) -> None:
    def build(**feeds: Any) -> Any:
        return mb.list_length(ls=mb.make_list(init_length=length, dynamic_length=False, elem_shape=(2,)))

    (found,) = interpret(build, {"unused": np.zeros(1, np.float32)}, opset)
    judgement = inferred(build, {}, opset)
    assert judgement is not None
    assert int(found) == int(judgement[0]) == length


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_elements_are_written_and_read(shape: tuple[int, ...], dtype: str) -> None:
    a, b = numbers(1, shape, dtype), numbers(2, shape, dtype)

    def build(a: Any, b: Any) -> Any:
        ls = mb.make_list(init_length=3, elem_shape=shape, dtype=DTYPES[dtype])
        ls = mb.list_write(ls=mb.list_write(ls=ls, index=2, value=a), index=0, value=b)
        return [mb.list_read(ls=ls, index=i) for i in range(3)] + [mb.list_gather(ls=ls, indices=[2, 1, 0, 2])]

    first, second, third, packed = interpret(build, {"a": a, "b": b}, 16)
    np.testing.assert_array_equal(first, b)
    np.testing.assert_array_equal(second, np.zeros(shape))
    np.testing.assert_array_equal(third, a)
    np.testing.assert_array_equal(packed, np.stack([a, np.zeros(shape, a.dtype), b, a]))


def test_a_list_that_was_written_to_is_another_one() -> None:
    """As a value: both branches start from the same list."""
    x = np.array([1.0, 2.0], np.float32)

    def build(x: Any) -> Any:
        ls = mb.make_list(init_length=2, elem_shape=(2,))
        left = mb.list_write(ls=ls, index=0, value=x)
        right = mb.list_scatter(ls=left, indices=[1], value=mb.expand_dims(x=mb.mul(x=x, y=2.0), axes=[0]))
        return [mb.list_gather(ls=one, indices=[0, 1]) for one in (ls, left, right)]

    untouched, left, right = interpret(build, {"x": x})
    np.testing.assert_array_equal(untouched, [[0, 0], [0, 0]])
    np.testing.assert_array_equal(left, [[1, 2], [0, 0]])
    np.testing.assert_array_equal(right, [[1, 2], [2, 4]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_scattered_elements_lie_at_their_indices(dtype: str) -> None:
    values, indices = numbers(4, (4, 2, 3), dtype), np.array([5, 0, 2, 3], np.int32)

    def build(values: Any, indices: Any) -> Any:
        ls = mb.make_list(init_length=6, elem_shape=(2, 3), dtype=DTYPES[dtype])
        ls = mb.list_scatter(ls=ls, indices=indices, value=values)
        return mb.list_gather(ls=ls, indices=list(range(6)))

    (found,) = interpret(build, {"values": values, "indices": indices}, 16)
    wanted = np.zeros((6, 2, 3), dtype)
    wanted[indices] = values
    np.testing.assert_array_equal(found, wanted)


def grown(x: Any, index: int) -> Any:
    """Length and elements of a list of one element after two elements were written from ``index`` on."""
    ls = mb.list_write(ls=mb.make_list(init_length=1, elem_shape=(2,)), index=0, value=mb.gather(x=x, indices=0))
    ls = mb.list_scatter(ls=ls, indices=[index + 1, index], value=x)
    return mb.list_length(ls=ls), mb.list_gather(ls=ls, indices=list(range(index + 2)))


@pytest.mark.parametrize("index", [0, 1, 3])
def test_a_list_grows_with_zeros_up_to_what_is_written(index: int) -> None:
    x = numbers(6, (2, 2))
    length, found = interpret(lambda x: grown(x, index), {"x": x})
    wanted = np.zeros((index + 2, 2), np.float32)
    wanted[0], wanted[index + 1], wanted[index] = x[0], x[0], x[1]
    assert int(length) == index + 2
    np.testing.assert_array_equal(found, wanted)


def looped(x: Any, count: int) -> Any:
    """Squares of the rows of x, written and read back in a loop, with what the loop counted."""

    def holds(i: Any, ls: Any) -> Any:
        return mb.less(x=i, y=count)

    def body(i: Any, ls: Any) -> Any:
        row = mb.gather(x=x, indices=i, axis=0)
        return mb.add(x=i, y=1), mb.list_write(ls=ls, index=i, value=mb.mul(x=row, y=row))

    ls = mb.make_list(init_length=1, elem_shape=(3,))
    i, ls = mb.while_loop(_cond=holds, _body=body, loop_vars=(0, ls))
    return mb.list_gather(ls=ls, indices=list(range(count))), mb.expand_dims(x=i, axes=[0]), mb.list_length(ls=ls)


@pytest.mark.parametrize("count", [1, 4])
def test_a_loop_carries_a_list(count: int) -> None:
    x: Array = numbers(8, (count, 3))
    rows, i, length = interpret(lambda x: looped(x, count), {"x": x})
    np.testing.assert_allclose(rows, x**2, rtol=1e-6)
    assert i == length == count


def test_a_shape_that_the_first_write_tells() -> None:
    x = numbers(9, (2, 3))

    def build(x: Any) -> Any:
        ls = mb.make_list(init_length=2, elem_shape=(2, "width"))
        return mb.list_gather(ls=mb.list_write(ls=ls, index=1, value=x), indices=[0, 1])

    (found,) = interpret(build, {"x": x})
    np.testing.assert_array_equal(found, np.stack([np.zeros((2, 3), np.float32), x]))


@pytest.mark.parametrize("op", ["list_read", "list_gather"])
def test_an_element_of_no_shape_cannot_be_read(op: str) -> None:
    def build(x: Any) -> Any:
        ls = mb.make_list(init_length=2, elem_shape=("height",))
        return mb.list_read(ls=ls, index=0) if op == "list_read" else mb.list_gather(ls=ls, indices=[0])

    with pytest.raises(CheckFailed, match="read before it is written"):
        interpret(build, {"x": np.zeros(1, np.float32)})


@pytest.mark.parametrize("op", ["list_read", "list_gather"])
def test_an_element_beyond_the_end_cannot_be_read(op: str) -> None:
    def build(x: Any) -> Any:
        ls = mb.make_list(init_length=2, elem_shape=(2,))
        return mb.list_read(ls=ls, index=2) if op == "list_read" else mb.list_gather(ls=ls, indices=[2])

    with pytest.raises(CheckFailed, match=r"out of (range|bounds)"):
        interpret(build, {"x": np.zeros(1, np.float32)})
