"""Quantized values and compressed weights: each operation by its formula, and by coremltools' own inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from edgeattn.core.numerics import Array
from edgeattn.core.quiet import quiet
from edgeattn.targets.coreml.mil.registry import OPS
from tests.targets.coreml.harness import TARGETS, inferred, interpret, mb, types
from tests.targets.coreml.judging import agree, judgeable, numbers

FAMILY = (
    "constexpr_affine_dequantize",
    "constexpr_blockwise_shift_scale",
    "constexpr_cast",
    "constexpr_lut_to_dense",
    "constexpr_lut_to_sparse",
    "constexpr_sparse_blockwise_shift_scale",
    "constexpr_sparse_to_dense",
    "dequantize",
    "quantize",
)


def whole(seed: int, dtype: str, shape: tuple[int, ...]) -> Array:
    """Whole numbers over all of a type's range, of less than a byte too."""
    bits, signed = int("".join(filter(str.isdigit, dtype))), dtype.startswith("i")
    low = -(2 ** (bits - 1)) if signed else 0
    values = np.random.default_rng(seed).integers(low, low + 2**bits, shape)
    return values.astype(getattr(types, f"np_{dtype}_dtype") if bits < 8 else dtype)


def packed(values: Array, bits: int) -> Array:
    """The bits of each number, lowest first, in bytes filled from their lowest bit."""
    stream = "".join(f"{int(value):0{bits}b}"[::-1] for value in values.ravel())
    stream += "0" * (-len(stream) % 8)
    return np.array([int(stream[i : i + 8][::-1], 2) for i in range(0, len(stream), 8)], np.uint8)


def masked(seed: int, shape: tuple[int, ...]) -> Array:
    """A mask with ones and zeros."""
    return whole(seed, "uint1", shape)


def blocked(value: Array, shape: tuple[int, ...]) -> Array:
    """What a number of ``value`` is for each element of that shape: both are cut into the same blocks."""
    at = np.indices(shape)
    return value[tuple(at[i] * value.shape[i] // shape[i] for i in range(len(shape)))]


def shifted(data: Array, scale: Array, offset: Array | None = None) -> Array:
    less = 0.0 if offset is None else blocked(offset.astype(np.float64), data.shape)
    return (data.astype(np.float64) - less) * blocked(scale.astype(np.float64), data.shape)


def looked_up(indices: Array, lut: Array, vector_axis: int | None = None) -> Array:
    at, groups, length = np.indices(indices.shape), lut.shape[:-2], lut.shape[-1]
    entries = lut[(*(at[i] * groups[i] // indices.shape[i] for i in range(indices.ndim)), indices.astype(int))]
    if vector_axis is None:
        return entries[..., 0]
    axis = vector_axis % indices.ndim
    made = np.zeros([size * (length if i == axis else 1) for i, size in enumerate(indices.shape)], lut.dtype)
    for v in range(length):
        made[(slice(None),) * axis + (slice(v, None, length),)] = entries[..., v]
    return made


def along(value: Array, rank: int, axis: int | None) -> Array:
    shape = [1] * rank
    if axis is not None and value.ndim:
        shape[axis] = -1
    return value.astype(np.float64).reshape(shape)


def affine(quantized_data: Array, zero_point: Array, scale: Array, axis: int) -> Array:
    rank = quantized_data.ndim
    return (quantized_data.astype(np.float64) - along(zero_point, rank, axis)) * along(scale, rank, axis)


def dense(nonzero_data: Array, mask: Array, shape: Any = None) -> Array:
    bits = mask.ravel()
    if shape is not None:
        bits = np.array([mask[i // 8] >> (i % 8) & 1 for i in range(np.prod(shape))])
    values = iter(nonzero_data)
    return np.array([next(values) if bit else 0 for bit in bits]).reshape(mask.shape if shape is None else shape)


F16, F32 = "float16", "float32"
SHAPE = np.array([3, 2, 5], np.uint32)
MASKS = {shape: masked(sum(shape), shape) for shape in ((4, 6), (3, 2, 5), (2, 4, 3))}
#: Operations on constants by their version, with their arguments; coremltools infers the results of all of them.
CONSTANT: list[tuple[str, int, dict[str, Any]]] = [
    *(
        (
            "constexpr_affine_dequantize",
            16,
            {
                "quantized_data": whole(1, source, (4, 3, 2)),
                "zero_point": whole(2, source, point),
                "scale": numbers(3, step, kind),
                "axis": axis,
            },
        )
        for source, point, step, kind, axis in (
            ("int8", (4,), (4,), F32, 0),
            ("uint8", (3,), (), F16, 1),
            ("uint8", (), (2,), F32, -1),
            ("int8", (), (), F16, 0),
        )
    ),
    ("constexpr_cast", 16, {"source_val": numbers(1, (3, 4), F16), "output_dtype": "fp32"}),
    ("constexpr_cast", 18, {"source_val": numbers(1, (3, 4), F16), "output_dtype": "fp32"}),
    *(
        (
            "constexpr_lut_to_dense",
            # The form of iOS16 is iOS17's too, where the harness can give 8 bits out.
            16 if kind in (F16, F32) else 17,
            {
                "indices": packed(whole(bits, f"uint{bits}", (30,)), bits),
                "lut": numbers(1, (2**bits,), kind),
                "shape": SHAPE,
            },
        )
        for bits, kind in ((1, F32), (2, F16), (4, "int8"), (6, F32), (8, "uint8"))
    ),
    *(
        (
            "constexpr_lut_to_dense",
            18,
            {
                "indices": whole(bits, f"uint{bits}", shape),
                "lut": numbers(1, (*groups, 2**bits, vector), kind),
                **({} if axis is None else {"vector_axis": np.int32(axis)}),
            },
        )
        for bits, shape, groups, vector, axis, kind in (
            (1, (6, 4), (1, 1), 1, None, F32),
            (2, (6, 4), (2, 1), 1, None, F16),
            (3, (6, 4), (3, 2), 1, 0, F32),
            (4, (2, 4, 3), (1, 2, 3), 1, None, "uint8"),
            (6, (2, 4, 3), (1, 1, 1), 2, 0, F32),
            (2, (2, 4, 3), (2, 2, 1), 3, 1, F16),
            (8, (2, 4, 3), (1, 2, 1), 2, -1, "int8"),
            (4, (8,), (2,), 4, 0, F32),
        )
    ),
    *(
        (
            "constexpr_sparse_to_dense",
            16 if kind in (F16, F32) else 17,
            {
                "nonzero_data": numbers(1, (int(MASKS[3, 2, 5].sum()),), kind),
                "mask": packed(MASKS[3, 2, 5], 1),
                "shape": SHAPE,
            },
        )
        for kind in (F32, F16, "int8", "uint8")
    ),
    *(
        ("constexpr_sparse_to_dense", 18, {"nonzero_data": numbers(1, (int(mask.sum()),), kind), "mask": mask})
        for mask, kind in zip(MASKS.values(), (F32, F16, "int8"), strict=True)
    ),
    *(
        (
            "constexpr_blockwise_shift_scale",
            18,
            {
                "data": whole(1, source, (4, 6, 2)) if source != F32 else numbers(1, (4, 6, 2)),
                "scale": numbers(2, blocks, kind),
                **(
                    {}
                    if point is None
                    else {"offset": whole(3, point, blocks) if point != F16 else numbers(3, blocks, F16)}
                ),
            },
        )
        for source, blocks, kind, point in (
            ("int4", (4, 1, 1), F16, None),
            ("int4", (4, 3, 1), F32, "int4"),
            ("uint4", (2, 2, 2), F16, "uint4"),
            ("uint8", (1, 6, 1), F32, "uint8"),
            ("int8", (1, 1, 1), F16, "int8"),
            ("uint8", (4, 6, 2), F32, F16),
            (F32, (2, 1, 1), F32, None),
        )
    ),
]
EXACT: dict[str, Callable[..., Array]] = {
    "constexpr_affine_dequantize": affine,
    "constexpr_cast": lambda source_val, output_dtype: source_val,
    "constexpr_blockwise_shift_scale": shifted,
    "constexpr_sparse_to_dense": dense,
}


def exact(name: str, arguments: dict[str, Any]) -> Array:
    if name != "constexpr_lut_to_dense":
        return EXACT[name](**arguments)
    if "shape" not in arguments:
        return looked_up(**arguments)
    lut, bits = arguments["lut"], len(arguments["lut"]).bit_length() - 1
    stream = sum(int(byte) << (8 * i) for i, byte in enumerate(arguments["indices"]))
    return lut[[stream >> (bits * i) & (2**bits - 1) for i in range(30)]].reshape(SHAPE)


def materialized(build: Callable[[], Any], opset: int) -> Any:
    """What coremltools itself gives for operations on constants."""
    found: list[Any] = []

    def body(unused: Any) -> Any:
        made = build()
        found.append((made[0] if isinstance(made, list) else made).op.materialized_val_inference())
        return mb.identity(x=unused)

    with quiet():
        mb.program(input_specs=[mb.TensorSpec((1,), types.fp32)], opset_version=TARGETS[opset])(body)
    return found[0]


DUMMY = {"unused": np.zeros(1, np.float32)}


@pytest.mark.parametrize("index", range(len(CONSTANT)))
def test_operations_on_constants(index: int) -> None:
    name, opset, arguments = CONSTANT[index]
    found = interpret(lambda unused: getattr(mb, name)(**arguments), DUMMY, opset)
    judged = materialized(lambda: getattr(mb, name)(**arguments), opset)
    expected = exact(name, arguments)
    # One rounding to float16; coremltools rounds after each step.
    agree(found, [expected], str(judged.dtype))
    agree(found, [judged], str(judged.dtype), 2)


# Bits, groups of the tables, length of their vectors, the axis of those.
SPARSE_TABLES = [(1, (1, 1), 1, None), (2, (2, 3), 1, 0), (4, (1, 1), 2, 0), (3, (2, 1), 3, 1), (2, (1, 1), 2, -1)]


@pytest.mark.parametrize("kind", [F32, F16])
@pytest.mark.parametrize("case", SPARSE_TABLES)
def test_tables_of_what_is_not_zero(case: Any, kind: str) -> None:
    bits, groups, vector, axis = case
    mask = MASKS[4, 6]
    entries, lut = whole(2, f"uint{bits}", (int(mask.sum()),)), numbers(3, (*groups, 2**bits, vector), kind)
    given = {"indices_mask": mask, "indices_nonzero_data": entries, "lut": lut}
    given |= {} if axis is None else {"vector_axis": np.int32(axis)}

    def build(unused: Any) -> Any:
        spread, values = mb.constexpr_lut_to_sparse(**given)
        return mb.constexpr_sparse_to_dense(nonzero_data=values, mask=spread)

    wide = mask if axis is None else np.repeat(mask, vector, axis)
    values = looked_up(dense(entries, mask), lut, axis)
    found = interpret(build, DUMMY)
    agree(found, [np.where(wide, values, 0)], kind)
    judged_mask, judged = materialized(lambda: mb.constexpr_lut_to_sparse(**given), 18)
    agree(found, [dense(judged, judged_mask)], kind)


SPARSE_BLOCKS = [("int4", (4, 1), None, F16), ("uint4", (2, 3), "uint4", F32), ("int8", (1, 6), "int8", F16)]


@pytest.mark.parametrize("case", SPARSE_BLOCKS)
def test_blocks_of_what_is_not_zero(case: Any) -> None:
    source, blocks, point, kind = case
    mask = MASKS[4, 6]
    given = {
        "data_mask": mask,
        "nonzero_data": whole(2, source, (int(mask.sum()),)),
        "scale": numbers(3, blocks, kind),
        **({} if point is None else {"offset": whole(4, point, blocks)}),
    }

    def build(unused: Any) -> Any:
        same, values = mb.constexpr_sparse_blockwise_shift_scale(**given)
        return mb.constexpr_sparse_to_dense(nonzero_data=values, mask=same)

    found = interpret(build, DUMMY)
    values = shifted(dense(given["nonzero_data"], mask), given["scale"], given.get("offset"))
    agree(found, [np.where(mask, values, 0)], kind)
    _, judged = materialized(lambda: mb.constexpr_sparse_blockwise_shift_scale(**given), 18)
    agree(found, [dense(judged, mask)], kind, 2)


def test_a_table_of_quantized_entries() -> None:
    indices, lut = whole(1, "uint4", (6, 4)), whole(2, "int8", (2, 1, 16, 1))
    scale, mask = numbers(3, (6, 1)), MASKS[4, 6]
    small = whole(4, "int4", (int(mask.sum()),))

    def build(unused: Any) -> Any:
        entries = mb.constexpr_lut_to_dense(indices=indices, lut=lut)
        sparse = mb.constexpr_sparse_to_dense(nonzero_data=small, mask=mask)
        return (
            mb.constexpr_blockwise_shift_scale(data=entries, scale=scale),
            mb.constexpr_blockwise_shift_scale(data=sparse, scale=scale[:4]),
        )

    expected = [shifted(looked_up(indices, lut), scale), shifted(dense(small, mask), scale[:4])]
    agree(interpret(build, DUMMY), expected, F32)


# Shape, of the quantized type, the shape of scale and zero point (None: no zero point), axis.
QUANTIZE: list[tuple[tuple[int, ...], str, tuple[int, ...], bool, int | None]] = [
    ((40,), "int8", (), False, None),
    ((5, 8), "uint8", (), True, None),
    ((4, 3, 5), "int8", (4,), True, 0),
    ((4, 3, 5), "uint8", (3,), False, 1),
    ((2, 4, 3, 5), "uint8", (5,), True, -1),
]
#: All operations whose results coremltools infers in a test here.
JUDGED = {
    *(name for name, _, _ in CONSTANT),
    *("constexpr_lut_to_sparse", "constexpr_sparse_blockwise_shift_scale"),
    *("quantize", "dequantize"),
}


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("case", QUANTIZE)
def test_quantize_and_dequantize(case: Any, dtype: str) -> None:
    shape, target, vector, pointed, axis = case
    # Powers of two divide exactly: halves stay halves. A quarter of the numbers leaves the range.
    scale = (2.0 ** np.random.default_rng(1).integers(-4, 0, vector)).astype(dtype)
    point = whole(2, target, vector) if pointed else None
    steps = np.random.default_rng(3).integers(-400, 400, shape) / 2
    given = {"scale": scale, "axis": axis, "zero_point": point}
    feeds = {"x": (steps * along(scale, len(shape), axis)).astype(dtype)}

    def forth(x: Any) -> Any:
        return mb.quantize(input=x, output_dtype=target, **given)

    levels = np.rint(steps) + (0 if point is None else along(point, len(shape), axis))
    limits = np.iinfo(target)
    levels = np.clip(levels, limits.min, limits.max)
    found = interpret(forth, feeds, 17)
    agree(found, [levels], "int32")
    judged = inferred(forth, feeds, 17)
    assert judged is not None
    agree(found, judged, "int32")

    feeds = {"x": levels.astype(target)}
    found = interpret(lambda x: mb.dequantize(input=x, **given), feeds, 17)
    back = (levels - (0 if point is None else along(point, len(shape), axis))) * along(scale, len(shape), axis)
    agree(found, [back], dtype)
    agree(found, [materialized(lambda: mb.dequantize(input=feeds["x"], **given), 17)], dtype)


@pytest.mark.parametrize("mode", ["fp32acc", "fp32", "native"])
def test_a_constant_that_is_compressed_is_a_weight(mode: str) -> None:
    x, weight, scale = numbers(1, (3, 6), F16), whole(2, "int4", (4, 6)), numbers(3, (4, 2), F16)
    found = interpret(
        lambda x: mb.linear(x=x, weight=mb.constexpr_blockwise_shift_scale(data=weight, scale=scale)),
        {"x": x},
        18,
        mode,
    )
    agree(found, [x.astype(np.float64) @ shifted(weight, scale).T], F16, 4)


def test_a_cast_to_another_type_than_float32_is_refused() -> None:
    with pytest.raises(ValueError, match="constexpr_cast to fp16"):
        OPS["constexpr_cast"].function(torch.zeros(1), "fp16")


def test_all_that_coremltools_infers_is_judged() -> None:
    assert judgeable(FAMILY) == JUDGED
