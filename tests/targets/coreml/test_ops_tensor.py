"""Operations that make, order and join tensors, against their definitions and against what coremltools infers."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from edgeattn.core.numerics import Array
from edgeattn.targets.coreml.mil.registry import OPS
from tests.targets.coreml.cases import ALL, FLOATS, NUMBERS, Case, check, defined_in, each, like
from tests.targets.coreml.harness import inferred, interpret, mb
from tests.targets.coreml.judging import agree, judgeable

FAMILY = defined_in("tensor_operation")
FEW = np.array([[0.0, 2.0, 0.0], [0.0, 0.0, -1.0]], np.float32)
#: All different, so that there is one order only.
MIXED = np.random.default_rng(5).permutation(24).reshape(2, 3, 4) - 9
ORDERED = [MIXED.astype(dtype) for dtype in ("float32", "float16", "int32")]
#: Equal values in every row.
TIES = np.array([[1, 3, 1, 3, 2], [2, 2, 2, 0, 0]], np.float32)


def band_part(x: Array, lower: int, upper: int) -> Array:
    """x where m - n <= lower and n - m <= upper, as far as they are not negative."""
    made = np.zeros_like(x)
    for m, n in product(range(x.shape[-2]), range(x.shape[-1])):
        if (lower < 0 or m - n <= lower) and (upper < 0 or n - m <= upper):
            made[..., m, n] = x[..., m, n]
    return made


def cumsum(x: Array, axis: int = 0, exclusive: bool = False, reverse: bool = False) -> Array:
    """Sums of the elements before (reverse: after) each place, and of it unless exclusive."""
    rows = np.moveaxis(x.astype(np.float64), axis, 0)
    own = 0 if exclusive else 1
    sums = [rows[i + 1 - own :].sum(0) if reverse else rows[: i + own].sum(0) for i in range(len(rows))]
    return np.moveaxis(np.stack(sums), 0, axis)


def argsort(x: Array, axis: int = -1, ascending: bool = False) -> Array:
    """Places in sorted order, equal values in theirs."""
    rows = np.moveaxis(x.astype(np.float64) * (1 if ascending else -1), axis, -1)
    flat = rows.reshape(-1, rows.shape[-1])
    places = [sorted(range(len(row)), key=lambda i, row=row: (row[i], i)) for row in flat]
    return np.moveaxis(np.array(places).reshape(rows.shape), -1, axis)


def topk(x: Array, k: int = 1, axis: int = -1, ascending: bool = False, **others: Any) -> Any:
    """The first k of the sorted values, and their places."""
    places = np.take(argsort(x, axis, ascending), range(k), axis)
    values = np.take_along_axis(x, places, axis)
    return (values, places) if others.get("return_indices", True) else values


def pad(x: Array, pad: list[int], mode: str = "constant", value: float = 0.0) -> Array:
    """Padded by NumPy."""
    pairs = [(0, 0)] * (x.ndim - len(pad) // 2) + list(zip(pad[::2], pad[1::2], strict=True))
    if mode == "constant":
        return np.pad(x, pairs, constant_values=value)
    return np.pad(x, pairs, "edge") if mode == "replicate" else np.pad(x, pairs, "reflect")


def one_hot(indices: Array, one_hot_vector_size: int, axis: int = -1, on_value: Any = 1, off_value: Any = 0) -> Array:
    """Vectors of a unit matrix."""
    vectors = np.full((*indices.shape, one_hot_vector_size), off_value)
    for place in np.ndindex(indices.shape):
        if 0 <= indices[place] < one_hot_vector_size:
            vectors[(*place, indices[place])] = on_value
    return np.moveaxis(vectors, -1, axis)


def padded(x: Any, pad: list[int], mode: str, value: float) -> Any:
    return mb.pad(x=x, pad=pad, mode=mode, constant_val=like(x, value))


def joined(op: str) -> Any:
    return lambda axis, **values: getattr(mb, op)(values=list(values.values()), axis=axis)


def filled(shape: tuple[int, ...], value: Any) -> Array:
    return np.full(shape, value)


PAIRS = [((3, 5), -1, -1), ((4, 4), 0, -1), ((2, 5, 3), -1, 0), ((1, 2, 3, 4), 0, 0), ((4, 3), 1, 2), ((5, 5), 2, -1)]
SUMS = [((5,), 0), ((2, 3, 4), 1), ((2, 3, 4), -1), ((4, 1, 2), 0)]
# The shape of x, pad, mode, value.
PADS: list[tuple[tuple[int, ...], list[int], str, float]] = [
    ((4,), [2, 1], "constant", 0.0),
    ((2, 3), [0, 1, 2, 0], "constant", 1.5),
    ((2, 3, 4), [1, 2], "constant", -2.0),
    ((1, 2, 3, 4), [1, 0, 0, 1, 2, 2, 3, 1], "constant", 0.0),
    ((4,), [3, 2], "reflect", 0.0),
    ((2, 3, 4), [1, 2, 3, 0], "reflect", 7.0),
    ((1, 2, 3, 4), [0, 0, 1, 1, 2, 1, 3, 3], "reflect", 0.0),
    ((4,), [4, 1], "replicate", 0.0),
    ((2, 3, 4), [0, 2, 3, 1, 1, 4], "replicate", 7.0),
    ((1, 1, 3, 4, 2), [1, 2, 0, 1], "replicate", 0.0),
]
RANGES = [
    *((np.int32(a), np.int32(b), np.int32(c)) for a, b, c in [(0, 5, 1), (-3, 8, 4), (9, -2, -3)]),
    *(
        (np.float32(a), np.float32(b), np.float32(c))
        for a, b, c in [(0, 0.3, 0.1), (0, 1, 0.1), (-1.5, 2, 0.25), (3, 0.5, -1), (0, 0.7, 0.1)]
    ),
]
JOINS: list[tuple[list[tuple[int, ...]], int]] = [
    ([(2,), (3,), (1,)], 0),
    ([(2, 3, 1), (2, 3, 4)], -1),
    ([(1, 2, 2), (3, 2, 2), (2, 2, 2)], -3),
    ([(2, 3)], 1),
]
STACKS: list[tuple[tuple[int, ...], int, int]] = [((3,), 2, 0), ((2, 3), 3, 1), ((2, 3), 2, -1), ((2, 1, 3), 4, -3)]
SPLITS: list[tuple[tuple[int, ...], int, dict[str, Any]]] = [
    ((6,), 0, {"num_splits": 3}),
    ((2, 4, 3), 1, {"num_splits": 2}),
    ((2, 4, 3), -2, {"split_sizes": [1, 3]}),
    ((5, 2), 0, {"num_splits": 3, "split_sizes": [2, 2, 1]}),
    ((2, 4), -1, {"num_splits": 4}),
]


def split(x: Array, axis: int, num_splits: int | None = None, split_sizes: list[int] | None = None) -> tuple[Any, ...]:
    ends = np.cumsum(split_sizes or [x.shape[axis] // (num_splits or 1)] * (num_splits or 1))
    starts = [0, *ends[:-1]]
    return tuple(np.take(x, range(a, b), axis) for a, b in zip(starts, ends, strict=True))


def feeds_of(shapes: list[tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"x{place}": shape for place, shape in enumerate(shapes)}


JUDGED = [
    *(Case("band_part", 15, ALL, {"x": s}, {"lower": a, "upper": b}, band_part) for s, a, b in PAIRS),
    *(
        Case("cumsum", 15, NUMBERS, {"x": s}, {"axis": axis, "reverse": r}, cumsum, factor=4)
        for (s, axis), r in product(SUMS, [False, True])
    ),
    Case("cumsum", 15, NUMBERS, {"x": (3, 2)}, {}, cumsum),
    *(
        Case("fill", 16, "float32", {}, {"shape": (2, 1, 3), "value": value}, filled)
        for value in (np.float32(1.25), np.int32(-7), np.bool_(True), np.float16(0.5))
    ),
    Case("fill", 15, "float32", {}, {"shape": (2,)}, lambda shape: [0, 0]),
    *(
        Case("fill_like", 16, ALL, {"ref_tensor": (2, 3)}, {"value": v}, lambda ref_tensor, value: [[value] * 3] * 2)
        for v in (np.float32(1.25), np.int32(-7), np.bool_(True))
    ),
    *(
        Case("non_zero", 16, "float32", {"x": x}, {}, lambda x: [i for i in np.ndindex(x.shape) if x[i]])
        for x in (FEW, FEW.astype(np.int32), FEW[0], FEW != 0, FEW.reshape(1, 3, 2), FEW.astype(np.float16))
    ),
    *(
        Case("pad", 15, FLOATS, {"x": shape}, {"pad": p, "mode": mode, "value": value}, pad, padded)
        for shape, p, mode, value in PADS
    ),
    *(
        Case(
            "range_1d",
            15,
            "float32",
            {},
            {"start": a, "end": b, "step": c},
            lambda start, end, step: [start + i * step for i in range(math.ceil((end - start) / step))],
        )
        for a, b, c in RANGES
    ),
    *(
        Case("tile", 15, ALL, {"x": s}, {"reps": reps}, lambda x, reps: np.tile(x, reps))
        for s, reps in [((3,), [2]), ((2, 3), [1, 3]), ((2, 1, 3), [2, 4, 1])]
    ),
    *(
        Case("argsort", 16, "float32", {"x": x}, {"axis": axis, "ascending": up}, argsort)
        for x, axis, up in product(ORDERED, (0, 1, -1), (False, True))
    ),
    Case("argsort", 15, "float32", {"x": ORDERED[0]}, {}, argsort),
    *(
        Case("topk", 16 + place % 3, "float32", {"x": x}, {"k": k, "axis": axis, "ascending": up}, topk)
        for place, (x, (k, axis), up) in enumerate(product(ORDERED, [(1, 0), (2, 1), (4, -1)], (False, True)))
    ),
    Case("topk", 15, "float32", {"x": ORDERED[0]}, {}, topk),
    Case("topk", 16, "float32", {"x": ORDERED[0]}, {"k": 3, "sort": True, "return_indices": False}, topk),
    Case("topk", 17, "float32", {"x": MIXED.astype(np.int8)}, {"k": np.int8(2), "ascending": True}, topk),
    Case("topk", 17, "float32", {"x": ORDERED[2]}, {"k": np.int16(3), "output_indices_dtype": "uint16"}, topk),
    *(
        Case("flatten2d", 15, ALL, {"x": s}, {"axis": axis}, lambda x, axis, shape=to: x.ravel().reshape(shape))
        for s, axis, to in [
            ((4, 3), -1, (4, 3)),
            ((2, 3, 2), -1, (6, 2)),
            ((5, 5, 2), 1, (5, 10)),
            ((2, 3, 4, 5), 2, (6, 20)),
        ]
    ),
    *(Case("shape", 15, ALL, {"x": s}, {}, lambda x: list(x.shape)) for s in [(4,), (2, 3), (1, 2, 3, 4, 5)]),
    *(
        Case(
            "concat",
            15,
            ALL,
            feeds_of(s),
            {"axis": axis},
            lambda axis, **v: np.concatenate([*v.values()], axis),
            joined("concat"),
        )
        for s, axis in JOINS
    ),
    Case(
        "concat",
        15,
        NUMBERS,
        {"x": (3,)},
        {"axis": 0},
        lambda axis, x: x[::-1],
        lambda axis, x: mb.concat(values=[mb.gather(x=x, indices=np.int32(i)) for i in (2, 1, 0)], axis=axis),
    ),
    *(
        Case(
            "stack",
            15,
            ALL,
            feeds_of([s] * count),
            {"axis": axis},
            lambda axis, **v: np.stack([*v.values()], axis),
            joined("stack"),
        )
        for s, count, axis in STACKS
    ),
    *(Case("split", 15, ALL, {"x": s}, {"axis": axis, **given}, split) for s, axis, given in SPLITS),
    *(Case("identity", 15, ALL, {"x": s}, {}, lambda x: x) for s in [(3,), (2, 1, 3)]),
]
HOT = np.array([[1, 0, 3], [5, 2, -1]], np.int32)
#: What coremltools infers no values of, or wrong ones.
ALONE = [
    *(
        Case("cumsum", 15, NUMBERS, {"x": s}, {"axis": axis, "exclusive": True, "reverse": r}, cumsum, factor=4)
        for (s, axis), r in product(SUMS, [False, True])
    ),
    Case(
        "range_1d",
        15,
        "float32",
        {"start": np.array([2], np.int32)},
        {},
        lambda start: [2, 1, 0],
        lambda start: mb.range_1d(start=mb.squeeze(x=start), end=-1, step=-1),
    ),
    *(
        Case("one_hot", 15, "float32", {"indices": HOT}, {"one_hot_vector_size": 4, "axis": axis, **given}, one_hot)
        for axis, given in [
            (-1, {}),
            (0, {}),
            (1, {"on_value": np.float32(2.5), "off_value": np.float32(-1)}),
            (2, {"on_value": np.int32(7), "off_value": np.int32(1)}),
            (-3, {"on_value": np.bool_(False), "off_value": np.bool_(True)}),
        ]
    ),
    Case("one_hot", 15, "float32", {"indices": HOT[0]}, {"one_hot_vector_size": 6}, one_hot),
    *(
        Case("topk", 17, "float32", {"x": (MIXED + 9).astype(dtype)}, {"k": 2, "axis": 1}, topk)
        for dtype in ("uint8", "int16")
    ),
    *(
        Case("flatten2d", 15, ALL, {"x": s}, {"axis": axis}, lambda x, axis, shape=to: x.ravel().reshape(shape))
        for s, axis, to in [((3,), -1, (1, 3)), ((3,), 1, (3, 1)), ((2, 3), 0, (1, 6))]
    ),
    *(
        Case(
            op,
            15,
            NUMBERS,
            {"x": (1,)},
            {"axis": 0},
            lambda x, axis: [x[0]] * 3,
            lambda x, axis, op=op: getattr(mb, op)(values=[mb.squeeze(x=x)] * 3, axis=axis),
        )
        for op in ("concat", "stack")
    ),
    Case("topk", 15, FLOATS, {"x": TIES}, {"k": 4}, topk),
    Case("argsort", 15, FLOATS, {"x": TIES}, {}, argsort),
    Case(
        "concat",
        15,
        ALL,
        feeds_of([(2, 3)] * 3),
        {"axis": 0},
        lambda axis, x0, x1, x2: np.array([x0[0], x1[0], x2[0], x0[1], x1[1], x2[1]]),
        lambda axis, **v: mb.concat(values=list(v.values()), axis=axis, interleave=True),
    ),
    Case(
        "concat",
        15,
        ALL,
        feeds_of([(2, 2, 1)] * 2),
        {"axis": -2},
        lambda axis, x0, x1: np.array([[a[0], b[0], a[1], b[1]] for a, b in zip(x0, x1, strict=True)]),
        lambda axis, **v: mb.concat(values=list(v.values()), axis=axis, interleave=True),
    ),
]


@each(JUDGED)
def test_as_defined_and_as_inferred(case: Case, dtype: str) -> None:
    check(case, dtype, judged=True)


@each(ALONE)
def test_as_defined(case: Case, dtype: str) -> None:
    check(case, dtype, judged=False)


@pytest.mark.parametrize(
    ("feed", "build", "wrong"),
    [
        (FEW, lambda x: mb.concat(values=[x, x], axis=1, interleave=True), np.concatenate([FEW, FEW], 1)),
        (np.array([0, 3], np.uint8), lambda x: mb.topk(x=x, return_indices=False), [0]),
    ],
)
def test_what_coremltools_infers_wrongly_is_not_followed(feed: Array, build: Any, wrong: Any) -> None:
    judgement = inferred(build, {"x": feed}, 17)
    assert judgement is not None
    np.testing.assert_array_equal(judgement[0], wrong)
    assert not np.array_equal(interpret(build, {"x": feed}, 17)[0], wrong)


@pytest.mark.parametrize("ascending", [False, True])
def test_topk_of_all(ascending: bool) -> None:
    # coremltools cannot write a package in which all are asked for: it declares a dimension of -1.
    values, places = OPS["topk"].function(x=torch.from_numpy(ORDERED[0]), k=-1, axis=1, ascending=ascending)
    agree([values.numpy(), places.numpy()], list(topk(ORDERED[0], 3, 1, ascending)), "float32")


def overlap(one: Array, other: Array) -> float:
    """Intersection over union of (x, y, width, height)."""
    sides = [
        min(one[i] + one[i + 2] / 2, other[i] + other[i + 2] / 2)
        - max(one[i] - one[i + 2] / 2, other[i] - other[i + 2] / 2)
        for i in (0, 1)
    ]
    shared = max(sides[0], 0) * max(sides[1], 0)
    union = one[2] * one[3] + other[2] * other[3] - shared
    return float(shared / union) if union > 0 else 0.0


def suppress(boxes: Array, scores: Array, iou: float, least: float, most: int, per_class: bool) -> list[int]:
    """Boxes from the best to the worst, without those that a better one that stays overlaps too much."""
    order = sorted(range(len(boxes)), key=lambda i: -scores[i].max())
    stay: list[int] = []
    for i in order:
        rivals = [k for k in stay if not per_class or scores[k].argmax() == scores[i].argmax()]
        if scores[i].max() >= least and all(overlap(boxes[i], boxes[k]) <= iou for k in rivals):
            stay.append(i)
    return stay[:most] or order[:1]


def scene(dtype: str, classes: int) -> tuple[Array, Array]:
    """Boxes (2, 20, 4) that often overlap, and their scores (2, 20, classes), which all differ."""
    rng = np.random.default_rng(classes)
    boxes = np.concatenate([rng.uniform(0, 10, (2, 20, 2)), rng.uniform(0, 6, (2, 20, 2))], -1)
    boxes[:, :2] = 0  # two empty boxes at the same place, of which none suppresses the other
    return boxes.astype(dtype), (rng.permutation(40 * classes).reshape(2, 20, classes) - 20).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("opset", [15, 16, 17, 18])
@pytest.mark.parametrize(
    ("classes", "iou", "least", "most", "per_class"),
    [
        (1, 0.3, -1000, 20, False),
        (3, 0.1, 5, 6, False),
        (3, 0.2, 10, 20, True),
        (4, 0.05, -1000, 9, True),
        (2, 0.5, 1000, 4, False),
    ],
)
def test_non_maximum_suppression(
    opset: int, dtype: str, classes: int, iou: float, least: float, most: int, per_class: bool
) -> None:
    opset = max(opset, 16) if dtype == "float16" else opset
    boxes, scores = scene(dtype, classes)
    turned = opset >= 17
    order = (0, 2, 1) if turned else (0, 1, 2)

    def build(boxes: Any, scores: Any) -> Any:
        limit = {} if turned else {"score_threshold": like(boxes, least)}
        given = {"iou_threshold": like(boxes, iou), "max_boxes": most, "per_class_suppression": per_class}
        return mb.non_maximum_suppression(boxes=boxes, scores=scores, **given, **limit)

    found = interpret(build, {"boxes": boxes.transpose(order), "scores": scores.transpose(order)}, opset)
    kept, points = np.zeros((2, most, 4)), np.zeros((2, most, classes))
    places, counts = np.full((2, most), -1), np.zeros(2)
    for n in range(2):
        stay = suppress(boxes[n].astype(float), scores[n], iou, -math.inf if turned else least, most, per_class)
        kept[n, : len(stay)], points[n, : len(stay)], places[n, : len(stay)] = boxes[n][stay], scores[n][stay], stay
        counts[n] = len(stay)
    expected = [kept.transpose(order), points.transpose(order), places, *([] if turned else [counts])]
    agree(found, expected, dtype)


def test_every_operation_is_tested_and_judged_where_it_can_be() -> None:
    assert {case.op for case in JUDGED} == judgeable(FAMILY)
    assert {case.op for case in JUDGED + ALONE} | {"non_maximum_suppression"} == FAMILY
