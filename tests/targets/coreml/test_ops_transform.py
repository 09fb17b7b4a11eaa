"""Operations that change a tensor's shape or the order of its elements, against NumPy, PyTorch and coremltools."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Any

import numpy as np
import pytest
import torch

from edgeattn.core.errors import CheckFailed
from edgeattn.core.numerics import Array
from tests.targets.coreml.cases import ALL, FLOATS, NUMBERS, Case, check, defined_in, each
from tests.targets.coreml.harness import inferred, interpret, mb
from tests.targets.coreml.judging import agree, judgeable, numbers

FAMILY = defined_in("tensor_transformation")
#: coremltools has a method for it, which only says that it is not implemented.
NOT_INFERRED = {"reverse_sequence"}

# The shape of x, the shape asked for, the one that comes out, and the first iOS where it does.
RESHAPES: list[tuple[tuple[int, ...], list[int], tuple[int, ...], int]] = [
    ((2, 6), [3, 4], (3, 4), 15),
    ((2, 3, 4), [-1], (24,), 15),
    ((2, 3, 4), [4, -1, 2], (4, 3, 2), 15),
    ((2, 3, 4), [0, -1, 2], (2, 6, 2), 15),
    ((2, 3, 4), [0, 0, 0], (2, 3, 4), 18),
    ((6,), [1, 2, 1, 3], (1, 2, 1, 3), 16),
    ((2, 50), [1, 0, -1, 0], (1, 1, 2, 50), 17),
    ((2, 3, 4), [-1, 0], (6, 4), 17),
    ((2, 3, 4), [2, 0, 0], (2, 3, 4), 17),
    ((3, 4), [2, 0, 2, -1], (2, 1, 2, 3), 18),
]
EXPANDS: list[tuple[tuple[int, ...], list[int], tuple[int, ...]]] = [
    ((3,), [0], (1, 3)),
    ((3,), [-1], (3, 1)),
    ((2, 3), [1], (2, 1, 3)),
    ((2, 3), [-2, 0], (1, 2, 1, 3)),
    ((2, 3), [3, 1, 0], (1, 1, 2, 1, 3)),
]
SQUEEZES: list[tuple[tuple[int, ...], list[int] | None, tuple[int, ...]]] = [
    ((1, 3), [0], (3,)),
    ((1, 1, 3, 1), [-1], (1, 1, 3)),
    ((1, 1, 3, 1), [-3, 0], (3, 1)),
    ((1, 2, 1, 3), None, (2, 3)),
]
TURNS: list[tuple[tuple[int, ...], list[int]]] = [
    ((2, 3), [1, 0]),
    ((2, 3, 4), [2, 0, 1]),
    ((2, 3, 4), [-1, 0, -2]),
    ((1, 2, 3, 4), [0, 2, 3, 1]),
    ((2, 1, 3, 2, 2), [4, 1, 0, 3, 2]),
]
# The shape of x, begin, end and the other parameters.
SLICES: list[tuple[tuple[int, ...], list[int], list[int], dict[str, list[Any]]]] = [
    ((5,), [1], [4], {}),
    ((5, 4), [0, 0], [5, 4], {}),
    ((5, 4), [-4, -3], [-1, -1], {}),
    ((7, 6), [1, 0], [7, 5], {"stride": [2, 3]}),
    ((7, 6), [5, 4], [1, 0], {"stride": [-2, -1]}),
    ((7, 6), [-1, 5], [0, -6], {"stride": [-3, -2]}),
    ((7, 6), [3, 2], [0, 0], {"end_mask": [True, True]}),
    ((7, 6), [3, 2], [4, 5], {"begin_mask": [True, False]}),
    ((7, 6), [3, 2], [1, 1], {"stride": [-1, -2], "begin_mask": [True, True], "end_mask": [True, True]}),
    ((7, 6), [4, 3], [1, 0], {"stride": [-2, -1], "begin_mask": [True, False], "end_mask": [False, True]}),
    ((2, 3, 4), [1, 0, 0], [2, 3, 4], {"squeeze_mask": [True, False, False]}),
    ((2, 3, 4), [0, -1, 3], [0, 0, 0], {"squeeze_mask": [False, True, True], "end_mask": [True, False, False]}),
    (
        (2, 3, 4),
        [1, 2, 1],
        [0, 0, 9],
        {"squeeze_mask": [True, False, False], "begin_mask": [True, False, False], "stride": [1, -1, 2]},
    ),
    ((3, 1, 5), [2, 0, -9], [3, 1, 99], {}),
    ((4, 5), [2, 1], [2, 4], {}),
]
#: Slices in which nothing lies.
EMPTY: list[tuple[list[int], list[int], list[int]]] = [([1, 0], [3, 4], [-1, 1]), ([0, 2], [5, 2], [1, 1])]
SIZES: list[tuple[tuple[int, ...], list[int], list[int]]] = [
    ((5,), [1], [3]),
    ((5, 4), [0, 2], [5, -1]),
    ((5, 4), [-2, -3], [1, 2]),
    ((2, 3, 4), [1, 0, 1], [-1, -1, 3]),
]


def sliced(x: Array, begin: Sequence[int], end: Sequence[int], **masks: Sequence[Any]) -> tuple[Any, ...]:
    """The index by which NumPy takes the slice."""
    rank = x.ndim
    stride = masks.get("stride", [1] * rank)
    no_begin, no_end, pure = (masks.get(name, [False] * rank) for name in ("begin_mask", "end_mask", "squeeze_mask"))
    return tuple(
        (0 if no_begin[i] else begin[i])
        if pure[i]
        else slice(None if no_begin[i] else begin[i], None if no_end[i] else end[i], stride[i])
        for i in range(rank)
    )


def slice_by_index(x: Array, **given: Any) -> Array:
    return np.asarray(x[sliced(x, **given)])


def slice_update(x: Array, update: Array, **given: Any) -> Array:
    changed = x.copy()
    changed[sliced(x, **given)] = update
    return changed


def transpose(x: Array, perm: list[int]) -> Array:
    """The dimensions named, and asked for in their new order."""
    names = [i % x.ndim for i in perm]
    return np.asarray(np.einsum(x, list(range(x.ndim)), names))


def reverse(x: Array, axes: list[int] | None = None) -> Array:
    for axis in range(x.ndim) if axes is None else axes:
        x = np.take(x, range(x.shape[axis] - 1, -1, -1), axis)
    return x


def slice_by_size(x: Array, begin: Sequence[int], size: Sequence[int]) -> Array:
    for axis, (first, count) in enumerate(zip(begin, size, strict=True)):
        places = list(range(x.shape[axis]))
        x = np.take(x, places[first:] if count < 0 else places[first:][:count], axis)
    return x


def part(shape: tuple[int, ...], begin: Sequence[int], end: Sequence[int], masks: Any) -> tuple[int, ...]:
    """The shape of a slice."""
    return tuple(slice_by_index(np.empty(shape), begin=begin, end=end, **masks).shape)


JUDGED = [
    *(
        Case("reshape", opset, ALL, {"x": s}, {"shape": shape}, lambda x, shape, to=to: x.ravel().reshape(to))
        for s, shape, to, opset in RESHAPES
    ),
    Case(
        "reshape",
        17,
        "float32",
        {"x": numbers(1, (2, 6), "int8")},
        {"shape": np.array([3, -1], np.int16)},
        lambda x, shape: x.reshape(3, 4),
    ),
    *(
        Case("expand_dims", 15, ALL, {"x": s}, {"axes": axes}, lambda x, axes, to=to: x.ravel().reshape(to))
        for s, axes, to in EXPANDS
    ),
    *(
        Case("squeeze", 15, ALL, {"x": s}, {"axes": axes} if axes else {}, lambda x, to=to, **_: x.ravel().reshape(to))
        for s, axes, to in SQUEEZES
    ),
    *(Case("transpose", 15, ALL, {"x": s}, {"perm": perm}, transpose) for s, perm in TURNS),
    *(
        Case("reverse", 15, ALL, {"x": s}, {"axes": axes} if axes else {}, reverse)
        for s, axes in [((4,), [0]), ((2, 3, 4), [1, -1]), ((2, 3), None)]
    ),
    *(
        Case("slice_by_index", 15, dtype, {"x": s}, {"begin": b, "end": e, **masks}, slice_by_index)
        for (s, b, e, masks), dtype in zip(SLICES, cycle(ALL.split()[::-1]), strict=False)
    ),
    *(
        Case("slice_by_index", 15, FLOATS, {"x": (5, 4)}, {"begin": b, "end": e, "stride": stride}, slice_by_index)
        for b, e, stride in EMPTY
    ),
    Case(
        "slice_by_index",
        17,
        "float32",
        {"x": numbers(1, (5, 4), "int8")},
        {"begin": np.array([1, 0], np.int8), "end": np.array([4, 2], np.int8)},
        slice_by_index,
    ),
    *(
        Case(
            "slice_update",
            18,
            dtype,
            {"x": s, "update": part(s, b, e, masks)},
            {"begin": b, "end": e, **masks},
            slice_update,
        )
        for (s, b, e, masks), dtype in zip(SLICES, cycle(NUMBERS.split()), strict=False)
    ),
    *(Case("slice_by_size", 15, ALL, {"x": s}, {"begin": b, "size": n}, slice_by_size) for s, b, n in SIZES),
]


def blocks_of_channels(x: Array, block_size: int) -> Array:
    """Element by element: place (i, j) of a block comes from the (i b + j)-th part of the channels."""
    n, c, h, w = x.shape
    b = block_size
    made = np.zeros((n, c // b**2, h * b, w * b), x.dtype)
    for place in np.ndindex(made.shape):
        k, channel, y, z = place
        made[place] = x[k, (y % b * b + z % b) * (c // b**2) + channel, y // b, z // b]
    return made


def channels_of_blocks(x: Array, block_size: int) -> Array:
    """The other way round."""
    n, c, h, w = x.shape
    b = block_size
    made = np.zeros((n, c * b**2, h // b, w // b), x.dtype)
    for place in np.ndindex(x.shape):
        k, channel, y, z = place
        made[k, (y % b * b + z % b) * c + channel, y // b, z // b] = x[place]
    return made


def space_to_batch(x: Array, block_shape: list[int], paddings: list[list[int]]) -> Array:
    """One image for each place of a block, made of every b-th pixel."""
    x = np.pad(x, [(0, 0), (0, 0), *map(tuple, paddings)])
    down, right = block_shape
    return np.concatenate([x[:, :, i::down, j::right] for i in range(down) for j in range(right)])


def batch_to_space(x: Array, block_shape: list[int], crops: list[list[int]]) -> Array:
    """The images of a block's places put among each other."""
    down, right = block_shape
    parts = np.split(x, down * right)
    n, c, h, w = parts[0].shape
    made = np.zeros((n, c, h * down, w * right), x.dtype)
    for place, one in enumerate(parts):
        made[:, :, place // right :: down, place % right :: right] = one
    (top, bottom), (left, side) = crops
    return made[:, :, top : h * down - bottom, left : w * right - side]


def reverse_sequence(x: Array, lengths: Array, seq_axis: int, batch_axis: int) -> Array:
    made = x.copy()
    for place in np.ndindex(x.shape):
        source = list(place)
        length = lengths[place[batch_axis]]
        if place[seq_axis] < length:
            source[seq_axis] = length - 1 - place[seq_axis]
        made[place] = x[tuple(source)]
    return made


def sliding_windows(x: Array, axis: int, size: int, stride: int = 1) -> Array:
    axis %= x.ndim
    starts = range(0, x.shape[axis] - size + 1, stride)
    return np.stack([np.take(x, range(i, i + size), axis) for i in starts], axis)


def alike(begins: list[int], ends: list[int], end_masks: list[bool]) -> Any:
    """``reshape_like`` with tuples of constants."""
    return lambda x, like: mb.reshape_like(
        x=x,
        ref_tensors=(like, x) if len(begins) > 1 else (like,),
        begins=[np.int32(i) for i in begins],
        ends=[np.int32(i) for i in ends],
        end_masks=[np.bool_(i) for i in end_masks],
    )


def pixel_shuffle(x: Array, upscale_factor: int) -> Array:
    """Element by element: place (i, j) of a block comes from the (i f + j)-th channel of its own ones."""
    n, c, h, w = x.shape
    factor = upscale_factor
    made = np.zeros((n, c // factor**2, h * factor, w * factor), x.dtype)
    for place in np.ndindex(made.shape):
        k, channel, y, z = place
        made[place] = x[k, channel * factor**2 + y % factor * factor + z % factor, y // factor, z // factor]
    return made


def pixel_unshuffle(x: Array, downscale_factor: int) -> Array:
    """The other way round."""
    n, c, h, w = x.shape
    factor = int(downscale_factor)
    made = np.zeros((n, c * factor**2, h // factor, w // factor), x.dtype)
    for place in np.ndindex(x.shape):
        k, channel, y, z = place
        made[k, channel * factor**2 + y % factor * factor + z % factor, y // factor, z // factor] = x[place]
    return made


LENGTHS = np.array([3, 0, 1, 4], np.int32)
ALONE = [
    Case("squeeze", 15, ALL, {"x": (1, 2, 1)}, {"axes": [0, 1]}, lambda x, axes: x.reshape(2, 1)),
    Case("squeeze", 15, NUMBERS, {"x": (1, 1)}, {}, lambda x: x.reshape(())),
    Case("slice_by_size", 15, NUMBERS, {"x": (3, 2)}, {"begin": [1, 0], "size": [2, 0]}, slice_by_size),
    Case(
        "reshape",
        15,
        NUMBERS,
        {"x": (2, 3, 4), "shape": np.array([0, -1, 2], np.int32)},
        {},
        lambda x, shape: x.reshape(2, 6, 2),
    ),
    Case(
        "slice_by_index",
        15,
        NUMBERS,
        {"x": (5, 4), "begin": np.array([1, -2], np.int32), "end": np.array([4, 4], np.int32)},
        {},
        slice_by_index,
    ),
    Case(
        "slice_by_size",
        15,
        NUMBERS,
        {"x": (5, 4), "begin": np.array([1, -2], np.int32)},
        {"size": [2, -1]},
        slice_by_size,
    ),
    *(
        Case(
            "reverse_sequence",
            15,
            ALL,
            {"x": s, "lengths": LENGTHS},
            {"seq_axis": q, "batch_axis": b},
            reverse_sequence,
        )
        for s, q, b in [((4, 6), 1, 0), ((5, 4), 0, 1), ((2, 4, 3, 5), -1, 1), ((4, 2, 4), 2, -3)]
    ),
    *(
        Case("depth_to_space", 15, FLOATS, {"x": s}, {"block_size": b}, blocks_of_channels)
        for s, b in [((1, 4, 1, 1), 2), ((2, 12, 2, 3), 2), ((1, 18, 3, 2), 3)]
    ),
    *(
        Case("space_to_depth", 15, FLOATS, {"x": s}, {"block_size": b}, channels_of_blocks)
        for s, b in [((1, 1, 2, 2), 2), ((2, 3, 4, 6), 2), ((1, 2, 3, 6), 3)]
    ),
    *(
        Case("space_to_batch", 15, FLOATS, {"x": s}, {"block_shape": b, "paddings": p}, space_to_batch)
        for s, b, p in [((2, 1, 2, 4), [2, 2], [[0, 0], [2, 0]]), ((1, 3, 5, 4), [3, 2], [[0, 1], [1, 1]])]
    ),
    *(
        Case("batch_to_space", 15, FLOATS, {"x": s}, {"block_shape": b, "crops": c}, batch_to_space)
        for s, b, c in [((8, 1, 1, 3), [2, 2], [[0, 0], [2, 0]]), ((12, 2, 2, 3), [3, 2], [[1, 2], [0, 1]])]
    ),
    *(
        Case("pixel_shuffle", 15, FLOATS, {"x": s}, {"upscale_factor": f}, pixel_shuffle)
        for s, f in [((1, 4, 2, 3), 2), ((2, 18, 1, 2), 3)]
    ),
    *(
        Case("pixel_unshuffle", 16, FLOATS, {"x": s}, {"downscale_factor": np.uint32(f)}, pixel_unshuffle)
        for s, f in [((1, 2, 4, 6), 2), ((2, 1, 3, 9), 3)]
    ),
    *(
        Case("sliding_windows", 15, NUMBERS, {"x": s}, {"axis": axis, "size": n, **step}, sliding_windows)
        for s, axis, n, step in [((7,), 0, 3, {}), ((2, 8, 3), 1, 4, {"stride": 2}), ((2, 3, 9), -1, 2, {"stride": 3})]
    ),
    *(
        Case(
            "reshape_like",
            opset,
            NUMBERS,
            {"x": s, "like": like},
            {},
            lambda x, like, to=to: x.reshape(to),
            alike(*how),
        )
        for opset, s, like, to, how in [
            (16, (6,), (2, 3), (2, 3), ([0], [0], [True])),
            (17, (4, 6), (2, 2, 6), (2, 2, 6), ([0], [3], [False])),
            (18, (2, 3), (9, 2, 3), (2, 3), ([1], [0], [True])),
            (16, (2, 6), (2, 1, 5), (2, 1, 6), ([0, 1], [2, 0], [False, True])),
        ]
    ),
]


@each(JUDGED)
def test_as_defined_and_as_inferred(case: Case, dtype: str) -> None:
    check(case, dtype, judged=True)


@each(ALONE)
def test_as_defined(case: Case, dtype: str) -> None:
    check(case, dtype, judged=False)


def test_what_coremltools_infers_wrongly_is_not_followed() -> None:
    x = numbers(1, (3, 2))
    judgement = inferred(lambda x: mb.slice_by_size(x=x, begin=[1, 0], size=[2, 0]), {"x": x})
    assert judgement is not None
    assert judgement[0].shape == (2, 2)  # its own type inference says (2, 0), as a size of 0 should


def test_pytorch_shuffles_pixels_the_same_way() -> None:
    x, y = torch.from_numpy(numbers(1, (2, 8, 3, 2))), torch.from_numpy(numbers(2, (2, 2, 4, 6)))
    agree(
        [pixel_shuffle(x.numpy(), 2), pixel_unshuffle(y.numpy(), 2)],
        [torch.nn.PixelShuffle(2)(x).numpy(), torch.nn.PixelUnshuffle(2)(y).numpy()],
        "float32",
    )


@pytest.mark.parametrize("opset", [15, 16])
def test_a_0_of_reshape_needs_a_dimension_before_ios17(opset: int) -> None:
    with pytest.raises(CheckFailed, match="cannot be computed"):
        interpret(
            lambda x, shape: mb.reshape(x=x, shape=shape),
            {"x": numbers(1, (2, 6)), "shape": np.array([2, 3, 2, 0], np.int32)},
            opset,
        )


def test_an_update_leaves_its_source_alone() -> None:
    x, update = numbers(1, (3, 4)), numbers(2, (1, 2))
    found = interpret(
        lambda x, update: (mb.slice_update(x=x, update=update, begin=[1, 1], end=[2, 3]), x), {"x": x, "update": update}
    )
    agree(found, [slice_update(x, update, begin=[1, 1], end=[2, 3]), x], "float32")


@pytest.mark.parametrize("begin", [3, 4])
def test_an_update_beyond_the_end_is_an_error(begin: int) -> None:
    """Where it begins is computed, and not known before it runs; not even a slice of nothing is passed over."""
    feeds = {"x": numbers(1, (1, 4, 3)), "update": numbers(2, (1, 2, 3)), "at": np.array([begin], np.int32)}

    def build(x: Any, update: Any, at: Any) -> Any:
        zero, end = np.array([0], np.int32), mb.add(x=at, y=np.array([2], np.int32))
        limits = (mb.concat(values=[zero, place, zero], axis=0) for place in (at, end))
        masks = {"begin_mask": [True, False, True], "end_mask": [True, False, True]}
        return mb.slice_update(x=x, update=update, **dict(zip(("begin", "end"), limits, strict=True)), **masks)

    with pytest.raises(CheckFailed, match="slice of"):
        interpret(build, feeds)
    feeds["at"] -= begin - 2
    wanted = np.concatenate([feeds["x"][:, :2], feeds["update"]], axis=1)
    agree(interpret(build, feeds), [wanted], "float32")


def test_every_operation_is_tested_and_judged_where_it_can_be() -> None:
    assert {case.op for case in JUDGED} == judgeable(FAMILY) - NOT_INFERRED
    assert {case.op for case in JUDGED + ALONE} == FAMILY
    for name in NOT_INFERRED:
        case = next(case for case in ALONE if case.op == name)
        assert inferred(case.built, case.arrays("float32")) is None
